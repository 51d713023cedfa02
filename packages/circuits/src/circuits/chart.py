"""Plots of faithfulness and completeness against circuit size, and of sweeps, in the look of `shared.plots`.

Estimators have colours and markers of their own; controls (random nodes, the largest activations) are grey and dashed,
so that what is to be judged and what it is judged by differ at a glance. Bands are 95 % intervals.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from circuits.faithfulness import CurvePoint
from shared.errors import UserError
from shared.stats import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {
    "relp": "RelP",
    "atp": "gradient x activation",
    "ig_activations": "IG on activations",
    "ig_inputs": "IG on inputs",
    "conductance": "conductance",
    "exact": "exact patching",
    "relp_no_half": "RelP, no half rule",
    "relp_gate_detached": "RelP, gate detached",
    "relp_qk_open": "RelP, QK open",
    "relp_norm_open": "RelP, norm open",
    "relp_ig": "RelP along a path",
    "activation": "|activation - reference|",
    "magnitude": "|activation|",
    "random": "random",
}
CONTROLS = {"random": "#8C8C8C", "activation": "#5A5A5A", "magnitude": "#B0B0B0"}  # with their greys
KINDS = {"faithfulness": 1.0, "completeness": 0.0}  # with the ideal value
MARKERS = "osD^vP*X"

SETTINGS = ("pipeline", "settings", "model")  # where a row of `shared.collect` has what a sweep varies

# Estimator -> size -> value with its interval.
Curves = Mapping[str, Mapping[int, Interval]]


class Point(NamedTuple):
    """One run of a sweep: the value of the varied setting, and of the metric."""

    setting: Any
    value: float


def draw_curves(points: Mapping[str, Sequence[CurvePoint]], what: str = "neurons") -> "Figure":
    """Return a figure with one line an estimator and its 95 % bootstrap band, sizes (of `what`) on a log axis."""
    from shared.plots import subplots

    figure, axes = subplots(1, 2)
    for axis, kind in zip(axes, KINDS, strict=True):
        curves = {
            name: {point.size: getattr(point, kind)() for point in curve} for name, curve in points.items()
        }
        draw_kind(axis, kind, curves, what)
    axes[0].legend()
    return figure


def draw_metrics(metrics: Mapping[str, Any]) -> "Figure":
    """Return the curves of a run's metrics.json, a row of two panels a task; UserError where it has none."""
    from shared.plots import subplots

    saved = {kind: read_curves(metrics, kind) for kind in KINDS}
    tasks = list(saved["faithfulness"])
    if not tasks:
        raise UserError("these metrics hold no curves: `faithfulness` and `intervals` by task are missing")
    figure, axes = subplots(len(tasks), 2, squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        for axis, kind in zip(row, KINDS, strict=True):
            draw_kind(axis, kind, saved[kind].get(task, {}))
        row[0].set_title(task, loc="left")
    axes[0, 0].legend()
    return figure


def read_curves(metrics: Mapping[str, Any], kind: str) -> dict[str, Curves]:
    """Return, by task, the curves of a kind with their intervals out of a run's metrics."""
    found: dict[str, Curves] = {}
    for task, estimators in (metrics.get(kind) or {}).items():
        bounds = ((metrics.get("intervals") or {}).get(task) or {}).get(kind) or {}
        found[task] = {
            name: {
                int(size): Interval(value, *(bounds.get(name, {}).get(size) or (value, value)))
                for size, value in curve.items()
            }
            for name, curve in estimators.items()
        }
    return found


def draw_kind(axis: "Axes", kind: str, curves: Curves, what: str = "neurons") -> None:
    """Draw the curves of one kind on a panel: ideal value, bands, lines; controls below."""
    axis.axhline(KINDS[kind], color="#8C8C8C", linewidth=1, linestyle=":")
    for (name, curve), look in zip(curves.items(), _looks(curves), strict=True):
        sizes = sorted(curve)
        axis.plot(
            sizes,
            [curve[size].estimate for size in sizes],
            markersize=3.5,
            label=NAMES.get(name, name),
            **look,
        )
        axis.fill_between(
            sizes,
            [curve[size].low for size in sizes],
            [curve[size].high for size in sizes],
            color=look["color"],
            alpha=0.15,
            linewidth=0,
        )
    axis.set(xscale="log", xlabel=f"{what} in the circuit", ylabel=kind)


def _looks(names: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Colour, marker and line of each estimator; the controls' are fixed, the others go through the palette."""
    from shared.plots import PALETTE

    free = iter(zip(PALETTE, MARKERS, strict=False))
    for name in names:
        if name in CONTROLS:
            yield {"color": CONTROLS[name], "linestyle": "--", "marker": ".", "zorder": 1.5}
        else:
            colour, marker = next(free)
            yield {"color": colour, "marker": marker}


def draw_sweep(rows: Sequence[Mapping[str, Any]], metric: str) -> "Figure":
    """Return a figure of one metric (dotted key) against the setting that a sweep varies.

    `rows` are those of `shared.collect.collect`. Runs of one value of the setting (other seeds) are points, their mean
    a line. UserError where no run has the metric, or where more than one setting varies.
    """
    from shared.plots import PALETTE, subplots

    setting, points = sweep_points(rows, metric)
    figure, axis = subplots(width=6.0)
    values = list(dict.fromkeys(point.setting for point in points))
    numeric = all(isinstance(value, (int, float)) for value in values)
    values = sorted(values) if numeric else values
    places = {value: value if numeric else i for i, value in enumerate(values)}
    groups = {value: [point.value for point in points if point.setting == value] for value in values}
    means = [sum(group) / len(group) for group in groups.values()]
    axis.plot(list(places.values()), means, color=PALETTE[0], marker="o", markersize=4)
    for value, group in groups.items():
        axis.plot([places[value]] * len(group), group, ".", color=PALETTE[0], alpha=0.45)
    if not numeric:
        axis.set_xticks(list(places.values()), [str(value) for value in values])
    elif len(values) > 2 and min(values) > 0 and max(values) >= 20 * min(values):
        axis.set_xscale("log")
    axis.set(xlabel=setting, ylabel=metric)
    return figure


def sweep_points(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[str, list[Point]]:
    """Return the name of the varied setting and a point for every run that reports the metric."""
    known = [row for row in rows if isinstance(row.get(metric), (int, float))]
    if not known:
        names = sorted({key for row in rows for key, value in row.items() if isinstance(value, float)})
        raise UserError(f"no run reports {metric!r}; there are {', '.join(names) or 'no metrics'}")
    settings = [key for key in rows[0] if key.split(".")[0] in SETTINGS]
    if len(settings) > 1:
        raise UserError(f"the sweep varies {', '.join(settings)}; plot sweeps of one setting (and the seed)")
    setting = settings[0] if settings else "seed"
    return setting, [Point(row.get(setting), float(row[metric])) for row in known]
