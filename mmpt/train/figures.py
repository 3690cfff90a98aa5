"""What a step says of itself: sums over micro-batches, then over ranks in one all-reduce, then figures by name.

LossTerms, Routing, gradients --StepFigures.add--> Tally --one all-reduce--> loss/next_token, loss/source/NAME, ...

Every loss is a sum of rows, and a row belongs to a document, which has a source and a kind: parts add up to the total.
The names, one by one, are those of `StepFigures.read`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmpt.config import ContrastiveConfig
from mmpt.model.multimodal import MAX_LOG_SCALE, MultimodalModel
from mmpt.objectives.combine import Counts, contrasted, pair_name
from mmpt.objectives.contrastive import PairLoss
from mmpt.objectives.diagnostics import contrastive_figures
from mmpt.train.grad_cache import join_embeddings, join_slots
from mmpt.types import KINDS, Embeddings, LossTerms, ModelOutput, PackedBatch


class Tally:
    """Named tensors, summed in fp64. Every rank adds the same names in the same order."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        value = value.detach().double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def over_ranks(self, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
        """The sums over the ranks of `group`, on the CPU."""
        if not self.sums:
            return {}
        values = torch.cat([value.reshape(-1) for value in self.sums.values()])
        if group is not None:
            dist.all_reduce(values, group=group)
        parts = values.cpu().split([value.numel() for value in self.sums.values()])
        return {name: part.reshape(value.shape) for (name, value), part in zip(self.sums.items(), parts, strict=True)}


@dataclass(frozen=True, kw_only=True)
class Origins:
    """Where the documents of a batch are from, and what they show; last, what stands for rows of no document.

    A row's document is its index: NOTHING, which is -1, finds the last.
    """

    source: Int[Tensor, " documents_plus_1"]  # number in the step's list of sources, which "none" ends
    kind: Int[Tensor, " documents_plus_1"]  # in KINDS

    @classmethod
    def of(cls, batch: PackedBatch, sources: Sequence[str]) -> Origins:
        number = {name: i for i, name in enumerate(sources)}
        names = [ref.source for ref in batch.provenance]
        source = batch.tokens.new_tensor([number[name] for name in names] + [len(sources) - 1])
        kind = torch.cat([batch.kinds, source.new_full((1,), KINDS.index("none"))])
        return cls(source=source, kind=kind)

    @staticmethod
    def join(parts: Sequence[Origins]) -> Origins:
        """Of the documents of several batches, numbered on from batch to batch."""
        source, kind = (
            torch.cat([*(getattr(part, name)[:-1] for part in parts), getattr(parts[0], name)[-1:]])
            for name in ("source", "kind")
        )
        return Origins(source=source, kind=kind)


def source_names(batches: Sequence[PackedBatch], group: dist.ProcessGroup | None) -> list[str]:
    """Of the documents of a step, over all ranks, in order of name; then "none"."""
    names = {ref.source for batch in batches for ref in batch.provenance}
    if group is not None:
        found: list[set[str]] = [set()] * dist.get_world_size(group)
        dist.all_gather_object(found, names, group=group)
        names = set().union(*found)
    return [*sorted(names - {"none"}), "none"]


