"""Ring attention: the tokens of a batch lie with R ranks, and the keys that a rank's queries see come to it from the others.

    hop 0        own keys                              | keys of hop 1 on their way
    hop h        keys of the rank h places back        | keys of hop h + 1 on their way
    slices of a hop --kernel--> (out, lse) of these keys --merge--> of all keys so far

Attention of a row is a weighted mean of values, the weights exp(score). Over some of the keys it is their mean `out` with the log
of their weights' sum, `lse`; two such make one by a mean of their means, the weights exp(lse) (arXiv 2112.05682, 2310.01889).

    hop R - 1    keys kept from the way there          | keys of hop R - 2 on their way
    hop h        keys again; what they get, dk and dv  | dk, dv of hop h + 1 on their way home, in fp32
    hop 0        own keys                              | dk, dv of hop 1

Going back, hops run backwards, so that the last journey home is hidden behind the own keys. With `out` and `lse` of the whole row
a slice's gradients are its share of the whole's. Memory holds the keys of a few hops, coming and leaving, and keeps those of one,
whatever R is. Which rows travel and what is computed says a plan (mmpt.parallel.planner); where a hop has no keys nothing is sent
or computed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from mmpt.parallel.kernels import accumulation_dtype, choose_kernel, empty_rows, make_runs
from mmpt.parallel.ulysses import heads_to_tokens, tokens_to_heads
from mmpt.types import RingPlan

KEYS, GRADIENTS = 0, 1  # tags of what travels


def ring_attention(
    q: Float[Tensor, "T heads head_dim"],
    k: Float[Tensor, "T kv_heads head_dim"],
    v: Float[Tensor, "T kv_heads head_dim"],
    plan: RingPlan,
    group: dist.ProcessGroup | None,
) -> Float[Tensor, "T heads head_dim"]:
    """Scaled dot-product attention of this rank's queries over the keys of all ranks, as far as `plan` lets them see.

    Every rank of `group` calls it, and differentiates it, at once; without a group this rank has all tokens. Queries that share
    keys stand in order of heads. A row that sees no key is 0.
    """
    return _RingAttention.apply(q, k, v, plan, group)


@dataclass(frozen=True)
class RingLayout:
    """Which tokens of the shared transformer attend to one another, where several ranks share a batch's.

    As mmpt.model.attention.AttentionLayout for one rank; `order` and `inverse` are None, for tokens stand in the plan's order
    already. `short` says that all of a batch is better computed in fp32, which is decided for each piece here: what travels is of
    one type on every rank.
    """

    plan: RingPlan
    ring: dist.ProcessGroup | None
    ulysses: dist.ProcessGroup | None
    order: None = None
    inverse: None = None
    short: bool = False

    def attend(
        self,
        q: Float[Tensor, "t heads head_dim"],
        k: Float[Tensor, "t kv_heads head_dim"],
        v: Float[Tensor, "t kv_heads head_dim"],
    ) -> Float[Tensor, "t heads head_dim"]:
        """Attention for this rank's tokens, in the type of v. Every rank of both groups calls it at once."""
        with torch.autocast(v.device.type, enabled=False):
            q, k = q.to(v.dtype), k.to(v.dtype)
            if self.ulysses is None:
                return ring_attention(q, k, v, self.plan, self.ring)
            out = ring_attention(*tokens_to_heads(q, k, v, self.ulysses), self.plan, self.ring)
            return heads_to_tokens(out, self.ulysses)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: RingPlan, group: dist.ProcessGroup | None
    ) -> Float[Tensor, "T heads head_dim"]:
        q, k, v = (x.transpose(0, 1).contiguous() for x in (q, k, v))  # head by head: so kernels read them fastest
        ring, kernel, whole, kept = Ring(plan, group), choose_kernel(q), Whole(q), [k, v]
        for hop, slices in enumerate(plan.slices):
            coming = ring.send_keys(hop + 1, k, v) if hop < ring.last else None
            keys, values = kept
            for rows, seen, pieces in make_runs(slices):
                whole.merge(rows, *kernel.forward(q[:, rows], keys[:, seen], values[:, seen], pieces))
            kept = coming.take() if coming else kept
        out, lse = whole.result()
        ring.finish()
        ctx.plan, ctx.group = plan, group
        ctx.save_for_backward(q, k, v, out, lse, *kept)
        return out.transpose(0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Float[Tensor, "T heads head_dim"]) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse, *kept = ctx.saved_tensors
        ring, kernel, dout = Ring(ctx.plan, ctx.group), choose_kernel(q), dout.contiguous().transpose(0, 1)
        dq, own, returning = Sum(q), (Sum(k), Sum(v)), None
        for hop in range(ring.last, -1, -1):
            coming = ring.send_keys(hop - 1, k, v) if hop > 1 else None
            keys, values = kept if hop else (k, v)
            dk, dv = (Sum(keys), Sum(values)) if hop else own
            for rows, seen, pieces in make_runs(ctx.plan.slices[hop]):
                shown = (dout[:, rows], q[:, rows], keys[:, seen], values[:, seen], out[:, rows], lse[:, rows])
                parts = kernel.backward(*shown, pieces)
                for total, places, part in zip((dq, dk, dv), (rows, seen, seen), parts, strict=True):
                    total.add(places, part)
            if hop < ring.last:
                ring.bring_home(hop + 1, returning, own)
            returning = ring.send_home(hop, dk, dv) if hop else None
            kept = coming.take() if coming else None
        ring.finish()
        grads = (total.result().to(x.dtype).transpose(0, 1) for total, x in zip((dq, *own), (q, k, v), strict=True))
        return *(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)), None, None


