"""Agreement on the embedded model: how faithful 200 neurons and their edges are, on pairs without a common noun.

    make circuits EXPERIMENT=circuits_sva          the same run, with its report and graphs
    python benchmarks/circuits_sva.py              runs it and writes the table
    python benchmarks/circuits_sva.py --run runs/x only writes the table of a run that is finished

Targets: at most 200 neurons (layer, position, index) at least 0.9 faithful and at most 0.1 complete (0 is ideal), edges
among them at least 0.8 faithful by path patching. Neurons and edges, and the smallest size that is 0.9 faithful, are
chosen on training pairs; every figure is of test pairs.
"""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _circuits_run import run_or_read
from _results import write_results

TARGETS = {"faithfulness_200": 0.9, "completeness_200": 0.1, "edge_faithfulness": 0.8}
CONTROLS = ("activation", "random")


def main() -> None:
    """Run the experiment, or read a finished one, and write table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of a finished run")
    given = parser.parse_args()
    metrics, settings, _ = run_or_read("circuits_sva", given.run)
    rows = [_row(metrics, task) for task in metrics["faithfulness_200"]]
    page = write_results("circuits_sva", _claim(metrics), rows, settings, metrics)
    print(page)
    seconds = {key: settings[key] for key in ("seconds", "cpu_seconds") if key in settings}
    print(json.dumps({key: metrics[key] for name in TARGETS for key in (name, f"{name}_ci")} | seconds))


def _row(metrics: Mapping[str, Any], task: str) -> dict[str, Any]:
    row: dict[str, Any] = {"structure": task, "test pairs": metrics["pairs"][task]["test"]}
    for name in TARGETS:
        low, high = metrics[f"{name}_ci"][task]
        row[name] = f"{metrics[name][task]:.3f} [{low:.3f}, {high:.3f}]"
    curve = metrics["faithfulness"][task]
    row |= {f"{name} (200)": f"{curve[name]['200']:.2f}" for name in CONTROLS}
    row["neurons for 0.9 in training"] = _smallest(metrics["smallest"][task])
    edges = metrics["edge_curve"][task]["faithfulness"]
    row["edges"] = list(edges["relp"])[-1]
    row |= {f"edges, {name}": f"{list(edges[name].values())[-1]:.2f}" for name in ("magnitude", "random")}
    return row


def _smallest(figures: Mapping[str, Any]) -> str:
    """The size chosen on training pairs, with its faithfulness on test pairs."""
    if figures["neurons"] is None:
        return "-"
    low, high = figures["faithfulness_ci"]
    return f"{figures['neurons']}: {figures['faithfulness']:.3f} [{low:.3f}, {high:.3f}]"


def _claim(metrics: Mapping[str, Any]) -> str:
    # Rounded to the worse side, so that "at least" and "at most" hold.
    faithful = math.floor(1000 * min(metrics["faithfulness_200"].values())) / 1000
    complete = math.ceil(1000 * max(metrics["completeness_200"].values())) / 1000
    edges = math.floor(1000 * min(metrics["edge_faithfulness"].values())) / 1000
    return (
        f"Over four agreement structures, 200 neurons are at least {faithful:.3f} faithful and at most {complete:.3f} "
        f"complete on held-out nouns, their edges at least {edges:.3f} faithful."
    )


if __name__ == "__main__":
    main()
