"""Goal switches: how fast the assumptions follow a person who changes what they want (goal-switch study, section 1.8).

Of one score over the turns of a conversation, with a switch after turn k and `target` the level that conversations
with the new goal hold from the beginning:

    pre          level at the last `window` turns up to k
    jump         s(k + 1) - s(k)
    residual(n)  s(k + n) - target
    stickiness   (post - target) / (pre - target), post = s(k + n): 0 has followed, 1 has not moved; below 0 overshot
    half-life    turns after the switch until half of pre - target is left, log-linear between turns; inf if never
    carry-over   least-squares lambda of residual(n) on residual(n - 1), residual(0) = pre - target: a planted geometric
                 decay gives lambda back
    drift        least-squares slope on the turn, where nothing was switched

Means are over conversations, and so is the bootstrap: the conversation, not the turn, is the unit. Stickiness of many
is their mean residual over their mean distance: a mean of ratios would hang on those that begin near the target.
Intervals take the target as known; one conversation has none.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from assumptions.closure import known_mean
from assumptions.conversation import Turn
from assumptions.goal_users import GOALS, OTHER, check_modes, mode
from shared.errors import UserError
from shared.stats import Interval, bootstrap_interval

LEAST = 0.05  # below this distance of pre and target no share of it means anything
UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Switch:
    """Indices of one score in one conversation; nan where turns or distance from the target do not allow any."""

    pre: float
    jump: float
    residual: list[float]
    stickiness: float
    half_life: float
    carry_over: float


def series(turns: Sequence[Turn], dimension: str) -> dict[str, Float[ndarray, " T"]]:
    """Scores by conversation, one a turn from 1 on; nan at turns without one."""
    rows: dict[str, dict[int, float]] = {}
    for one in turns:
        rows.setdefault(one.conversation, {})[one.turn] = one.scores.get(dimension, math.nan)
    return {
        name: np.array([by_turn.get(t, math.nan) for t in range(1, max(by_turn) + 1)])
        for name, by_turn in rows.items()
    }


def by_turn(turns: Sequence[Turn], dimension: str) -> list[float]:
    """Mean score over conversations, turn by turn; nan where none has one."""
    return mean_by_turn(list(series(turns, dimension).values()))


def switch(scores_T: Float[ndarray, " T"], after: int, target: float, window: int = 1) -> Switch:
    """The indices of one score whose goal changed after turn `after`; UserError where no turn follows."""
    if not 1 <= after < len(scores_T):
        raise UserError(
            f"a switch after turn {after} needs a later turn; this conversation has {len(scores_T)} turns"
        )
    before = scores_T[max(0, after - window) : after]
    pre = float(np.nanmean(before)) if np.isfinite(before).any() else math.nan
    residual = scores_T[after:] - target
    distance = pre - target
    known = math.isfinite(distance) and abs(distance) >= LEAST
    return Switch(
        pre,
        float(scores_T[after] - scores_T[after - 1]),
        residual.tolist(),
        float(residual[-1] / distance) if known else math.nan,
        half_life(residual, distance) if known else math.nan,
        carry_over(np.array([distance, *residual])) if known else math.nan,
    )


def half_life(residual_N: Float[ndarray, " N"], distance: float) -> float:
    """Turns until |residual| is half of |distance|, log-linear between turns; inf where that is not reached."""
    before, half = abs(distance), abs(distance) / 2
    for n, after in enumerate(np.abs(residual_N), start=1):
        if not math.isfinite(after):
            return math.nan
        if after <= half:
            # A residual of 0 is reached within the turn: half of the distance lies halfway.
            part = math.log(before / half) / math.log(before / after) if after > 0 else 0.5
            return n - 1 + part
        before = float(after)
    return math.inf


def carry_over(residual_N: Float[ndarray, " N"]) -> float:
    """Lambda of residual(n) = lambda residual(n - 1), least squares over the pairs that are known."""
    before, after = residual_N[:-1], residual_N[1:]
    known = np.isfinite(before) & np.isfinite(after)
    weight = float((before[known] ** 2).sum())
    return float((before[known] * after[known]).sum() / weight) if weight > 0 else math.nan


def drift(scores_T: Float[ndarray, " T"]) -> float:
    """Slope of a score on the turn; nan with fewer than two known turns."""
    known = np.isfinite(scores_T)
    if known.sum() < 2:
        return math.nan
    return float(np.polyfit(np.flatnonzero(known) + 1.0, scores_T[known], 1)[0])


@dataclass(frozen=True)
class SwitchSummary:
    """Means over conversations of one score under one kind of switch, with bootstrap intervals over conversations."""

    conversations: int
    by_turn: list[float]
    pre: Interval
    jump: Interval
    residual: Interval  # at the last turn
    stickiness: Interval  # mean residual over mean distance
    half_life_median: float


def summarise(
    scores: Mapping[str, Float[ndarray, " T"]], after: int, target: float, window: int = 1, seed: int = 0
) -> SwitchSummary:
    """The indices of a score over all conversations that changed their goal after the same turn."""
    found = [switch(one, after, target, window) for one in scores.values()]
    lives = [one.half_life for one in found if not math.isnan(one.half_life)]
    return SwitchSummary(
        len(found),
        mean_by_turn(list(scores.values())),
        _interval([one.pre for one in found], seed),
        _interval([one.jump for one in found], seed),
        _interval([one.residual[-1] for one in found], seed),
        _stickiness(np.array([(one.residual[-1], one.pre - target) for one in found]), seed),
        float(np.median(lives)) if lives else math.nan,
    )


def drifts(scores: Mapping[str, Float[ndarray, " T"]], seed: int = 0) -> Interval:
    """Mean drift over conversations without a switch."""
    return _interval([drift(one) for one in scores.values()], seed)


def mean_by_turn(scores: Sequence[Sequence[float] | Float[ndarray, " T"]]) -> list[float]:
    """Mean over conversations of any lengths, turn by turn; nan where none has a score."""
    longest = max(len(one) for one in scores)
    padded_CT = np.array([[*one, *[math.nan] * (longest - len(one))] for one in scores], dtype=float)
    return [float(one) for one in known_mean(padded_CT, axis=0)]


def _known(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _interval(values: Sequence[float], seed: int) -> Interval:
    known = _known(values)
    if len(known) < 2:
        return Interval(known[0], math.nan, math.nan) if known else UNKNOWN
    return bootstrap_interval(known, seed=seed)


def _stickiness(pairs_C2: Float[ndarray, "C 2"], seed: int) -> Interval:
    """Mean residual over mean distance of conversations that know both; nan where the distance is next to nothing."""
    residual_C, distance_C = pairs_C2[np.isfinite(pairs_C2).all(1)].T
    if not len(distance_C) or abs(distance_C.mean()) < LEAST:
        return UNKNOWN
    if len(distance_C) < 2:
        return Interval(float(residual_C[0] / distance_C[0]), math.nan, math.nan)
    return bootstrap_interval(
        residual_C, distance_C, statistic=lambda left, whole: left.mean(-1) / whole.mean(-1), seed=seed
    )


@dataclass(frozen=True)
class GoalFigures:
    """By dimension: the indices of every kind of switch, and the mean drift of every goal that was kept."""

    switches: dict[str, dict[str, SwitchSummary]]
    drifts: dict[str, dict[str, Interval]]


def analyse(
    turns: Mapping[str, Sequence[Turn]],
    dimensions: Sequence[str],
    after: int,
    window: int = 1,
    seed: int = 0,
) -> GoalFigures:
    """Figures of conversations by mode (`mode`); the target of a switch is what those that kept its new goal say later.

    UserError of `check_modes`.
    """
    check_modes(turns)
    scores = {name: {d: series(some, d) for d in dimensions} for name, some in turns.items()}
    switches: dict[str, dict[str, SwitchSummary]] = {}
    for goal, other in OTHER.items():
        if (name := mode(goal, switched=True)) not in turns:
            continue
        kept = {d: mean_by_turn([one[after:] for one in scores[other][d].values()]) for d in dimensions}
        targets = {d: float(np.mean(known)) if (known := _known(kept[d])) else math.nan for d in dimensions}
        reached = {d: {c: one for c, one in scores[name][d].items() if len(one) > after} for d in dimensions}
        if reached[dimensions[0]]:  # a conversation whose model fell silent before the switch has none
            switches[name] = {d: summarise(reached[d], after, targets[d], window, seed) for d in dimensions}
    kept_goals = [goal for goal in GOALS if goal in turns]
    return GoalFigures(
        switches, {goal: {d: drifts(scores[goal][d], seed) for d in dimensions} for goal in kept_goals}
    )