class Whole:
    """Attention over all keys so far, in fp32 (fp64 for fp64)."""

    def __init__(self, q: Float[Tensor, "heads T head_dim"]) -> None:
        self._q = q
        self._only: tuple[Tensor, Tensor] | None = None  # the first part, as long as it is all that there is
        self._out: Tensor | None = None

    def merge(self, rows: slice, out: Float[Tensor, "heads n head_dim"], lse: Float[Tensor, "heads n"]) -> None:
        """Over further keys. Each of the rows sees one of them at least, so that `lse` is finite."""
        if self._only is None and self._out is None and lse.shape[1] == self._q.shape[1]:
            self._only = out, lse
            return
        self._open()
        before = self._lse[:, rows]
        share = torch.sigmoid(lse - before)  # of the new keys: 1 where there were none, whose lse is -inf
        self._out[:, rows].lerp_(out.to(self._out.dtype), share[..., None])
        torch.logaddexp(before, lse, out=before)

    def result(self) -> tuple[Float[Tensor, "heads T head_dim"], Float[Tensor, "heads T"]]:
        """A row that saw no key is 0, and its `lse` -inf."""
        if self._only is None:
            self._open()
        out, lse = self._only or (self._out, self._lse)
        return out.to(self._q.dtype), lse

    def _open(self) -> None:
        """Memory of our own: what a kernel returned may be kept by selective recomputation, and is not written to."""
        if self._out is not None:
            return
        dtype = accumulation_dtype(self._q.dtype)
        self._out = empty_rows(*self._q.shape, like=self._q, dtype=dtype)
        self._lse = self._q.new_empty(self._q.shape[1::-1], dtype=dtype).T
        if self._only is None:
            self._out.zero_()
            self._lse.fill_(-torch.inf)
        else:
            self._out.copy_(self._only[0])
            self._lse.copy_(self._only[1])
            self._only = None


class Sum:
    """Parts of a gradient added up, in fp32 (fp64 for fp64). Parts are given away: one that holds the others becomes the sum."""

    def __init__(self, like: Float[Tensor, "heads n head_dim"]) -> None:
        self._like, self._dtype = like, accumulation_dtype(like.dtype)
        self._rows, self._part = slice(0, 0), None  # nothing stands elsewhere

    def add(self, rows: slice | Int[Tensor, " rows"], part: Float[Tensor, "heads rows head_dim"]) -> None:
        if isinstance(rows, Tensor):
            self.result().index_add_(1, rows, part)
            return
        if self._part is None:
            self._rows, self._part = rows, part
            return
        if _within(self._rows, rows):
            (rows, part), (self._rows, self._part) = (self._rows, self._part), (rows, part)
        elif not _within(rows, self._rows):
            self.result()
        self._part = self._part.to(self._dtype)
        self._part[:, rows.start - self._rows.start : rows.stop - self._rows.start] += part

    def result(self) -> Float[Tensor, "heads n head_dim"]:
        """All rows; those that had no part are 0."""
        n = self._like.shape[1]
        if self._part is None or self._part.shape[1] < n:
            whole = empty_rows(*self._like.shape, like=self._like, dtype=self._dtype).zero_()
            if self._part is not None:
                whole[:, self._rows] = self._part.to(self._dtype)
            self._rows, self._part = slice(0, n), whole
        self._part = self._part.to(self._dtype)
        return self._part


