"""The table of all pairs against all pairs, a tile of logits at a time: memory grows with the number of pairs, not its square.

Rows are this rank's own; columns are those of all ranks, in blocks as an exchange brings them. A tile is gone once it is used:
the backward pass computes it anew, but for those that memory set aside for it holds, which of a small batch are all.

All products write into memory that is there already (`out=`), which autocast leaves alone.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from mmpt.objectives.duplicates import Duplicates
from mmpt.objectives.gather import Shares
from mmpt.objectives.infonce import InfoNCE
from mmpt.objectives.sigmoid import Sigmoid

TILE = {"cpu": (1024, 1024), "cuda": (4096, 4096)}
"""Rows and columns of a tile: on a CPU it and its gradient stay within the second-level caches of two cores."""

MEMORY = 80 * 2**20
"""Bytes: what gradients leave of it holds tiles from the forward pass to the backward pass."""


class Sweep:
    """One pass forward (`measure` each block, `settle`, `correct`) and one back (`start_back`, then `differentiate` each)."""

    def __init__(
        self, loss: InfoNCE | Sigmoid, shares: Shares, duplicates: Duplicates, scale: float, a: Float[Tensor, "n E"]
    ) -> None:
        self.loss, self.shares, self.duplicates, self.scale = loss, shares, duplicates, scale
        self.height, self.width = TILE["cpu" if a.device.type == "cpu" else "cuda"]
        self.free = self.budget = MEMORY - (shares.all + a.shape[0]) * a.shape[1] * _exact(a).itemsize
        self.kept: dict[tuple[int, int], Tensor] = {}
        self.row_best = a.new_full(a.shape[:1], loss.nothing, dtype=torch.float64)
        self.column_best = a.new_full((shares.all,), loss.nothing, dtype=torch.float64)

    def measure(self, a: Float[Tensor, "n E"], start: int, block: Float[Tensor, "columns E"]) -> None:
        """Take in one block, whose first column is number `start` of all."""
        room = _Room(self, a)
        for rows in _parts(a.shape[0], self.height):
            best = self.row_best[rows]
            for columns in _parts(block.shape[0], self.width):
                place = slice(start + columns.start, start + columns.stop)
                keep = self.free >= room.bytes
                tile = self._prepared(a, block[columns], rows, place, room, keep)
                if keep:
                    self.free -= room.bytes
                    self.kept[rows.start, place.start] = tile
                pairs, cells = self._pairs(tile, rows, place)
                if pairs:
                    self.loss.diagonal[pairs] = cells.double()
                    cells.fill_(self.loss.nothing)
                self.loss.add(tile, rows, place)
                torch.maximum(best, tile.amax(1), out=best)
                others = self.column_best[place]
                torch.maximum(others, tile.amax(0), out=others)

    def settle(self) -> bool:
        """All blocks are in. False: the loss wants to see them once more."""
        if self.loss.settle():
            return True
        self.kept.clear()
        self.free = self.budget
        self.row_best.fill_(self.loss.nothing)
        self.column_best.fill_(self.loss.nothing)
        return False

    def correct(self) -> Float[Tensor, ""]:
        """Of 2 * n searches, how many find their own pair before all others; a tie is a miss."""
        self.shares.reduce(self.column_best, dist.ReduceOp.MAX)
        best = torch.stack([self.row_best, self.column_best[self.shares.own]])
        return torch.count_nonzero(self.loss.diagonal > best).float()

    def start_back(self, a: Float[Tensor, "n E"], factor: Float[Tensor, ""], blocks: int) -> tuple[Tensor, torch.dtype]:
        """Differentiate `factor` times the loss, in `blocks` blocks. Returns room for `grad_a`, and the type of `grad_block`."""
        self.factor, self.blocks = factor, blocks
        self.cosines = torch.zeros((), dtype=torch.float64, device=a.device)
        self.bias_gradient = None if self.loss.bias is None else torch.zeros_like(self.cosines)
        grad_a = torch.empty_like(a) if blocks == 1 else torch.zeros_like(a, dtype=_exact(a))
        return grad_a, a.dtype if self.shares.group is None and a.shape[0] <= self.height else _exact(a)

    def differentiate(
        self,
        a: Float[Tensor, "n E"],
        start: int,
        block: Float[Tensor, "columns E"],
        grad_a: Float[Tensor, "n E"],
        grad_block: Float[Tensor, "columns E"],
    ) -> None:
        """Fill `grad_block` with this rank's part of the block's gradient; add the block's part of `grad_a` and of the sums
        `cosines` (of d loss / d logit times the cosine) and `bias_gradient`, both of which still lack `factor`."""
        room = _Room(self, a, backward=True)
        if not a.shape[0]:
            grad_block.zero_()
        step = self.scale * self.factor
        for rows in _parts(a.shape[0], self.height):
            height = rows.stop - rows.start
            weighted = torch.mul(a[rows], step, out=room.weighted[:height])
            total = room.total[:height]
            for columns in _parts(block.shape[0], self.width):
                place, right = slice(start + columns.start, start + columns.stop), block[columns]
                tile = self._gradient(a, right, rows, place, room)
                room.add_product(total, tile, right, first=columns.start == 0)
                room.add_product(grad_block[columns], tile.t(), weighted, first=rows.start == 0)
            if block.shape[0]:
                self.cosines += room.wide[:height].copy_(a[rows]).mul_(total).sum(1).sum(dtype=torch.float64)
                total.mul_(step)
                grad_a[rows].copy_(total) if self.blocks == 1 else grad_a[rows].add_(total)

    def _prepared(
        self, a: Tensor, columns: Tensor, rows: slice, place: slice, room: _Room, keep: bool
    ) -> Float[Tensor, "rows columns"]:
        """A tile, in the room there is for it or in memory of its own."""
        scaled = room.scale_rows(a, rows, self.scale)
        shape = (scaled.shape[0], columns.shape[0])
        tile = torch.empty(shape, dtype=self.loss.dtype, device=scaled.device) if keep else _shaped(room.work, shape)
        if scaled.dtype == self.loss.dtype:
            torch.mm(scaled, columns.t(), out=tile)
        else:
            tile.copy_(torch.mm(scaled, columns.t(), out=_shaped(room.raw, shape)))
        self.duplicates.mask(tile, self.shares.own.start + rows.start, place.start)
        return self.loss.prepare(tile)

    def _gradient(self, a: Tensor, columns: Tensor, rows: slice, place: slice, room: _Room) -> Float[Tensor, "rows columns"]:
        """d loss / d logit of a tile, in the type of products."""
        tile = self.kept.pop((rows.start, place.start), None)
        if tile is None:
            tile = self._prepared(a, columns, rows, place, room, keep=False)
        tile = self.loss.gradient(tile, rows, place, _shaped(room.spare, tile.shape))
        pairs, cells = self._pairs(tile, rows, place)
        if pairs:
            cells.copy_(self.loss.diagonal_gradient[pairs])
        if self.bias_gradient is not None:
            self.bias_gradient += tile.sum()
        return tile if tile.dtype == a.dtype else _shaped(room.raw, tile.shape).copy_(tile)

    def _pairs(self, tile: Tensor, rows: slice, place: slice) -> tuple[slice | None, Tensor]:
        """Which of this rank's pairs meet themselves in a tile, and in which cells."""
        own = self.shares.own.start
        low, high = max(rows.start, place.start - own), min(rows.stop, place.stop - own)
        if low >= high:
            return None, tile
        cells = tile[low - rows.start : high - rows.start, low + own - place.start : high + own - place.start]
        return slice(low, high), cells.diagonal()


