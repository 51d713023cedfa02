"""Plots of faithfulness and completeness against circuit size."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from circuits.faithfulness import CurvePoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {
    "relp": "RelP",
    "atp": "gradient x activation",
    "ig_activations": "IG on activations",
    "exact": "exact patching",
    "activation": "|activation|",
    "random": "random",
}


def draw_curves(points: Mapping[str, Sequence[CurvePoint]]) -> "Figure":
    """Return a figure with one line an estimator and its 95 % bootstrap band, sizes on a log axis."""
    from shared.plots import PALETTE, subplots

    figure, axes = subplots(1, 2)
    for axis, kind, ideal in zip(axes, ("faithfulness", "completeness"), (1.0, 0.0), strict=True):
        axis.axhline(ideal, color="#8C8C8C", linewidth=1, linestyle=":")
        for colour, (name, curve) in zip(PALETTE, points.items(), strict=False):
            sizes, values = [point.size for point in curve], [getattr(point, kind)() for point in curve]
            axis.plot(
                sizes,
                [v.estimate for v in values],
                marker="o",
                markersize=3,
                color=colour,
                label=NAMES.get(name, name),
            )
            axis.fill_between(
                sizes,
                [v.low for v in values],
                [v.high for v in values],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
        axis.set(xscale="log", xlabel="neurons in the circuit", ylabel=kind)
    axes[0].legend()
    return figure
