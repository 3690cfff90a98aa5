"""What is known of a published architecture: how its configs and the names of its weights stand to ours.

their config --settings--> our fields      our config --describe--> their config      rules: which tensor is made of which
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mmpt.config import BlocksConfig, ModelConfig
from mmpt.model.convert.rules import ByKeyHead, Rule
from mmpt.model.convert.settings import Settings, Theirs


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a checkpoint that goes into one part of our model, and can do so alone."""

    into: str  # what of ours, as lines and messages say it
    has: Callable[[ModelConfig], bool]  # whether a model of ours has that part
    fields: tuple[str, ...]  # beginnings of the fields of ours that must agree
    rules: Callable[[ModelConfig], tuple[Rule, ...]]  # called where `has` holds alone
    scope: re.Pattern[str]  # names of theirs that belong here: one that no rule knows is refused


@dataclass(frozen=True, kw_only=True, eq=False)
class Architecture:
    name: str
    settings: Callable[[Theirs], Settings]
    describe: Callable[[ModelConfig], dict[str, Any]] | None  # None: there is no export
    parts: Mapping[str, Part]  # by the place in our config where an `init` stands for it alone, or a name of its own
    renames: tuple[tuple[re.Pattern[str], str], ...] = ()  # from other spellings of the same names
    ignored: re.Pattern[str] = re.compile(r"(?!)")  # buffers in older files, which hold no weights
    repeated: Mapping[str, str] = field(default_factory=dict)  # names that repeat another's tensor, where a file has them
    computed: Mapping[str, Callable[[int, int], Tensor]] = field(default_factory=dict)  # tables that ours computes, by shape

    def rename(self, name: str) -> str:
        for pattern, replacement in self.renames:
            name = pattern.sub(replacement, name)
        return name

    def rules(self, config: ModelConfig) -> tuple[Rule, ...]:
        """Of all parts that a model has."""
        return tuple(rule for part in self.parts.values() if part.has(config) for rule in part.rules(config))


def qkv_rules(config: BlocksConfig, theirs: Mapping[str, tuple[str | None, ...]]) -> tuple[Rule, ...]:
    """Of one layer's `attention.qkv`: by kind, weight or bias, their names of queries, keys and values, or of all in one."""
    rows = config.dim, config.kv_heads * config.head_dim, config.kv_heads * config.head_dim
    form = ByKeyHead(config.kv_heads, rows)
    return tuple(
        Rule(ours=(f"attention.qkv.{kind}",), theirs=names, form=form, their_rows=rows if len(names) == 3 else ())
        for kind, names in theirs.items()
    )


def of_layers(config: BlocksConfig, rules: tuple[Rule, ...], ours: str, theirs: str) -> tuple[Rule, ...]:
    """The rules of one layer, for every layer; `ours` and `theirs` are prefixes in which {} stands for its number."""
    return tuple(rule.within(ours.format(layer), theirs.format(layer)) for layer in range(config.layers) for rule in rules)
