"""Run one experiment of circuits in a process of its own, as `make circuits EXPERIMENT=...` does; read its figures."""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from shared.serialize import read_json


class Finished(NamedTuple):
    """What a run leaves: its metrics, and its settings with the seconds that it took (where it was run here)."""

    metrics: dict[str, Any]
    settings: dict[str, Any]
    effects: list[dict[str, Any]]


def run_or_read(experiment: str, folder: Path | None) -> Finished:
    """Run an experiment into a temporary folder, or read the folder of a finished run."""
    if folder is not None:
        return _read(folder, {})
    with tempfile.TemporaryDirectory() as made:
        return _read(Path(made), _run(experiment, Path(made)))


def _run(experiment: str, folder: Path) -> dict[str, float]:
    start = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "shared.run",
        f"experiment=circuits/{experiment}",
        f"run.folder={folder}",
    ]
    subprocess.run(command, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall = time.perf_counter() - start
    return {"seconds": round(wall, 1), "cpu_seconds": round(used.ru_utime + used.ru_stime, 1)}


def _read(folder: Path, seconds: dict[str, float]) -> Finished:
    metrics, manifest = read_json(folder / "metrics.json"), read_json(folder / "manifest.json")
    steps = folder / "steps.json"
    effects = read_json(steps)["effects"] if steps.exists() else []
    return Finished(metrics, manifest["config"]["settings"] | seconds, effects)
