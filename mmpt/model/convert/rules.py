"""Which of our tensors is made of which of theirs: tables that read in both directions, to the byte.

theirs (by name) --join--> one tensor --split--> ours (by name), and back the same way

Nearly every rule has one name on either side. Rows are joined where one side keeps together what the other keeps apart:
queries, keys and values; all experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


class Form(Protocol):
    """How one joined tensor of theirs stands to one joined tensor of ours. `ours` undoes `theirs`, and the other way round."""

    def ours(self, theirs: Tensor) -> Tensor: ...

    def theirs(self, ours: Tensor) -> Tensor: ...


class AsItIs:
    def ours(self, theirs: Tensor) -> Tensor:
        return theirs

    theirs = ours


AS_IT_IS = AsItIs()


class Transposed:
    """(in, out), as open_clip's projections are, and (out, in), as of a linear layer."""

    def ours(self, theirs: Tensor) -> Tensor:
        return theirs.mT

    theirs = ours


class Scalar:
    """() and (1,): a parameter without axes cannot be sharded."""

    def ours(self, theirs: Tensor) -> Tensor:
        return theirs[None]

    def theirs(self, ours: Tensor) -> Tensor:
        return ours[0]


class OneRow:
    """(1, dim), the only one of several possible, and (dim,)."""

    def ours(self, theirs: Tensor) -> Tensor:
        return theirs[0]

    def theirs(self, ours: Tensor) -> Tensor:
        return ours[None]


@dataclass(frozen=True)
class Patches:
    """A convolution over whole patches, (dim, channel, row, column), and a linear layer over (row, column, channel)."""

    patch: int

    def ours(self, theirs: Tensor) -> Tensor:
        return theirs.permute(0, 2, 3, 1).flatten(1)

    def theirs(self, ours: Tensor) -> Tensor:
        return ours.unflatten(1, (self.patch, self.patch, -1)).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Experts:
    """The matrices of all experts, one below the other, and stacked along an axis of their own."""

    count: int

    def ours(self, theirs: Tensor) -> Tensor:
        return theirs.unflatten(0, (self.count, -1))

    def theirs(self, ours: Tensor) -> Tensor:
        return ours.flatten(0, 1)


@dataclass(frozen=True)
class ByKeyHead:
    """Queries, keys and values of all heads, `rows` of each; and for every head of keys its queries, its keys, its values."""

    kv_heads: int
    rows: tuple[int, int, int]

    def ours(self, theirs: Tensor) -> Tensor:
        parts = theirs.split(list(self.rows))
        return torch.cat([part.unflatten(0, (self.kv_heads, -1)) for part in parts], dim=1).flatten(0, 1)

    def theirs(self, ours: Tensor) -> Tensor:
        by_head = ours.unflatten(0, (self.kv_heads, -1))
        parts = by_head.split([rows // self.kv_heads for rows in self.rows], dim=1)
        return torch.cat([part.flatten(0, 1) for part in parts])


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Rows of `theirs`, one below the other, are, in another form, the rows of `ours`.

    `our_rows` and `their_rows` are the numbers of rows of each name, and are wanted where there are several. None among
    theirs stands for rows that their model lacks and ours has as zeros: Whisper's keys have no bias.
    """

    ours: tuple[str, ...]
    theirs: tuple[str | None, ...]
    form: Form = AS_IT_IS
    our_rows: tuple[int, ...] = ()
    their_rows: tuple[int, ...] = ()

    def to_ours(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Our tensors, from a function that reads one of theirs."""
        parts = [None if name is None else read(name) for name in self.theirs]
        like = next(part for part in parts if part is not None)
        rows = self.their_rows or (0,)
        whole = [like.new_zeros(count) if part is None else part for part, count in zip(parts, rows, strict=True)]
        return _apart(self.ours, self.form.ours(_together(whole)), self.our_rows)

    def to_theirs(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Their tensors, from a function that reads one of ours."""
        whole = self.form.theirs(_together([read(name) for name in self.ours]))
        return {name: part for name, part in _apart(self.theirs, whole, self.their_rows).items() if name is not None}

    def within(self, ours: str, theirs: str) -> Rule:
        """The same rule with prefixes before all names: those of one layer, or of one part of a model."""
        return replace(
            self,
            ours=tuple(ours + name for name in self.ours),
            theirs=tuple(None if name is None else theirs + name for name in self.theirs),
        )


def _together(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _apart(names: tuple[str | None, ...], whole: Tensor, rows: tuple[int, ...]) -> dict[str | None, Tensor]:
    parts = whole.split(list(rows)) if len(names) > 1 else [whole]
    return {name: part.contiguous() for name, part in zip(names, parts, strict=True)}


def same(pairs: Mapping[str, str]) -> tuple[Rule, ...]:
    """Rules of which nothing but the name differs: ours -> theirs."""
    return tuple(Rule(ours=(ours,), theirs=(theirs,)) for ours, theirs in pairs.items())


def with_bias(pairs: Mapping[str, str]) -> tuple[Rule, ...]:
    """As `same`, of layers with a weight and a bias."""
    return same({f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in pairs.items() for kind in ("weight", "bias")})


def to_ours(rules: Iterable[Rule], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict of theirs. Types stay as they are."""
    return {name: tensor for rule in rules for name, tensor in rule.to_ours(theirs.__getitem__).items()}


def to_theirs(rules: Iterable[Rule], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict of ours. Types stay as they are."""
    return {name: tensor for rule in rules for name, tensor in rule.to_theirs(ours.__getitem__).items()}
