"""The whole model on a batch that ranks share: losses, embeddings, hidden states and every gradient are one process's, in fp64.

Four modalities, both levels of contrast, experts; masks causal, media and bidirectional; BERT's head; towers alone. Some batches
leave ranks without a picture, a sound, a pair or a label: they take part all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from split_batches import MODEL, Made, made_batch, without_fusion
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmpt.config import ModelConfig
from mmpt.config.run import ObjectivesConfig
from mmpt.model.multimodal import MultimodalModel
from mmpt.objectives.combine import combine, contrast_losses, contrast_terms, global_counts, local_terms
from mmpt.parallel.exchange import _Exchange
from mmpt.parallel.layout import Layout
from mmpt.parallel.mesh import World, make_mesh
from mmpt.parallel.sequence import SplitSequence, Splitter, refuse_unequal
from mmpt.parallel.tensor import shard_blocks
from mmpt.types import AUDIO, IMAGE, MASKED, SPAN, TEXT, VIDEO, PackedBatch, UserError

TOLERANCE = 1e-10  # of the norm
ALONE = World(rank=0, size=1, device=torch.device("cpu"), mesh=None)
OBJECTIVES = ObjectivesConfig.model_validate(
    {"next_token": {"z_loss": 1e-2}, "contrastive": {"tower": {"loss": "sigmoid"}, "backbone": {"weight": 0.7}}}
)
EXPERTS = {"count": 4, "top_k": 2, "shared": 1}
BERT = {"mask": "bidirectional", "positions": "learned", "max_positions": 64, "norm": "layer", "norm_placement": "post"}
MODELS: dict[str, dict] = {
    "media, experts": {"logit_bias_init": -2.0, "transformer": {"n_kv_heads": 2, "experts": EXPERTS}},
    "causal": {"logit_bias_init": -2.0, "transformer": {"dim": 32, "mask": "causal", "rope_sections": (2, 1, 1)}},
    "bert": {"levels": ("backbone",), "token_types": 2, "embedding_norm": True, "head": "bert", "transformer": BERT},
    "towers": {"levels": ("tower",), "logit_bias_init": -2.0, "fusion": False, "transformer": {"mask": "causal"}},
}
MIXED = (
    [
        Made(((IMAGE, 3), (TEXT, 6), (VIDEO, 2), (TEXT, 4)), contrasted=True),
        Made(((TEXT, 5), (AUDIO, 4)), contrasted=True),
        Made(((TEXT, 7), (IMAGE, 1)), task=MASKED, second=3, next_sentence=1),
    ],
    [
        Made(((TEXT, 3), (AUDIO, 2), (IMAGE, 2), (VIDEO, 1), (TEXT, 5)), contrasted=True),
        Made(((TEXT, 9),), lost=True),
        Made(((IMAGE, 4), (TEXT, 2)), contrasted=True),
        Made(((TEXT, 8),), task=SPAN, second=4, next_sentence=0),
    ],
)
ONE_PICTURE = ([Made(((IMAGE, 2), (TEXT, 21)), contrasted=True)], [Made(((TEXT, 20),), predicted=False)])
TEXTS = ([Made(((TEXT, 15),))], [Made(((TEXT, 2),), predicted=False), Made(((TEXT, 1),))])
PADDING = ([Made(((IMAGE, 3),), lost=True)], [])
BATCHES = {"mixed": MIXED, "one picture": ONE_PICTURE, "texts": TEXTS, "padding": PADDING}

Case = tuple[str, str]  # model and batch
Found = dict[str, Tensor]
Share = tuple[Found, Tensor, Tensor]  # see `share`
Run = tuple[Layout, str, list[Case]]  # the name in MUTATIONS says what is broken in it on purpose

CASES: list[Case] = [(model, batch) for model in MODELS for batch in BATCHES]


def model_config(name: str) -> ModelConfig:
    tree = MODEL.model_dump()
    for key, value in MODELS[name].items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) else value
    return ModelConfig.model_validate(tree)


def case_batch(model: str, batch: str, numbers: tuple[int, ...] = (0, 1)) -> PackedBatch:
    """Those packs of a batch, for a model: both, or one of two data ranks'."""
    made = made_batch(BATCHES[batch], model_config(model), numbers=numbers, mean=model == "causal")
    return without_fusion(made) if model == "towers" else made


