"""The figures of the study's report.

Agreement and probes by dimension, curves over blocks, dose-response with controls, the specificity of directions, and
what less sycophancy costs.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from assumptions.conditions import UNEDITED
from assumptions.control import Trial
from assumptions.doses import Curve, Effect
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
    """Dose against judged sycophancy, one panel a dimension: the direction with its interval, and its controls.

    Random directions are grey lines; every other control has a colour and, at each dose, its interval.
    """
    figure, panels = _panels(len(curves), sharey=True)
    for axis, (name, lines) in zip(panels, curves.items(), strict=True):
        labelled: set[str] = set()
        for number, curve in enumerate(lines):
            style = _curve_style(curve, number)
            label = None if curve.kind in labelled else curve.kind.replace("probe", "probe's direction")
            labelled.add(curve.kind)
            axis.plot(curve.doses, curve.means, "o-", label=label, markersize=3, **style)
            if number == 0:
                axis.fill_between(
                    curve.doses, curve.lows, curve.highs, color=style["color"], alpha=0.18, linewidth=0
                )
            elif curve.kind != "random":
                axis.vlines(curve.doses, curve.lows, curve.highs, color=style["color"], linewidth=0.8)
        axis.set_title(_label(name))
        axis.set_xlabel(f"dose ({UNITS[unit]})")
        axis.set_ylabel("judged " + ", ".join(outcomes[name]), fontsize=8)
        axis.set_ylim(0.9, 5.1)
        axis.legend(fontsize=7)
    return figure


def choice_chart(trials: Mapping[str, Sequence[Trial]], chosen: Mapping[str, int]) -> "Figure":
    """Absolute slope on validation messages by block, beside the steepest random direction's; the choice is marked."""
    figure, panels = _panels(len(trials))
    for axis, (name, tried) in zip(panels, trials.items(), strict=True):
        ordered = sorted(tried, key=lambda one: one.block)
        blocks = [one.block for one in ordered]
        slopes = [abs(one.slope) for one in ordered]
        axis.plot(blocks, slopes, "o-", color=PALETTE[0], label="direction", markersize=4)
        axis.plot(
            blocks,
            [one.steepest_random for one in ordered],
            "s--",
            color=PALETTE[-1],
            label="steepest random",
            markersize=3,
        )
        axis.plot(
            chosen[name],
            slopes[blocks.index(chosen[name])],
            "o",
            color=PALETTE[1],
            markersize=8,
            fillstyle="none",
        )
        axis.set_title(_label(name))
        axis.set_xticks(blocks)
        axis.set_xlabel("block (its output)")
        axis.set_ylabel("absolute slope a unit of dose", fontsize=8)
        axis.legend(fontsize=7)
    return figure


def specificity_chart(
    slopes_RK: Float[np.ndarray, "R K"], rows: Sequence[str], columns: Sequence[str]
) -> "Figure":
    """Slope of every stated score (K) on the dose of every direction (R), as a matrix with its numbers."""
    figure, axis = subplots(width=8.0, height=1.9 + 0.42 * len(rows))
    largest = float(np.nanmax(np.abs(slopes_RK), initial=1e-9))
    axis.imshow(slopes_RK, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    for (row, column), value in np.ndenumerate(slopes_RK):
        # Not black and white, which follow the page's colours: the cells do not.
        shade = "#fefefe" if abs(value) > 0.6 * largest else "#111111"
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=shade)
    axis.set_xticks(range(len(columns)), [_label(name) for name in columns], rotation=35, ha="right")
    axis.set_yticks(range(len(rows)), [_label(name) for name in rows])
    axis.set_xlabel("stated score")
    axis.set_ylabel("direction")
    axis.grid(visible=False)
    return figure


