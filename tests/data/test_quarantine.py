from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from mmpt.config import RunConfig
from mmpt.data.corpus import Corpus
from mmpt.data.loader import Loader, refuse_faults, sequential_batches
from mmpt.data.quarantine import IN_A_ROW, Quarantine, refuse_too_many
from mmpt.data.spec import OnBad, load_spec
from mmpt.data.tokens import Tokenizer
from mmpt.types import IGNORE, NOTHING, Fault, PackedBatch, UserError


def copy(data: Path, folder: Path) -> Path:
    shutil.copytree(data, folder, dirs_exist_ok=True)
    return folder


def damage(shard: Path, found: bytes, skip: int = 0) -> None:
    """Change one byte behind the first occurrence of `found`, the time of the file kept: the index is not made anew."""
    times = shard.stat()
    content = bytearray(shard.read_bytes())
    at = content.index(found) + len(found) + skip
    content[at] ^= 0xFF
    shard.write_bytes(content)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))


def config_of(config: RunConfig, spec: Path, **changes: object) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"spec": str(spec), **changes})})


def load(config: RunConfig, count: int, folder: Path | None = None) -> list[PackedBatch]:
    return list(islice(Loader(config, 0, 1, bad_samples=folder), count))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_medium_that_changed_is_masked_and_the_plan_does_not_move(
    four_data: Path, four_config: RunConfig, tmp_path: Path, workers: int
):
    """Other documents are equal to the bit; the faulty picture's tokens have no features and no loss."""
    sound = config_of(four_config, four_data / "four.yaml", workers=workers)
    whole = load(sound, 2)
    folder = copy(four_data, tmp_path / "four")
    damage(folder / "four-00000.tar", b"IHDR", skip=30)
    found = load(config_of(sound, folder / "four.yaml"), 2, tmp_path / "bad")
    faults = [fault for batch in found for fault in batch.report.faults]
    assert {(fault.key, fault.part, fault.reason, fault.shard) for fault in faults} == {("four00", 0, "crc", "four-00000.tar")}
    for one, other in zip(whole, found, strict=True):
        for name in ("tokens", "labels", "position_ids", "document_ids"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert one.provenance == other.provenance and torch.equal(one.audios.values, other.audios.values)
        masked = (one.media_index != NOTHING) & (other.media_index == NOTHING)
        assert int(masked.sum()) == 4 * len(other.report.faults) and set(other.labels[masked].tolist()) <= {IGNORE}
        assert len(one.images.grid) - len(other.images.grid) == len(other.report.faults)
        assert len(one.slots.pair) - len(other.slots.pair) == len(other.report.faults)
    lines = [json.loads(line) for line in (tmp_path / "bad" / "rank-0.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines] == ["crc"] * len(faults) and lines[0]["source"] == "four"


def test_a_document_whose_json_changed_is_padding(four_data: Path, four_config: RunConfig, tmp_path: Path):
    epoch = {"packs_per_batch": 12}
    whole = load(config_of(four_config, four_data / "four.yaml", **epoch), 1)[0]
    folder = copy(four_data, tmp_path / "four")
    damage(folder / "four-00000.tar", b'"id": "four01"', skip=3)
    found = load(config_of(four_config, folder / "four.yaml", **epoch), 1)[0]
    (fault,) = {fault.key: fault for fault in found.report.faults}.values()
    assert (fault.key, fault.part, fault.reason) == ("four01", NOTHING, "crc")
    gone = (whole.document_ids != NOTHING) & (found.document_ids == NOTHING)
    assert gone.any() and set(found.labels[gone].tolist()) == {IGNORE}
    assert torch.equal(whole.labels[~gone], found.labels[~gone]) and whole.provenance == found.provenance


def test_policy_stop_ends_the_run_with_the_document(four_data: Path, four_config: RunConfig, tmp_path: Path):
    folder = copy(four_data, tmp_path / "four")
    damage(folder / "four-00000.tar", b"IHDR", skip=30)
    with (folder / "four.yaml").open("a") as spec:
        spec.write("on_bad: {policy: stop}\n")
    with pytest.raises(UserError, match=r"source four: on_bad.policy is stop, and document four00 of four-00000.tar"):
        load(config_of(four_config, folder / "four.yaml"), 4)


def test_an_evaluation_names_the_faulty_document(four_data: Path, four_config: RunConfig, tokenizer: Tokenizer, tmp_path: Path):
    folder = copy(four_data, tmp_path / "four")
    damage(folder / "four-00000.tar", b"IHDR", skip=30)
    corpus = Corpus.open(load_spec(folder / "four.yaml"), "train")
    with pytest.raises(UserError, match=r"four: document four00 of four-00000\.tar: its bytes have changed"):
        list(refuse_faults(sequential_batches(corpus, tokenizer, four_config)))


def fault(number: int, source: str = "s") -> Fault:
    return Fault(source=source, shard="a.tar", key=f"k{number}", epoch=0, piece=0, part=0, reason="decode", detail="broken")


@pytest.mark.parametrize(("bad", "seen", "stops"), [(9, 10, False), (10, 999, True), (10, 1000, False), (11, 1000, True)])
def test_too_large_a_share_ends_the_run(bad: int, seen: int, stops: bool):
    first = [fault(number) for number in range(3)]
    if stops:
        with pytest.raises(UserError, match=rf"source s: {bad} of {seen} documents are faulty, more than .*max_fraction = 0.01"):
            refuse_too_many("s", bad, seen, OnBad(), first)
    else:
        refuse_too_many("s", bad, seen, OnBad(), first)


def test_many_faults_in_a_row_end_the_run(four_data: Path, four_config: RunConfig):
    (batch,) = load(config_of(four_config, four_data / "four.yaml"), 1)

    def with_faults(count: int) -> PackedBatch:
        refs = tuple(replace(batch.provenance[0], source="s", key=f"k{number}", epoch=0, piece=0) for number in range(count))
        return replace(batch, provenance=refs, report=replace(batch.report, faults=tuple(fault(n) for n in range(count))))

    lenient = {"s": OnBad(max_fraction=1.0)}
    quarantine = Quarantine(lenient, None, 0)
    quarantine.admit(with_faults(IN_A_ROW - 1))
    with pytest.raises(UserError, match=f"{IN_A_ROW} faulty documents in a row: document k0 of a.tar: broken"):
        quarantine.admit(with_faults(1))
    assert quarantine.figures == {"faults/s/decode": IN_A_ROW - 1}


def test_documents_that_were_faulty_when_indexed_are_left_out_and_counted(
    four_data: Path, four_config: RunConfig, tmp_path: Path
):
    folder = copy(four_data, tmp_path / "four")
    path = folder / "four-00000.tar"
    path.write_bytes(path.read_bytes().replace(b'"v": 1, "id": "four02"', b'"v": 2, "id": "four02"'))
    keys = {ref.key for batch in load(config_of(four_config, folder / "four.yaml"), 6) for ref in batch.provenance}
    assert keys == {f"four{number:02d}" for number in range(16)} - {"four02"}


def test_a_fault_marks_its_own_piece_of_a_document_alone(four_data: Path, four_config: RunConfig):
    (batch,) = load(config_of(four_config, four_data / "four.yaml"), 1)
    pieces = tuple(replace(batch.provenance[0], source="s", key="k0", epoch=0, piece=piece) for piece in range(2 * IN_A_ROW))
    one = replace(batch, provenance=pieces, report=replace(batch.report, faults=(replace(fault(0), piece=3),)))
    quarantine = Quarantine({"s": OnBad()}, None, 0)
    quarantine.admit(one)
    assert (quarantine.seen["s"], quarantine.bad["s"]) == (2 * IN_A_ROW, 1)