def _within(inner: slice, outer: slice) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop


class Ring:
    """Who sends what to whom: at hop h keys go to the rank h places on, and come from the rank h places back.

    Every rank posts its messages in the same order, and those of one hop at once, so that none waits for another in a circle.
    """

    def __init__(self, plan: RingPlan, group: dist.ProcessGroup | None) -> None:
        self.plan, self.group = plan, group
        self.last = len(plan.slices) - 1  # hop
        self._leaving: deque[tuple[list[Tensor], list[dist.Work]]] = deque()

    def send_keys(self, hop: int, k: Float[Tensor, "kv_heads T head_dim"], v: Tensor) -> Coming:
        """This rank's keys and values go where they are seen, and those seen here at this hop come."""
        rows = self._rows(hop)
        leaving = [x[:, rows].contiguous() for x in (k, v)]
        received = [x.new_empty(len(x), self.plan.receive_sizes[hop], x.shape[2]) for x in (k, v)]
        return self._exchange(leaving, received, hop, KEYS)

    def send_home(self, hop: int, dk: Sum, dv: Sum) -> Coming:
        """What the keys of a hop get from this rank's queries goes to their rank, and what this rank's keys get comes."""
        leaving = [x.result().transpose(0, 1).contiguous() for x in (dk, dv)]
        received = [x.new_empty(self.plan.send_sizes[hop], *x.shape[1:]) for x in leaving]
        return self._exchange(leaving, received, -hop, GRADIENTS)

    def bring_home(self, hop: int, returning: Coming, own: tuple[Sum, Sum]) -> None:
        """Add what comes to the gradients of this rank's keys and values."""
        for total, part in zip(own, returning.take(), strict=True):
            if len(part):
                total.add(self._rows(hop), part.transpose(0, 1))

    def finish(self) -> None:
        """Everything that was sent has left."""
        while self._leaving:
            self._let_go()

    def _rows(self, hop: int) -> slice | Int[Tensor, " rows"]:
        """Those of this rank's keys that the rank `hop` places on sees. On a CPU a range, if they are one: it needs no index."""
        start = sum(self.plan.send_sizes[:hop])
        rows = self.plan.send[start : start + self.plan.send_sizes[hop]]
        if len(rows) and rows.device.type == "cpu" and int(rows[-1] - rows[0]) == len(rows) - 1:
            return slice(int(rows[0]), int(rows[-1]) + 1)
        return rows

    def _exchange(self, leaving: list[Tensor], received: list[Tensor], shift: int, tag: int) -> Coming:
        """Tensors to the rank `shift` places on, and others from the rank as many places back. Empty ones do not travel."""
        if len(self._leaving) > 2:  # a rank that computes little would run ahead of the others with all that it sends in memory
            self._let_go()
        rank, size = dist.get_rank(self.group), self.last + 1
        on, back = {"group_peer": (rank + shift) % size}, {"group_peer": (rank - shift) % size}
        sends = [dist.P2POp(dist.isend, x, group=self.group, tag=tag, **on) for x in leaving if x.numel()]
        receives = [dist.P2POp(dist.irecv, x, group=self.group, tag=tag, **back) for x in received if x.numel()]
        requests = dist.batch_isend_irecv(sends + receives) if sends or receives else []
        # NCCL has one request for all of them: then it is waited for where something comes.
        apart = len(sends) if len(requests) == len(sends) + len(receives) else 0 if receives else len(requests)
        self._leaving.append((leaving, requests[:apart]))
        return Coming(leaving, received, requests[apart:])

    def _let_go(self) -> None:
        for request in self._leaving.popleft()[1]:
            request.wait()


class Coming(NamedTuple):
    """Tensors on their way."""

    sent: list[Tensor]  # at the same time: kept until the others are here
    received: list[Tensor]
    requests: list[dist.Work]

    def take(self) -> list[Tensor]:
        for request in self.requests:
            request.wait()
        return self.received
