"""Weights in files that a stranger may have written: nothing in them is run, and no tensor is read before its shape is known.

FILE.safetensors, or a folder's shards --headers--> {name: shape and type, without memory} --read(name)--> one tensor
FILE.pt, .bin (PyTorch's)              --weights_only, mapped into memory--> the same
"""

from __future__ import annotations

import json
import pickletools
import reprlib
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmpt.types import UserError

MAX_JSON_BYTES = 1 << 24  # an index of 100,000 tensors has some ten million
MAX_PICKLE_BYTES = 1 << 26  # of names and shapes; tensors lie beside them
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Of weights, as safetensors spells them. Eight-bit ones have scales of their own, and would be read wrongly without."""

IN_PICKLES = {"collections OrderedDict", "collections defaultdict", "builtins dict", "torch._utils _rebuild_tensor_v2",
              "torch._utils _rebuild_parameter", "torch.nn.parameter Parameter", "torch Size", "torch device"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Tensors by name, none of which is read before it is asked for."""

    origin: str  # as shown in messages
    headers: Mapping[str, Tensor]  # on the meta device
    read: Callable[[str], Tensor]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError for anything else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes; such a file has fewer than {MAX_JSON_BYTES:,}")
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file that reads ({_one_line(error)})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: a JSON object is wanted, not {reprlib.repr(found)}")
    return found


def open_folder(folder: Path) -> Weights:
    """The weights of a Hugging Face checkpoint: one file, or the shards that an index names. Raises UserError."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _open_shards(folder, index)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return open_file(folder / name)
    raise UserError(f"{folder}: neither model.safetensors nor model.safetensors.index.json lies there")


def open_file(path: Path) -> Weights:
    """The weights in a file, of safetensors or PyTorch's by its first bytes. Raises UserError."""
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    return _open_torch(path) if is_zip else _open_safetensors(path)


def _open_safetensors(path: Path) -> Weights:
    try:
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a mapping
        headers = {name: _header(path, name, part.get_shape(), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: neither a safetensors file nor one of PyTorch's ({_one_line(error)}); save older ones as safetensors"
        ) from error
    return Weights(origin=str(path), headers=headers, read=file.get_tensor)


def _header(path: Path, name: str, shape: list[int], dtype: str) -> Tensor:
    # What is no weight, positions counted out as int64 for instance, is refused only if a rule asks for it.
    return torch.empty(shape, dtype=TYPES.get(dtype, torch.uint8), device="meta")


def _open_shards(folder: Path, index: Path) -> Weights:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{index}: weight_map, from names to files, is wanted")
    outside = next(
        (f for f in files.values() if Path(f).name != f or not f.endswith(".safetensors") or not f.isprintable()), None
    )
    if outside is not None:
        raise UserError(f"{index}: the file {reprlib.repr(outside)} does not lie beside it")
    shards = {file: _open_safetensors(folder / file) for file in sorted(set(files.values()))}
    absent = next((name for name, file in files.items() if name not in shards[file].headers), None)
    if absent is not None:
        raise UserError(f"{index}: {absent!r:.200} is not in {files[absent]}")
    return Weights(
        origin=str(folder),
        headers={name: shards[file].headers[name] for name, file in files.items()},
        read=lambda name: shards[files[name]].read(name),
    )


def _open_torch(path: Path) -> Weights:
    """A state dict, by itself or under `state_dict`, as training code saves it."""
    try:
        _check_archive(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except Exception as error:  # of many kinds, in code that reads whatever stands there
        raise UserError(f"{path}: not weights that read safely ({_one_line(error)}); save them as safetensors") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(name, str) and _is_plain(value) for name, value in found.items()):
        raise UserError(f"{path}: a dictionary of tensors by name is wanted")
    hollow = next((name for name, tensor in found.items() if tensor.untyped_storage().nbytes() < tensor.nbytes), None)
    if hollow is not None:
        raise UserError(f"{path}: {hollow!r:.200} says more numbers than the file holds; save it contiguous")
    headers = {name: torch.empty_like(tensor, device="meta") for name, tensor in found.items()}
    return Weights(origin=str(path), headers=headers, read=found.__getitem__)


def _check_archive(path: Path) -> None:
    """Uncompressed, so that no file grows as it is read, and a pickle that names nothing but tensors and dictionaries."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise UserError(f"{path}: a compressed archive; PyTorch's are not")
        pickle = next((entry for entry in entries if entry.filename.endswith("/data.pkl")), None)
        if pickle is None or pickle.file_size > MAX_PICKLE_BYTES:
            raise UserError(f"{path}: no data.pkl as torch.save writes it: not a file of weights")
        for opcode, argument, _ in pickletools.genops(archive.read(pickle)):
            if opcode.name == "GLOBAL" and argument not in IN_PICKLES and not _is_storage(argument):
                raise UserError(f"{path}: it names {reprlib.repr(argument)}, for which weights have no need; it was not read")
            if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                raise UserError(f"{path}: a pickle as torch.save does not write it; it was not read")


def _is_storage(argument: str) -> bool:
    module, _, name = argument.partition(" ")
    return module in ("torch", "torch.storage") and (
        name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)
    )


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
