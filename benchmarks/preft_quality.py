"""What prefill-only adapters cost in quality on TinyWorld's users: loss against rank, distance and speed; rivals.

Runs the pipeline adapter_quality (a stage an arm and rank: interrupted, it goes on where it stopped) and records its
figures beside its plots.

    python benchmarks/preft_quality.py [--folder runs/adapter_quality/benchmark] [Hydra overrides]
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from _results import write_results

from shared.serialize import read_json

CLAIM = (
    "Held-out loss (nats a response token) of adapters for single users; every arm and size has a learning rate of its "
    "own; intervals are 95% over users. Speed is generated tokens a second over the bare model's, rounds interleaved."
)
PLOTS = ("rank", "distance", "tradeoff")


def main() -> None:
    """Run the study, record its figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/adapter_quality/benchmark"))
    options, overrides = parser.parse_known_args()
    command = [sys.executable, "-m", "shared.run", "pipeline=adapter_quality", f"run.folder={options.folder}"]
    if code := subprocess.run([*command, *overrides], check=False).returncode:
        sys.exit(code)
    metrics = read_json(options.folder / "metrics.json")
    settings = read_json(options.folder / "manifest.json")["config"]["settings"]
    page = write_results("preft_quality", CLAIM, rows(metrics), settings, metrics)
    for name in PLOTS:
        if (plot := options.folder / f"{name}.png").exists():
            shutil.copy(plot, page.with_name(f"{page.stem}_{name}.png"))
    print(page.read_text())


def rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """One row an arm and size."""
    table = []
    for arm, losses in metrics["heldout_loss"].items():
        of_sizes = losses if isinstance(losses, dict) else {"": losses}
        for size, loss in of_sizes.items():
            known = [
                metrics[key].get(arm) or {} for key in ("interval", "learning_rate", "throughput_over_base")
            ]
            interval, rate, speed = (values.get(size) for values in known)
            answers = metrics["answers"].get(arm) or {}
            answers = answers.get(size, {}) if size else answers
            table.append(
                {
                    "arm": arm,
                    "rank or tokens": size,
                    "loss": loss,
                    "interval": f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "",
                    "learning rate": "" if rate is None else f"{rate:g}",
                    "speed over base": "" if speed is None else speed,
                    "answers that keep all preferences": answers.get("all", ""),
                }
            )
    return table


if __name__ == "__main__":
    main()
