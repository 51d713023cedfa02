"""Peak memory of ridge probes fitted from disk: 100,000 rows of width 4,096.

A process of its own opens a store, fits all dimensions at every layer and predicts the validation rows; its peak
resident memory, libraries and mapped pages included, is read from the operating system.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
from _assumptions_ridge import STRENGTH, planted_store

from assumptions.selection import choose
from assumptions.splits import Split
from assumptions.store import ActivationStore

CLAIM = "Peak resident memory of a process that fits ridge probes of all dimensions from activations on disk."
KEYS = ("ridge_peak_gib",)


def add_arguments(parser: ArgumentParser) -> None:
    """The sizes; memory does not grow with the number of layers, which are read one after the other."""
    parser.add_argument("--peak-rows", type=int, default=100_000)
    parser.add_argument("--peak-width", type=int, default=4096)
    parser.add_argument("--peak-layers", type=int, default=1)


def measure(arguments: Namespace) -> dict[str, Any]:
    """Peak memory and seconds of a process that fits probes from a store written here."""
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder = Path(scratch)
        sizes = (arguments.peak_rows, arguments.peak_width, arguments.peak_layers, arguments.dimensions)
        planted_store(folder, *sizes)
        command = [sys.executable, __file__, str(folder), str(arguments.dimensions)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        on_disk = sum(path.stat().st_size for path in folder.iterdir())
    result: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return result | {"on_disk_gib": on_disk / 2**30}


def table(measured: dict[str, Any], arguments: Namespace) -> list[dict[str, Any]]:
    """One row."""
    size = f"{arguments.peak_rows:,} x {arguments.peak_width:,}, {arguments.peak_layers} layers"
    return [
        {"activations": size, "probes": measured["probes"]}
        | {
            "on disk, GiB": measured["on_disk_gib"],
            "peak, GiB": measured["ridge_peak_gib"],
            "before fitting, GiB": measured["before_gib"],
            "seconds": measured["seconds"],
        }
    ]


def fit_and_tell(folder: Path, dimensions: int) -> None:
    """Fit a read-out a dimension on 80% of the rows of every layer, choose on 10%; print memory and seconds as JSON."""
    store = ActivationStore(folder)
    rows = len(store)
    labels_BK = torch.rand(rows, dimensions, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ends = [0, rows * 8 // 10, rows * 9 // 10, rows]
    split = Split(*(list(range(*ends[i : i + 2])) for i in range(3)))
    before, start = peak_gib(), time.perf_counter()
    chosen = choose([store.at([site]) for site in store.sites], labels_BK, split, strengths=(STRENGTH,))
    seconds = time.perf_counter() - start
    told = {"ridge_peak_gib": peak_gib(), "before_gib": before, "seconds": seconds, "probes": len(chosen)}
    print(json.dumps(told))


def peak_gib() -> float:
    """Highest resident memory of this process so far (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    fit_and_tell(Path(sys.argv[1]), int(sys.argv[2]))
