"""The input files of a build, cut into segments where a split begins or ends.

    split {train: "0:40", val: "40:"} --Inputs.of--> segments 0..39 and 40..41: each becomes shards of its own

Splits may overlap, and files may belong to none.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path

from mmpt.data.spec import DataSpec
from mmpt.types import UserError


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The input files of all splits, in the pattern's order."""

    root: Path
    names: list[str]  # of the whole pattern: a file's number is its place here
    sizes: dict[int, int]  # number -> bytes, of those that a split wants and that are there
    segments: list[range]  # numbers of files that belong to the same splits

    @classmethod
    def of(cls, spec: DataSpec) -> Inputs:
        """Look at the files. Raises UserError where more than `on_bad.max_fraction` of them are missing."""
        if spec.shards.is_remote:
            raise UserError(f"spec {spec.path}: shards.root = {spec.root!r}: a build reads a local folder; copy the files to one")
        root, names = Path(spec.root), spec.shards.names()
        splits = [split_range(spec, name) for name in spec.split]
        borders = sorted({border for split in splits for border in (split.start, split.stop)})
        pieces = [range(start, stop) for start, stop in pairwise(borders)]
        segments = [piece for piece in pieces if any(piece.start in split for split in splits)]
        wanted = [number for segment in segments for number in segment]
        sizes = {number: size for number in wanted if (size := _size_of(spec, root / names[number])) is not None}
        missing = [number for number in wanted if number not in sizes]
        if len(missing) > spec.on_bad.max_fraction * len(wanted):
            first = root / names[missing[0]]
            raise UserError(f"spec {spec.path}: {len(missing):,} of {len(wanted):,} files are missing, the first of them {first}")
        return cls(root=root, names=names, sizes=sizes, segments=segments)

    def before(self, number: int) -> tuple[int, int]:
        """How many files, and how many bytes of them, come before file `number`."""
        files = bisect_left(self._numbers, number)
        return files, self._ends[files]

    @cached_property
    def _numbers(self) -> list[int]:
        return sorted(self.sizes)

    @cached_property
    def _ends(self) -> list[int]:
        return [0, *accumulate(self.sizes[number] for number in self._numbers)]


def split_range(spec: DataSpec, split: str) -> range:
    """Numbers of a split's files."""
    start, stop = spec.split[split].split(":")
    return range(int(start or 0), int(stop or len(spec.shards.names())))


def _size_of(spec: DataSpec, path: Path) -> int | None:
    if not path.is_file():
        return None
    if not path.resolve().is_relative_to(Path(spec.root).resolve()):
        raise UserError(f"spec {spec.path}: {path} is a link out of shards.root; set root to a folder that holds both")
    return path.stat().st_size
