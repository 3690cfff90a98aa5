"""Blocks of rows passed round a ring of ranks: two of them are in memory at a time, whatever the number of ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from mmpt.objectives.gather import Shares, Visit, VisitBack

COLUMNS, GRADIENTS = 0, 1  # tags of what travels


class Ring:
    """Every rank's columns travel from rank to rank, and the next block arrives while one is worked on.

    On the way back each block's gradient follows one step behind it, gains every rank's part, and comes home.
    """

    def __init__(self, shares: Shares) -> None:
        self.shares = shares
        self.blocks = self.size = len(shares.sizes)

    def open(self, columns: Float[Tensor, "n E"]) -> Float[Tensor, "n E"]:
        """What `visit` and `visit_back` want, and what the backward pass keeps."""
        return columns.contiguous()

    def visit(self, opened: Float[Tensor, "n E"], work: Visit) -> None:
        block = opened
        for step in range(self.size):
            coming = self._pass_on(block, step, COLUMNS) if step + 1 < self.size else None
            work(self._start(step), block)
            block = coming.take() if coming else block

    def visit_back(self, opened: Float[Tensor, "n E"], work: VisitBack, dtype: torch.dtype) -> Float[Tensor, "n E"]:
        """The gradient of this rank's own columns, from the work of all ranks."""
        block, gradient = opened, None
        for step in range(self.size):
            coming = self._pass_on(block, step, COLUMNS) if step + 1 < self.size else None
            mine = torch.empty_like(block, dtype=dtype)
            work(self._start(step), block, mine)
            total = mine if gradient is None else gradient.take().add_(mine)
            gradient = self._pass_on(total, step, GRADIENTS)
            block = coming.take() if coming else block
        return gradient.take()

    def _owner(self, step: int) -> int:
        """Whose block this rank holds at a step."""
        return (self.shares.rank - step) % self.size

    def _start(self, step: int) -> int:
        return self.shares.starts[self._owner(step)]

    def _pass_on(self, rows: Tensor, step: int, tag: int) -> _Coming:
        """Send what belongs to this step's block to the next rank, and receive the same of the next step's block."""
        group, rank = self.shares.group, self.shares.rank
        received = rows.new_empty(self.shares.sizes[self._owner(step + 1)], rows.shape[1])
        if self.size == 1:
            return _Coming(rows, rows, [])
        operations = []
        if len(rows):
            operations.append(dist.P2POp(dist.isend, rows, group=group, tag=tag, group_peer=(rank + 1) % self.size))
        if len(received):
            operations.append(dist.P2POp(dist.irecv, received, group=group, tag=tag, group_peer=(rank - 1) % self.size))
        return _Coming(rows, received, dist.batch_isend_irecv(operations) if operations else [])


class _Coming:
    """Rows on their way: those sent are kept until they are gone."""

    def __init__(self, sent: Tensor, received: Tensor, requests: list[dist.Work]) -> None:
        self.sent, self.received, self.requests = sent, received, requests

    def take(self) -> Tensor:
        for request in self.requests:
            request.wait()
        return self.received
