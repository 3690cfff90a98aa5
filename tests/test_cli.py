"""The commands as a person meets them: help, results, and one line for each mistake."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from mmpt import cli
from mmpt.config import RunConfig, dump
from mmpt.train.loop import train
from mmpt.types import UserError

ROOT = Path(__file__).parent.parent
DEMO = str(ROOT / "configs" / "demo.yaml")
BARE = """\
version: 1
name: bare
format: interleaved
shards: {root: ".", pattern: "a-{0..3}.tar"}
split: {train: "0:4"}
"""
COMMANDS = (
    "",
    "train",
    "eval",
    "eval retrieval",
    "eval classification",
    "eval language",
    "export",
    "report",
    "config",
    "config show",
    "config schema",
    "config cost",
    "data",
    "data build",
    "data index",
    "data validate",
    "data stats",
    "data preview",
    "verify",
    "verify layouts",
    "verify data",
    "demo",
)


@pytest.fixture
def mmpt(capsys: pytest.CaptureFixture[str]):
    """Run a command line; its exit code, output and complaints."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        return code, printed.out, printed.err

    return run


@pytest.fixture
def complaint(mmpt):
    """Run a command line that must fail, and return its one line."""

    def run(*arguments: str | Path) -> str:
        code, _, err = mmpt(*arguments)
        assert code == 2
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        return line

    return run


@pytest.fixture
def tiny_run(tiny_config: RunConfig, tmp_path: Path) -> Path:
    """A run of two steps."""
    settings = tiny_config.train.model_copy(update={"steps": 2})
    return train(tiny_config.model_copy(update={"train": settings}), tmp_path, Console(quiet=True))


