"""`mmpt eval ...` and `mmpt report` on a run whose checkpoint need not be trained."""

import json
from pathlib import Path

import pytest
from fakes import write_corpus

from mmpt import cli
from mmpt.config import RunConfig, dump, parse
from mmpt.model.multimodal import MultimodalModel


@pytest.fixture
def mmpt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run a command on a run of this config, with drawn weights for trained ones; its code, lines of output, and complaint."""

    def run(config: RunConfig, *arguments: str | Path) -> tuple[int, list[str], str]:
        folder = tmp_path / config.name
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(dump(config))
        pace = {"samples": 64, "seconds": 9.0, "samples_per_second": 7.0, "lr": 1e-3}
        (folder / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 40, "loss": 1.0} | pace) + "\n")
        model = MultimodalModel(config.model).initialize(seed=0).eval()
        monkeypatch.setattr("mmpt.train.checkpoint.load_model", lambda run, device: (model, config, 40))
        words = [folder if argument == "RUN" else argument for argument in arguments]
        code = cli.main([str(word) for word in words])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err

    return run


def changed(config: RunConfig, **model: object) -> RunConfig:
    tree = config.model_dump(mode="json")
    tree["model"] |= model
    return parse(tree, where="changed")


def test_retrieval_by_level_item_and_captions(mmpt, tiny_config: RunConfig):
    config = changed(tiny_config, levels=["backbone", "tower"])
    spec = tiny_config.data.spec
    code, out, _ = mmpt(config, "eval", "retrieval", "RUN", "--spec", spec, "--level", "tower", "--captions", "all")
    assert code == 0 and any("(tower)" in line for line in out) and any("picture to text" in line for line in out)
    result = json.loads(Path(out[-1]).read_text())
    assert Path(out[-1]).name == "retrieval-tiny-val-image-tower-all.json"
    assert (result["level"], result["item"], result["captions"]) == ("tower", "image", "all")
    assert (result["trained_on"]["name"], result["checkpoint"]["step"]) == ("tiny", 40)
    code, _, err = mmpt(tiny_config, "eval", "retrieval", "RUN", "--spec", spec, "--level", "tower")
    assert (code, err) == (2, "error: --level tower: the model has backbone (model.levels)\n")


def test_classification(mmpt, tiny_config: RunConfig, tmp_path: Path):
    classes = tmp_path / "licences.yaml"
    classes.write_text("templates: ['{}', 'under {}']\nclasses: [MIT, CC0-1.0]\nlabel: license\n")
    command = ("eval", "classification", "RUN", "--spec", tiny_config.data.spec, "--classes", classes)
    code, out, _ = mmpt(tiny_config, *command)
    assert code == 0 and any("top-1" in line for line in out)
    assert Path(out[-1]).name == "classification-tiny-val-licences-image-backbone.json"
    result = json.loads(Path(out[-1]).read_text())
    assert (result["kind"], result["classes"], result["classes_present"], result["templates"]) == ("classification", 2, 1, 2)
    assert result["evaluated_on"]["name"] == "tiny" and 0 <= result["top-1"] <= 1
    classes.write_text("templates: ['{}']\nclasses: [MIT, BSD]\nlabel: license\n")
    code, _, err = mmpt(tiny_config, *command)
    assert code == 2 and "its meta.license = 'CC0-1.0' is none of the 2 classes" in err


def test_language(mmpt, tiny_config: RunConfig):
    code, out, _ = mmpt(tiny_config, "eval", "language", "RUN", "--spec", tiny_config.data.spec)
    assert code == 0 and any("perplexity" in line for line in out)
    assert Path(out[-1]).name == "language-tiny-val.json"
    assert json.loads(Path(out[-1]).read_text())["sources"].keys() == {"tiny"}


@pytest.mark.parametrize(
    ("changes", "kinds", "says"),
    [
        ({}, ["language", "retrieval"], "the caption that the model wrote"),
        ({"fusion": False, "levels": ["tower"]}, ["retrieval"], "Pictures and the texts found"),
        ({"levels": []}, ["language"], "Bits per byte"),
    ],
    ids=["interleaved", "towers", "writes alone"],
)
def test_a_report_measures_what_the_run_can_do(mmpt, tiny_config: RunConfig, changes: dict, kinds: list[str], says: str):
    code, out, err = mmpt(changed(tiny_config, **changes), "report", "RUN")
    assert (code, err) == (0, "")
    page = Path(out[-1])
    assert page.name == "report.html" and says in page.read_text()
    assert sorted(path.name.split("-")[0] for path in (page.parent / "eval").iterdir()) == kinds


def test_a_report_of_a_model_of_texts_alone(mmpt, tiny_config: RunConfig, tmp_path: Path):
    spec = write_corpus(tmp_path, [(["a red disc", "and another"], {}), (["a blue box"], {})], "words")
    config = changed(tiny_config, image=None, levels=[])
    code, out, err = mmpt(config.model_copy(update={"data": config.data.model_copy(update={"spec": str(spec)})}), "report", "RUN")
    assert (code, err) == (0, "") and Path(out[-2]).name == "language-words-val.json"
    page = Path(out[-1]).read_text()
    assert "Perplexity" in page and "Zero-shot" not in page and "Pictures" not in page


def test_a_report_of_a_run_of_which_nothing_is_held_out(mmpt, four_config: RunConfig, four_data: Path):
    data = four_config.data.model_copy(update={"spec": str(four_data / "four.yaml")})
    code, out, err = mmpt(four_config.model_copy(update={"data": data}), "report", "RUN")
    assert (code, err, len(out)) == (0, "", 1) and Path(out[0]).is_file()
    code, _, err = mmpt(four_config, "eval", "retrieval", "RUN", "--spec", four_data / "four.yaml", "--split", "train")
    assert code == 2 and "name one of them with --item" in err
