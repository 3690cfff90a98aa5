"""Media of given shapes, and what tests of several encoders ask of them."""

import torch
from torch import Tensor, nn

from mmpt.types import MediaBatch


def pictures(shapes: list[tuple[int, int, int]], patch: int, seed: int = 0) -> list[Tensor]:
    """Random patches of items of (frames, rows, columns)."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (t * h * w, 3 * patch**2), dtype=torch.uint8, generator=draw) for t, h, w in shapes]


def sounds(frames: list[int], mel_bins: int, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(count, mel_bins, generator=draw) for count in frames]


def pack(items: list[Tensor], shapes: list[tuple[int, int, int]], seconds: list[float] | None = None) -> MediaBatch:
    """A batch of items; `seconds` are the times of all steps, item after item."""
    steps = sum(t for t, _, _ in shapes)
    return MediaBatch(
        values=torch.cat(items),
        cu_seqlens=torch.tensor([0, *(len(item) for item in items)]).cumsum(0),
        grid=torch.tensor(shapes),
        times=torch.zeros(steps) if seconds is None else torch.tensor(seconds),
    )


def pack_sounds(items: list[Tensor]) -> MediaBatch:
    return pack(items, [(len(item), 1, 1) for item in items])


def gradients(encoder: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter: there is none that the loss does not reach."""
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Equal names, and each tensor equal to within `tolerance` of the largest number in it, or of 1 where all are smaller."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(1.0, tensor.abs().max().item())
        error = (found[name] - tensor).abs().max().item()
        assert error <= tolerance * scale, f"{name}: {error:.2e} off, of {scale:.2e}"


def dtype_of_blocks(encoder: nn.Module, media: MediaBatch) -> torch.dtype:
    """In which the blocks of an encoder add up, under bf16 autocast."""
    seen = []
    handle = encoder.transformer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        encoder(media)
    handle.remove()
    return seen[0]