class StepFigures:
    """Gathers the figures of one step. `detailed` adds the costly ones; without, there is little beside the loss."""

    def __init__(
        self, model: MultimodalModel, batches: Sequence[PackedBatch], group: dist.ProcessGroup | None, *, detailed: bool
    ) -> None:
        self.model, self.batches, self.group, self.detailed = model, batches, group, detailed
        self.tally = Tally()
        self.embeddings: list[Mapping[str, Embeddings]] = []
        self.sources = source_names(batches, group) if detailed else []
        self.origins = [Origins.of(batch, self.sources) for batch in batches] if detailed else []
        for split in (batch.split for batch in batches if detailed and batch.split):
            self.tally.add("sequence", torch.tensor([split.imbalance, split.remote, 1.0]))

    def add_terms(self, terms: LossTerms, pairs: Mapping[str, PairLoss], number: int | None) -> None:
        """The terms of micro-batch `number`, or those of all micro-batches together; and the contrast among them."""
        for name, term in terms.items():
            rows = term.rows.double() * (term.weight / max(term.count, 1))
            self.tally.add(f"loss/{name}", rows.sum())
            if self.detailed:
                origins = Origins.join(self.origins) if number is None else self.origins[number]
                self._add_parts("source", rows, origins.source[term.documents], len(self.sources))
                if name in pairs:
                    self.tally.add(f"loss/modality/{name.rsplit('/', 1)[1]}", rows.sum())
                else:
                    self._add_parts("modality", rows, origins.kind[term.documents], len(KINDS))
        for name, loss in pairs.items():
            self.tally.add(f"correct/{name}", loss.correct)
            self.tally.add(f"negatives/{name}", loss.negatives)

    def _add_parts(self, name: str, rows: Float[Tensor, " n"], part: Int[Tensor, " n"], parts: int) -> None:
        self.tally.add(f"parts/{name}", rows.new_zeros(parts).index_add(0, part, rows))
        self.tally.add(f"rows/{name}", torch.bincount(part, minlength=parts))

    def add_output(self, output: ModelOutput, objectives: Mapping[str, Float[Tensor, ""]]) -> None:
        """What a micro-batch shows beside its losses, while its graph is there."""
        if output.routing:
            self.tally.add("experts", torch.stack([layer.load for layer in output.routing]))
        if self.detailed:
            self.embeddings.append(join_embeddings([output.embeddings]))
            for name, gradient in gain_gradients(self.model, output, objectives).items():
                self.tally.add(f"gradient/{name}", gradient)

    def over_ranks(self) -> None:
        """The one all-reduce. Every rank calls it, once all is added."""
        self.sums = self.tally.over_ranks(self.group)

    @property
    def loss(self) -> float:
        return sum(float(value) for name, value in self.sums.items() if name.startswith("loss/") and "/modality/" not in name)

    @property
    def loads(self) -> Int[Tensor, "layers experts"] | None:
        """Tokens of the step that went to each expert."""
        return self.sums["experts"].round().long() if "experts" in self.sums else None

    def read(self, config: ContrastiveConfig, counts: Counts) -> dict[str, float]:
        """By name; every rank calls it. `loss` is the sum of loss/NAME over objectives, all of them weighted, and of
        loss/source/NAME, and of loss/modality/KIND; count/NAME is what a loss was divided by.

        gradient/OBJECTIVE: norm of its gradient by the gain of the last norm; gradient/cosine: of next-token's with contrast's.
        contrast/LEVEL/...: the scale, whether it stands at a bound (clamped), the bias; by pair of modalities, over the
        step's pairs: batch_R@1, negatives (left of each pair's after masking), and those of `diagnostics`.
        sequence/imbalance, sequence/remote: of ring attention, the mean over batches of Split's.
        experts/imbalance: the load of the fullest expert over the mean, averaged over layers; imbalance_max: the worst layer's.
        """
        figures = {"loss": self.loss, **{name: float(v) for name, v in self.sums.items() if name.startswith("loss/")}}
        figures |= {"documents": counts["documents"]}
        if not self.detailed:
            return figures
        figures |= {f"count/{name}": count for name, count in counts.items() if count and name != "documents"}
        figures |= dict(self._parts("source", self.sources)) | dict(self._parts("modality", KINDS))
        figures |= dict(self._gradients()) | dict(self._sequence()) | dict(self._experts())
        return figures | self._contrast(config, counts)

    def _parts(self, name: str, names: Sequence[str]) -> Iterator[tuple[str, float]]:
        if f"rows/{name}" in self.sums:
            for part, value, rows in zip(names, self.sums[f"parts/{name}"], self.sums[f"rows/{name}"], strict=True):
                if rows:
                    yield f"loss/{name}/{part}", float(value)

    def _gradients(self) -> Iterator[tuple[str, float]]:
        found = {name: value for name, value in self.sums.items() if name.startswith("gradient/") and value.any()}
        yield from ((name, float(value.norm())) for name, value in found.items())
        if {"gradient/next_token", "gradient/contrastive"} <= found.keys():
            cosine = nn.functional.cosine_similarity(found["gradient/next_token"], found["gradient/contrastive"], dim=0)
            yield "gradient/cosine", float(cosine)

    def _sequence(self) -> Iterator[tuple[str, float]]:
        if "sequence" in self.sums:
            *values, splits = self.sums["sequence"].tolist()
            yield from ((f"sequence/{name}", value / splits) for name, value in zip(("imbalance", "remote"), values, strict=True))

    def _experts(self) -> Iterator[tuple[str, float]]:
        if self.loads is not None:
            imbalance = self.loads.amax(1) / self.loads.double().mean(1).clamp(min=1e-9)
            yield "experts/imbalance", float(imbalance.mean())
            yield "experts/imbalance_max", float(imbalance.max())

    def _contrast(self, config: ContrastiveConfig, counts: Counts) -> dict[str, float]:
        figures: dict[str, float] = {}
        whole, slots = join_embeddings(self.embeddings), join_slots(self.batches)
        for level, embeddings in whole.items():
            scale = float(embeddings.scale)
            figures[f"contrast/{level}/scale"] = scale
            figures[f"contrast/{level}/clamped"] = float(not 1 + 1e-6 < scale < math.exp(MAX_LOG_SCALE) * (1 - 1e-6))
            if embeddings.bias is not None and getattr(config, level).loss == "sigmoid":
                figures[f"contrast/{level}/bias"] = float(embeddings.bias)
        for level, combo in contrasted(config, tuple(whole), counts):
            name, pairs = f"{level}/{pair_name(combo)}", counts[pair_name(combo)]
            figures[f"contrast/{name}/batch_R@1"] = float(self.sums[f"correct/contrastive/{name}"]) / (2 * pairs)
            figures[f"contrast/{name}/negatives"] = float(self.sums[f"negatives/contrastive/{name}"]) / pairs
            found = contrastive_figures(whole[level], slots, combo, self.group)
            figures |= {f"contrast/{name}/{figure}": float(value) for figure, value in found.items() if value.isfinite()}
        return figures


