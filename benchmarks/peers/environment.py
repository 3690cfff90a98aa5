"""The peers' own Python environment, for their versions may not agree with this project's.

requirements.txt --pip, one peer at a time--> an environment that falls back on this one's packages (torch comes once)
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import av

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
LIMIT = 600  # seconds for one pip


def make_environment(folder: Path, requirements: Path = REQUIREMENTS) -> tuple[Path, dict[str, str]]:
    """The environment's Python, and the requirements that could not be had, each with the reason. Made once."""
    marker = folder / f"made-for-{hashlib.sha256(requirements.read_bytes()).hexdigest()[:16]}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    missing: dict[str, str] = {}
    if marker.exists():
        return python, missing
    venv.create(folder, with_pip=True, clear=True, symlinks=os.name != "nt")
    fall_back_on_this_one(python)
    for requirement in requirements.read_text().split():
        if reason := _install(python, requirement):
            missing[re.split("[=<>]", requirement)[0]] = reason
    if not missing:
        marker.touch()
    return python, missing


def fall_back_on_this_one(python: Path) -> None:
    """This environment's packages come after the new one's own on its path."""
    own = [sysconfig.get_path(kind) for kind in ("purelib", "platlib")]
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    theirs = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    Path(theirs, "this-project.pth").write_text("\n".join(dict.fromkeys(own)) + "\n")


def _install(python: Path, requirement: str) -> str | None:
    """None, or why not."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return f"pip took over {LIMIT} s"
    return (done.stderr.strip().splitlines() or ["pip failed"])[-1] if done.returncode else None


def link_ffmpeg(folder: Path) -> Path:
    """A folder with the libraries of FFmpeg that PyAV brings, under the names by which SPDL looks for them."""
    folder.mkdir(parents=True, exist_ok=True)
    for library in Path(av.__file__).parent.with_name("av.libs").glob("lib*.so.*"):
        if found := re.match(r"(lib(?:av|sw)[a-z]+)-\w+\.so\.(\d+)", library.name):
            link = folder / f"{found[1]}.so.{found[2]}"
            link.unlink(missing_ok=True)
            link.symlink_to(library)
    return folder
