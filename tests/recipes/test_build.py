from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from building import faults, folder_bytes, lines, picture, read_split, spec_over, told

from mmpt.data.spec import DataSpec, load_spec
from mmpt.recipes import build
from mmpt.recipes.build import Progress, build_spec
from mmpt.types import UserError

PER_SHARD = 7

# Dies by SIGKILL once the progress says so; a shard is in hand then, and another may be between its tar and its record.
BUILD_AND_DIE = """
import os, signal, sys
from pathlib import Path
from mmpt.data.spec import load_spec
from mmpt.recipes import build
build.DOCUMENTS_PER_SHARD, build.ROWS_PER_REPORT = 7, 1
def die(progress):
    if progress.documents >= int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
build.build_spec(load_spec(sys.argv[1]), Path(sys.argv[2]), die)
"""


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "DOCUMENTS_PER_SHARD", PER_SHARD)
    monkeypatch.setattr(build, "ROWS_PER_REPORT", 2)


@pytest.fixture
def pages(tmp_path: Path) -> DataSpec:
    """Three files of 20 pages, the last one held out; every fifth page's second picture is missing, row 13 is broken."""
    (tmp_path / "images").mkdir()
    for number in range(12):
        (tmp_path / "images" / f"{number}.png").write_bytes(picture(number))
    for file in range(3):
        rows = []
        for row in range(20):
            names = [f"{row % 12}.png", "gone.png" if row % 5 == 4 else f"{(row + file) % 12}.png"]
            info = [{"image_name": name, "matched_text_index": i, "matched_sim": 0.25} for i, name in enumerate(names)]
            rows.append({"text_list": [f"page {file}.{row}", "more"], "image_info": info, "url": f"https://a/{file}/{row}"})
        rows[13] = {"text_list": "no list"}
        (tmp_path / f"pages-{file}.jsonl").write_bytes(lines(rows))
    return spec_over(
        tmp_path,
        "mmc4",
        "pages-{0..2}.jsonl",
        shards={"media": "images"},
        split={"train": "0:2", "val": "2:"},
        on_bad={"max_fraction": 0.1},
    )


