"""The main job: run the three pipelines on the embedded model and show their figures on one screen.

    python -m shared.demo [hydra overrides for all three]

Each pipeline is a `python -m shared.run` of its own, in runs/demo/NAME with its log beside it. The metrics of all three
go to runs/demo/summary.json. A pipeline that fails ends the demo with the end of its log and exit status 1; so does a
figure that is missing or outside of its limit, after the screen. What a former demo left is removed first.
"""

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from rich.console import Console

from shared.report import flatten
from shared.screen import LINES, line
from shared.serialize import read_json, remove, write_json

FOLDER = Path("runs/demo")


class Limit(NamedTuple):
    """The range in which a metric must lie, ends included."""

    metric: str
    low: float
    high: float


class Part(NamedTuple):
    """A pipeline of the demo: its key in the summary, its name, the metrics it owes, the limits they must keep.

    `settings`: those of this part in the demo; `on_gpu`: further ones where vLLM runs on a GPU.
    """

    key: str
    pipeline: str
    title: str
    owed: tuple[str, ...]
    limits: tuple[Limit, ...] = ()
    settings: tuple[str, ...] = ()
    on_gpu: tuple[str, ...] = ()


PARTS = (
    Part(
        "preft",
        "adapter_serving",
        "Adapter serving: four users' adapters and the base model in one vLLM batch",
        ("match_rate", "throughput.base", "throughput.lora", "throughput.lora_p", "throughput.reft_p"),
        (Limit("match_rate", 1.0, 1.0),),
        on_gpu=("model.dtype=bfloat16",),  # vLLM's operators for adapters take 16 bit there
    ),
    Part(
        "circuits",
        "circuit_tracing",
        "Circuit tracing: which neurons carry agreement and capitals",
        ("conservation_error", "faithfulness"),
        (Limit("conservation_error", 0.0, 1e-4),),
    ),
    Part(
        "assumptions",
        "assumption_probing",
        "Assumption probing: what the model takes its user to want, read and steered",
        ("spearman", "dose_response_rho"),
        settings=("pipeline.truth=4",),  # beside the planted directions on few messages: the study has more
    ),
)


def run_part(part: Part, overrides: Sequence[str], console: Console) -> float:
    """Run one pipeline as a subprocess and return its seconds; exits with its log's end when it fails."""
    folder = FOLDER / part.pipeline
    log = FOLDER / f"{part.pipeline}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "shared.run", f"pipeline={part.pipeline}", f"run.folder={folder}"]
    command += [*part.settings, *(part.on_gpu if has_gpu() else ())]
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as file, console.status(f"{part.title} (log: {log})"):
        code = _status([*command, *overrides], file)
    seconds = time.perf_counter() - started
    if code:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        console.print(tail, markup=False, highlight=False)
        sys.exit(f"error: {part.pipeline} failed with exit status {code}; the end of {log} is above")
    console.print(f"{part.pipeline}: {seconds:.0f} s", highlight=False)
    return seconds


def has_gpu() -> bool:
    """Whether torch sees a GPU, and with it vLLM."""
    import torch

    return torch.cuda.is_available()


def _status(command: Sequence[str], log: TextIO) -> int:
    return subprocess.run(command, check=False, stdout=log, stderr=subprocess.STDOUT).returncode


def owed_metrics(part: Part, metrics: Mapping[str, Any]) -> list[str]:
    """The metrics that the part owes the summary and did not give; null is not given.

    Only a random control may be null: its dose-response curve may be flat, which has no rank correlation.
    """
    given = {key: value for key, value in flatten(metrics).items() if "_random" not in key}
    missing = []
    for name in part.owed:
        values = {key: value for key, value in given.items() if f"{key}.".startswith(f"{name}.")}
        missing += [key for key, value in values.items() if value is None] if values else [name]
    return missing


def violations(part: Part, metrics: Mapping[str, Any]) -> list[str]:
    """The metrics of the part that lie outside of their limits, each with its value and its range."""
    given = flatten(metrics)
    return [
        f"{part.key}.{limit.metric} is {value:.6g}, must lie in [{limit.low:g}, {limit.high:g}]"
        for limit in part.limits
        if (value := given.get(limit.metric)) is not None and not limit.low <= value <= limit.high
    ]


def show(summary: Mapping[str, Any], console: Console) -> None:
    """Print the figures and the paths of the reports."""
    for part in PARTS:
        report = f"{line('report')}{FOLDER / part.pipeline / 'report.html'}"
        text = "\n".join([*LINES[part.pipeline](summary[part.key]), report])
        console.print(f"\n{part.title}", style="bold", markup=False, highlight=False, soft_wrap=True)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    seconds = f"{summary['seconds']:.0f} s in all; every figure: {FOLDER / 'summary.json'}"
    console.print(f"\n{seconds}", highlight=False, soft_wrap=True)


def clear() -> None:
    """Remove what a former demo left, so that no old figure outlives a failure."""
    for part in PARTS:
        remove(FOLDER / part.pipeline)
        remove(FOLDER / f"{part.pipeline}.log")
    remove(FOLDER / "summary.json")


def main() -> None:
    """Entry point of `python -m shared.demo`."""
    console = Console()
    clear()
    seconds = {part.key: run_part(part, sys.argv[1:], console) for part in PARTS}
    summary: dict[str, Any] = {part.key: read_json(FOLDER / part.pipeline / "metrics.json") for part in PARTS}
    missing = [f"{part.key}.{name}" for part in PARTS for name in owed_metrics(part, summary[part.key])]
    wrong = [text for part in PARTS for text in violations(part, summary[part.key])]
    summary |= {
        "seconds": round(sum(seconds.values()), 1),
        "seconds_by_pipeline": {key: round(value, 1) for key, value in seconds.items()},
    }
    write_json(FOLDER / "summary.json", summary)
    show(summary, console)
    if missing:
        wrong.insert(0, f"the pipelines did not report {', '.join(missing)}")
    if wrong:
        sys.exit(f"error: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
