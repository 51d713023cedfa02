"""The main job: run the three pipelines on the embedded model and show their figures on one screen.

    python -m shared.demo [hydra overrides for all three]

Each pipeline is a `python -m shared.run` of its own, in runs/demo/NAME with its log beside it. The metrics of all three
go to runs/demo/summary.json. A pipeline that fails ends the demo with the end of its log and exit status 1.
"""

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from rich.console import Console
from rich.table import Table

from shared.report import flatten
from shared.serialize import read_json, remove, write_json

FOLDER = Path("runs/demo")


class Part(NamedTuple):
    """A pipeline of the demo: its key in the summary, its name, the metrics it owes, the lines of the screen."""

    key: str
    pipeline: str
    title: str
    owed: tuple[str, ...]
    lines: tuple[tuple[str, str], ...]  # text, dotted metric; `*` stands for every key


PARTS = (
    Part(
        "preft",
        "adapter_serving",
        "Adapter serving: four users' adapters and the base model in one vLLM batch",
        ("match_rate", "throughput.base", "throughput.lora", "throughput.lora_p", "throughput.reft_p"),
        (
            ("requests whose greedy tokens equal the reference's", "match_rate"),
            ("held-out loss, nats a token", "heldout_loss"),
            ("generated tokens a second", "throughput"),
        ),
    ),
    Part(
        "circuits",
        "circuit_tracing",
        "Circuit tracing: which neurons carry agreement and capitals",
        ("conservation_error", "faithfulness"),
        (
            ("conservation error of the attribution", "conservation_error"),
            ("faithfulness by number of neurons", "faithfulness"),
            ("accuracy, model and with the top neurons ablated", "ablation.*.*.accuracy"),
        ),
    ),
    Part(
        "assumptions",
        "assumption_probing",
        "Assumption probing: what the model takes its user to want, read and steered",
        ("spearman", "dose_response_rho"),
        (
            ("elicited score against posterior mean, Spearman", "spearman"),
            ("dose against judged reply, Spearman", "dose_response_rho"),
        ),
    ),
)


def run_part(part: Part, overrides: Sequence[str], console: Console) -> float:
    """Run one pipeline as a subprocess and return its seconds; exits with its log's end when it fails."""
    folder = FOLDER / part.pipeline
    remove(folder)
    log = FOLDER / f"{part.pipeline}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "shared.run", f"pipeline={part.pipeline}", f"run.folder={folder}"]
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


def _status(command: Sequence[str], log: TextIO) -> int:
    return subprocess.run(command, check=False, stdout=log, stderr=subprocess.STDOUT).returncode


def owed_metrics(part: Part, metrics: Mapping[str, Any]) -> list[str]:
    """The metrics that the part owes the summary and did not give."""
    given = flatten(metrics)
    return [name for name in part.owed if not any(f"{key}.".startswith(f"{name}.") for key in given)]


def pick(value: Any, path: Sequence[str]) -> Any:
    """What lies at a path, `*` keeping a level of keys; None where there is nothing."""
    if not path or not isinstance(value, Mapping):
        return None if path else value
    if path[0] != "*":
        return pick(value.get(path[0]), path[1:])
    below = {key: pick(item, path[1:]) for key, item in value.items()}
    return {key: item for key, item in below.items() if item is not None} or None


def rows(text: str, value: Any) -> Iterator[tuple[str, str]]:
    """A metric as lines of text and figures: one line for each innermost mapping."""
    if not isinstance(value, Mapping):
        yield text, _figure(value)
    elif any(isinstance(item, Mapping) for item in value.values()):
        for key, item in value.items():
            yield from rows(f"{text}, {key}", item)
    else:
        yield text, "   ".join(f"[dim]{key}[/] {_figure(item)}" for key, item in value.items())


def _figure(value: Any) -> str:
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def show(summary: Mapping[str, Any], console: Console) -> None:
    """Print the figures and the paths of the reports."""
    for part in PARTS:
        table = Table(title=part.title, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for text, metric in part.lines:
            for line in rows(text, pick(summary[part.key], metric.split("."))):
                table.add_row(*line)
        table.add_row("report", str(FOLDER / part.pipeline / "report.html"))
        console.print()
        console.print(table, highlight=False)
    console.print(
        f"\n{summary['seconds']:.0f} s in all; every figure: {FOLDER / 'summary.json'}", highlight=False
    )


def main() -> None:
    """Entry point of `python -m shared.demo`."""
    console = Console()
    seconds = {part.key: run_part(part, sys.argv[1:], console) for part in PARTS}
    summary: dict[str, Any] = {part.key: read_json(FOLDER / part.pipeline / "metrics.json") for part in PARTS}
    missing = [f"{part.key}.{name}" for part in PARTS for name in owed_metrics(part, summary[part.key])]
    summary |= {
        "seconds": round(sum(seconds.values()), 1),
        "seconds_by_pipeline": {key: round(value, 1) for key, value in seconds.items()},
    }
    write_json(FOLDER / "summary.json", summary)
    show(summary, console)
    if missing:
        sys.exit(f"error: the pipelines did not report {', '.join(missing)}")


if __name__ == "__main__":
    main()
