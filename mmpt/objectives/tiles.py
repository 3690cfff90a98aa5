"""The table of all pairs against all pairs, a tile of logits at a time: memory grows with the number of pairs, not its square.

Rows are this rank's own; columns are those of all ranks, in blocks as an exchange brings them. A tile is one product; what comes
between products is done a strip of it at a time, in caches. A tile is gone once it is used: the backward pass computes it anew,
but for those that memory set aside for it holds, which of a small batch are all.

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

TILE = {"cpu": (2048, 1024), "cuda": (4096, 4096)}
"""Rows and columns of a tile."""

STRIP = {"cpu": 256, "cuda": 4096}
"""Rows of a strip: on a CPU it and its gradient stay within the second-level caches of two cores."""

MEMORY = 92 * 2**20
"""Bytes: what gradients and a tile's work leave of it keeps tiles from the forward pass for the backward pass."""


class Sweep:
    """A pass forward (`measure` each block, `settle`, `correct`) and one back (`start_back`, `differentiate` each block)."""

    def __init__(
        self, loss: InfoNCE | Sigmoid, shares: Shares, duplicates: Duplicates, scale: float, a: Float[Tensor, "n E"]
    ) -> None:
        self.loss, self.shares, self.duplicates, self.scale = loss, shares, duplicates, scale
        device = "cpu" if a.device.type == "cpu" else "cuda"
        self.height, self.width = min(TILE[device][0], a.shape[0]), min(TILE[device][1], shares.all)
        self.strip = min(STRIP[device], self.height)
        gradients = (shares.all + a.shape[0]) * a.shape[1] * _exact(a).itemsize
        self.keeps = (MEMORY - gradients - _Room.bytes(self, a)) // max(self.height * self.width * a.itemsize, 1)
        self.kept: dict[tuple[int, int], Tensor] = {}
        self.row_best = a.new_full(a.shape[:1], loss.nothing, dtype=torch.float64)
        self.column_best = a.new_full((shares.all,), loss.nothing, dtype=torch.float64)

    def measure(self, a: Float[Tensor, "n E"], start: int, block: Float[Tensor, "columns E"]) -> None:
        """Take in one block, whose first column is number `start` of all."""
        room = _Room(self, a)
        for rows in _parts(0, a.shape[0], self.height):
            for columns in _parts(0, block.shape[0], self.width):
                place = slice(start + columns.start, start + columns.stop)
                keep = len(self.kept) < self.keeps
                tile = self._logits(a, block[columns], rows, place, room, keep)
                if keep:
                    self.kept[rows.start, place.start] = tile
                best = self.column_best[place]
                for strip in _parts(rows.start, rows.stop, self.strip):
                    cells = self._prepared(tile, rows, strip, room)
                    pairs, diagonal = self._pairs(cells, strip, place)
                    if pairs:
                        self.loss.diagonal[pairs] = diagonal.double()
                        diagonal.fill_(self.loss.nothing)
                    self.loss.add(cells, strip, place)
                    torch.maximum(self.row_best[strip], cells.amax(1), out=self.row_best[strip])
                    torch.maximum(best, cells.amax(0), out=best)

    def settle(self) -> bool:
        """All blocks are in. False: the loss wants to see them once more."""
        if self.loss.settle():
            return True
        self.kept.clear()
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
        in_place = self.blocks == 1 and (a.dtype == _exact(a) or block.shape[0] <= self.width)
        room = _Room(self, a, backward=True, totals=not in_place)
        if not a.shape[0]:
            grad_block.zero_()
        step = self.scale * self.factor
        for rows in _parts(0, a.shape[0], self.height):
            height = rows.stop - rows.start
            weighted = torch.mul(a[rows], step, out=room.weighted[:height])
            total = grad_a[rows] if in_place else room.total[:height]
            for columns in _parts(0, block.shape[0], self.width):
                place, right = slice(start + columns.start, start + columns.stop), block[columns]
                tile = self._gradient(a, right, rows, place, room)
                room.add_product(total, tile, right, first=columns.start == 0)
                room.add_product(grad_block[columns], tile.t(), weighted, first=rows.start == 0)
            if block.shape[0]:
                self._add_cosines(a[rows], total)
                total.mul_(step)
                if not in_place:
                    grad_a[rows].copy_(total) if self.blocks == 1 else grad_a[rows].add_(total)

    def _add_cosines(self, a: Float[Tensor, "h E"], total: Float[Tensor, "h E"]) -> None:
        """A strip at a time, as bf16 becomes fp32 on the way."""
        for rows, sums in zip(a.split(self.strip), total.split(self.strip), strict=True):
            self.cosines += (rows.to(_exact(a)) * sums).sum(1).sum(dtype=torch.float64)

    def _logits(self, a: Tensor, columns: Tensor, rows: slice, place: slice, room: _Room, keep: bool) -> Float[Tensor, "h w"]:
        """Scaled cosines of a tile, in the room there is for it or in memory of its own; -inf for duplicates."""
        shape = (rows.stop - rows.start, columns.shape[0])
        tile = a.new_empty(shape) if keep else _shaped(room.tile, shape)
        torch.mm(room.scale_rows(a, rows, self.scale), columns.t(), out=tile)
        self.duplicates.mask(tile, self.shares.own.start + rows.start, place.start)
        return tile

    def _prepared(self, tile: Tensor, rows: slice, strip: slice, room: _Room) -> Float[Tensor, "strip w"]:
        """What the loss makes of a strip's logits, in the type of its exponentials."""
        logits = tile[strip.start - rows.start : strip.stop - rows.start]
        return self.loss.prepare(logits, _shaped(room.strip, logits.shape))

    def _gradient(self, a: Tensor, columns: Tensor, rows: slice, place: slice, room: _Room) -> Float[Tensor, "h w"]:
        """d loss / d logit of a tile, in the type of products."""
        tile = self.kept.pop((rows.start, place.start), None)
        if tile is None:
            tile = self._logits(a, columns, rows, place, room, keep=False)
        for strip in _parts(rows.start, rows.stop, self.strip):
            cells, part = self._prepared(tile, rows, strip, room), tile[strip.start - rows.start : strip.stop - rows.start]
            gradient = part if part.dtype == cells.dtype else cells
            self.loss.gradient(cells, strip, place, _shaped(room.spare, cells.shape), out=gradient)
            pairs, diagonal = self._pairs(gradient, strip, place)
            if pairs:
                diagonal.copy_(self.loss.diagonal_gradient[pairs])
            if self.bias_gradient is not None:
                self.bias_gradient += gradient.sum()
            if gradient is not part:
                part.copy_(gradient)
        return tile

    def _pairs(self, cells: Tensor, rows: slice, place: slice) -> tuple[slice | None, Tensor]:
        """Which of this rank's pairs meet themselves in a strip, and in which cells."""
        own = self.shares.own.start
        low, high = max(rows.start, place.start - own), min(rows.stop, place.stop - own)
        if low >= high:
            return None, cells
        inside = cells[low - rows.start : high - rows.start, low + own - place.start : high + own - place.start]
        return slice(low, high), inside.diagonal()


