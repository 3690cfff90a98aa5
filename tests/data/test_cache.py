import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from children import FORK, in_children
from object_store import some_bytes

from mmpt.data.cache import Cache
from mmpt.types import UserError


def chunks_of(data: bytes) -> Iterator[bytes]:
    yield data[: len(data) // 2]
    yield data[len(data) // 2 :]


def cached(cache: Cache, number: int, size: int = 1_000) -> bytes:
    """File `number`, read through the cache."""
    file = cache.open(f"{number:032x}", size, f"file {number}", partial(chunks_of, some_bytes(size, number)))
    try:
        return os.pread(file, size + 1, 0)
    finally:
        os.close(file)


def names(cache: Cache) -> set[str]:
    return {path.name.lstrip("0") or "0" for path in cache.path.iterdir()} - {"lock"}


def test_the_least_recently_used_copy_makes_room(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "new" / "cache", 2_500)
    for number in (1, 2, 1, 3):
        assert cached(cache, number) == some_bytes(1_000, number)
    assert names(cache) == {"1", "3"}
    assert cached(cache, 4, size=2_000) == some_bytes(2_000, 4)
    assert names(cache) == {"4"}


def test_a_file_larger_than_the_cache_is_refused_and_evicts_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 2_000)
    cached(cache, 1)
    with pytest.raises(UserError, match=r"file 2: 2,001 bytes do not fit the cache of 2,000; set data\.cache_gib"):
        cached(cache, 2, size=2_001)
    assert names(cache) == {"1"}


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    for name in ("thesis.txt", "film.part"):
        (tmp_path / name).write_bytes(b"x" * 5_000)
    cached(Cache(tmp_path, 1_000), 1)
    cached(Cache(tmp_path, 1_000), 2)
    assert names(Cache(tmp_path, 0)) == {"thesis.txt", "film.part", "2"}


def test_a_copy_of_another_size_is_made_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 5_000)
    cached(cache, 1)
    os.truncate(tmp_path / f"{1:032x}", 999)
    assert cached(cache, 1) == some_bytes(1_000, 1)


def test_a_copy_in_progress_takes_its_whole_place(tmp_path: Path) -> None:
    def looking() -> Iterator[bytes]:
        yield b"half"
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 8
        yield b"half"

    os.close(Cache(tmp_path, 10).open("0" * 32, 8, "file", looking))


def test_a_failed_copy_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[bytes]:
        yield b"half"
        raise UserError("server gone")

    cache = Cache(tmp_path, 5_000)
    with pytest.raises(UserError, match="server gone"):
        cache.open("0" * 32, 8, "file", failing)
    assert names(cache) == set()


def test_the_part_of_a_process_that_died_is_taken_away(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1_500)

    def dying() -> Iterator[bytes]:
        yield b"half"
        os._exit(7)

    child = FORK.Process(target=partial(cache.open, f"{1:032x}", 1_000, "file", dying))
    child.start()
    child.join(timeout=20)
    assert child.exitcode == 7
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".part"}
    assert cached(cache, 2) == some_bytes(1_000, 2)
    assert names(cache) == {"2"}
    assert cached(cache, 1) == some_bytes(1_000, 1)


def test_processes_that_want_more_than_fits_wait_for_one_another(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 200_000)  # one of these at a time
    read = [partial(cached, cache, number, size=150_000) for number in (1, 2, 3, 1)]
    assert in_children(read) == [some_bytes(150_000, number) for number in (1, 2, 3, 1)]
    assert len(names(cache)) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"cache .*file: .*data\.cache"):
        cached(Cache(tmp_path / "file", 5_000), 1)
