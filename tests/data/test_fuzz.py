"""A thousand corrupted shards: each is refused, masked, without effect or valid, and counted; `benchmarks/fuzz.py` runs more."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import fuzzing
import pytest
from corrupt import Shard
from fuzzing import KINDS, SOUND, Bench, Case, Result, fuzz

from mmpt.data.faults import REASONS

CASES = 1000


@pytest.mark.timeout(600)
def test_corruptions_are_counted_by_source_and_reason_and_nothing_breaks(tmp_path: Path) -> None:
    results = list(fuzz((Case(0, number) for number in range(CASES)), tmp_path))
    assert sorted(result.case.number for result in results) == list(range(CASES))
    wrong = [result for result in results if result.outcome not in SOUND]
    assert not wrong, "\n\n".join(f"{r.case} {r.case.kind}: {r.outcome}\n{r.detail}" for r in wrong[:5])
    counted = Counter((result.source, reason) for result in results for reason in result.reasons)
    assert all(result.source == "fuzzed" and result.reasons for result in results)
    masked = {reason for result in results if result.outcome == "masked" for reason in result.reasons}
    refused = {reason for result in results if result.outcome == "refused" for reason in result.reasons}
    assert masked <= set(REASONS) and masked >= {"json", "missing", "crc", "size", "limit", "decode", "text"}
    assert refused >= {"damaged", "truncated", "link", "name", "order", "duplicate-member", "trailing", "limit"}
    assert counted.total() >= CASES


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    folder = tmp_path_factory.mktemp("sound")
    fuzzing.write_corpus(folder)
    return Shard((folder / fuzzing.HURT).read_bytes(), (folder / f"{fuzzing.HURT}.index.npz").read_bytes())


def test_a_case_is_its_seed_and_number(shard: Shard) -> None:
    for number, kind in enumerate(KINDS):
        assert Case(1, number).kind == kind
        assert Case(1, number).damage(shard) == Case(1, number).damage(shard)
    some = [Case(seed, list(KINDS).index("flipped")).damage(shard).tar for seed in range(20)]
    assert len(set(some)) == 20


def test_headers_of_a_shard_lie_where_tarfile_puts_them(shard: Shard) -> None:
    names = [shard.tar[place : place + 100].rstrip(b"\0").decode() for place in shard.headers]
    assert names == [*(name for name, _ in shard.members), ""]


def test_a_sound_shard_is_consistent_and_a_changed_medium_is_not(shard: Shard) -> None:
    assert fuzzing.is_consistent(shard.tar)
    for name, data in shard.members:
        at = shard.tar.index(data) + len(data) // 2
        changed = shard.tar[:at] + bytes([shard.tar[at] ^ 1]) + shard.tar[at + 1 :]
        assert fuzzing.is_consistent(changed) <= name.endswith(".json")


def test_what_goes_wrong_in_a_process_is_told_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(bench: Bench, case: Case) -> Result:
        if case.number == 1:
            raise ZeroDivisionError("planted")
        if case.number == 2:
            os._exit(7)
        if case.number == 3:
            signal.pause()
        if case.number == 4:
            bytes(1 << 40)
        return Result(case=case, outcome="harmless", source="fuzzed", reasons=("unused",))

    monkeypatch.setattr(Bench, "run", run)
    monkeypatch.setattr(fuzzing, "LIMIT_S", 2.0)
    found = {result.case.number: result for result in fuzz((Case(0, number) for number in range(8)), tmp_path)}
    outcomes = [found[number].outcome for number in range(8)]
    assert outcomes == ["harmless", "error", "crash", "hang", "error", "harmless", "harmless", "harmless"]
    assert "planted" in found[1].detail and "7" in found[2].detail and "MemoryError" in found[4].detail


def test_what_nobody_notices_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without checksums and without the documents' faults, damage would go by."""
    monkeypatch.setattr("mmpt.data.decode.check_bytes", lambda part: None)
    number = list(KINDS).index("flipped_after_indexing")
    results = list(fuzz((Case(0, number + turn * len(KINDS)) for turn in range(20)), tmp_path))
    assert "unnoticed" in {result.outcome for result in results}