def computed(case: Case, batch: PackedBatch, world: World = ALONE) -> Found:
    """This rank's part of every loss and gradient, of the hidden states and of the embeddings."""
    model = MultimodalModel(model_config(case[0])).initialize(seed=0).double()
    if world.layout.tp > 1:
        shard_blocks(model.transformer, world.mesh["tp"])
    if batch.split is not None:
        model.sequence = split_sequence(world)
    group = world.group
    counts = global_counts([batch], group)
    output = model(batch)
    contrastive = OBJECTIVES.contrastive
    pairs = contrast_losses(contrastive, output.embeddings, batch.slots, counts, group)
    terms = {**local_terms(OBJECTIVES, output, batch, counts), **contrast_terms(contrastive, pairs, counts)}
    losses = combine(terms)
    sum(losses.values(), output.hidden.sum() * 0).backward()
    found = {f"loss/{name}": term.sum.detach() / term.count for name, term in terms.items()}
    found |= {f"correct/{name}": loss.correct.double() for name, loss in pairs.items()}
    found |= {f"gradient/{name}": whole_gradient(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    found |= {f"load/{number}": layer.load.double() for number, layer in enumerate(output.routing)}
    found |= {f"rows/embeddings/{level}": vectors.vectors.detach() for level, vectors in output.embeddings.items()}
    return found | {"rows/hidden": output.hidden.detach() * (batch.document_ids >= 0)[:, None]}


def whole_gradient(gradient: Tensor | DTensor) -> Tensor:
    """That of what tp has cut is put together, and shared evenly by the ranks that have it: to be added up over all ranks."""
    return gradient.full_tensor() / gradient.device_mesh.size() if isinstance(gradient, DTensor) else gradient


def body(runs: list[Run]) -> list[list[Share]]:
    """What this rank has of every case of every run."""
    device, size = torch.device("cpu"), dist.get_world_size()
    seen = []
    for layout, mutation, cases in runs:
        world = World(rank=dist.get_rank(), size=size, device=device, mesh=make_mesh(layout, device))
        with MUTATIONS[mutation]():
            seen.append([share(case, world) for case in cases])
    return seen


def share(case: Case, world: World) -> Share:
    """What all ranks found together, and which tokens and slots of all batches the rows of this rank are."""
    layout, whole = world.layout, case_batch(*case)
    batch = whole if layout.data == 1 else case_batch(*case, numbers=(world.data_rank,))
    splitter = Splitter(model_config(case[0]), layout.ring, layout.ulysses, layout.tp, world.sequence_rank)
    part = splitter(batch)
    tokens = splitter(replace(batch, tokens=torch.arange(len(batch.tokens)))).tokens
    found = computed(case, part, world)
    for name in sorted(name for name in found if not name.startswith("rows/")):
        dist.all_reduce(found[name], group=world.group)
    before = world.data_rank * torch.tensor([len(batch.tokens), len(whole.slots.pair) - len(batch.slots.pair)])
    return found, tokens + before[0], part.split.slot_numbers + before[1]


def split_sequence(world: World) -> SplitSequence:
    groups = {"ring": world.ring_group, "ulysses": world.ulysses_group, "tp": world.tp_group}
    return SplitSequence(sequence=world.sequence_group, **groups)


def some_gradients(context: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    """The way back of an exchange, but that of rows which several ranks look at the gradient of one is taken."""
    route = context.route
    back = grad.new_empty(sum(route.send_sizes), grad.shape[1])
    dist.all_to_all_single(back, grad.contiguous(), list(route.send_sizes), list(route.receive_sizes), group=context.group)
    return grad.new_zeros(context.rows, grad.shape[1]).index_copy_(0, route.send, back), None, None


MUTATIONS: dict[str, Callable[[], AbstractContextManager]] = {
    "none": nullcontext,
    "gradients of several ranks are not added": lambda: patch.object(_Exchange, "backward", staticmethod(some_gradients)),
    "experts are balanced on each rank": lambda: patch.object(SplitSequence, "add_up", lambda self, counts: counts),
    "slots of texts and media are mixed up": lambda: patch.object(Splitter, "_items", mixed_up_items),
}


def mixed_up_items(splitter: Splitter, *arguments: Any) -> tuple[Any, Tensor]:
    route, rows = ITEMS(splitter, *arguments)
    return route, rows.flip(0)


ITEMS = Splitter._items
CORE: list[Case] = [("media, experts", "mixed"), ("media, experts", "one picture"), ("bert", "mixed")]
MODES: list[Case] = [(model, "mixed") for model in MODELS]
RUNS: dict[int, list[Run]] = {
    2: [(Layout(ring=2), "none", CASES), (Layout(ulysses=2), "none", CORE), (Layout(tp=2), "none", MODES)],
    4: [
        (Layout(ring=4), "none", [*CORE, ("media, experts", "texts"), ("causal", "padding")]),
        (Layout(ring=2, ulysses=2), "none", CORE[::2]),
        (Layout(ring=2, tp=2), "none", CORE[::2]),
        (Layout(dp_shard=2, ring=2), "none", CORE),
    ],
}
BROKEN: list[Run] = [(Layout(ring=2), mutation, [("media, experts", "mixed")]) for mutation in MUTATIONS if mutation != "none"]


@pytest.fixture(scope="module")
def one() -> dict[Case, Found]:
    return {case: computed(case, case_batch(*case)) for case in CASES}


def differences(shares: list[Share], expected: Found) -> list[str]:
    """What is not as in one process, and by how much; `shares` are those of all ranks, of one case."""
    tokens, slots = (torch.cat(numbers) for numbers in zip(*(share[1:] for share in shares), strict=True))
    founds, wrong = [share[0] for share in shares], []
    for name, value in expected.items():
        together = founds[0][name]
        if name.startswith("rows/"):
            order = tokens if name == "rows/hidden" else slots
            together = torch.cat([found[name] for found in founds])[order.argsort()]
        distance, norm = (together - value).norm(), value.norm()
        if not distance <= TOLERANCE * norm + 1e-14:
            wrong.append(f"{name} is {distance:.1e} off, of {norm:.1e}")
    return wrong + [f"{found.keys() ^ expected.keys()} here or there" for found in founds if found.keys() != expected.keys()]


def of_two() -> tuple[list[list[Share]], Tensor]:
    return body(RUNS[2] + BROKEN), gathered_positions()


def gathered_positions() -> Tensor:
    """Of two tp ranks, with two tokens each, whose places have three axes."""
    world = World(rank=dist.get_rank(), size=2, device=torch.device("cpu"), mesh=make_mesh(Layout(tp=2), torch.device("cpu")))
    return split_sequence(world).positions(torch.arange(12).view(2, 3, 2)[dist.get_rank()])


@pytest.fixture(scope="module")
def two() -> list[tuple[list[list[Share]], Tensor]]:
    return on_ranks(2, of_two)


def assert_one_process(runs: list[Run], by_rank: list[list[list[Share]]], one: dict[Case, Found]) -> None:
    for (layout, _, cases), *of_ranks in zip(runs, *by_rank, strict=True):
        for case, *shares in zip(cases, *of_ranks, strict=True):
            assert not differences(shares, one[case]), (layout, case)


def test_two_ranks_are_one_process(two: list[tuple[list[list[Share]], Tensor]], one: dict[Case, Found]):
    assert_one_process(RUNS[2], [found[: len(RUNS[2])] for found, _ in two], one)


def test_four_ranks_are_one_process(one: dict[Case, Found]):
    assert_one_process(RUNS[4], on_ranks(4, body, RUNS[4]), one)


def test_what_is_broken_is_seen(two: list[tuple[list[list[Share]], Tensor]], one: dict[Case, Found]):
    """The same comparison, of ranks that go wrong in one place."""
    for (_, mutation, (case,)), *shares in zip(BROKEN, *(found[len(RUNS[2]) :] for found, _ in two), strict=True):
        assert differences([share for (share,) in shares], one[case]), mutation


def test_tp_ranks_turn_the_tokens_of_all_of_them(two: list[tuple[list[list[Share]], Tensor]]):
    for _, positions in two:
        assert positions.tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]


def told(change: bool) -> str:
    """What a rank says to a batch of which rank 1 may have read another."""
    config, rank = model_config("causal"), dist.get_rank()
    batch = case_batch("causal", "texts")
    if change and rank == 1:
        batch = replace(batch, tokens=batch.tokens.index_fill(0, torch.tensor([3]), 1))
    try:
        refuse_unequal([Splitter(config, ring=2, ulysses=1, tp=1, part=rank)(batch)], dist.group.WORLD)
    except UserError as error:
        return str(error)
    return ""


def tell() -> list[str]:
    return [told(change) for change in (False, True)]


def test_ranks_that_read_different_batches_are_told():
    for same, other in on_ranks(2, tell):
        assert same == "" and other.startswith("ranks that share a sequence read different batches before pack 0")
