"""What ring attention is predicted to cost, hop by hop, from the very slices that the ranks would compute.

lengths --plan_sequence--> SequencePlan --ring_slices--> pairs and keys of every rank and hop --Machine--> seconds, what is hidden

While a rank computes a hop, the keys of its next are on their way to it. Going back the hops come in reverse, from the last,
whose keys are still there, to its own keys; the gradients of one hop's keys travel home, in fp32, while the next is computed.
What takes longer than the computation beside it is waited for. Ranks are taken to be in step, and links to carry both
directions at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmpt.config import TransformerConfig
from mmpt.parallel.layout import Layout
from mmpt.parallel.planner import SequencePlan, ring_slices
from mmpt.types import Slice

Direction = Literal["forward", "backward"]

FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
"""Matrix products over all pairs of a query and a key: scores and the mixture of values; scores again, and four gradients."""
GRADIENT_BYTES = 4  # of a number that travels home


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a rank can do."""

    flops: float  # FLOP/s of the attention kernel
    bandwidth: float  # bytes/s between neighbours of the ring, one way
    latency: float = 0.0  # seconds from one rank to another, whatever the size


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Those of one rank, and how its keys travel."""

    queries: int
    keys: int
    dim: int
    bytes: int  # of a number of keys and values

    @classmethod
    def of(cls, config: TransformerConfig, layout: Layout, number_bytes: int = 2) -> Heads:
        share = layout.ulysses * layout.tp
        return cls(queries=config.n_heads // share, keys=config.kv_heads // share, dim=config.head_dim, bytes=number_bytes)


@dataclass(frozen=True, kw_only=True)
class Hop:
    """What one rank does at one hop of one layer."""

    number: int
    pairs: int  # of a query and a key
    received: int  # keys
    sent: int  # keys

    def flops(self, heads: Heads, direction: Direction) -> int:
        products = FORWARD_PRODUCTS if direction == "forward" else BACKWARD_PRODUCTS
        return 2 * products * self.pairs * heads.queries * heads.dim


@dataclass(frozen=True, kw_only=True)
class Window:
    """The computation of a hop, and what is on its way beside it."""

    hop: int
    compute: float  # seconds
    bytes: int  # in the busier direction
    transfer: float  # seconds

    @property
    def waited(self) -> float:
        return max(self.transfer - self.compute, 0.0)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One rank's way through its hops."""

    windows: tuple[Window, ...]

    @property
    def seconds(self) -> float:
        return sum(window.compute + window.waited for window in self.windows)

    @property
    def hidden(self) -> float:
        """The share of the transfers' time that computation hides; 1 where nothing is sent."""
        transfer = sum(window.transfer for window in self.windows)
        return 1 - sum(window.waited for window in self.windows) / transfer if transfer else 1.0


def hops_of(plan: SequencePlan) -> tuple[tuple[Hop, ...], ...]:
    """Every rank's hops."""
    slices, received = zip(*(ring_slices(plan, rank) for rank in range(plan.ranks)), strict=True)
    ranks = []
    for rank in range(plan.ranks):
        own = [Hop(number=0, pairs=area(slices[rank][0]), received=0, sent=0)]
        for hop in range(1, plan.ranks):
            sent = received[(rank + hop) % plan.ranks][hop]
            own.append(Hop(number=hop, pairs=area(slices[rank][hop]), received=received[rank][hop], sent=sent))
        ranks.append(tuple(own))
    return tuple(ranks)


def area(slices: Sequence[Slice]) -> int:
    """Pairs of a query and a key that it sees."""
    full = sum((s.q_stop - s.q_start) * (s.k_stop - s.k_start) for s in slices if not s.causal)
    return full + sum((s.q_stop - s.q_start) * (s.q_stop - s.q_start + 1) // 2 for s in slices if s.causal)


def predict(hops: Sequence[Hop], heads: Heads, machine: Machine, direction: Direction) -> Pass:
    """One rank's pass over one layer."""
    numbers = 2 * heads.keys * heads.dim  # of a key and its value
    windows = []
    for hop in hops if direction == "forward" else reversed(hops):
        after = hop.number + (1 if direction == "forward" else -1)
        arriving = leaving = 0
        if 0 < after < len(hops):
            arriving, leaving = hops[after].received * numbers * heads.bytes, hops[after].sent * numbers * heads.bytes
        if direction == "backward" and hop.number + 1 < len(hops):
            before = hops[hop.number + 1]  # computed last: what its keys got goes where they came from
            arriving += before.sent * numbers * GRADIENT_BYTES
            leaving += before.received * numbers * GRADIENT_BYTES
        busier = max(arriving, leaving)
        windows.append(
            Window(
                hop=hop.number,
                compute=hop.flops(heads, direction) / machine.flops,
                bytes=busier,
                transfer=busier / machine.bandwidth + machine.latency if busier else 0.0,
            )
        )
    return Pass(windows=tuple(windows))


def slowest(ranks: Sequence[Sequence[Hop]], heads: Heads, machine: Machine, direction: Direction) -> tuple[int, Pass]:
    """The rank that all others wait for, and its pass."""
    passes = [predict(hops, heads, machine, direction) for hops in ranks]
    return max(enumerate(passes), key=lambda numbered: numbered[1].seconds)


def length_seen(lengths: Sequence[int]) -> float:
    """Tokens of the document that a token stands in, on average: E[n^2] / E[n]."""
    return sum(n * n for n in lengths) / max(sum(lengths), 1)


def length_that_hides(plan: SequencePlan, heads: Heads, machine: Machine, direction: Direction) -> float:
    """What `length_seen` must be for computation to hide communication: 2 kappa (R - 1) (kv heads / heads) (FLOP/s / bytes/s) for
    causal documents and two bytes a number, and in the backward pass 1.2 times that."""
    bytes_of_a_key = 2 * heads.keys * heads.dim * (heads.bytes + (GRADIENT_BYTES if direction == "backward" else 0))
    products = FORWARD_PRODUCTS if direction == "forward" else BACKWARD_PRODUCTS
    flops_of_a_token_per_length = products * heads.queries * heads.dim  # of causal attention: half a pair for each token of it
    return plan.remote * (plan.ranks - 1) * bytes_of_a_key / flops_of_a_token_per_length * machine.flops / machine.bandwidth


def ulysses_bytes(tokens: int, heads: Heads, layout: Layout) -> int:
    """That one rank sends in a layer's forward pass and, as many again, in its backward pass, before and after attention.

    `tokens` are those of its ring rank. Nothing is computed beside it.
    """
    numbers = (
        2 * (heads.queries + heads.keys) * heads.dim * tokens // layout.ulysses
    )  # q, k, v there, out back: of all its tokens
    return numbers * (layout.ulysses - 1) * heads.bytes
