"""A system in a process of its own, told line by line what to do; see run_peer.py for the lines."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
from pathlib import Path
from typing import Any

LIMIT = 180  # seconds for one command, preparing included


class PeerError(Exception):
    """A system cannot be had, or failed: the message says why, in a line."""


class Peer:
    """Raises PeerError where the process ends, says something else than it should, or takes longer than LIMIT."""

    def __init__(self, name: str, python: Path, folder: Path, environment: dict[str, str]) -> None:
        self.name, self._log = name, folder / f"{name}.log"
        script = Path(__file__).with_name("run_peer.py")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(python), str(script), f"with_{name}", str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                start_new_session=True,  # so that its workers can be ended with it
            )
        self.versions: dict[str, str] = self._answer()["versions"]

    def tell(self, command: str) -> dict[str, Any]:
        """One command and its answer."""
        try:
            self._process.stdin.write(f"{command}\n".encode())
            self._process.stdin.flush()
        except OSError as error:
            raise PeerError(self._last_words()) from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        ready, _, _ = select.select([self._process.stdout], [], [], LIMIT)
        if not ready:
            self.end()
            raise PeerError(f"no answer within {LIMIT} s")
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n")
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "ended without a word")

    def end(self) -> None:
        """The process and its workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
