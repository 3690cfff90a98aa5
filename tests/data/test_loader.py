from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from mmpt.config import AugmentConfig, RunConfig, dump
from mmpt.data.corpus import Corpus
from mmpt.data.loader import Loader, sequential_batches
from mmpt.data.media.images import composite, decode_image, patchify
from mmpt.data.spec import load_spec
from mmpt.data.tokens import Tokenizer
from mmpt.types import NOTHING, Image, LoaderState, LoadReport, PackedBatch, UserError

WILD = AugmentConfig(rotate=30, scale=0.3, shift=0.2, color=0.5, grayscale=0.3, background=0.6)


def with_data(config: RunConfig, **changes: Any) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def take(
    config: RunConfig, count: int, rank: int = 0, world_size: int = 1, state: LoaderState | None = None
) -> list[PackedBatch]:
    return list(islice(Loader(config, rank, world_size, state), count))


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if is_dataclass(value):
        for field in fields(value):
            if not isinstance(value, LoadReport) or field.name != "milliseconds":
                yield from leaves(getattr(value, field.name), f"{name}.{field.name}")
    else:
        yield name, value


def assert_same(one: PackedBatch, other: PackedBatch) -> None:
    for (name, a), (_, b) in zip(leaves(one), leaves(other), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


def packs_of(batch: PackedBatch, pack_tokens: int) -> Iterator[tuple[Any, ...]]:
    """Each pack of a batch without the numbers that are local to the batch."""
    per_item = batch.images.cu_seqlens.diff().tolist()
    items = batch.images.values.split(per_item)
    for start in range(0, len(batch.tokens), pack_tokens):
        rows = slice(start, start + pack_tokens)
        ids, media, pool = batch.document_ids[rows], batch.media_index[rows], batch.pool_index[rows]
        shown = sorted({int(row) // 4 for row in media if row != NOTHING})
        slots = pool[pool != NOTHING]
        pairs = batch.slots.pair[slots]
        yield (
            batch.tokens[rows].tolist(),
            batch.labels[rows].tolist(),
            batch.position_ids[:, rows].tolist(),
            torch.where(ids == NOTHING, ids, ids - ids[0]).tolist(),
            [items[item].tolist() for item in shown],
            batch.slots.modality[slots].tolist(),
            batch.slots.content[slots].tolist(),
            [batch.provenance[int(pair)] for pair in pairs],
        )


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_resuming_gives_the_batches_that_would_have_followed(tiny_config: RunConfig, workers: int):
    config = with_data(tiny_config, augment=WILD)
    whole = take(config, 9)
    assert len({ref.epoch for batch in whole for ref in batch.provenance}) > 1
    for done in (1, 4):
        for one, other in zip(
            take(with_data(config, workers=workers), 4, state=whole[done - 1].state), whole[done:], strict=False
        ):
            assert_same(one, other)


def test_ranks_share_the_batches_of_one(tiny_config: RunConfig):
    config = with_data(tiny_config, augment=WILD)
    whole, halves = take(config, 4), [take(config, 4, rank, 2) for rank in range(2)]
    for one, *parts in zip(whole, *halves, strict=True):
        alone = list(packs_of(one, config.data.pack_tokens))
        shared = [pack for part in parts for pack in packs_of(part, config.data.pack_tokens)]
        assert alone == shared
        assert all(part.state == one.state for part in parts)
        assert one.provenance == parts[0].provenance + parts[1].provenance
    assert whole[3].state.packs_consumed == 16


def test_resuming_on_another_number_of_ranks(tiny_config: RunConfig):
    state = take(tiny_config, 2, 1, 2)[-1].state
    assert_same(take(tiny_config, 1, state=state)[0], take(tiny_config, 3)[-1])


def test_packs_are_numbered_over_the_run(tiny_config: RunConfig):
    for rank in range(2):
        numbers = [ref.pack for batch in take(tiny_config, 3, rank, 2) for ref in batch.provenance]
        assert sorted(set(numbers)) == [step * 4 + rank * 2 + pack for step in range(3) for pack in range(2)]


def test_pictures_change_with_the_epoch_not_with_the_packing(tiny_config: RunConfig):
    def pictures(config: RunConfig) -> dict[tuple[str, int], list[int]]:
        return {
            (ref.key, ref.epoch): batch.images.values[batch.images.cu_seqlens[item] : batch.images.cu_seqlens[item + 1]].tolist()
            for batch in take(config, 8)
            for item, ref in first_items(batch)
        }

    def first_items(batch: PackedBatch) -> Iterator[tuple[int, Any]]:
        for slot in (batch.slots.modality == 1).nonzero()[:, 0]:
            row = int((batch.pool_index == slot).nonzero()[0, 0]) - 1
            yield int(batch.media_index[row]) // 4, batch.provenance[int(batch.slots.pair[slot])]

    config = with_data(tiny_config, augment=WILD)
    one, other = pictures(config), pictures(with_data(config, window=7, packs_per_batch=3))
    common = one.keys() & other.keys()
    assert len(common) > 20 and all(one[name] == other[name] for name in common)
    assert any(one[key, 0] != one[key, 1] for key, epoch in one if epoch == 1 and (key, 0) in one)


def open_split(config: RunConfig, split: str) -> Corpus:
    return Corpus.open(load_spec(Path(config.data.spec)), split)


def test_sequential_batches_show_every_document_once_unchanged(tiny_config: RunConfig, tokenizer: Tokenizer):
    corpus = open_split(tiny_config, "val")
    batches = list(sequential_batches(corpus, tokenizer, with_data(tiny_config, augment=WILD, packs_per_batch=1)))
    assert len(batches) > 1 and all(len(batch.tokens) == 128 for batch in batches)
    assert [ref.key for batch in batches for ref in batch.provenance] == [corpus.read(i).key for i in range(len(corpus))]
    images = [part for i in range(len(corpus)) for part in corpus.document(i).parts if isinstance(part, Image)]
    expected = patchify(composite(torch.stack([decode_image(image.data, 32, 32) for image in images])), 8)
    assert torch.equal(torch.cat([batch.images.values for batch in batches]), expected)


def test_finish_is_applied_to_every_batch(tiny_config: RunConfig):
    def finish(batch: PackedBatch) -> PackedBatch:
        return replace(batch, tokens=batch.tokens + 1)

    loader = Loader(with_data(tiny_config, workers=1), 0, 1, finish=finish)
    for one, other in zip(islice(loader, 2), take(tiny_config, 2), strict=True):
        assert torch.equal(one.tokens, other.tokens + 1)


def test_loading_leaves_the_global_generator_alone(tiny_config: RunConfig):
    before = torch.get_rng_state()
    take(with_data(tiny_config, augment=WILD), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_changed_corpus_or_setting_is_named(tiny_config: RunConfig):
    state = take(tiny_config, 1)[0].state
    with pytest.raises(UserError, match=r"data\.pack_tokens was 128, is 160; data\.seed was 0, is 1;"):
        Loader(with_data(tiny_config, pack_tokens=160, seed=1), 0, 1, state)
    other = replace(state, fingerprint=state.fingerprint | {"source tiny": "0"})
    with pytest.raises(UserError, match="source tiny was 0"):
        Loader(tiny_config, 0, 1, other)


def test_packs_that_ranks_cannot_share_are_refused(tiny_config: RunConfig):
    with pytest.raises(UserError, match=r"data\.packs_per_batch = 4: 3 ranks need a multiple of 3"):
        Loader(tiny_config, 0, 3)


def test_a_document_longer_than_a_pack_comes_in_pieces(tiny_config: RunConfig):
    config = with_data(tiny_config, pack_tokens=24)
    refs = [ref for batch in take(config, 40) for ref in batch.provenance if ref.epoch == 0]
    assert len(refs) == len({(ref.key, ref.piece) for ref in refs}) and max(ref.piece for ref in refs) > 0


def test_a_medium_that_no_pack_holds_is_named(tiny_config: RunConfig):
    with pytest.raises(UserError, match=r"data\.pack_media = 10: a medium of document tiny\d+ of tiny takes 16"):
        Loader(with_data(tiny_config, pack_media=10), 0, 1)


def test_no_pack_holds_more_media_than_it_may(tiny_config: RunConfig):
    for batch in take(with_data(tiny_config, pack_media=48, packs_per_batch=1), 30):
        assert 0 < len(batch.images.values) <= 48


def test_batches_made_ahead_fit_the_memory_given(tiny_config: RunConfig):
    config = with_data(tiny_config, pack_tokens=4096, packs_per_batch=16, workers=2, prefetch=100, prefetch_mib=512)
    batch = 16 * 4096 * (25 * 8 + 4 * 3 * 8**2)  # bytes: all that is kept of a token, and a picture at every token
    assert Loader(config, 0, 1).prefetch == 512 * 2**20 // (2 * (batch + 2**20)) > 1
    with pytest.raises(UserError, match=r"data\.prefetch_mib = 50: one batch for each worker may take 123 MiB"):
        Loader(with_data(config, prefetch_mib=50), 0, 1)
    assert Loader(config, 0, 1, parts=8).batch_bytes < batch / 3  # of a split batch, some things are kept by all ranks


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tiny_config: RunConfig, tokenizer: Tokenizer):
    config = tiny_config.model_copy(update={"model": tiny_config.model.model_copy(update={"vocabulary": 100})})
    with pytest.raises(UserError, match=rf"model\.vocabulary = 100: the tokenizer has {len(tokenizer)} tokens"):
        Loader(config, 0, 1)


PARENT = """
import os, sys, torch
from mmpt.config import load
from mmpt.data.loader import Loader

def finish(batch):
    os.write(1, b"made\\n")
    return batch

torch.set_num_threads(2)
for _ in range(3):
    (torch.randn(400, 400) @ torch.randn(400, 400)).softmax(-1).sum()
assert torch.get_num_threads() == 2
batches = iter(Loader(load(sys.argv[1]), 0, 1, finish=finish))
for _ in range(3):
    next(batches)
sys.stdin.readline()
"""


def start_parent(tmp_path: Path, config: RunConfig, **changes: Any) -> subprocess.Popen[str]:
    """A process that has computed with two threads, takes three batches from two workers and waits for a line to end."""
    (tmp_path / "config.yaml").write_text(dump(with_data(config, workers=2, augment=WILD, **changes)))
    command = [sys.executable, "-c", PARENT, str(tmp_path / "config.yaml")]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_workers_start_and_end_beside_a_parent_with_threads(tmp_path: Path, tiny_config: RunConfig):
    with start_parent(tmp_path, tiny_config) as parent:
        out, err = parent.communicate("\n", timeout=60)
    assert (err, parent.returncode) == ("", 0) and out.count("made") >= 3


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path, tiny_config: RunConfig):
    """Not even when the pipe to the parent is full: a worker that ends of itself waits until that is read."""
    with start_parent(tmp_path, tiny_config, packs_per_batch=64, prefetch=16) as parent:
        for _ in range(3 + 2 * 16):  # until the workers have made all that they may make ahead
            assert parent.stdout.readline() == "made\n"
        parent.send_signal(signal.SIGKILL)
        parent.communicate(timeout=15)  # ends with the last process that holds the pipe, so with the last worker
