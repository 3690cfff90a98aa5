"""A config's mistakes are told in one line each: the field, its value, the mend."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmpt.config import MAX_BYTES, RunConfig, dump, load
from mmpt.types import UserError

SMALL = """\
name: small
data: {spec: spec.yaml, tokenizer: tokenizer.json}
train: {steps: 10}
"""
SHIPPED = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def mistakes(path: Path, *overrides: str) -> list[str]:
    """The lines of the error, which all begin with what is at fault."""
    with pytest.raises(UserError) as caught:
        load(path, list(overrides))
    return str(caught.value).splitlines()


def mistake(path: Path, *overrides: str) -> str:
    (line,) = mistakes(path, *overrides)
    return line


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_load(path: Path) -> None:
    assert load(path).name == path.stem


def test_overrides_are_typed(small: Path) -> None:
    overrides = [
        "train.steps=1e2",
        "optimizer.lr=3e-4",
        "optimizer.betas=[0.8, 0.99]",
        "data.augment={rotate: 5, color: 0.5}",
        "data.augment.color=0.25",
        'name="2024"',
        "data.spec=a folder/spec=1.yaml",
    ]
    config = load(small, overrides)
    assert config.train.steps == 100 and isinstance(config.train.steps, int)
    assert config.optimizer.lr == 3e-4
    assert config.optimizer.betas == (0.8, 0.99)
    assert (config.data.augment.rotate, config.data.augment.color) == (5.0, 0.25)
    assert config.name == "2024"
    assert config.data.spec == "a folder/spec=1.yaml"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stps=5", ["unknown key train.stps", "did you mean 'steps'"]),
        ("train.zzz=5", ["unknown key train.zzz", "known here: steps, accumulate"]),
        ("zzz.a=5", ["unknown key zzz", "known here: name, model, data"]),
        ("train.steps=abc", ["train.steps = 'abc'", "valid integer"]),
        ("train.steps=", ["train.steps = (nothing)", "valid integer"]),
        ("train.steps=1.5", ["train.steps = 1.5", "valid integer"]),
        ("train.steps=-1", ["train.steps = -1", "greater than 0"]),
        ("train.steps=true", ["train.steps = True", "no value here"]),
        ("train.steps=99999999999999999999", ["train.steps = 99999999999999999999", "less than"]),
        ("data.seed=99999999999999999999", ["data.seed = 99999999999999999999", "less than"]),
        ("train.precision=fp16", ["train.precision = 'fp16'", "'auto', 'bf16' or 'fp32'"]),
        ("optimizer.lr=.nan", ["optimizer.lr = nan", "finite"]),
        ("optimizer.lr=.inf", ["optimizer.lr = inf", "finite"]),
        ("optimizer.betas=0.9", ["optimizer.betas = 0.9", "list"]),
        ("name=2024", ["name = 2024", "quotes"]),
        ("name=a/b", ["name = 'a/b'", "letters, digits"]),
        ("train=5", ["train = 5", "a section is wanted", "steps"]),
        ("train.steps.x=5", ["train.steps.x", "the value 10", "write train.steps="]),
        ("model.image.size=60", ["image.size 60", "image.patch 16"]),
        ("train.steps", ["'train.steps'", "key.sub=value"]),
        ("=5", ["'=5'", "key.sub=value"]),
        ("train..steps=5", ["'train..steps=5'", "key.sub=value"]),
        ("model.image.stem_dims[0]=5", ["stem_dims[0]=5", "key.sub=value"]),
        ("name=???", ["name=???", "write the value"]),
        ("name=[", ["name", "[", "write"]),
        ("name=a\0b", ["name", "write"]),
        ("data.spec=${oc.env:HOME}", ["data.spec", "not expanded", "write the value"]),
    ],
)
def test_a_wrong_override_gets_one_line(small: Path, override: str, words: list[str]) -> None:
    line = mistake(small, override)
    assert all(word in line for word in words), line
    assert line.isprintable()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2]", ["not a mapping"]),
        ("just words", ["not a mapping"]),
        ("a: [", ["line 1"]),
        ("a:\t- b", ["line 1"]),
        (SMALL + "name: other\n", ["'name' in line 4", "twice"]),
        (SMALL.replace("{steps: 10}", "{steps: 10, steps: 20}"), ["'steps' in line 3", "twice"]),
        ("a: &x [1]\nb: *x\n", ["*x in line 2", "write the value out"]),
        ("a: &x [*x]\n", ["*x in line 1", "write the value out"]),
        (SMALL + "a: !!python/object/apply:os.getcwd []\n", ["could not determine a constructor", "line 4"]),
        (SMALL.replace("small", "${oc.env:HOME}"), ["${oc.env:HOME}", "not expanded"]),
        (SMALL + "a: {b: ['${c}${c}']}\n", ["${c}${c}", "not expanded"]),
        (SMALL + "---\n" + SMALL, ["single document"]),
        ("[" * 5000, ["recursion"]),
        ("a: \0", ["#x0000"]),
    ],
)
def test_a_wrong_file_gets_one_line(small: Path, text: str, words: list[str]) -> None:
    small.write_text(text)
    line = mistake(small)
    assert line.startswith(f"config {small}: ")
    assert all(word in line for word in words), line
    assert line.isprintable()


def test_every_missing_field_gets_a_line(small: Path) -> None:
    small.write_text("name: small\ndata: {spec: spec.yaml}\n")
    lines = mistakes(small)
    assert [line.partition(": ")[2].split()[0] for line in lines] == ["data.tokenizer", "train"]
    assert all("is missing" in line for line in lines)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    assert "no such file" in mistake(tmp_path / "nowhere.yaml")
    assert "no such file" in mistake(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    assert "utf-8" in mistake(tmp_path / "latin.yaml")


def test_the_environment_is_not_read(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "sesame")
    for text in ("${oc.env:SECRET}", "a${oc.env:SECRET}b", "${oc.decode:${oc.env:SECRET}}"):
        assert "sesame" not in mistake(small, f"data.spec={text}")
        small.write_text(SMALL.replace("spec.yaml", f"'{text}'"))
        assert "sesame" not in mistake(small)
        small.write_text(SMALL)


def test_a_huge_file_is_not_parsed(small: Path) -> None:
    with small.open("wb") as file:
        file.truncate(100 * MAX_BYTES)
    assert f"{100 * MAX_BYTES:,} bytes" in mistake(small)


def test_a_bomb_of_aliases_is_refused_at_its_first(small: Path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    small.write_text("\n".join(levels))
    assert "*a0 in line 2" in mistake(small)


def test_a_stranger_s_values_do_not_flood_the_line(small: Path) -> None:
    small.write_text(SMALL.replace("10", "'" + "9" * 100_000 + "'"))
    assert len(mistake(small)) < 1000
    small.write_text(SMALL + "".join(f"key{n}: 1\n" for n in range(10_000)))
    assert len(mistakes(small)) < 50


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4),
    max_leaves=8,
)
SETTINGS = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@SETTINGS
@given(tree=st.dictionaries(st.sampled_from(list(RunConfig.model_fields)) | st.text(max_size=8), VALUES, max_size=6))
def test_any_tree_loads_or_is_a_user_error(small: Path, tree: dict[str, Any]) -> None:
    small.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="replace")
    _loads_or_complains(small, [])


@SETTINGS
@given(
    key=st.sampled_from(["train.steps", "name", "data", "model.image.stem_dims", "optimizer.betas", ""]) | st.text(max_size=12),
    value=st.text(max_size=24) | st.text(alphabet="${}[]:,&*!?'\"\\ .-0a\n", max_size=12),
)
def test_any_override_loads_or_is_a_user_error(small: Path, key: str, value: str) -> None:
    _loads_or_complains(small, [f"{key}={value}"])


def _loads_or_complains(path: Path, overrides: list[str]) -> None:
    try:
        config = load(path, overrides)
    except UserError as error:
        assert str(error)
    else:
        assert isinstance(config, RunConfig)


@SETTINGS
@given(
    steps=st.integers(1, 2**31 - 1),
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    spec=st.text(max_size=20).filter(lambda text: "${" not in text),
    seed=st.integers(0, 2**63 - 1),
)
def test_dump_and_load_give_the_same_config(small: Path, steps: int, lr: float, spec: str, seed: int) -> None:
    small.write_text(SMALL)
    config = load(small)
    config = config.model_copy(
        update={
            "train": config.train.model_copy(update={"steps": steps, "seed": seed}),
            "optimizer": config.optimizer.model_copy(update={"lr": lr}),
            "data": config.data.model_copy(update={"spec": spec}),
        }
    )
    small.write_text(dump(config), encoding="utf-8")
    assert load(small) == config


def test_the_schema_describes_the_tree() -> None:
    schema = json.loads(json.dumps(RunConfig.model_json_schema()))
    assert schema["type"] == "object"
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert set(schema["required"]) == {"name", "data", "train"}
    for name, section in {"RunConfig": schema, **schema["$defs"]}.items():
        assert section["additionalProperties"] is False, name
        for reference in _references(section):
            assert reference.removeprefix("#/$defs/") in schema["$defs"]
    assert schema["$defs"]["TrainConfig"]["properties"]["steps"]["description"] == "optimizer steps of the whole run"


def _references(tree: Any) -> list[str]:
    if isinstance(tree, dict):
        own = [tree["$ref"]] if "$ref" in tree else []
        return own + [found for value in tree.values() for found in _references(value)]
    return [found for value in tree for found in _references(value)] if isinstance(tree, list) else []
