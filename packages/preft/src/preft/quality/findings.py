"""From results to figures: the curve over sizes, the size that reaches all-token LoRA, and the gap by distance.

Intervals are 95% bootstrap intervals over (user, seed) pairs drawn by user. Differences are paired: the same user and
seed under both arms.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from preft.quality.study import Cell, Result
from shared.stats import Interval, bootstrap_interval

REFERENCE_RANK = 8


class Reached(NamedTuple):
    """The smallest size whose mean loss is at most the reference's, and the smallest that cannot be told from it.

    None where no size is: a finding too.
    """

    mean: int | None
    interval: int | None


def interval(results: Sequence[Result]) -> Interval:
    """Mean loss of results with its interval over users."""
    return _interval([result.loss for result in results], results)


def difference(results: Sequence[Result], reference: Sequence[Result]) -> Interval:
    """Mean loss less the reference's on the same user and seed."""
    other = {(result.user, result.seed): result.loss for result in reference}
    return _interval([result.loss - other[result.user, result.seed] for result in results], results)


def _interval(values: Sequence[float], results: Sequence[Result]) -> Interval:
    users = sorted({result.user for result in results})
    return bootstrap_interval(values, clusters=[users.index(result.user) for result in results])


def reference_cell(cells: Sequence[Cell]) -> Cell:
    """All-token LoRA of rank 8, or of the largest rank below where 8 was not trained."""
    lora = [cell for cell in cells if cell.arm == "lora"]
    return max(
        (cell for cell in lora if cell.size <= REFERENCE_RANK), key=lambda cell: cell.size, default=lora[0]
    )


def reached(cells: Sequence[Cell], arm: str) -> Reached:
    """At which size an arm reaches the reference (`reference_cell`)."""
    reference = reference_cell(cells).results
    gaps = {cell.size: difference(cell.results, reference) for cell in cells if cell.arm == arm}
    return Reached(
        min((size for size, gap in gaps.items() if gap.estimate <= 0), default=None),
        min((size for size, gap in gaps.items() if gap.low <= 0), default=None),
    )


def losses_by_distance(results: Sequence[Result]) -> dict[str, float]:
    """Mean loss in each bin of the distance from the prompt, over all tokens of all results."""
    sums: dict[str, list[float]] = {}
    for result in results:
        for name, (total, tokens) in result.bins.items():
            entry = sums.setdefault(name, [0.0, 0.0])
            entry[0] += total
            entry[1] += tokens
    return {name: total / tokens for name, (total, tokens) in sums.items()}


def gap_by_distance(cell: Cell, twin: Cell) -> dict[str, Interval]:
    """Loss of a prefill-only cell less that of its all-token twin of the same size, by distance, paired."""
    other = {(result.user, result.seed): result.bins for result in twin.results}
    gaps = {}
    for name in cell.results[0].bins:
        values = [
            _mean(result.bins[name]) - _mean(other[result.user, result.seed][name]) for result in cell.results
        ]
        gaps[name] = _interval(values, cell.results)
    return gaps


def _mean(entry: Sequence[float]) -> float:
    return entry[0] / entry[1]


def answer_means(results: Sequence[Result]) -> dict[str, float] | None:
    """Mean over users of the share of answers that keep each preference; None where none were judged."""
    judged = [result.answers for result in results if result.answers]
    return {name: sum(one[name] for one in judged) / len(judged) for name in judged[0]} if judged else None


def quality_metrics(cells: Sequence[Cell], baselines: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """The figures of metrics.json, by arm and size."""
    metrics: dict[str, Any] = {"heldout_loss": {}, "interval": {}, "learning_rate": {}, "answers": {}}
    for cell in cells:
        key = str(cell.size)
        found = interval(cell.results)
        metrics["heldout_loss"].setdefault(cell.arm, {})[key] = found.estimate
        metrics["interval"].setdefault(cell.arm, {})[key] = [found.low, found.high]
        if cell.tuned:
            metrics["learning_rate"].setdefault(cell.arm, {})[key] = cell.tuned.rate
        if answers := answer_means(cell.results):
            metrics["answers"].setdefault(cell.arm, {})[key] = answers
    for name, results in baselines.items():
        metrics["heldout_loss"][name] = interval(results).estimate
        if answers := answer_means(results):
            metrics["answers"][name] = answers
    arms = dict.fromkeys(cell.arm for cell in cells)
    metrics["reference"] = {"arm": "lora", "rank": reference_cell(cells).size}
    metrics["reaches_reference_at"] = {arm: reached(cells, arm)._asdict() for arm in arms if arm != "lora"}
    return metrics
