"""Training batches from a real S3 server are those of the same shards on disk, whatever the connection does."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from object_store import BUCKET, ENVIRONMENT, Proxy, Store, running_store

from mmpt.config import RunConfig
from mmpt.data.index import index_name
from mmpt.data.loader import Loader
from mmpt.types import PackedBatch, UserError

SHARDS = [f"tiny-{number:05d}.tar" for number in range(3)]


@pytest.fixture(scope="module")
def store(tiny_data: Path) -> Iterator[Store]:
    with running_store() as server:
        for name in SHARDS:
            server.put(f"bare/{name}", (tiny_data / name).read_bytes())
            server.put(f"indexed/{name}", (tiny_data / name).read_bytes())
            server.put(f"indexed/{index_name(name)}", (tiny_data / index_name(name)).read_bytes())
        yield server


@pytest.fixture
def proxy(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    front = Proxy(store.port)
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": front.endpoint}.items():
        monkeypatch.setenv(name, value)
    yield front
    front.stop()


def config_of(config: RunConfig, folder: Path, root: str, **changes: object) -> RunConfig:
    """The tiny corpus at `root`, its shards shuffled two at a time."""
    tree = {"version": 1, "name": "tiny", "format": "interleaved", "split": {"train": ":"}}
    tree["shards"] = {"root": root, "pattern": "tiny-{00000..00002}.tar", "block": 2}
    path = folder / f"{len(list(folder.glob('*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump(tree))
    data = {"spec": str(path), "cache": str(folder / "cache"), **changes}
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


def take(config: RunConfig, count: int = 12) -> list[PackedBatch]:
    return list(islice(Loader(config, 0, 1), count))


def assert_equal(ones: list[PackedBatch], others: list[PackedBatch]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert one.provenance == other.provenance and one.state == other.state
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.images.values, other.images.values)
        assert not other.report.faults


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_a_store_whose_connections_drop_are_those_from_disk(
    proxy: Proxy, tiny_config: RunConfig, tiny_data: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache holds two of three shards, so they come and go, and every third of a shard the connection breaks."""
    on_disk = take(config_of(tiny_config, tmp_path, str(tiny_data)))
    size = (tiny_data / SHARDS[0]).stat().st_size
    monkeypatch.setattr("mmpt.data.storage.CHUNK", size // 5)
    monkeypatch.setattr("mmpt.data.retry.FIRST_DELAY", 0.0)
    small = {"cache_gib": 2.5 * size / 2**30, "workers": workers}
    proxy.cut(times=6, after=size // 3)
    remote = take(config_of(tiny_config, tmp_path, f"s3://{BUCKET}/bare", **small))
    assert proxy.cuts_left == 0
    assert sum(proxy.gets(f"bare/{name}") for name in SHARDS) > 6
    assert_equal(on_disk, remote)


def test_an_index_beside_a_remote_shard_spares_fetching_it(
    proxy: Proxy, tiny_config: RunConfig, tiny_data: Path, tmp_path: Path
) -> None:
    """But for the tokens of its texts, which are counted once and kept."""
    config = config_of(tiny_config, tmp_path, f"s3://{BUCKET}/indexed")
    first = take(config, 2)
    assert_equal(take(config_of(tiny_config, tmp_path, str(tiny_data)), 2), first)
    for copy in (tmp_path / "cache").iterdir():
        if copy.is_file():
            copy.unlink()
    proxy.requests.clear()
    Loader(config, 0, 1)
    assert sum(proxy.gets(f"indexed/{name}") for name in SHARDS) == 0


def test_a_store_that_is_gone_ends_the_run_in_one_line(
    proxy: Proxy, tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmpt.data.retry.FIRST_DELAY", 0.0)
    config = config_of(tiny_config, tmp_path, f"s3://{BUCKET}/bare")
    proxy.stop()
    with pytest.raises(UserError, match=r"s3://shards/bare/tiny-00000\.tar: .*after 6 tries") as caught:
        Loader(config, 0, 1)
    assert "\n" not in str(caught.value)
