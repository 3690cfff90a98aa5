"""Contrast of all micro-batches of a step with one another, in the memory of one: GradCache (arXiv 2101.06983).

micro-batches --model, without graph--> embeddings --contrast of all with all--> gradients by embeddings, scale and bias
micro-batch   --model, again, with graph--> the same embeddings; loss.backward() with those gradients put in

Every gradient is that of one big batch, the scale's and the bias's included, at the cost of a second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from mmpt.config import ContrastiveConfig
from mmpt.model.multimodal import MultimodalModel
from mmpt.objectives.combine import Counts, combine, contrast_losses, contrast_terms, contrasted
from mmpt.objectives.contrastive import PairLoss
from mmpt.types import NOTHING, Embeddings, EmbeddingSlots, PackedBatch

RandomState = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class CachedContrast:
    """The contrast of a step, and what it asks of each micro-batch's embeddings."""

    losses: Mapping[str, PairLoss]  # of all micro-batches together, detached; documents are numbered as `join_slots` does
    gradients: Mapping[str, tuple[tuple[Float[Tensor, "P E"], ...], Tensor, Tensor | None]]  # by vectors, scale, bias
    states: tuple[RandomState, ...]  # in which each micro-batch was computed

    @contextmanager
    def repeating(self, number: int) -> Iterator[None]:
        """With the random numbers that micro-batch `number` had in the first pass."""
        state = random_state()
        set_random_state(self.states[number])
        yield
        set_random_state(state)

    def pull(self, number: int, embeddings: Mapping[str, Embeddings]) -> Float[Tensor, ""]:
        """A number whose gradients are those of the contrast of the step, as far as micro-batch `number` has a part in it.

        The scale and the bias, of which all micro-batches have the same, are pulled once.
        """
        pulls = []
        for level, (vectors, scale, bias) in self.gradients.items():
            found = embeddings[level]
            pulls.append((found.vectors * vectors[number]).sum())
            if number == 0:
                pulls.append((found.scale * scale).sum())
            if number == 0 and bias is not None:
                pulls.append((found.bias * bias).sum())
        return torch.stack(pulls).sum()


def cache_contrast(
    model: MultimodalModel,
    batches: Sequence[PackedBatch],
    config: ContrastiveConfig,
    counts: Counts,
    group: dist.ProcessGroup | None,
    precision: Callable[[], AbstractContextManager],
) -> CachedContrast | None:
    """The first pass, and the contrast; None where the step has nothing to contrast. `precision`: the autocast to compute in."""
    chosen = dict.fromkeys(level for level, _ in contrasted(config, model.config.levels, counts))
    if not chosen:
        return None
    parts, states = [], []
    for batch in batches:
        states.append(random_state())
        with torch.no_grad(), precision():
            parts.append(model(batch).embeddings)
    whole = join_embeddings(parts)
    for embeddings in whole.values():
        for leaf in filter(lambda t: t is not None, (embeddings.vectors, embeddings.scale, embeddings.bias)):
            leaf.requires_grad_()
    with precision():
        losses = contrast_losses(config, whole, join_slots(batches), counts, group)
    combine(contrast_terms(config, losses, counts))["contrastive"].backward()
    sizes = [len(batch.slots.pair) for batch in batches]
    return CachedContrast(
        losses={name: replace(loss, sum=loss.sum.detach()) for name, loss in losses.items()},
        gradients={level: _gradients(whole[level], sizes) for level in chosen},
        states=tuple(states),
    )


def _gradients(embeddings: Embeddings, sizes: Sequence[int]) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
    return embeddings.vectors.grad.split(sizes), embeddings.scale.grad, None if embeddings.bias is None else embeddings.bias.grad


def join_embeddings(parts: Sequence[Mapping[str, Embeddings]]) -> dict[str, Embeddings]:
    """The embeddings of several micro-batches as those of one, detached. Scale and bias are copies: parameters may lie in
    memory that FSDP frees."""
    joined = {}
    for level, first in parts[0].items():
        vectors, norms = (torch.cat([getattr(part[level], name).detach() for part in parts]) for name in ("vectors", "norms"))
        scale, bias = (t if t is None else t.detach().clone() for t in (first.scale, first.bias))
        joined[level] = Embeddings(vectors=vectors, norms=norms, scale=scale, bias=bias)
    return joined


def join_slots(batches: Sequence[PackedBatch]) -> EmbeddingSlots:
    """The slots of several micro-batches as those of one: documents are numbered on from batch to batch, items no more."""
    before, pairs = 0, []
    for batch in batches:
        pairs.append(batch.slots.pair + before)
        before += batch.documents
    modality, content = (torch.cat([getattr(batch.slots, name) for batch in batches]) for name in ("modality", "content"))
    return EmbeddingSlots(modality=modality, item=torch.full_like(modality, NOTHING), pair=torch.cat(pairs), content=content)


def random_state() -> RandomState:
    """Of this device's generators: the CPU's, and the accelerator's where there is one."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def set_random_state(state: RandomState) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
