"""Checkpoints: tensors through torch's distributed checkpoint, everything else as JSON, written aside and then renamed.

    runs/NAME/checkpoints/step-00000100/{.metadata, *.distcp, state.json}

Nothing in a checkpoint can run code: tensors are read with weights_only, and DCP's pickled metadata through an
unpickler that knows the few classes it consists of.
"""

from __future__ import annotations

import json
import pickle
import reprlib
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from mmpt.config import ParallelConfig, RunConfig, load
from mmpt.model.multimodal import MultimodalModel
from mmpt.parallel.mesh import World
from mmpt.types import TrainState, UserError

ALLOWED_IN_METADATA = {
    "torch": {"Size", "float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}  # fmt: skip


FORMAT = 2  # of what the tensors of a checkpoint mean; 1: rows of attention's qkv by kind, not by head of keys


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED_IN_METADATA.get(module, ()):
            raise UserError(
                f"the checkpoint's .metadata names {module}.{name}, which no checkpoint of mmpt holds: it was not loaded"
            )
        return super().find_class(module, name)


class Writer(dcp.FileSystemWriter):
    """DCP's writer, less the folder's path: it would be pickled into .metadata as one more class to allow."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)


class SafeReader(dcp.FileSystemReader):
    """DCP's reader for files that a stranger may have written. The metadata is read and checked at once, before any tensor."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with (path / ".metadata").open("rb") as file:
                self._metadata = self._checked(file)
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ValueError, TypeError) as error:
            raise UserError(
                f"checkpoint {path}: .metadata does not read ({error}); remove this folder to go on from the one before"
            ) from error

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata

    def _checked(self, file: IO[bytes]) -> Metadata:
        metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise UserError(f"checkpoint {self.path}: .metadata holds a {type(metadata).__name__}, not a checkpoint's metadata")
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise UserError(f"checkpoint {self.path}: {name} is not a tensor; mmpt's checkpoints hold tensors only")
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise UserError(f"checkpoint {self.path}: the file {info.relative_path!r} lies outside it")
        return metadata


def newest(run: Path) -> Path | None:
    """The last complete checkpoint of a run. Half-written ones carry another name and are never found."""
    found = sorted((run / "checkpoints").glob("step-*[0-9]"))
    return found[-1] if found else None


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def save(
    run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState, config: RunConfig, world: World
) -> None:
    """Write checkpoint step-N, all ranks together, and drop the oldest beyond `keep_checkpoints`."""
    final = step_folder(run, state.step)
    aside = final.with_name(final.name + ".tmp")
    if world.is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    world.barrier()
    with _quiet():
        dcp.save(_tensors(model, optimizer), storage_writer=Writer(aside))
    if world.is_main:
        plain = {"format": FORMAT, **asdict(state), "config": config.model_dump(mode="json")}
        (aside / "state.json").write_text(json.dumps(plain, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in sorted(final.parent.glob("step-*[0-9]"))[: -config.train.keep_checkpoints]:
            shutil.rmtree(old)
    world.barrier()


def restore(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig) -> TrainState:
    """Load weights and optimizer state in place, whatever layout wrote them. Refuses a run that was begun differently."""
    state, saved = read_state(checkpoint)
    refuse_changes(saved, config, checkpoint)
    tensors = _tensors(model, optimizer)
    _load(tensors, checkpoint)
    options = dcp_state.StateDictOptions(strict=True)
    groups = dcp_state.get_optimizer_state_dict(model, optimizer)["param_groups"]
    dcp_state.set_model_state_dict(model, tensors["model"], options=options)
    dcp_state.set_optimizer_state_dict(model, optimizer, {"state": tensors["optimizer"], "param_groups": groups}, options=options)
    return state


def load_model(run: Path, device: str = "cpu", step: int | None = None) -> tuple[MultimodalModel, RunConfig, int]:
    """The model of a run's newest checkpoint, or that of `step`, in evaluation mode, with the run's config and the step.

    Raises UserError where there is no run, no checkpoint, or the checkpoint is another model's.
    """
    if not run.is_dir():
        raise UserError(f"run {run}: no such folder; `mmpt train CONFIG` makes runs/NAME")
    config = load(run / "config.yaml")
    checkpoint = newest(run) if step is None else step_folder(run, step)
    if step is not None and not checkpoint.is_dir():
        raise UserError(f"run {run}: its checkpoint of step {step} is gone; bring {checkpoint} back")
    if checkpoint is None:
        raise UserError(f"run {run}: no checkpoint in {run / 'checkpoints'}; train it first: mmpt train {run / 'config.yaml'}")
    state, saved = read_state(checkpoint)
    refuse_changes({"model": saved["model"]}, config, checkpoint)
    model = MultimodalModel(config.model)
    _load({"model": model.state_dict()}, checkpoint)
    return model.to(device).eval(), config, state.step


def _load(tensors: dict[str, Any], checkpoint: Path) -> None:
    """Fill `tensors` in place from a checkpoint's files."""
    reader = SafeReader(checkpoint)
    try:
        with _quiet():
            dcp.load(tensors, storage_reader=reader)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise UserError(f"checkpoint {checkpoint}: {reason}; remove this folder to go on from the one before") from error


def read_state(checkpoint: Path) -> tuple[TrainState, dict]:
    """The state in state.json, and the config of the run that wrote it."""
    try:
        plain = json.loads((checkpoint / "state.json").read_text())
        config, found = plain.pop("config"), plain.pop("format", 1)
        if found != FORMAT:
            raise UserError(
                f"checkpoint {checkpoint}: its format is {reprlib.repr(found)}, and this version of mmpt reads {FORMAT}; go on "
                f"with the version that wrote it, or train anew under another name"
            )
        return TrainState.from_json(plain), config
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"checkpoint {checkpoint}: state.json does not read ({reason}); remove this folder to go on from the one before"
        ) from error


FREE_TO_CHANGE = {
    *(f"parallel.{name}" for name in ParallelConfig.model_fields),
    *(f"data.{name}" for name in ("workers", "prefetch", "prefetch_mib", "cache", "cache_gib")),
    *("data.spec", "data.tokenizer"),  # paths: what lies there has fingerprints in the loader's state
    *(f"train.{name}" for name in ("log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "recompute")),
}


def refuse_changes(saved: Mapping[str, Any], config: RunConfig, checkpoint: Path) -> None:
    """A run goes on as it began: name the first settings that differ, in the sections that were saved, but for those that
    change no number."""
    now = flatten({section: value for section, value in config.model_dump(mode="json").items() if section in saved})
    then = flatten(saved)
    # A section that is left out is None, one that is there has settings of its own: both sides' keys count.
    changed = [key for key in {**then, **now} if key not in FREE_TO_CHANGE and now.get(key) != then.get(key)]
    if changed:
        shown = ", ".join(f"{key} was {then.get(key)!r} and is {now.get(key)!r}" for key in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{checkpoint} was written by another config: {shown}{more}; set them back, or give the new run its own name=..."
        )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What DCP writes: tensors alone. The optimizer's settings come from the config."""
    model_state, optimizer_state = dcp_state.get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state["state"]}


class _quiet(warnings.catch_warnings):
    """DCP warns that a single process saves without a process group, which is meant."""

    def __enter__(self) -> Any:
        log = super().__enter__()
        warnings.simplefilter("ignore")
        return log
