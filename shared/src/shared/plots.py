"""Matplotlib figures in one look, without pyplot's global state."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by readers with any colour vision, and on light and dark ground.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")

STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.8,
}


def subplots(
    rows: int = 1, columns: int = 1, width: float = 4.6, height: float = 3.2, **options: Any
) -> "tuple[Figure, Any]":
    """A figure and its axes (as matplotlib's `subplots` gives them); width and height in inches of one panel."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.rcsetup import cycler

    with matplotlib.rc_context(STYLE | {"axes.prop_cycle": cycler(color=PALETTE)}):
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        return figure, figure.subplots(rows, columns, **options)
