from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmpt.data.spec import MAX_SPEC_BYTES, load_mixture, load_spec
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
    shards = [f"a-{number:02d}.tar" for number in range(5)]
    assert spec.shard_names("train") == shards[:3]
    assert spec.shard_names("val") == shards[3:]
    assert spec.shard_names("all") == shards


def test_root_is_relative_to_the_spec_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    assert Path(load_spec(f"{tmp_path.name}/spec.yaml").root).resolve() == tmp_path / "shards"


@pytest.mark.parametrize(
    "root", ["s3://bucket/a/b", "gs://bucket", "az://box/a", "https://example.org/a/", "http://127.0.0.1:9/a"]
)
def test_a_root_may_be_an_object_store_or_a_web_server(tmp_path: Path, root: str) -> None:
    spec = load_spec(write(tmp_path, shards=json.dumps({"root": root, "pattern": "a-{00..04}.tar"})))
    assert spec.root == root.rstrip("/") and spec.shards.is_remote and spec.shards.shuffled_together == 16


@pytest.mark.parametrize("block", [None, 0, 3])
def test_local_shards_are_shuffled_all_together_unless_told(tmp_path: Path, block: int | None) -> None:
    shards = {"root": "shards", "pattern": "a-{00..04}.tar"} | ({} if block is None else {"block": block})
    assert load_spec(write(tmp_path, shards=json.dumps(shards))).shards.shuffled_together == (block or 0)


def test_a_pattern_without_a_range_is_one_shard(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, shards="{root: shards, pattern: a-03.tar}", split='{train: ":"}'))
    assert spec.shard_names("train") == ["a-03.tar"]


def test_a_split_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path))
    with pytest.raises(UserError, match="no split 'test'; it has train, val, all"):
        spec.shard_names("test")


@pytest.mark.parametrize("pattern", ["/etc/{0..1}.tar", "../a.tar", "x/../../a.tar", ".{0..1}./a.tar", "x/.."])
def test_patterns_that_leave_root_are_refused(tmp_path: Path, pattern: str) -> None:
    assert "must stay below root" in message(write(tmp_path, shards=f'{{root: shards, pattern: "{pattern}"}}'))


@pytest.mark.parametrize(
    "pattern", ["*.tar", "a-?.tar", "a-[0-9].tar", "a-{0,1}.tar", "{0..1}-{0..1}.tar", "a-{0..9999999999}.tar", "a-{x..y}.tar"]
)
def test_one_range_is_the_only_wildcard(tmp_path: Path, pattern: str) -> None:
    assert "one number range is understood" in message(write(tmp_path, shards=f'{{root: shards, pattern: "{pattern}"}}'))


