"""A batch cut for the ranks of a sequence group, and what the model asks of them.

In the loader's workers, where every rank of the group makes the same batch, by index arithmetic alone:

    document_ids, span_ids --plan_sequence--> tokens of each ring rank, cut into ulysses * tp parts
    media --cost--> items of each part;  slots --whole documents--> slots of each part
    PackedBatch --Splitter--> one part's tokens, items and slots, and the routes between the parts

In the model, in place of WholeSequence:

    features, pooled media, pooled hidden states --SplitSequence--> where they are looked at, each row once
"""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from mmpt.config import ModelConfig
from mmpt.model.attention import AttentionLayout
from mmpt.model.encoders import Encoded
from mmpt.model.layers import widened
from mmpt.model.sequence import WholeSequence
from mmpt.parallel.exchange import exchange, make_route
from mmpt.parallel.planner import SequencePlan, plan_sequence, ring_plan
from mmpt.parallel.ring import RingLayout
from mmpt.types import (
    AUDIO,
    IMAGE,
    NOTHING,
    TEXT,
    VIDEO,
    EmbeddingSlots,
    MediaBatch,
    PackedBatch,
    Route,
    Split,
    UserError,
)


@dataclass(frozen=True)
class Splitter:
    """Cuts a batch for rank `part` of ring * ulysses * tp, which is (ring rank * ulysses + ulysses rank) * tp + tp rank.

    Equal batches are cut alike on every rank, without a word between them. Segments, kinds and provenance stay those of the whole
    batch, and so do `pool_index` and the numbers in `slots`.
    """

    model: ModelConfig
    ring: int
    ulysses: int
    tp: int
    part: int

    @property
    def parts(self) -> int:
        return self.ring * self.ulysses * self.tp

    def __call__(self, batch: PackedBatch) -> PackedBatch:
        """Raises AssertionError for a batch whose tokens the parts cannot share equally."""
        assert len(batch.tokens) % self.parts == 0, f"{len(batch.tokens)} tokens cannot be shared equally by {self.parts} ranks"
        plan, order = plan_batch(batch, self.ring, self.model.transformer.mask)
        mine = order.view(self.parts, -1)[self.part]
        tokens = _Shares.in_order(order, self.parts)
        items = _Shares.of(share_out(item_costs(self.model, batch.media), self.parts))
        slots = _Shares.of(share_slots(batch.slots, self.parts))
        features, media_index = self._features(batch, tokens, items)
        item_route, item_rows = self._items(batch, items, slots)
        pooled, pooled_slots = self._pooled(batch, tokens, slots)
        own_slots = (slots.owner == self.part).nonzero().flatten()
        first = batch.segments.first
        here = tokens.owner[first] == self.part
        split = Split(
            part=self.part,
            parts=self.parts,
            imbalance=plan.imbalance,
            remote=plan.remote,
            attention=ring_plan(plan, self.part // (self.ulysses * self.tp)),
            features=features,
            items=item_route,
            item_rows=item_rows[own_slots],
            pooled=pooled,
            pooled_slots=pooled_slots,
            slot_numbers=own_slots,
            token_numbers=mine,
            digest=digest_of(batch),
        )
        per_token = ("tokens", "labels", "token_types", "document_ids", "pool_index", "span_ids")
        return replace(
            batch,
            **{name: getattr(batch, name)[mine] for name in per_token},
            **self._media(batch, items),
            position_ids=batch.position_ids[:, mine],
            media_index=media_index[mine],
            slots=EmbeddingSlots(**{name: values[own_slots] for name, values in vars(batch.slots).items()}),
            segments=replace(batch.segments, first=torch.where(here, tokens.place[first], NOTHING)),
            split=split,
        )

    def _features(self, batch: PackedBatch, tokens: _Shares, items: _Shares) -> tuple[Route, Int[Tensor, " T"]]:
        """The route of media features to the tokens that show them; and per token of the whole batch, if it is this part's,
        the row that it then shows."""
        features = _Shares.of(items.owner.repeat_interleave(feature_rows(self.model, batch.media)))
        showing = (batch.media_index >= 0).nonzero().flatten()
        shown, target = batch.media_index[showing], tokens.owner[showing]
        route, found = make_route(features.owner[shown], features.place[shown], target, self.part, self.parts)
        media_index = torch.full_like(batch.media_index, NOTHING)
        media_index[showing[target == self.part]] = found
        return route, media_index

    def _items(self, batch: PackedBatch, items: _Shares, slots: _Shares) -> tuple[Route, Int[Tensor, " P"]]:
        """The route of pooled media to their slots; and per slot of the whole batch, if it is a medium's and this part's, its
        row there."""
        images, sounds = len(batch.images.grid), len(batch.audios.grid)
        before = torch.tensor([0, 0, images, images + sounds])  # items that are counted before those of each modality
        media = (batch.slots.modality != TEXT).nonzero().flatten()
        item, target = batch.slots.item[media] + before[batch.slots.modality[media]], slots.owner[media]
        route, found = make_route(items.owner[item], items.place[item], target, self.part, self.parts)
        rows = torch.zeros_like(batch.slots.item)
        rows[media[target == self.part]] = found
        return route, rows

    def _pooled(self, batch: PackedBatch, tokens: _Shares, slots: _Shares) -> tuple[Route, Int[Tensor, " n"]]:
        """The route of hidden states that are pooled to their slots; and the slot of this part for each that it receives."""
        chosen = (batch.pool_index >= 0).nonzero().flatten()
        slot = batch.pool_index[chosen]
        target = slots.owner[slot]
        route, found = make_route(tokens.owner[chosen], tokens.place[chosen], target, self.part, self.parts)
        received = torch.empty_like(found)
        received[found] = slots.place[slot[target == self.part]]
        return route, received

    def _media(self, batch: PackedBatch, items: _Shares) -> dict[str, MediaBatch]:
        names = {IMAGE: "images", AUDIO: "audios", VIDEO: "videos"}
        owners = items.owner.split([len(media.grid) for media in batch.media.values()])
        return {
            names[modality]: some_items(media, (owner == self.part).nonzero().flatten())
            for (modality, media), owner in zip(batch.media.items(), owners, strict=True)
        }


@dataclass(frozen=True)
class _Shares:
    """Who has each of the tokens, items, feature rows or slots of a batch."""

    owner: Int[Tensor, " n"]  # the part
    place: Int[Tensor, " n"]  # its number among those of that part

    @classmethod
    def of(cls, owner: Int[Tensor, " n"]) -> _Shares:
        """Parts keep the order of the batch."""
        order = owner.argsort(stable=True)
        sizes = torch.bincount(owner)
        place = torch.empty_like(owner)
        place[order] = torch.arange(len(owner)) - (sizes.cumsum(0) - sizes)[owner[order]]
        return cls(owner, place)

    @classmethod
    def in_order(cls, order: Int[Tensor, " n"], parts: int) -> _Shares:
        """The parts have equally many, and stand in `order` one after the other."""
        inverse, size = torch.empty_like(order), len(order) // parts
        inverse[order] = torch.arange(len(order))
        return cls(inverse // size, inverse % size)


def plan_batch(
    batch: PackedBatch, ring: int, mask: Literal["causal", "bidirectional", "media"]
) -> tuple[SequencePlan, Int[Tensor, " T"]]:
    """The ring's plan, and the tokens in its order, rank after rank.

    Documents are to attention what segments are to a batch; padding, wherever it stands there, comes last in the plan's numbers.
    """
    inside = (batch.document_ids >= 0).nonzero().flatten()
    outside = (batch.document_ids < 0).nonzero().flatten()
    documents, lengths = batch.document_ids[inside].unique_consecutive(return_counts=True)
    spans = _document_spans(batch.span_ids[inside], lengths) if mask == "media" else None
    assert len(documents.unique()) == len(documents), "a segment's tokens stand apart"
    plan = plan_sequence(lengths.tolist(), spans, len(outside), ring, mask=mask)
    return plan, torch.cat([inside, outside])[torch.from_numpy(plan.order)]


def _document_spans(span_ids: Int[Tensor, " n"], lengths: Int[Tensor, " documents"]) -> list[list[tuple[int, int]]]:
    """Per document, where each of its media starts and stops within it."""
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    kinds = int(span_ids.max()) + 2 if len(span_ids) else 1  # tokens of no medium are one of them
    runs, sizes = (owner * kinds + span_ids + 1).unique_consecutive(return_counts=True)
    number, shows = runs // kinds, runs % kinds > 0
    starts = (sizes.cumsum(0) - sizes) - (lengths.cumsum(0) - lengths)[number]
    spans: list[list[tuple[int, int]]] = [[] for _ in lengths]
    for document, start, size in torch.stack([number, starts, sizes]).T[shows].tolist():
        spans[document].append((start, start + size))
    return spans


def share_out(costs: Sequence[int], parts: int) -> Int[Tensor, " n"]:
    """The part of each: the costliest first, each to the part that has least so far."""
    owner = torch.zeros(len(costs), dtype=torch.int64)
    loads = [(0, part) for part in range(parts)]
    for number in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        load, part = heapq.heappop(loads)
        owner[number] = part
        heapq.heappush(loads, (load + costs[number], part))
    return owner


def share_slots(slots: EmbeddingSlots, parts: int) -> Int[Tensor, " P"]:
    """The part of each slot: those of a document, which are contrasted with one another, stay together."""
    _, which, counts = slots.pair.unique(return_inverse=True, return_counts=True)
    return share_out(counts.tolist(), parts)[which]


def item_costs(model: ModelConfig, media: Mapping[int, MediaBatch]) -> list[int]:
    """Multiplications that the encoder spends on each item, of all modalities end to end; pooling and projecting left out."""
    costs: list[int] = []
    for modality, found in media.items():
        config = model.audio if modality == AUDIO else model.image
        if not len(found.grid):
            continue
        qkv = (config.n_heads + 2 * config.kv_heads) * config.head_dim
        feed_forward = (3 if config.activation == "swiglu" else 2) * config.ffn_dim
        weights = config.layers * config.dim * (qkv + config.dim + feed_forward) + found.values.shape[1] * config.dim
        time, height, width = found.grid.unbind(1)
        rows, stacks = (time // 2, 1) if modality == AUDIO else (height * width, time)  # frames are pictures of their own
        costs += (stacks * rows * (weights + 2 * config.layers * config.dim * rows)).tolist()
    return costs


def feature_rows(model: ModelConfig, media: Mapping[int, MediaBatch]) -> Int[Tensor, " M"]:
    """Rows of features that the encoder makes of each item, of all modalities end to end."""
    rows = []
    for modality, found in media.items():
        time, height, width = found.grid.unbind(1)
        if modality == AUDIO:
            rows.append(time // model.audio.frames_per_token if model.audio else time)
        else:
            merged = model.video.merge_frames if modality == VIDEO and model.video else 1
            rows.append(-(-time // merged) * height * width // (model.image.merge**2 if model.image else 1))
    return torch.cat(rows)


def some_items(media: MediaBatch, numbers: Int[Tensor, " m"]) -> MediaBatch:
    """Those of the items, in the order of their `numbers`."""
    edges, steps = media.cu_seqlens.tolist(), [0, *media.grid[:, 0].cumsum(0).tolist()]
    chosen = numbers.tolist()
    return MediaBatch(
        values=torch.cat([media.values[:0], *(media.values[edges[i] : edges[i + 1]] for i in chosen)]),
        cu_seqlens=torch.cat([media.cu_seqlens[:1], media.cu_seqlens.diff()[numbers].cumsum(0)]),
        grid=media.grid[numbers],
        times=torch.cat([media.times[:0], *(media.times[steps[i] : steps[i + 1]] for i in chosen)]),
    )


def digest_of(batch: PackedBatch) -> int:
    """Of what a batch is cut by. Pixels and sounds, of which each is one rank's, may differ by rounding."""
    media = [found.grid for found in batch.media.values()]
    whole = (batch.tokens, batch.labels, batch.document_ids, batch.media_index, batch.slots.pair, batch.slots.content, *media)
    digest = 0
    for values in whole:
        digest = zlib.crc32(values.contiguous().numpy(), digest)
    return digest


def refuse_unequal(batches: Sequence[PackedBatch], group: dist.ProcessGroup) -> None:
    """Raises UserError on every rank of a sequence group where they are not parts of the same batches.

    Each rank reads and decodes for itself. What one alone cannot read would else end in a hang, or in a step on parts of two
    batches.
    """
    digests = torch.tensor([batch.split.digest for batch in batches], device=batches[0].tokens.device)
    most = torch.cat([digests, -digests])
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    if (most[: len(digests)] == -most[len(digests) :]).all():
        return
    faults = [f"{fault.key} of {fault.shard}: {fault.detail}" for batch in batches for fault in batch.report.faults]
    raise UserError(
        f"ranks that share a sequence read different batches before pack {batches[-1].state.packs_consumed}: what one could read "
        f"or decode, another could not (this one's faults: {'; '.join(faults[:3]) or 'none'}); compare their disks and decoders, "
        f"then train on from the last checkpoint"
    )


class SplitSequence(WholeSequence):
    """The tokens of a batch, its media and its slots are shared by the ranks of `sequence`: see Splitter.

    Every rank of the group calls every method, whatever it has, and so it is on the way back: an empty row keeps its graph.
    """

    def __init__(
        self,
        *,
        sequence: dist.ProcessGroup,
        ring: dist.ProcessGroup | None,
        ulysses: dist.ProcessGroup | None,
        tp: dist.ProcessGroup | None,
    ) -> None:
        """Groups of one rank are None."""
        self.sequence, self.ring, self.ulysses, self.tp = sequence, ring, ulysses, tp

    def layout(self, batch: PackedBatch, *, causal: bool, window: int | None, spans: bool) -> AttentionLayout | RingLayout:
        """The plan knows the mask: `causal` and `spans` are in it."""
        assert window is None, f"a window of {window} tokens over ranks that share a sequence"
        return RingLayout(batch.split.attention, self.ring, self.ulysses)

    def positions(self, position_ids: Int[Tensor, "axes T"]) -> Int[Tensor, "axes all"]:
        if self.tp is None:
            return position_ids
        rows = position_ids.T.contiguous()
        gathered = rows.new_empty(dist.get_world_size(self.tp) * len(rows), rows.shape[1])
        dist.all_gather_into_tensor(gathered, rows, group=self.tp)
        return gathered.T

    def features(self, rows: Float[Tensor, "rows D"], batch: PackedBatch) -> Float[Tensor, "received D"]:
        """Those of media that stand in for none, which an encoder without any reads, come last and are never sent."""
        return exchange(rows, batch.split.features, self.sequence)

    def items(self, encoded: Mapping[int, Encoded], batch: PackedBatch) -> tuple[Float[Tensor, "rows E"], Int[Tensor, " P"]]:
        rows = torch.cat([widened(found.pooled) for found in encoded.values()])
        return exchange(rows, batch.split.items, self.sequence), batch.split.item_rows

    def pooled(self, hidden: Float[Tensor, "T D"], batch: PackedBatch) -> tuple[Float[Tensor, "n D"], Int[Tensor, " n"]]:
        return exchange(hidden, batch.split.pooled, self.sequence), batch.split.pooled_slots

    def add_up(self, counts: Tensor) -> Tensor:
        total = counts.clone()
        dist.all_reduce(total, group=self.sequence)
        return total
