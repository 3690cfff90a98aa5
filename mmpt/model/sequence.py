"""What the model asks of the ranks that share a batch. Here one rank has all of it: nothing is sent.

mmpt.parallel.sequence has the same for a part of the tokens, the media and the slots, and is put in its place from outside.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmpt.model.attention import AttentionLayout
from mmpt.model.encoders import Encoded
from mmpt.model.layers import widened
from mmpt.types import PackedBatch


class WholeSequence:
    """All tokens of a batch, its media and its slots are this rank's."""

    def layout(self, batch: PackedBatch, *, causal: bool, window: int | None, spans: bool) -> AttentionLayout:
        """Which tokens of the shared transformer attend to one another; `spans`: those of one medium see each other."""
        found = batch.span_ids if spans else None
        return AttentionLayout.from_document_ids(batch.document_ids, causal=causal, window=window, spans=found)

    def positions(self, position_ids: Int[Tensor, "axes T"]) -> Int[Tensor, "axes T"]:
        """Of the tokens whose queries, keys and values this rank makes."""
        return position_ids

    def features(self, rows: Float[Tensor, "rows D"], batch: PackedBatch) -> Float[Tensor, "rows D"]:
        """What `batch.media_index` counts, of the features that this rank's encoders made of its media."""
        return rows

    def items(self, encoded: Mapping[int, Encoded], batch: PackedBatch) -> tuple[Float[Tensor, "rows E"], Int[Tensor, " P"]]:
        """Pooled media, and the row of every slot's among them; any row for a text."""
        slots, start = batch.slots, 0
        row = torch.zeros_like(slots.item)
        for modality, found in encoded.items():
            row = torch.where(slots.modality == modality, start + slots.item, row)
            start += len(found.pooled)
        return torch.cat([widened(found.pooled) for found in encoded.values()]), row

    def pooled(self, hidden: Float[Tensor, "T D"], batch: PackedBatch) -> tuple[Float[Tensor, "n D"], Int[Tensor, " n"]]:
        """The hidden states that are pooled, and the slot of each."""
        chosen = (batch.pool_index >= 0).nonzero().flatten()
        return hidden.index_select(0, chosen), batch.pool_index[chosen]

    def add_up(self, counts: Tensor) -> Tensor:
        """Counts of tokens over all ranks that share the batch. Not differentiated."""
        return counts
