from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmpt.data.spec import MAX_SPEC_BYTES, load_spec
from mmpt.types import UserError

GOOD = {
    "version": "1",
    "name": "tiny",
    "format": "interleaved",
    "shards": '{root: shards, pattern: "a-{00..04}.tar"}',
    "split": '{train: "0:3", val: "3:", all: ":"}',
}


def write(folder: Path, **changed: str | None) -> Path:
    """A spec beside five shards, with some lines changed or (None) left out."""
    (folder / "shards").mkdir(exist_ok=True)
    for number in range(5):
        (folder / "shards" / f"a-{number:02d}.tar").touch()
    path = folder / "spec.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in {**GOOD, **changed}.items() if value is not None))
    return path


def message(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_spec(path)
    return str(caught.value)


def test_splits_are_ranges_of_the_pattern(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path))
    shards = [tmp_path / "shards" / f"a-{number:02d}.tar" for number in range(5)]
    assert spec.shard_paths("train") == shards[:3]
    assert spec.shard_paths("val") == shards[3:]
    assert spec.shard_paths("all") == shards


def test_root_is_relative_to_the_spec_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    assert load_spec(f"{tmp_path.name}/spec.yaml").shard_paths("train")[0].resolve() == tmp_path / "shards" / "a-00.tar"


def test_a_pattern_without_a_range_is_one_shard(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, shards="{root: shards, pattern: a-03.tar}", split='{train: ":"}'))
    assert spec.shard_paths("train") == [tmp_path / "shards" / "a-03.tar"]


def test_a_split_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path))
    with pytest.raises(UserError, match="no split 'test'; it has train, val, all"):
        spec.shard_paths("test")


def test_missing_shards_are_named_and_counted(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path))
    (tmp_path / "shards" / "a-01.tar").unlink()
    with pytest.raises(UserError, match=r"lacks a-01.tar, 1 of 3 shards of split 'train'"):
        spec.shard_paths("train")


@pytest.mark.parametrize("pattern", ["/etc/{0..1}.tar", "../a.tar", "x/../../a.tar", ".{0..1}./a.tar", "x/.."])
def test_patterns_that_leave_root_are_refused(tmp_path: Path, pattern: str) -> None:
    assert "must stay below root" in message(write(tmp_path, shards=f'{{root: shards, pattern: "{pattern}"}}'))


@pytest.mark.parametrize(
    "pattern", ["*.tar", "a-?.tar", "a-[0-9].tar", "a-{0,1}.tar", "{0..1}-{0..1}.tar", "a-{0..9999999999}.tar", "a-{x..y}.tar"]
)
def test_one_range_is_the_only_wildcard(tmp_path: Path, pattern: str) -> None:
    assert "one number range is understood" in message(write(tmp_path, shards=f'{{root: shards, pattern: "{pattern}"}}'))


@pytest.mark.parametrize("command", ["pipe:cat a.tar", "https://example.org/a.tar", "s3://bucket/a.tar", "cat a.tar |"])
@pytest.mark.parametrize("field", ["root", "pattern"])
def test_commands_and_addresses_are_refused(tmp_path: Path, field: str, command: str) -> None:
    shards = {"root": "shards", "pattern": "a.tar", field: command}
    assert "never run or opened" in message(write(tmp_path, shards=json.dumps(shards)))


@pytest.mark.parametrize("pattern", ["{0..999999999}.tar", "a-{04..00}.tar"])
def test_a_pattern_of_countless_shards_or_none_is_refused(tmp_path: Path, pattern: str) -> None:
    told = message(write(tmp_path, shards=f'{{root: shards, pattern: "{pattern}"}}'))
    assert "counts down, or names over 1,000,000 shards" in told
    assert f"shards.pattern = {pattern!r}" in told
    assert "\n" not in told


@pytest.mark.parametrize("range", ["2:2", "3:1", "5:", "0:6", ":9"])
def test_a_split_beyond_the_pattern_or_empty_is_refused(tmp_path: Path, range: str) -> None:
    told = message(write(tmp_path, split=f'{{train: "{range}", val: "3:"}}'))
    assert f"train: {range!r} does not fit shards.pattern, which names 5 shards" in told
    assert "\n" not in told


def test_a_range_without_quotes_is_refused_as_yaml_takes_it_for_a_number(tmp_path: Path) -> None:
    told = message(write(tmp_path, split="{train: 0:3, val: 3:5}"))
    assert "val: 185 is not a range of shards" in told
    assert "quoted" in told


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"name": None}, "name is missing"),
        ({"version": "2"}, "version = 2"),
        ({"format": "pairs"}, "format = 'pairs'"),
        ({"name": "../x"}, "name = '../x'"),
        ({"nmae": "x"}, "unknown key nmae; did you mean 'name'?"),
        ({"shards": "a.tar"}, "shards = 'a.tar'"),
        ({"split": "{}"}, "split"),
        ({"split": "[train]"}, "split = ['train']"),
        ({"split": "{train: 0-3}"}, "'0-3' is not a range of shards"),
        ({"split": f'{{train: "0:{"9" * 5000}"}}'}, "is not a range of shards"),
        ({"split": '{train: "-1:"}'}, "is not a range of shards"),
    ],
)
def test_a_mistake_names_field_and_value(tmp_path: Path, changed: dict, told: str) -> None:
    lines = message(write(tmp_path, **changed)).splitlines()
    assert len(lines) == 1
    assert told in lines[0]


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00",
        b"a: [",
        b"[" * 100_000,
        b"version: 2001-99-99",
        b'!!python/object/apply:os.system ["touch ran"]',
        b"name: !!python/name:os.system",
        b"a: &a [x, x]\nb: [*a, *a]",
    ],
)
def test_what_is_no_plain_yaml_is_refused_in_one_line_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.yaml").write_bytes(content)
    told = message(tmp_path / "spec.yaml")
    assert "not YAML" in told
    assert "\n" not in told
    assert not (tmp_path / "ran").exists()


def test_a_list_a_missing_file_and_a_huge_one_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    assert "no such file" in message(path)
    path.write_text("- 1\n")
    assert "a mapping is wanted" in message(path)
    path.write_bytes(b"#" * (MAX_SPEC_BYTES + 1))
    assert "a few lines of YAML" in message(path)


def test_the_shipped_specs_parse() -> None:
    shipped = sorted((Path(__file__).parents[2] / "data_specs").glob("*.yaml"))
    assert shipped
    for path in shipped:
        spec = load_spec(path)
        assert spec.name == path.stem
        assert {"train", "val"} <= spec.split.keys()
