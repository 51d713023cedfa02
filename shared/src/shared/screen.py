"""The demo's one screen: a few lines of figures for each pipeline, none wider than 80 columns.

Long families are condensed: four of the circuit sizes, Spearman's worst and mean dimension, the steepest control.
What a pipeline did not report is shown as `-`. All figures are in summary.json.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

Metrics = Mapping[str, Any]
LABEL = 38  # columns of a label
SIZES = 4  # circuit sizes shown
ARMS = ("model", "ablated", "swapped", "random ablated")


def line(text: str, *cells: str) -> str:
    """A label and right-aligned cells."""
    return f"  {text:<{LABEL}}" + "".join(f"{cell:>10}" for cell in cells)


def figure(value: Any) -> str:
    """A number with three significant digits, whole from 1000 on."""
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def pick(values: Any, *path: str) -> Any:
    """What lies at a path of keys; None where there is nothing."""
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _row(text: str, values: Any, keys: Iterable[str]) -> str:
    return line(text, *(figure(pick(values, key)) for key in keys))


def spread(items: Sequence[str], count: int) -> list[str]:
    """At most `count` of the items, evenly over their range, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def adapter_serving(metrics: Metrics) -> Iterator[str]:
    """Match rate, held-out loss and throughput by kind of adapter."""
    kinds = list(pick(metrics, "throughput") or ())
    yield line("share of answers equal to reference", figure(pick(metrics, "match_rate")))
    if ties := pick(metrics, "near_ties", "requests"):
        yield line("  of them other only after a near tie", str(ties))
    yield line("", *kinds)
    yield _row("held-out loss, nats a token", pick(metrics, "heldout_loss"), kinds)
    yield _row("generated tokens a second", pick(metrics, "throughput"), kinds)


def circuit_tracing(metrics: Metrics) -> Iterator[str]:
    """Conservation error; faithfulness by task, estimator and size; accuracy with the top neurons edited."""
    yield line("conservation error of the attribution", figure(pick(metrics, "conservation_error")))
    tasks: Metrics = pick(metrics, "faithfulness") or {}
    sizes = sorted(
        {size for curves in tasks.values() for curve in curves.values() for size in curve}, key=int
    )
    shown = spread(sizes, SIZES)
    yield line("faithfulness by number of neurons", *shown)
    for task, curves in tasks.items():
        for estimator, curve in curves.items():
            yield _row(f"{task}, {estimator}", curve, shown)
    yield line("accuracy, top neurons edited", *(arm.split()[0] for arm in ARMS))
    for task, arms in (pick(metrics, "ablation") or {}).items():
        yield line(task, *(figure(pick(arms, arm, "accuracy")) for arm in ARMS))


def assumption_probing(metrics: Metrics) -> Iterator[str]:
    """Spearman of the elicited scores, worst and mean dimension; dose-response of each direction."""
    known = {name: rho for name, rho in (pick(metrics, "spearman") or {}).items() if rho is not None}
    yield line("elicited against posterior, Spearman", "worst", "mean")
    if known:
        worst = min(known, key=known.__getitem__)
        mean = sum(known.values()) / len(known)
        yield line(f"worst {worst}", figure(known[worst]), figure(mean))
    slopes: Metrics = pick(metrics, "dose_response_slope") or {}
    yield line("dose against judged reply", "rho", "slope", "random")
    for name, rho in (pick(metrics, "dose_response_rho") or {}).items():
        if "_random" in name:
            continue
        controls = [abs(slope) for key, slope in slopes.items() if key.startswith(f"{name}_random")]
        steepest = max(controls, default=None)
        yield line(name, figure(rho), figure(slopes.get(name)), figure(steepest))


LINES: dict[str, Callable[[Metrics], Iterator[str]]] = {
    "adapter_serving": adapter_serving,
    "circuit_tracing": circuit_tracing,
    "assumption_probing": assumption_probing,
}