COMMANDS = ["pipe:cat a.tar", "cat a.tar |", "file:///etc", "s3://bucket/a|b", "simplecache::s3://bucket/a", "s3://a::file://b"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("field", ["root", "pattern", "media"])
def test_commands_and_other_addresses_are_refused(tmp_path: Path, field: str, command: str) -> None:
    shards = {"root": "shards", "pattern": "a.tar", field: command}
    assert "never run" in message(write(tmp_path, shards=json.dumps(shards)))


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
        ({"format": "zip"}, "format = 'zip'"),
        ({"map": "{image: jpg}"}, "map.image is no field of format interleaved"),
        ({"format": "text", "map": "{image: jpg}"}, "map.image is no field of format text; it has text"),
        ({"templates": "[{order: [image, text]}]"}, "templates belong to formats pairs and csv"),
        ({"format": "pairs", "templates": "[{order: [image, image]}]"}, "one image and one text are wanted"),
        ({"format": "pairs", "templates": "[{order: [text, image], p: 0}]"}, "templates.0.p = 0"),
        ({"image": "{max_pixels: 0}"}, "image.max_pixels = 0"),
        ({"audio": "{sample_rate: 44100}"}, "audio.sample_rate = 44100"),
        ({"video": "{fps: .inf}"}, "video.fps = inf"),
        ({"on_bad": "{policy: ignore}"}, "on_bad.policy = 'ignore'"),
        ({"on_bad": "{max_fraction: true}"}, "true and false are no value here"),
        ({"version": "0x" + "f" * 4000}, "a number of 4002 characters in line 1"),
        ({"shards": '{root: "a\\0b", pattern: a.tar}'}, "a path that can be printed"),
        ({"shards": "{root: a, pattern: a.tar, block: 9223372036854775808}"}, "shards.block = 9223372036854775808"),
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
        for spec in load_mixture(path).specs():
            assert "train" in spec.split, path


MIXTURE = """\
version: 1
name: both
unit: samples
mixture:
  - {spec: spec.yaml, weight: 2}
  - {spec: other.yaml, weight: 1.5, max_epochs: 2, on_exhausted: stop}
"""


def test_a_mixture_names_its_specs(tmp_path: Path) -> None:
    write(tmp_path).rename(tmp_path / "other.yaml")
    write(tmp_path, name="second")
    (tmp_path / "both.yaml").write_text(MIXTURE)
    mixture = load_mixture(tmp_path / "both.yaml")
    assert mixture.unit == "samples" and [part.weight for part in mixture.mixture] == [2, 1.5]
    assert [spec.name for spec in mixture.specs()] == ["second", "tiny"]
    assert (mixture.mixture[1].max_epochs, mixture.mixture[1].on_exhausted) == (2, "stop")


def test_a_spec_alone_is_a_mixture_of_one(tmp_path: Path) -> None:
    mixture = load_mixture(write(tmp_path))
    assert [(part.weight, part.max_epochs) for part in mixture.mixture] == [(1, None)]
    assert [spec.path for spec in mixture.specs()] == [tmp_path / "spec.yaml"]


def test_two_specs_of_one_name_are_refused(tmp_path: Path) -> None:
    write(tmp_path).rename(tmp_path / "other.yaml")
    write(tmp_path)
    (tmp_path / "both.yaml").write_text(MIXTURE)
    with pytest.raises(UserError, match="two of its specs have the name 'tiny'"):
        load_mixture(tmp_path / "both.yaml").specs()


TASKS = """\
version: 1
name: tasks
mixture:
  - {spec: spec.yaml, weight: 2}
  - {spec: spec.yaml, weight: 1, task: masked}
  - {spec: ./spec.yaml, weight: 1, task: span}
"""


def test_one_spec_may_have_several_tasks(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "tasks.yaml").write_text(TASKS)
    mixture = load_mixture(tmp_path / "tasks.yaml")
    specs = mixture.specs()
    assert [spec.name for spec in specs] == ["tiny"] * 3 and [spec.name for spec in mixture.corpora()] == ["tiny"]
    names = [part.source_name(spec.name) for part, spec in zip(mixture.mixture, specs, strict=True)]
    assert names == ["tiny", "tiny:masked", "tiny:span"]


def test_one_spec_with_one_task_twice_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "tasks.yaml").write_text(TASKS.replace("task: span", "task: masked"))
    with pytest.raises(UserError, match="source 'tiny:masked' stands there twice; take one out, or give it another task"):
        load_mixture(tmp_path / "tasks.yaml").specs()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("weight: 2", "weight: -1"), "mixture.0.weight = -1"),
        (("on_exhausted: stop", "on_exhausted: loop"), "mixture.1.on_exhausted = 'loop'"),
        (("max_epochs: 2", "max_epochs: 0"), "mixture.1.max_epochs = 0"),
        (("unit: samples", "unit: bytes"), "unit = 'bytes'"),
        (("weight: 2", "weight: 2, task: cloze"), "mixture.0.task = 'cloze'"),
        (("spec: spec.yaml", "spec: 'pipe:cat'"), "never run"),
    ],
)
def test_a_mistake_in_a_mixture_names_field_and_value(tmp_path: Path, change: tuple[str, str], told: str) -> None:
    (tmp_path / "both.yaml").write_text(MIXTURE.replace(*change))
    with pytest.raises(UserError) as caught:
        load_mixture(tmp_path / "both.yaml")
    assert told in str(caught.value)


def test_a_mixture_where_a_spec_is_wanted_is_told(tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text(MIXTURE)
    assert "this is a mixture" in message(tmp_path / "both.yaml")