def test_every_split_gets_its_own_shards_and_the_spec_loads(pages: DataSpec, tmp_path: Path) -> None:
    spec = build_spec(pages, tmp_path / "out")
    assert spec == tmp_path / "out" / "spec.yaml"
    built = load_spec(spec)
    assert (built.name, built.format, built.on_bad.max_fraction) == ("source", "interleaved", 0.1)
    for split, files in (("train", (0, 1)), ("val", (2,))):
        expected = [f"page {file}.{row}" for file in files for row in range(20) if row != 13]
        samples = read_split(spec, split)
        assert [told(sample)[1] for sample in samples] == expected
        assert [len(built.shard_names(split))] == [-(-len(expected) // PER_SHARD)]
        keys = [key for key, _, _ in samples]
        assert keys == [f"{file:05d}-{row:08d}" for file in files for row in range(20) if row != 13]
        for key, document, stored in samples:
            assert document["id"] == key
            images = [part for part in document["parts"] if part["type"] == "image"]
            assert [part["crc32"] for part in images] == [zlib.crc32(data) for data in stored.values()]


def test_what_was_wrong_is_told_row_by_row(pages: DataSpec, tmp_path: Path) -> None:
    seen: list[Progress] = []
    build_spec(pages, tmp_path / "out", seen.append)
    found = faults(tmp_path / "out")
    assert [(f["file"], f["row"], f["reason"]) for f in found if "left_out" not in f] == [
        (f"pages-{file}.jsonl", 13, "json") for file in range(3)
    ]
    assert [(f["file"], f["row"], f["reason"]) for f in found if "left_out" in f] == [
        (f"pages-{file}.jsonl", row, "missing") for file in range(3) for row in (4, 9, 14, 19)
    ]
    last = seen[-1]
    assert (last.documents, last.skipped, last.left_out, last.files_done, last.files) == (57, 3, 12, 3, 3)
    assert last.bytes_done == last.bytes_total == sum(path.stat().st_size for path in tmp_path.glob("pages-*"))
    assert [p.bytes_done for p in seen] == sorted(p.bytes_done for p in seen)


class Stop(Exception):
    pass


@pytest.mark.parametrize("documents", [0, 3, 6, 7, 8, 19, 20, 38, 40, 56])
def test_stopped_anywhere_and_given_again_it_writes_the_same_bytes(pages: DataSpec, tmp_path: Path, documents: int) -> None:
    build_spec(pages, tmp_path / "whole")
    with pytest.raises(Stop):
        build_spec(pages, tmp_path / "out", lambda progress: _stop(progress.documents >= documents))
    assert not (tmp_path / "out" / "spec.yaml").exists()
    first: list[Progress] = []
    build_spec(pages, tmp_path / "out", first.append)
    # What stood in a whole shard is not made again.
    assert first[0].documents >= documents - PER_SHARD
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_stopped_again_and_again(pages: DataSpec, tmp_path: Path) -> None:
    build_spec(pages, tmp_path / "whole")
    for _ in range(20):
        told_of = 0

        def stop(_: Progress) -> None:
            nonlocal told_of
            told_of += 1
            _stop(told_of == 6)  # about a shard and a half further on each time

        try:
            build_spec(pages, tmp_path / "out", stop)
        except Stop:
            continue
        break
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_stopped_at_once_when_going_on(pages: DataSpec, tmp_path: Path) -> None:
    build_spec(pages, tmp_path / "whole")
    for documents in (6, 0):  # the first time behind a fault that no whole shard stands for
        with pytest.raises(Stop):
            build_spec(pages, tmp_path / "out", lambda progress, most=documents: _stop(progress.documents >= most))
    build_spec(pages, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def _stop(now: bool) -> None:
    if now:
        raise Stop


def _table(folder: Path) -> DataSpec:
    rows = [f'{number % 12}.png,"caption\n{number}"' if number % 9 else "gone.png,x" for number in range(30)]
    (folder / "a.csv").write_text("\n".join(["filepath,title", *rows, ""]))
    return spec_over(folder, "csv", "a.csv", shards={"media": "images"}, on_bad={"max_fraction": 0.2})


def _conversations(folder: Path) -> DataSpec:
    turns = [[{"from": "human", "value": f"<image>{n}"}, {"from": "gpt", "value": "yes"}] for n in range(30)]
    rows = [{"image": f"{n % 13}.png", "conversations": turn} for n, turn in enumerate(turns)]
    (folder / "a.json").write_text(json.dumps(rows))
    return spec_over(folder, "llava", "a.json", shards={"media": "images"}, on_bad={"max_fraction": 0.2})


def _parquet(folder: Path) -> DataSpec:
    slots = [[picture(n % 12), None] if n % 10 else [None, None] for n in range(30)]
    table = pa.table({"images": pa.array(slots, pa.list_(pa.binary())), "texts": [[None, f"text {n}"] for n in range(30)]})
    pq.write_table(table, folder / "a.parquet", row_group_size=8)
    return spec_over(folder, "obelics", "a.parquet", on_bad={"max_fraction": 0.2})


@pytest.mark.parametrize("documents", [8, 13, 15, 23])
@pytest.mark.parametrize("make", [_table, _conversations, _parquet])
def test_every_way_of_reading_goes_on_within_a_file(pages: DataSpec, make: Callable, tmp_path: Path, documents: int) -> None:
    spec = make(tmp_path)
    build_spec(spec, tmp_path / "whole")
    with pytest.raises(Stop):
        build_spec(spec, tmp_path / "out", lambda progress: _stop(progress.documents >= documents))
    build_spec(spec, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
    assert faults(tmp_path / "out")


def test_killed_outright_and_given_again(pages: DataSpec, tmp_path: Path) -> None:
    build_spec(pages, tmp_path / "whole")
    for documents in (10, 47):
        command = [sys.executable, "-c", BUILD_AND_DIE, str(pages.path), str(tmp_path / "out"), str(documents)]
        killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert killed.returncode == -9, killed.stderr
        assert list((tmp_path / "out").glob("*.part"))  # it was in the midst of a shard
    build_spec(pages, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_a_shard_that_is_whole_but_not_recorded_is_made_again(pages: DataSpec, tmp_path: Path) -> None:
    build_spec(pages, tmp_path / "whole")
    record, out = build._replace, tmp_path / "out"

    def die_before_the_second_record(path: Path, text: str) -> None:
        if json.loads(text)["shards"] == 2:
            raise Stop
        record(path, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_replace", die_before_the_second_record)
        with pytest.raises(Stop):
            build_spec(pages, out)
    assert (out / "source-00001.tar").exists()
    build_spec(pages, out)
    assert folder_bytes(out) == folder_bytes(tmp_path / "whole")


def test_built_twice_nothing_changes(pages: DataSpec, tmp_path: Path) -> None:
    build_spec(pages, tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    seen: list[Progress] = []
    build_spec(pages, tmp_path / "out", seen.append)
    assert folder_bytes(tmp_path / "out") == before
    assert [p.documents for p in seen] == [57]


def test_a_shard_ends_at_its_bytes_too(pages: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SHARD_BYTES", 1)
    spec = build_spec(pages, tmp_path / "out")
    assert len(load_spec(spec).shard_names("train")) == 38
    assert len(read_split(spec, "val")) == 19


def test_another_spec_is_refused_and_other_limits_are_not(pages: DataSpec, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_spec(pages, out)
    tree = json.loads(pages.model_dump_json(exclude_defaults=True))
    limits = {**tree, "image": {"max_pixels": 999}}
    spec = build_spec(spec_over(tmp_path, "mmc4", **_without(limits), pattern=pages.shards.pattern), out)
    assert load_spec(spec).image.max_pixels == 999
    other = {**tree, "placement": "after"}
    with pytest.raises(UserError, match="begun from another spec"):
        build_spec(spec_over(tmp_path, "mmc4", **_without(other), pattern=pages.shards.pattern), out)


def _without(tree: dict) -> dict:
    return {name: value for name, value in tree.items() if name not in ("version", "name", "format")}


def test_an_input_that_changed_meanwhile_is_refused(pages: DataSpec, tmp_path: Path) -> None:
    build_spec(pages, tmp_path / "out")
    with (tmp_path / "pages-1.jsonl").open("ab") as file:
        file.write(lines([{"text_list": ["one more"], "image_info": []}]))
    with pytest.raises(UserError, match="from other files"):
        build_spec(pages, tmp_path / "out")


def test_too_many_bad_rows_end_the_build_by_name(tmp_path: Path) -> None:
    rows = [{"text": f"row {n}"} for n in range(40)]
    rows[3], rows[17], rows[31], rows[32] = {"body": "x"}, {"text": 5}, {"text": ""}, {"text": "\ud800"}
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    with pytest.raises(UserError) as error:
        build_spec(spec_over(tmp_path, "text", "a.jsonl", on_bad={"max_fraction": 0.09}), tmp_path / "out")
    for words in (
        "a.jsonl: 4 of 40 rows",
        "max_fraction = 0.09",
        "row 3: missing",
        "row 17: text",
        "row 31",
        "build_faults.jsonl",
    ):
        assert words in str(error.value)
    assert "row 32" not in str(error.value)
    assert [fault["row"] for fault in faults(tmp_path / "out")] == [3, 17, 31, 32]
    # Allowed more, it goes on where it was; the folder is then as if that had been allowed from the beginning.
    spec = build_spec(spec_over(tmp_path, "text", "a.jsonl", on_bad={"max_fraction": 0.1}), tmp_path / "out")
    assert len(read_split(spec, "train")) == 36
    build_spec(load_spec(tmp_path / "source.yaml"), tmp_path / "whole")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_the_fraction_counts_rows_from_before_a_restart(tmp_path: Path) -> None:
    rows = [{"text": f"row {n}"} if n % 2 else {} for n in range(10)] + [{"text": f"row {n}"} for n in range(10, 40)]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    spec = spec_over(tmp_path, "text", "a.jsonl", on_bad={"max_fraction": 0.1})

    with pytest.raises(Stop):
        build_spec(spec, tmp_path / "out", lambda progress: _stop(progress.documents > 20))
    with pytest.raises(UserError, match=r"5 of 40 rows are bad.*row 0: missing"):
        build_spec(spec, tmp_path / "out")


def test_splits_may_overlap_and_leave_files_out(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.jsonl").write_bytes(lines([{"text": f"{number}.{row}"} for row in range(3)]))
    split = {"most": "1:5", "few": "2:3", "end": "4:"}
    spec = build_spec(spec_over(tmp_path, "text", "{0..5}.jsonl", split=split), tmp_path / "out")
    for name, files in {"most": range(1, 5), "few": range(2, 3), "end": range(4, 6)}.items():
        assert [told(s) for s in read_split(spec, name)] == [[f"{file}.{row}"] for file in files for row in range(3)]


def test_missing_files_are_counted_as_bad_rows_are(tmp_path: Path) -> None:
    for number in (0, 1, 3):
        (tmp_path / f"{number}.jsonl").write_bytes(lines([{"text": str(number)}]))
    with pytest.raises(UserError, match=r"1 of 4 files are missing.*2\.jsonl"):
        build_spec(spec_over(tmp_path, "text", "{0..3}.jsonl"), tmp_path / "out")
    spec = build_spec(spec_over(tmp_path, "text", "{0..3}.jsonl", on_bad={"max_fraction": 0.25}), tmp_path / "out")
    assert [told(sample) for sample in read_split(spec, "train")] == [["0"], ["1"], ["3"]]
    assert faults(tmp_path / "out") == [{"file": "2.jsonl", "row": None, "reason": "missing", "detail": "no such input file"}]


@pytest.mark.parametrize("format", build.READERS)
def test_the_example_of_every_format_loads(format: str) -> None:
    spec = load_spec(Path(build.__file__).parents[2] / "data_specs" / f"{format}.yaml")
    assert (spec.format, set(spec.split)) == (format, {"train", "val"})


def test_refusals(pages: DataSpec, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="nothing to build"):
        build_spec(pages.model_copy(update={"format": "interleaved"}), out)
    out.mkdir()
    (out / "spec.yaml").write_text("of another corpus")
    with pytest.raises(UserError, match="no build of this spec began"):
        build_spec(pages, out)
    (out / "spec.yaml").unlink()
    build_spec(pages, out)
    (out / "source-00002.tar").unlink()
    with pytest.raises(UserError, match=r"source-00002\.tar is gone"):
        build_spec(pages, out)
    (out / "build.json").write_text("[]")
    with pytest.raises(UserError, match="not the record of a build"):
        build_spec(pages, out)
    (tmp_path / "source.yaml").rename(tmp_path / "spec.yaml")
    with pytest.raises(UserError, match="would be overwritten"):
        build_spec(load_spec(tmp_path / "spec.yaml"), tmp_path)


def test_remote_roots_and_links_out_of_root_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="copy the files"):
        build_spec(spec_over(tmp_path, "text", "a.jsonl", shards={"root": "s3://bucket/x"}), tmp_path / "out")
    (tmp_path / "secret.jsonl").write_bytes(lines([{"text": "secret"}]))
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(UserError, match="link out of"):
        build_spec(spec_over(tmp_path, "text", "a.jsonl", shards={"root": "root"}), tmp_path / "out")


def test_a_split_without_documents_is_told(tmp_path: Path) -> None:
    (tmp_path / "0.jsonl").write_bytes(lines([{"text": "x"}]))
    (tmp_path / "1.jsonl").write_bytes(b"\n")
    with pytest.raises(UserError, match="no row of split 'val' made a document"):
        build_spec(spec_over(tmp_path, "text", "{0..1}.jsonl", split={"train": "0:1", "val": "1:"}), tmp_path / "out")


def test_two_builds_do_not_share_a_folder(pages: DataSpec, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    folder = os.open(out, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another build"):
        build_spec(pages, out)
    os.close(folder)
    build_spec(pages, out)
