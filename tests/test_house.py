"""The rules of the house that a program can hold: form, imports, and files that name no machine."""

import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
MACHINE_PATH = re.compile(r"(?<![\w.{<])/(home|root|Users|work|tmp|opt|mnt)/\w")


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["ruff", "check", "--quiet", "."], id="ruff check"),
        pytest.param(["ruff", "format", "--check", "--quiet", "."], id="ruff format: make format mends it"),
        pytest.param(["lint-imports", "--no-cache"], id="imports point one way"),
    ],
)
def test_form(command: list[str]) -> None:
    run = subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def repository_files() -> list[Path]:
    """What a clone holds: everything that .gitignore does not name."""
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()] + [".git"]
    found: list[Path] = []
    for folder, folders, files in os.walk(ROOT):
        at_root = folder == str(ROOT)
        names = {name: (name, "/" + name) if at_root else (name,) for name in folders}
        folders[:] = [name for name in folders if not any(fnmatch(way, each) for way in names[name] for each in ignored)]
        found += [Path(folder, name) for name in files]
    return found


def test_no_file_names_a_path_of_one_machine() -> None:
    files = repository_files()
    assert ROOT / "mmpt" / "data" / "index.py" in files
    named = []
    for path in files:
        text = path.read_bytes().decode("utf-8", errors="ignore")
        named += [f"{path.relative_to(ROOT)}: {found.group()}" for found in MACHINE_PATH.finditer(text)]
    assert not named


def test_the_tested_set_fits_the_declared_ranges() -> None:
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    for line in declared:
        requirement = Requirement(line)
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, line
