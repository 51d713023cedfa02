"""The study's figures: loss over size, loss over distance from the prompt, and loss against speed."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from preft.quality.arms import LABELS, PREFIX
from preft.quality.findings import gap_by_distance, interval, losses_by_distance
from preft.quality.study import Cell, Result
from preft.quality.tradeoff import Speed
from shared.plots import PALETTE, subplots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = dict(zip(LABELS, (PALETTE[-1], *PALETTE)))
TWINS = {"lora_p": "lora", "reft_p": "reft"}


def arms_of(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells by arm, in order of size."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.arm, []).append(cell)
    return found


def rank_chart(cells: Sequence[Cell], baselines: Mapping[str, Sequence[Result]]) -> "Figure":
    """Held-out loss with its interval over rank (left), and over trained values with prefix tuning (right)."""
    figure, (left, right) = subplots(1, 2, width=5.2, height=3.8, sharey=True)
    for arm, of_arm in arms_of(cells).items():
        found = [interval(cell.results) for cell in of_arm]
        means = [one.estimate for one in found]
        values = [cell.results[0].parameters for cell in of_arm]
        for axis, x in ((left, [cell.size for cell in of_arm]), (right, values)):
            if axis is left and arm == PREFIX:
                continue
            style = "o--" if arm in TWINS else "o-"
            axis.plot(x, means, style, color=COLORS[arm], label=LABELS[arm], markersize=4)
            low, high = [one.low for one in found], [one.high for one in found]
            axis.fill_between(x, low, high, color=COLORS[arm], alpha=0.15, linewidth=0)
    for style, (name, results) in zip(("-", "--", ":", "-."), baselines.items()):
        for axis in (left, right):
            axis.axhline(
                interval(results).estimate, color=PALETTE[-1], linestyle=style, linewidth=1, label=name
            )
    left.set_yscale("log")  # prompts that a model does not follow cost many times an adapter's loss
    left.set_xscale("log", base=2)
    left.set_xlabel("rank")
    left.set_ylabel("held-out loss (nats a response token)")
    right.set_xscale("log")
    right.set_xlabel("trained values")
    right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    return figure


def distance_chart(cells: Sequence[Cell], ranks: Sequence[int], base: Sequence[Result]) -> "Figure":
    """Loss by distance from the prompt (left, first rank), and the gap of -P to its all-token twin (right)."""
    figure, (left, right) = subplots(1, 2, width=5.2, height=3.8)
    by_place = {(cell.arm, cell.size): cell for cell in cells}
    bins = list(losses_by_distance(base))
    places = {name: place for place, name in enumerate(bins)}
    left.plot(
        range(len(bins)), list(losses_by_distance(base).values()), "o-", color=COLORS["base"], label="base"
    )
    for (arm, size), cell in by_place.items():
        if size == ranks[0] and arm != PREFIX:
            found = losses_by_distance(cell.results)
            style = "o--" if arm in TWINS else "o-"
            x = [places[name] for name in found]
            left.plot(x, list(found.values()), style, color=COLORS[arm], label=LABELS[arm], markersize=4)
    for arm, twin in TWINS.items():
        for rank, style in zip(ranks, ("o-", "s--", "^:")):
            if (arm, rank) not in by_place or (twin, rank) not in by_place:
                continue
            gaps = gap_by_distance(by_place[arm, rank], by_place[twin, rank])
            x = [places[name] for name in gaps]
            label = f"{LABELS[arm]}, rank {rank}"
            means = [gap.estimate for gap in gaps.values()]
            right.plot(x, means, style, color=COLORS[arm], label=label, markersize=4)
            low, high = [gap.low for gap in gaps.values()], [gap.high for gap in gaps.values()]
            right.fill_between(x, low, high, color=COLORS[arm], alpha=0.12, linewidth=0)
    right.axhline(0, color=PALETTE[-1], linewidth=0.8)
    for axis, title in ((left, f"loss (nats), rank {ranks[0]}"), (right, "loss less the all-token twin's")):
        axis.set_xticks(range(len(bins)), bins)
        axis.set_xlabel("tokens between prompt and response token")
        axis.set_ylabel(title)
        axis.legend(fontsize=8)
    return figure


def tradeoff_chart(cells: Sequence[Cell], speeds: Sequence[Speed], base: Sequence[Result]) -> "Figure":
    """Held-out loss against speed over the bare model's; one point an arm and rank."""
    figure, axis = subplots(width=6.0, height=4.2)
    axis.plot(1.0, interval(base).estimate, "D", color=COLORS["base"], label=LABELS["base"])
    by_place = {(cell.arm, cell.size): cell for cell in cells}
    for arm in dict.fromkeys(one.arm for one in speeds):
        points = [one for one in speeds if one.arm == arm and (arm, one.rank) in by_place]
        found = [interval(by_place[arm, one.rank].results) for one in points]
        y = [one.estimate for one in found]
        x = [one.over_base for one in points]
        spread = [[one.estimate - one.low for one in found], [one.high - one.estimate for one in found]]
        style = "o--" if arm in TWINS else "o-"
        axis.errorbar(x, y, yerr=spread, fmt=style, color=COLORS[arm], label=LABELS[arm], capsize=2)
        for one, height in zip(points, y):
            axis.annotate(
                f"r{one.rank}", (one.over_base, height), (4, 4), textcoords="offset points", fontsize=8
            )
    axis.set_xlabel("generated tokens a second over the bare model's")
    axis.set_ylabel("held-out loss (nats a response token)")
    axis.set_xlim(left=0)
    axis.legend(fontsize=8)
    return figure
