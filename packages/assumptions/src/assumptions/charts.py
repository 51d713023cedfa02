"""The figures of the study's report: agreement and probes by dimension, curves over blocks, dose-response."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from assumptions.doses import Curve
from assumptions.evaluation import ProbeScore
from shared.plots import PALETTE, subplots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


UNITS = {"raw": "alpha", "proj_sd": "SD of the projection", "resid_norm": "norms of the residual stream"}


def agreement_chart(spearman: Mapping[str, float]) -> "Figure":
    """Spearman of elicited score and posterior mean, one bar a dimension."""
    figure, axis = subplots(width=7.0, height=3.0)
    names = list(spearman)
    axis.barh(range(len(names)), [spearman[name] for name in names], color=PALETTE[0])
    axis.set_yticks(range(len(names)), [_label(name) for name in names])
    axis.invert_yaxis()
    axis.set_xlim(min(0.0, *spearman.values()), 1)
    axis.set_xlabel("Spearman, elicited score against posterior mean")
    return figure


def probe_chart(scores: Mapping[str, ProbeScore]) -> "Figure":
    """Test R2 of each probe beside a bag of words and shuffled labels."""
    figure, axis = subplots(width=7.0, height=4.0)
    names = list(scores)
    series = {
        "probe": [scores[name].r2 for name in names],
        "bag of words": [scores[name].r2_bag_of_words for name in names],
        "shuffled labels": [scores[name].r2_shuffled for name in names],
    }
    for place, (label, values) in enumerate(series.items()):
        rows = [row + 0.26 * (place - 1) for row in range(len(names))]
        axis.barh(rows, [max(value, -0.5) for value in values], height=0.24, label=label)
    axis.axvline(0, color=PALETTE[-1], linewidth=0.8)
    axis.set_yticks(range(len(names)), [_label(name) for name in names])
    axis.invert_yaxis()
    axis.set_xlabel("R2 on test messages (bars end at -0.5)")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def block_chart(scores: Mapping[str, ProbeScore]) -> "Figure":
    """Validation R2 at every block's output, one line a dimension; the chosen block is marked."""
    figure, axis = subplots(width=7.0, height=3.6)
    for number, (name, score) in enumerate(scores.items()):
        color, style = PALETTE[number % len(PALETTE)], "-" if number < len(PALETTE) else "--"
        axis.plot(range(len(score.curve)), score.curve, style, color=color, label=_label(name), linewidth=1.3)
        axis.plot(score.block, score.curve[score.block], "o", color=color, markersize=4)
    axis.set_xticks(range(len(next(iter(scores.values())).curve)))
    axis.set_xlabel("block (its output)")
    axis.set_ylabel("R2 on validation messages")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)
    return figure


def dose_chart(
    curves: Mapping[str, Sequence[Curve]], unit: str, outcomes: Mapping[str, Sequence[str]]
) -> "Figure":
    """Dose against judged sycophancy, one panel a dimension; the direction with its interval, random ones in grey."""
    figure, axes = subplots(1, len(curves), width=4.6, height=3.4, sharey=True, squeeze=False)
    for axis, (name, lines) in zip(axes[0], curves.items(), strict=True):
        labelled: set[str] = set()
        for curve in lines:
            color = PALETTE[-1] if curve.kind == "random" else PALETTE[0]
            label = None if curve.kind in labelled else curve.kind
            labelled.add(curve.kind)
            axis.plot(curve.doses, curve.means, "o-", color=color, label=label, markersize=3.5)
            if curve.kind != "random":
                axis.fill_between(curve.doses, curve.lows, curve.highs, color=color, alpha=0.18, linewidth=0)
        axis.set_title(_label(name))
        axis.set_xlabel(f"dose ({UNITS[unit]})")
        axis.set_ylabel("judged " + ", ".join(outcomes[name]), fontsize=8)
        axis.set_ylim(0.9, 5.1)
        axis.legend()
    return figure


def _label(name: str) -> str:
    return name.replace("_", " ")