def gain_gradients(
    model: MultimodalModel, output: ModelOutput, objectives: Mapping[str, Float[Tensor, ""]]
) -> dict[str, Float[Tensor, " D"]]:
    """This rank's part of each objective's gradient by the gain of the norm that writes the hidden states: one layer that
    all objectives share.

    hidden = gain * normalised + bias, so the gradient is the sum over tokens of d hidden * (hidden - bias) / gain: it takes
    the way back from each loss to the hidden states, and no further. An objective that does not look at them has zeros;
    without such a norm, or with all that is before it frozen, there are none.
    """
    blocks = model.transformer.blocks
    norm = model.transformer.norm or (blocks[-1].ffn_norm if len(blocks) else None)
    if norm is None or not output.hidden.requires_grad:
        return {}
    gain, bias = _full(norm.weight), _full(getattr(norm, "bias", None))
    found = {}
    for name, loss in objectives.items():
        (pull,) = (
            torch.autograd.grad(loss, output.hidden, retain_graph=True, allow_unused=True) if loss.requires_grad else (None,)
        )
        if pull is None:
            found[name] = torch.zeros_like(gain)
            continue
        pull, hidden = pull.to(gain.dtype), output.hidden.detach().to(gain.dtype)
        summed = (pull * hidden).sum(0, dtype=torch.float64)
        if bias is not None:
            summed -= bias * pull.sum(0, dtype=torch.float64)
        found[name] = torch.where(gain == 0, 0.0, summed / gain)
    return found


def _full(parameter: Tensor | None) -> Tensor | None:
    """A copy of a parameter, of which FSDP may have left this rank a part, and which it frees after any backward pass."""
    if parameter is None:
        return None
    parameter = parameter.detach()
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.clone()
