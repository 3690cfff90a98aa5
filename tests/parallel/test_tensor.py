"""The shared transformer cut over ranks: outputs and every gradient are those of one process."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmpt.config import BlocksConfig, ExpertsConfig
from mmpt.model.attention import AttentionLayout
from mmpt.model.experts import Experts, Origin
from mmpt.model.rotary import rotary_angles
from mmpt.model.transformer import Transformer
from mmpt.parallel.layout import Layout
from mmpt.parallel.mesh import BLOCK_SHARD, SHARD, World, make_mesh, shard_mesh
from mmpt.parallel.tensor import shard_blocks

CPU = torch.device("cpu")
DIM, HEADS, PACKS = 32, 8, 2
NUMBERS = torch.tensor([0, 0, 0, 1, 2, 2, 2, -1, 3, 3, 3, 3, 3, 4, 4, -1])  # two packs of eight tokens
VARIANTS = {
    "llama-like": {"n_kv_heads": 4, "qk_norm": True},
    "bert-like": {"norm": "layer", "norm_placement": "post", "bias": True, "activation": "gelu"},
    "clip-like": {"norm": "layer", "bias": True, "activation": "quick_gelu"},
    "biased gates": {"bias": True, "n_kv_heads": 8},
}
EXPERTS = {
    "dense": None,
    "auxiliary": ExpertsConfig(count=4, top_k=2, shared=1),
    "bias": ExpertsConfig(count=4, top_k=2, balance="bias"),
}
CASES = (
    ("llama-like", "dense"),
    ("bert-like", "dense"),
    ("clip-like", "dense"),
    ("biased gates", "dense"),
    ("llama-like", "auxiliary"),
    ("bert-like", "bias"),
)
PAIR = Layout(tp=2)
FOUR = (Layout(tp=4), Layout(ring=2, tp=2), Layout(dp_replicate=2, tp=2), Layout(dp_shard=2, tp=2))


@dataclass(frozen=True)
class Gathered:
    """In the ring's place: each rank gathers all keys, and keeps the outputs of its own queries."""

    whole: AttentionLayout
    group: dist.ProcessGroup | None
    order: None = None
    inverse: None = None
    short: bool = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [_Gather.apply(x, self.group)[self.whole.order] for x in (q, k, v)]
        out = self.whole.attend(*rows)[self.whole.inverse]
        return out.chunk(dist.get_world_size(self.group))[dist.get_rank(self.group)] if self.group else out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        if group is None:
            return x.view_as(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        if ctx.group is None:
            return grad, None
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


class Products(TorchDispatchMode):
    """How many products of matrices there are."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.mm.default
        return function(*args, **(kwargs or {}))


def built(variant: str, experts: str, dtype: torch.dtype) -> Transformer:
    """With norms and biases away from where they start, so that each is seen to take part."""
    config = BlocksConfig(**({"dim": DIM, "layers": 2, "n_heads": HEADS, "ffn_dim": 48, "qk_norm": False} | VARIANTS[variant]))
    torch.manual_seed(0)
    model = Transformer(config, experts=EXPERTS[experts])
    model.initialize()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.to(dtype)


def inputs(copy: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states, and the gradient that comes from above: different ones for each group of ranks that reads its own packs."""
    generator = torch.Generator().manual_seed(5 + copy)
    return tuple(torch.randn(len(NUMBERS), DIM, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


def angles(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos, sin = rotary_angles(torch.arange(len(NUMBERS))[None], DIM // HEADS, 1e4)
    return cos.to(dtype), sin.to(dtype)


def packs_of(add_up) -> Origin:
    numbers = torch.where(NUMBERS < 0, -1, torch.arange(len(NUMBERS)) * PACKS // len(NUMBERS))
    return Origin(numbers, PACKS, add_up)


def differentiated(model: Transformer, x: Tensor, upstream: Tensor, autocast: bool, *arguments) -> dict[str, Tensor]:
    """Outputs, and gradients of the input and, unless FSDP has them, of every parameter."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        out, routing = model(x, *arguments)
    balance = sum(layer.balance.sum() for layer in routing if layer.balance is not None)
    ((out * upstream).sum() + balance).backward()
    return {"out": out.detach(), "x": x.grad, **{f"load {i}": layer.load for i, layer in enumerate(routing)}}


def alone(variant: str, experts: str, dtype: torch.dtype, copies: int = 1, autocast: bool = False) -> list[dict[str, Tensor]]:
    """What one process finds, for each group's packs; the gradients of parameters, over all of them, stand in the first."""
    model = built(variant, experts, dtype)
    layout = AttentionLayout.from_document_ids(NUMBERS, causal=True)
    arguments = layout, angles(dtype), packs_of(lambda counts: counts)
    found = [differentiated(model, *inputs(copy, dtype), autocast, *arguments) for copy in range(copies)]
    return [found[0] | {name: parameter.grad for name, parameter in model.named_parameters()}, *found[1:]]


def sharded(model: Transformer, world: World) -> Transformer:
    """As mmpt.parallel.apply does it."""
    shard_blocks(model, world.mesh["tp"])
    parts: list[nn.Module] = [block.ffn for block in model.blocks if isinstance(block.ffn, Experts)]
    for part in (*parts, *model.blocks, model):
        fully_shard(part, mesh=shard_mesh(world.mesh, BLOCK_SHARD if part in [*model.blocks] else SHARD))
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    return model


def over_ranks(
    layout: Layout,
    variant: str,
    experts: str,
    dtype: torch.dtype,
    *,
    fsdp: bool = True,
    recompute: str = "none",
    autocast: bool = False,
) -> list[dict[str, Tensor]]:
    """The same of all ranks together, as `alone` has it."""
    world = World(rank=dist.get_rank(), size=dist.get_world_size(), device=CPU, mesh=make_mesh(layout, CPU))
    model = built(variant, experts, dtype)
    model = sharded(model, world) if fsdp else shard_blocks(model, world.mesh["tp"])
    model.recompute = recompute
    parts, part, copy = layout.sequence, world.sequence_rank, world.data_rank

    def add_up(counts: Tensor) -> Tensor:
        counts = counts.clone()
        dist.all_reduce(counts, group=world.sequence_group)
        return counts

    rotary = tuple(rows.chunk(layout.ring)[part // layout.tp] for rows in angles(dtype))
    origin = packs_of(add_up)
    origin = origin._replace(pack=origin.pack.chunk(parts)[part])
    attention = Gathered(AttentionLayout.from_document_ids(NUMBERS, causal=True), world.ring_group)
    x, upstream = (rows.chunk(parts)[part] for rows in inputs(copy, dtype))
    found = differentiated(model, x, upstream, autocast, attention, rotary, origin)
    everyone: list = [None] * world.size
    dist.all_gather_object(everyone, found)
    groups = [everyone[start : start + parts] for start in range(0, world.size, parts)]
    whole = [
        {name: sum(one[name] for one in group) if "load" in name else torch.cat([one[name] for one in group]) for name in found}
        for group in groups
    ]
    for name, parameter in model.named_parameters():
        whole[0][name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return whole


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest one, relative to the largest number of the tensor in which it is."""
    assert found.keys() == expected.keys()
    return max((float((found[n] - x).abs().max() / x.abs().max().clamp(min=1e-12)), n) for n, x in expected.items())


def worst_in(layouts: tuple[Layout, ...], cases: tuple[tuple[str, str], ...]) -> tuple[float, str, str]:
    """In fp64, under FSDP as in a run."""
    found = []
    for layout in layouts:
        for variant, experts in cases:
            expected = alone(variant, experts, torch.float64, layout.data)
            for mine, theirs in zip(over_ranks(layout, variant, experts, torch.float64), expected, strict=True):
                found.append((*difference(mine, theirs), f"{layout} {variant} {experts}"))
    return max(found)


def test_four_ranks_equal_one_process():
    """As two do, below."""
    for worst in on_ranks(4, worst_in, FOUR, (CASES[0], CASES[3], CASES[5])):
        assert worst[0] < 1e-12, worst


LLAMA = ("llama-like", "dense")


def kinds_of_runs() -> dict:
    """What else is said of two ranks."""
    exact, single = alone(*LLAMA, torch.float64)[0], alone(*LLAMA, torch.float32)[0]
    found: dict = {"one process in bf16": difference(alone(*LLAMA, torch.float32, autocast=True)[0], exact)[0]}
    for autocast in (False, True):
        kept = over_ranks(PAIR, *LLAMA, torch.float32, autocast=autocast)[0]
        found["bf16" if autocast else "fp32"] = difference(kept, exact if autocast else single)[0]
        for recompute in ("selective", "full"):
            other = over_ranks(PAIR, *LLAMA, torch.float32, autocast=autocast, recompute=recompute)[0]
            found[f"{recompute}, autocast {autocast}"] = all(torch.equal(kept[name], other[name]) for name in kept)
    without = over_ranks(PAIR, "bert-like", "dense", torch.float64, fsdp=False)[0]
    found["without FSDP"] = difference(without, alone("bert-like", "dense", torch.float64)[0])[0]
    with pytest.MonkeyPatch.context() as patch:  # as if each rank had seen all tokens
        patch.setattr("mmpt.model.layers.Partial", Replicate)
        found["norms not summed"] = difference(over_ranks(PAIR, *LLAMA, torch.float64)[0], exact)
    return found


def one_step(recompute: str) -> tuple[dict[str, int], int, dict[str, tuple]]:
    """How often ranks talk and how many products there are, in a forward and a backward pass; and what a rank holds."""
    world = World(rank=dist.get_rank(), size=2, device=CPU, mesh=make_mesh(PAIR, CPU))
    model = shard_blocks(built(*LLAMA, torch.float32), world.mesh["tp"])
    model.recompute = recompute
    held = {
        name: (*p.placements, p.to_local().untyped_storage().nbytes() / p.nbytes)
        for name, p in model.blocks[0].named_parameters()
    }
    attention = Gathered(AttentionLayout.from_document_ids(NUMBERS, causal=True), None)
    x, upstream = (rows.chunk(2)[world.rank] for rows in inputs(0, torch.float32))
    for _ in range(2):  # at first DTensor also asks what an operator would return
        with Products() as products, CommDebugMode() as talk:
            differentiated(model, x, upstream, False, attention, angles(torch.float32))
    return {str(name): count for name, count in talk.get_comm_counts().items()}, products.count, held


@pytest.fixture(scope="module")
def pair() -> list[tuple]:
    """What two ranks find, all of it in one start."""
    return on_ranks(2, everything)


def everything() -> tuple:
    return worst_in((PAIR,), CASES), kinds_of_runs(), {recompute: one_step(recompute) for recompute in ("none", "selective")}


def test_two_ranks_equal_one_process(pair: list[tuple]):
    """Outputs, loads, and every gradient, to rounding."""
    for worst, _, _ in pair:
        assert worst[0] < 1e-12, worst


def test_precisions_and_recomputation(pair: list[tuple]):
    for _, found, _ in pair:
        assert found["fp32"] < 1e-5 and found["without FSDP"] < 1e-12
        assert found["bf16"] < 1.5 * found["one process in bf16"]
        assert all(found[f"{kind}, autocast {on}"] for kind in ("selective", "full") for on in (False, True))


def test_gradients_of_norms_that_are_not_summed_are_seen(pair: list[tuple]):
    for _, found, _ in pair:
        worst, name = found["norms not summed"]
        assert worst > 0.1 and "norm" in name


def test_what_ranks_send_and_hold(pair: list[tuple]):
    """In each of two blocks tokens are gathered twice, and products scattered twice; the backward pass mirrors that.

    Selective recomputation gathers again, but neither multiplies nor scatters.
    """
    halves = {"attention.qkv": 0, "attention.out": 1, "ffn.gate": 0, "ffn.up": 0, "ffn.down": 1}
    for _, _, found in pair:
        talk, products, held = found["none"]
        assert talk == {"c10d_functional.all_gather_into_tensor": 8, "c10d_functional.reduce_scatter_tensor": 8}
        again, products_again, _ = found["selective"]
        assert again == talk | {"c10d_functional.all_gather_into_tensor": 8 + 4}
        assert products_again == products == 2 * 5 * 3
        cut = {f"{name}.weight": (Shard(dim), 0.5) for name, dim in halves.items()}
        assert {name: share for name, share in held.items() if "norm" not in name} == cut
        assert {share for name, share in held.items() if "norm" in name} == {(Replicate(), 1.0)}