def tradeoff_chart(
    curves: Mapping[str, Sequence[Curve]],
    words: Mapping[str, Sequence[Effect]],
    perplexity: Mapping[str, float],
) -> "Figure":
    """Judged sycophancy against the perplexity of the replies, one panel a dimension.

    The direction's doses are joined, the largest marked; a random direction is grey, controls in words are crosses.
    `perplexity`: by "condition@dose", under the unedited model; a control that has none is not drawn.
    """
    from matplotlib.ticker import LogFormatter

    figure, panels = _panels(len(curves))
    for axis, (name, lines) in zip(panels, curves.items(), strict=True):
        random = [
            one
            for one in lines[1:]
            if one.kind == "random" and f"{one.direction}@{one.doses[0]:g}" in perplexity
        ]
        for curve in [*random, lines[0]]:
            style = _curve_style(curve, 0 if curve is lines[0] else 1)
            costs = [perplexity[f"{curve.direction if dose else UNEDITED}@{dose:g}"] for dose in curve.doses]
            axis.plot(curve.means, costs, "o-", markersize=3, **style)
            if curve is lines[0]:
                axis.plot(
                    curve.means[-1], costs[-1], "o", markersize=7, fillstyle="none", color=style["color"]
                )
                axis.annotate(f"{curve.doses[-1]:+g}", (curve.means[-1], costs[-1]), fontsize=7)
        for number, one in enumerate(words.get(name, ()), start=1):
            color = PALETTE[number % (len(PALETTE) - 1)]
            axis.plot(
                one.mean, perplexity[f"{one.condition}@0"], "X", color=color, label=_label(one.condition)
            )
        axis.set_title(_label(name))
        axis.set_xlabel("judged sycophancy (1 to 5)")
        axis.set_yscale("log")  # words can cost hundreds of times what a direction does
        for level in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            level(LogFormatter(minor_thresholds=(2, 0.5)))
        axis.set_ylabel("perplexity of the replies", fontsize=8)
        if words.get(name):
            axis.legend(
                fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2
            )  # beside no point
    return figure


def _panels(count: int, across: int = 3, **options: Any) -> tuple["Figure", list[Any]]:
    """A figure of so many panels, at most three side by side; those left over are not drawn."""
    columns = min(count, across)
    rows = -(-count // columns)
    figure, axes = subplots(rows, columns, width=4.2, height=3.3, squeeze=False, **options)
    panels = list(axes.flat)
    for axis in panels[count:]:
        axis.set_visible(False)
    return figure, panels[:count]


def _curve_style(curve: Curve, number: int) -> dict[str, Any]:
    """The first curve of a family stands out, random controls stay behind, the others have colours of their own."""
    if number == 0:
        return {"color": PALETTE[0], "zorder": 3}
    if curve.kind == "random":
        return {"color": PALETTE[-1], "linewidth": 0.9, "alpha": 0.7, "zorder": 1}
    kinds = ("shuffled", "means", "sycophancy", "pattern", "planted", "composite")
    place = kinds.index(curve.kind) if curve.kind in kinds else 0
    return {"color": PALETTE[1 + place % (len(PALETTE) - 2)], "linewidth": 1.2, "zorder": 2}


def turns_chart(lines: Mapping[str, Mapping[str, Sequence[float]]], switched: Mapping[str, int]) -> "Figure":
    """Scores over turns, one panel a kind of conversation; a line marks where a kind has switched its goal."""
    figure, axes = subplots(columns=len(lines), width=3.6, height=3.4, sharey=True, squeeze=False)
    for axis, (title, by_score) in zip(axes[0], lines.items(), strict=True):
        for number, (name, values) in enumerate(by_score.items()):
            color, style = PALETTE[number % len(PALETTE)], "-" if number < len(PALETTE) else "--"
            axis.plot(
                range(1, len(values) + 1), values, style, color=color, label=_label(name), linewidth=1.3
            )
        if title in switched:
            axis.axvline(switched[title] + 0.5, color=PALETTE[-1], linewidth=0.8)
        axis.set_title(_label(title))
        axis.set_xlabel("turn")
    axes[0][0].set_ylabel("mean score")
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)
    return figure


def _label(name: str) -> str:
    return name.replace("_", " ")