class _Room:
    """Memory that every tile of a block uses again."""

    def __init__(self, sweep: Sweep, a: Float[Tensor, "n E"], backward: bool = False) -> None:
        height, width = min(sweep.height, a.shape[0]), min(sweep.width, sweep.shares.all)
        dtype, exact = sweep.loss.dtype, _exact(a)
        self.bytes = height * width * dtype.itemsize  # of a tile
        self.work = a.new_empty(height, width, dtype=dtype)
        self.raw = self.work if a.dtype == dtype else a.new_empty(height, width)
        self.scaled, self.scaled_from = a.new_empty(height, a.shape[1]), -1
        if backward:
            self.spare = torch.empty_like(self.work)
            self.weighted = torch.empty_like(self.scaled)
            self.total = torch.empty_like(self.scaled, dtype=exact)
            self.wide = a.new_empty(height if a.dtype == exact else max(height, width), a.shape[1], dtype=exact)
            self.half = self.wide if a.dtype == exact else torch.empty_like(self.wide, dtype=a.dtype)

    def scale_rows(self, a: Tensor, rows: slice, scale: float) -> Float[Tensor, "rows E"]:
        """Rows of `a` times the scale, as open_clip multiplies; kept while the rows stay the same."""
        scaled = self.scaled[: rows.stop - rows.start]
        if self.scaled_from != rows.start:
            torch.mul(a[rows], scale, out=scaled)
            self.scaled_from = rows.start
        return scaled

    def add_product(self, total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
        """total += left @ right, or equals it if it is the first. Where products are bf16, the total is fp32."""
        if total.dtype == left.dtype:
            torch.mm(left, right, out=total) if first else total.addmm_(left, right)
            return
        product = torch.mm(left, right, out=self.half[: total.shape[0]])
        total.copy_(product) if first else total.add_(self.wide[: total.shape[0]].copy_(product))


def _shaped(buffer: Tensor, shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
    """The buffer, or its beginning in another shape."""
    return buffer if buffer.shape == shape else buffer.view(-1)[: shape[0] * shape[1]].view(shape)


def _parts(length: int, most: int) -> list[slice]:
    return [slice(low, min(low + most, length)) for low in range(0, length, most)]


def _exact(a: Tensor) -> torch.dtype:
    """The type of sums of products: fp32 or better."""
    return torch.promote_types(a.dtype, torch.float32)
