"""The assumptions study on TinyWorld beside what was planted there: every figure with its target, reached or not.

Runs `python -m shared.run pipeline=assumption_probing` in a folder of its own and records metrics.json and the seconds.
`--folder` takes a finished run instead. The last line of output is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from _results import write_results

from shared.serialize import read_json

CLAIM = "On the embedded model, whose truth is known, the study finds what was planted and tells it from its controls."


GUIDED, SECONDS = "JSON valid, guided", "seconds"


class Target(NamedTuple):
    """A figure, where it lies in metrics.json, and the bound it is held to."""

    figure: str
    value: Callable[[Mapping[str, Any]], float]
    at_least: float | None = None
    at_most: float | None = None

    def row(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The figure as a row of the table."""
        value = self.value(metrics)
        low, high = self.at_least, self.at_most
        reached = (low is None or value >= low) and (high is None or value <= high)
        target = f">= {low:g}" if low is not None else f"<= {high:g}"
        return {
            "figure": self.figure,
            "value": value,
            "target": target,
            "reached": "yes" if reached else "no",
        }


def _worst(table: Mapping[str, float]) -> float:
    return min(table.values())


TARGETS = (
    Target(
        "elicited expected score against posterior, R2, worst",
        lambda m: _worst(m["truth"]["elicited_r2"]),
        0.95,
    ),
    Target(GUIDED, lambda m: m["json_valid"], 0.995),
    Target("JSON valid, unguided", lambda m: m["json_valid_unguided"], 0.97),
    Target("true directions: slope, mean", lambda m: m["truth"]["steering"]["true"]["slope_mean"], 0.6),
    Target(
        "true directions: off target", lambda m: m["truth"]["steering"]["true"]["off_target_mean"], None, 0.05
    ),
    Target("true directions: rho, worst", lambda m: _worst(m["truth"]["steering"]["true"]["rho"]), 0.8),
    Target(
        "ridge: slope over the true one's", lambda m: m["truth"]["steering"]["ridge"]["of_true_mean"], 0.7
    ),
    Target(
        "bisector on expected scores: slope over the true one's, worst",
        lambda m: _worst(m["truth"]["steering"]["bisector_expected"]["of_true"]),
        0.7,
    ),
    Target("ridge: specificity", lambda m: m["truth"]["steering"]["ridge"]["specificity"], 10),
    Target("ridge: right sign, of 9", lambda m: m["truth"]["steering"]["ridge"]["right_sign"], 9),
    Target(
        "pattern: slope over the true one's", lambda m: m["truth"]["steering"]["pattern"]["of_true_mean"], 0.7
    ),
    Target("pattern: specificity", lambda m: m["truth"]["steering"]["pattern"]["specificity"], 10),
    Target("pattern: right sign, of 9", lambda m: m["truth"]["steering"]["pattern"]["right_sign"], 9),
    Target(
        "random: largest slope of any score",
        lambda m: m["truth"]["steering"]["random"]["slope_largest"],
        None,
        0.15,
    ),
    Target(
        "replies against the rule, correlation, worst",
        lambda m: _worst(m["truth"]["reply"]["correlation"]),
        0.95,
    ),
    Target("replies: right sign under ridge", lambda m: m["truth"]["reply"]["right_sign_ridge"], 1.0),
    Target(SECONDS, lambda m: m["seconds"], None, 600),
)


def main() -> None:
    """Run the study, or take a finished one, and record it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="a finished run, whose seconds are not recorded")
    args = parser.parse_args()
    folder = args.folder or Path("runs/benchmark-assumptions")
    started = time.time()
    if args.folder is None:
        command = [sys.executable, "-m", "shared.run", "pipeline=assumption_probing", f"run.folder={folder}"]
        subprocess.run([*command, "run.resume=false"], check=True)
    metrics = read_json(folder / "metrics.json")
    study = read_json(folder / "manifest.json")["config"]["settings"]
    steering = {
        f"steering.{key}": study["steering"][key] for key in ("doses", "messages", "random", "controls")
    }
    left_out = set() if study["elicitation"]["guided"] else {GUIDED}
    if args.folder is None:
        metrics["seconds"] = time.time() - started
    else:
        left_out.add(SECONDS)
    rows = [target.row(metrics) for target in TARGETS if target.figure not in left_out]
    settings = {key: study[key] for key in ("messages", "engine", "truth", "again")} | steering
    print(write_results("assumptions_tinyworld", CLAIM, rows, settings, metrics))
    print(json.dumps({row["figure"]: row["value"] for row in rows}))


if __name__ == "__main__":
    main()