@pytest.mark.parametrize("command", COMMANDS)
def test_help(mmpt, command: str) -> None:
    code, out, _ = mmpt(*command.split(), "--help")
    assert code == 0
    assert out.startswith(f"Usage: mmpt {command}".strip())
    summaries = out.partition("Commands:")[2]
    assert "..." not in summaries  # each summary fits its line


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from mmpt.cli import main; main(['train', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, timeout=60).returncode == 0


@pytest.mark.parametrize(
    "line", ["trian", "train", "train x.yaml --nonsense", "eval retrieval run", "data build emojy --out x", "data build emoji"]
)
def test_a_wrong_command_line_ends_in_2(mmpt, line: str) -> None:
    code, out, err = mmpt(*line.split())
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.endswith("--help`\n") and err.count("\n") == 1


def test_config_show_is_yaml_that_loads_again(mmpt, tmp_path: Path) -> None:
    code, out, _ = mmpt("config", "show", DEMO, "train.steps=7")
    assert code == 0
    assert yaml.safe_load(out)["train"]["steps"] == 7
    rows = [line.split() for line in out.partition("# parameters")[2].splitlines()]
    parts = {row[1]: int(row[2].replace(",", "")) for row in rows if row}
    total = parts.pop("total")
    assert total == sum(parts.values()) > 1_000_000
    (tmp_path / "again.yaml").write_text(out)
    assert mmpt("config", "show", tmp_path / "again.yaml") == (0, out, "")


def test_config_schema_is_json(mmpt) -> None:
    code, out, _ = mmpt("config", "schema")
    assert code == 0
    assert json.loads(out) == RunConfig.model_json_schema()


def test_config_show_builds_no_weights(mmpt) -> None:
    sizes = ["transformer.dim=4096", "transformer.layers=32", "transformer.n_heads=32", "transformer.n_kv_heads=8"]
    code, out, _ = mmpt("config", "show", DEMO, *(f"model.{size}" for size in sizes), "model.transformer.ffn_dim=14336")
    assert code == 0
    total = next(line for line in out.splitlines() if line.startswith("# total"))
    assert int(total.split()[-1].replace(",", "")) > 6_000_000_000


def test_a_run_is_trained_evaluated_and_reported(mmpt, tiny_config: RunConfig, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(dump(tiny_config))
    code, out, _ = mmpt("train", "tiny.yaml", "train.steps=2")
    assert code == 0 and "step 2/2" in out
    code, out, _ = mmpt("eval", "retrieval", "runs/tiny", "--spec", tiny_config.data.spec)
    assert code == 0 and "picture to text" in out
    result = json.loads(Path(out.splitlines()[-1]).read_text())
    assert result["evaluated_on"]["split"] == "val" and result["checkpoint"]["step"] == 2
    code, out, _ = mmpt("report", "runs/tiny")
    assert code == 0
    assert Path(out.splitlines()[-1]) == Path("runs/tiny/report.html")
    assert "<html" in Path("runs/tiny/report.html").read_text()


def test_preview(mmpt, tiny_data: Path, tiny_config: RunConfig, tmp_path: Path) -> None:
    page, config = tmp_path / "page.html", tmp_path / "tiny.yaml"
    config.write_text(dump(tiny_config))
    code, out, err = mmpt("data", "preview", tiny_data / "tiny.yaml", "--config", config, "--out", page)
    assert (code, out, err) == (0, f"{page}\n", "")
    shown = page.read_text()
    assert "tiny0" in shown and "data:image/png" in shown and "picture 1 × 4" in shown


def test_index(mmpt, tiny_data: Path) -> None:
    code, out, err = mmpt("data", "index", tiny_data / "tiny.yaml", "--tokenizer", tiny_data / "tokenizer.json", "--workers", 1)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("tiny train: 36 documents in 3 shards, ") and "tokens of text" in out


def test_validate_ends_in_1_where_anything_is_wrong(mmpt, tiny_data: Path, tmp_path: Path) -> None:
    assert mmpt("data", "validate", tiny_data / "tiny.yaml", "--workers", 1)[:2] == (0, "48 documents of 4 shards: no faults\n")
    shutil.copytree(tiny_data, tmp_path, dirs_exist_ok=True)
    shard = tmp_path / "tiny-00001.tar"
    shard.write_bytes(shard.read_bytes()[:20_000])
    code, out, err = mmpt("data", "validate", tmp_path / "tiny.yaml", "--workers", 1, "--json")
    faults = json.loads(out)["faults"]
    assert (code, err) == (1, "") and {fault["shard"] for fault in faults} == {"tiny-00001.tar"}
    assert "truncated" in {fault["reason"] for fault in faults}
    code, out, _ = mmpt("data", "validate", tmp_path / "tiny.yaml", "--workers", 1)
    assert code == 1 and "truncated" in out


def test_stats(mmpt, tiny_data: Path, tiny_config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(dump(tiny_config))
    code, out, err = mmpt("data", "stats", tiny_data / "tiny.yaml", "--config", tmp_path / "tiny.yaml", "--json")
    source = json.loads(out)["sources"]["tiny"]
    assert (code, err, source["documents"]) == (0, "", 36)
    assert "fill" in mmpt("data", "stats", tiny_data / "tiny.yaml", "--config", tmp_path / "tiny.yaml")[1]


def test_a_corpus_of_another_format_is_built_and_trained_on(mmpt, tiny_config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "a.txt.jsonl").write_text("".join(json.dumps({"text": f"line {number}"}) + "\n" for number in range(9)))
    spec = {"version": 1, "name": "lines", "format": "text", "shards": {"root": ".", "pattern": "a.txt.jsonl"}}
    (tmp_path / "lines.yaml").write_text(json.dumps(spec | {"split": {"train": ":"}}))
    code, out, err = mmpt("data", "build", tmp_path / "lines.yaml", "--out", tmp_path / "built")
    assert (code, err) == (0, "") and out.startswith("9 documents; 0 rows skipped, 0 pictures left out\n")
    (tmp_path / "config.yaml").write_text(dump(tiny_config))
    code, out, _ = mmpt("verify", "data", tmp_path / "config.yaml", f"data.spec={tmp_path / 'built' / 'spec.yaml'}")
    assert code == 0 and "equal, with sample, augmentation seed, pack and position" in out


@pytest.mark.parametrize("command", [["train"], ["config", "show"]])
def test_mistakes_in_a_config(complaint, command: list[str], tmp_path: Path) -> None:
    assert "nowhere.yaml: no such file" in complaint(*command, tmp_path / "nowhere.yaml")
    assert "unknown key train.stps; did you mean 'steps'?" in complaint(*command, DEMO, "train.stps=5")
    assert "train.steps = 'many'" in complaint(*command, DEMO, "train.steps=many")


def test_every_mistake_has_its_line(mmpt) -> None:
    code, _, err = mmpt("config", "show", DEMO, "train.stps=5", "optimizer.lr=0")
    assert code == 2
    assert len(err.splitlines()) == 2
    assert all(line.startswith("error: ") for line in err.splitlines())


def test_data_that_is_not_there(complaint, tiny_config: RunConfig, tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(dump(tiny_config))
    assert "spec nowhere.yaml: no such file" in complaint("train", config, "data.spec=nowhere.yaml")
    assert "tokenizer nowhere.json: no such file" in complaint("train", config, "data.tokenizer=nowhere.json")
    bare = tmp_path / "bare.yaml"
    bare.write_text(BARE)
    line = complaint("train", config, f"data.spec={bare}")
    assert str(bare) in line and "a-0.tar" in line and "shards.root" in line
    assert "a-0.tar" in complaint("data", "preview", bare, "--config", config, "--out", tmp_path / "page.html")


def test_a_run_that_is_not_there(complaint, tiny_config: RunConfig, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    assert f"run {nothing}: no such folder" in complaint("report", nothing)
    assert f"run {nothing}: no such folder" in complaint("eval", "retrieval", nothing, "--spec", tiny_config.data.spec)
    run = tmp_path / "untrained"
    run.mkdir()
    assert "config.yaml: no such file" in complaint("report", run)
    (run / "config.yaml").write_text(dump(tiny_config))
    assert "no checkpoint" in complaint("report", run)


def test_a_trained_run_with_the_wrong_data_or_model(complaint, tiny_config: RunConfig, tiny_run: Path, tmp_path: Path) -> None:
    spec = tiny_config.data.spec
    assert "nowhere.yaml: no such file" in complaint("eval", "retrieval", tiny_run, "--spec", "nowhere.yaml")
    assert "no split 'test'; it has train, val" in complaint("eval", "retrieval", tiny_run, "--spec", spec, "--split", "test")
    config = tiny_run / "config.yaml"
    config.write_text(config.read_text().replace("embedding_dim: 16", "embedding_dim: 32"))
    line = complaint("eval", "retrieval", tiny_run, "--spec", spec)
    assert "model.embedding_dim was 16 and is 32" in line
    state = max(tiny_run.glob("checkpoints/*/state.json"))
    state.write_text("{")
    assert "state.json does not read" in complaint("report", tiny_run)


def test_a_folder_that_cannot_be_written(complaint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'}" in complaint("data", "build", "emoji", "--out", tmp_path / "file" / "inner")


def test_demo_away_from_the_repository(complaint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "folder of the repository" in complaint("demo")


def test_no_control_character_reaches_the_terminal(complaint) -> None:
    assert "\x1b" not in complaint("train", DEMO, "data.spec=\x1b[31mred")
    assert "\x1b" not in complaint("train", "\x1b[31mred.yaml")


def test_a_fault_of_mmpt_s_own_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("mmpt.config.load_either", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["config", "show", DEMO])


def test_a_user_error_of_several_lines(complaint, mmpt, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise UserError("first\nsecond")

    monkeypatch.setattr("mmpt.config.load_either", fail)
    assert mmpt("config", "show", DEMO) == (2, "", "error: first\nerror: second\n")


def test_ctrl_c_ends_a_run_in_one_line(tiny_config: RunConfig, tmp_path: Path) -> None:
    endless = tiny_config.train.model_copy(update={"steps": 1_000_000, "checkpoint_every": 1_000_000})
    (tmp_path / "tiny.yaml").write_text(dump(tiny_config.model_copy(update={"train": endless})))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mmpt", "train", "tiny.yaml"]
    run = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert any(line.startswith("step ") for line in run.stdout)  # reads on until it trains
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130
    assert err.splitlines()[-1].startswith("stopped") and "Traceback" not in err
