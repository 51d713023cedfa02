"""Dose against outcome: replies generated under a direction at several strengths, and the curve of their judgements.

1. Every chat is answered at every dose of every direction with common random numbers (`assumptions.conditions`). Dose 0
   is the unedited model, run once.
2. A judge scores the replies; the curve of a direction is the mean over chats at each dose with a bootstrap interval
   over chats, Spearman's rho between dose and mean, and the least-squares slope per unit of dose. A dose of which no
   reply could be judged has mean nan and enters neither; the share of judged replies stands beside every dose.
Truncated replies are counted at every dose: a reply cut by the token limit biases framing and length.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from assumptions.chats import Chat
from assumptions.conditions import UNEDITED, Reply, answer, dosed
from assumptions.engines import HFEngine
from assumptions.outcomes import Judgement, sycophancy
from assumptions.steering import Direction, Scope, Unit
from shared.generation import Sampling
from shared.models import Model
from shared.stats import Interval, bootstrap_interval, spearman


@dataclass(frozen=True)
class Curve:
    """Mean judgement by dose of one direction, with intervals over chats."""

    direction: str
    kind: str
    doses: list[float]
    means: list[float]
    lows: list[float]
    highs: list[float]
    rho: float
    slope: float
    truncated: list[float]
    judged: list[float]


@dataclass(frozen=True)
class Effect:
    """Mean judgement under one condition, and its difference from the unedited replies to the same chats."""

    condition: str
    mean: float
    difference: Interval
    judged: float
    truncated: float


def steer(
    model: Model,
    chats: Sequence[Chat],
    directions: Sequence[Direction],
    doses: Sequence[float],
    sampling: Sampling,
    *,
    unit: Unit = "proj_sd",
    scope: Scope = "all",
    seed: int = 0,
    batch_size: int = 64,
) -> list[Reply]:
    """Replies of the model to all chats under every direction and dose; dose 0 once, under the name "none"."""
    conditions = dosed(directions, doses, unit, scope)
    return answer(HFEngine(model, batch_size), chats, conditions, sampling, seed=seed)


def dose_response(
    replies: Sequence[Reply],
    judgements: Sequence[Judgement],
    direction: Direction,
    outcomes: Sequence[str],
    seed: int = 0,
) -> Curve:
    """The curve of one direction: mean over the outcomes of the judged scores at each dose, unedited replies at 0.

    Mean and interval are nan at a dose of which no reply could be judged; rho and slope are over the other doses, nan
    where fewer than two are left.
    """
    scores = sycophancy(judgements, outcomes)
    mine = [i for i, reply in enumerate(replies) if reply.direction in (direction.name, UNEDITED)]
    doses = sorted({replies[i].dose for i in mine})
    means, lows, highs, truncated, judged = [], [], [], [], []
    for dose in doses:
        rows = [i for i in mine if replies[i].dose == dose]
        by_chat = list(_by_chat([replies[i].chat for i in rows], scores[rows]).values())
        interval = (
            bootstrap_interval(by_chat, seed=seed) if by_chat else Interval(math.nan, math.nan, math.nan)
        )
        means.append(interval.estimate)
        lows.append(interval.low)
        highs.append(interval.high)
        truncated.append(float(np.mean([replies[i].finish_reason == "length" for i in rows])))
        judged.append(float(np.mean(np.isfinite(scores[rows]))))
    rho, slope = _trend(doses, means)
    return Curve(direction.name, direction.kind, doses, means, lows, highs, rho, slope, truncated, judged)


def effect(
    replies: Sequence[Reply],
    judgements: Sequence[Judgement],
    condition: str,
    outcomes: Sequence[str],
    seed: int = 0,
) -> Effect:
    """What a condition does beside no edit, paired by chat: chats judged under both, bootstrap over chats."""
    scores = sycophancy(judgements, outcomes)
    rows = [i for i, reply in enumerate(replies) if reply.direction == condition]
    plain = [i for i, reply in enumerate(replies) if reply.direction == UNEDITED]
    under = _by_chat([replies[i].chat for i in rows], scores[rows])
    without = _by_chat([replies[i].chat for i in plain], scores[plain])
    differences = [under[chat] - without[chat] for chat in under if chat in without]
    unknown = Interval(math.nan, math.nan, math.nan)
    return Effect(
        condition,
        float(np.mean(list(under.values()))) if under else math.nan,
        bootstrap_interval(differences, seed=seed) if differences else unknown,
        float(np.mean(np.isfinite(scores[rows]))),
        float(np.mean([replies[i].finish_reason == "length" for i in rows])),
    )


def _trend(doses: Sequence[float], means: Sequence[float]) -> tuple[float, float]:
    """Spearman's rho and least-squares slope of mean on dose over the doses whose mean is known."""
    known = [(dose, mean) for dose, mean in zip(doses, means, strict=True) if math.isfinite(mean)]
    if len(known) < 2:
        return math.nan, math.nan
    x, y = zip(*known, strict=True)
    return float(spearman(x, y)), float(np.polyfit(x, y, 1)[0])


def _by_chat(names: Sequence[str], scores: np.ndarray) -> dict[str, float]:
    """Mean score of every chat that has one: the chat, not the sample, is the unit of inference."""
    rows: dict[str, list[float]] = {}
    for name, score in zip(names, scores, strict=True):
        if np.isfinite(score):
            rows.setdefault(name, []).append(float(score))
    return {name: float(np.mean(values)) for name, values in rows.items()}