class _Room:
    """Memory that every tile of a block uses again."""

    def __init__(self, sweep: Sweep, a: Float[Tensor, "n E"], backward: bool = False, totals: bool = False) -> None:
        height, width, dtype, exact = sweep.height, sweep.width, sweep.loss.dtype, _exact(a)
        self.tile = a.new_empty(height, width)
        self.strip = a.new_empty(sweep.strip, width, dtype=dtype)
        self.scaled, self.scaled_from = a.new_empty(height, a.shape[1]), -1
        if backward:
            self.spare = torch.empty_like(self.strip)
            self.weighted = torch.empty_like(self.scaled)
        if totals:
            self.total = torch.empty_like(self.scaled, dtype=exact)
        if backward and a.dtype != exact:
            self.half = a.new_empty(max(height, width), a.shape[1])
            self.wide = torch.empty_like(self.half, dtype=exact)

    @staticmethod
    def bytes(sweep: Sweep, a: Float[Tensor, "n E"]) -> int:
        """About what it takes, where gradients are summed in place."""
        of_strip, of_rows = sweep.strip * sweep.width * sweep.loss.dtype.itemsize, sweep.height * a.shape[1] * a.itemsize
        sums = 0 if a.dtype == _exact(a) else 5 * of_rows  # total and wide are twice as large as their rows in bf16
        return sweep.height * sweep.width * a.itemsize + 2 * of_strip + 2 * of_rows + sums

    def scale_rows(self, a: Tensor, rows: slice, scale: float) -> Float[Tensor, "h E"]:
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


def _parts(start: int, stop: int, most: int) -> list[slice]:
    return [slice(low, min(low + most, stop)) for low in range(start, stop, most)] if most else []


def _exact(a: Tensor) -> torch.dtype:
    """The type of sums of products: fp32 or better."""
    return torch.promote_types(a.dtype, torch.float32)
