"""A benchmark's result as JSON in benchmarks/results/: figures, machine, versions, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def write(name: str, settings: dict[str, Any], figures: dict[str, Any], packages: tuple[str, ...]) -> Path:
    """Write benchmarks/results/NAME.json and return its path."""
    path = RESULTS / f"{name}.json"
    record = {
        "benchmark": name,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "machine": _machine(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "settings": settings,
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def _commit() -> str:
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(describe, cwd=RESULTS.parent, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _machine() -> dict[str, Any]:
    capabilities = torch.cpu.get_capabilities()
    return {
        "processor": capabilities.get("cpu_name") or platform.processor(),
        "cores": os.cpu_count(),
        "amx_bf16": capabilities.get("amx_bf16", False),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }
