"""Batches for both sides of a comparison, and the comparison: our packed documents against a library's, on the same weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmpt.config import ModelConfig, load_model
from mmpt.model.convert import initialize_from
from mmpt.model.convert.architecture import Architecture
from mmpt.model.convert.rules import to_theirs
from mmpt.model.multimodal import MultimodalModel
from mmpt.types import (
    IGNORE,
    NOTHING,
    EmbeddingSlots,
    LoaderState,
    LoadReport,
    MediaBatch,
    PackedBatch,
    PlanCursor,
    Segments,
)

CONFIGS = Path(__file__).parents[3] / "configs"
TOLERANCE = 1e-5

Documents = Sequence[Sequence[int]]


def shrunk(name: str, overrides: Iterable[str]) -> ModelConfig:
    """A published architecture of configs/models/, made tiny."""
    return load_model(CONFIGS / "models" / f"{name}.yaml", list(overrides))


@torch.no_grad()
def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter moved, so that no norm is 1 and no bias 0: what is left out, or mixed up, shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def built(config: ModelConfig, **init: dict) -> MultimodalModel:
    """Our model, with the weights that an `init` names: built(config, transformer={"hf": FOLDER}), or model={...}."""
    tree = config.model_dump()
    for place, source in init.items():
        (tree if place == "model" else tree[place])["init"] = source
    config = ModelConfig.model_validate(tree)
    model = MultimodalModel(config).initialize(seed=1)
    assert initialize_from(model, config)
    return model


def no_media(values: int = 0) -> MediaBatch:
    zero = torch.zeros(1, dtype=torch.int64)
    return MediaBatch(
        values=torch.empty(0, values), cu_seqlens=zero, grid=torch.empty(0, 3, dtype=torch.int64), times=torch.empty(0)
    )


def packed(packs: Sequence[Documents], labels: Sequence[Documents] | None = None, **fields: object) -> PackedBatch:
    """Packs of documents, end to end, padded to the longest pack. Without `labels` each token is to say the next."""
    length = max(sum(map(len, pack)) for pack in packs)
    rows: dict[str, list[int]] = {name: [] for name in ("tokens", "labels", "position_ids", "document_ids")}
    number = 0
    for pack, wanted in zip(packs, labels or [[None] * len(pack) for pack in packs], strict=True):
        for document, said in zip(pack, wanted, strict=True):
            rows["tokens"] += document
            rows["labels"] += [*document[1:], IGNORE] if said is None else said
            rows["position_ids"] += range(len(document))
            rows["document_ids"] += [number] * len(document)
            number += 1
        padding = length - sum(map(len, pack))
        for name, value in (("tokens", 0), ("labels", IGNORE), ("position_ids", 0), ("document_ids", NOTHING)):
            rows[name] += [value] * padding
    tensors = {name: torch.tensor(row) for name, row in rows.items()}
    nothing = torch.full((len(packs) * length,), NOTHING)
    none = torch.empty(0, dtype=torch.int64)
    state = LoaderState(fingerprint={}, cursor=PlanCursor(window=0, pack=0, sources={}), packs_consumed=0)
    whole = {
        **tensors,
        "position_ids": tensors["position_ids"][None],
        "token_types": torch.zeros_like(nothing),
        "media_index": nothing,
        "pool_index": nothing,
        "span_ids": nothing,
        "images": no_media(),
        "audios": no_media(),
        "videos": no_media(),
        "slots": EmbeddingSlots(modality=none, item=none, pair=none, content=none),
        "segments": segments_of(tensors["document_ids"], len(packs)),
        "packs": len(packs),
        "kinds": none,
        "provenance": (),
        "state": state,
        "report": LoadReport(milliseconds={}, tokens={}, faults=()),
    }
    return PackedBatch(**{**whole, **fields})


def segments_of(document_ids: Tensor, packs: int) -> Segments:
    """Of documents that are numbered from 0, one segment each, in packs of equal length."""
    numbers = torch.arange(int(document_ids.max()) + 1)
    first = (document_ids[None] == numbers[:, None]).int().argmax(1)
    pack = first // (len(document_ids) // packs)
    return Segments(document=numbers, task=0 * numbers, next_sentence=0 * numbers + IGNORE, pack=pack, first=first)


def rows_of(batch: PackedBatch, rows: Tensor) -> list[Tensor]:
    """Rows of a batch, document by document."""
    return [rows[batch.document_ids == number] for number in range(int(batch.document_ids.max()) + 1)]


def file_tensors(module: nn.Module, folder: Path) -> dict[str, Tensor]:
    """What transformers itself writes of a module, under the names of published files."""
    module.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def their_gradients(module: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The gradients under the names of published files: transformers saves them in the weights' place."""
    for parameter in module.parameters():
        parameter.data = parameter.grad
    return file_tensors(module, folder)


def our_gradients(model: MultimodalModel, architecture: Architecture) -> dict[str, Tensor]:
    """Ours under their names."""
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing
    return to_theirs(architecture.rules(model.config), {name: p.grad for name, p in model.named_parameters()})


def assert_near(ours: Tensor, theirs: Tensor, what: str = "", tolerance: float = TOLERANCE) -> None:
    """The largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    scale = theirs.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    difference = ((ours - theirs).abs().max() / scale).item()
    assert difference <= tolerance, f"{what}: {difference:.2e} of the largest value, {scale.item():.2e}"


def assert_all_near(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], zero: str = "-") -> None:
    """Every gradient of theirs, by name, and no other. Names with `zero` in them have none but for rounding, on both sides.

    Such are biases of keys: what all keys share changes no softmax.
    """
    assert ours.keys() == theirs.keys()
    largest = max(tensor.abs().max() for tensor in theirs.values())
    for name, tensor in theirs.items():
        if zero in name:
            assert max(tensor.abs().max(), ours[name].abs().max()) < 1e-7 * largest, name
        else:
            assert_near(ours[name], tensor, name)


def assert_same_bytes(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(ours[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name
