"""Dose against outcome: replies generated under a direction at several strengths, and the curve of their judgements.

1. Every chat is answered at every dose of every direction, with one seed per (chat, sample) whatever the dose: common
   random numbers, so that a curve shows the dose and not fresh sampling noise. Dose 0 is the unedited model, run once.
2. A judge scores the replies; the curve of a direction is the mean over chats at each dose with a bootstrap interval
   over chats, Spearman's rho between dose and mean, and the least-squares slope per unit of dose. A dose of which no
   reply could be judged has mean nan and enters neither; the share of judged replies stands beside every dose.
Truncated replies are counted at every dose: a reply cut by the token limit biases framing and length.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from assumptions.chats import Chat
from assumptions.outcomes import Judgement, sycophancy
from assumptions.steering import Direction, Unit
from shared.generation import HFGenerator, Request, Sampling
from shared.models import Model
from shared.stats import Interval, bootstrap_interval, spearman
from shared.tokens import Phase

UNEDITED = "none"
Condition: TypeAlias = tuple[Direction | None, float]


@dataclass(frozen=True)
class Reply:
    """One reply: to which chat, under which direction at which dose, and whether it ended by itself."""

    chat: str
    direction: str
    dose: float
    text: str
    finish_reason: str
    sample: int = 0


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


def steer(
    model: Model,
    chats: Sequence[Chat],
    directions: Sequence[Direction],
    doses: Sequence[float],
    sampling: Sampling,
    *,
    unit: Unit = "proj_sd",
    phase: Phase = Phase.ALL,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[list[Condition]], Iterable[Condition]] = iter,
) -> list[Reply]:
    """Replies of the model to all chats under every direction and dose; dose 0 once, under the name "none"."""
    conditions: list[Condition] = [(None, 0.0)]
    conditions += [(direction, dose) for direction in directions for dose in doses if dose != 0]
    requests = [Request(chat.messages, seed=_seed(seed, chat.id)) for chat in chats]
    replies = []
    for direction, dose in progress(conditions):
        edits = direction.interventions(dose, unit, phase) if direction else []
        name = direction.name if direction else UNEDITED
        answers = HFGenerator(model, edits, batch_size=batch_size).generate(requests, sampling)
        for chat, completions in zip(chats, answers, strict=True):
            for sample, one in enumerate(completions):
                replies.append(Reply(chat.id, name, dose, one.text, one.finish_reason, sample))
    return replies


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
        by_chat = _mean_by_chat([replies[i].chat for i in rows], scores[rows])
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


def _trend(doses: Sequence[float], means: Sequence[float]) -> tuple[float, float]:
    """Spearman's rho and least-squares slope of mean on dose over the doses whose mean is known."""
    known = [(dose, mean) for dose, mean in zip(doses, means, strict=True) if math.isfinite(mean)]
    if len(known) < 2:
        return math.nan, math.nan
    x, y = zip(*known, strict=True)
    return float(spearman(x, y)), float(np.polyfit(x, y, 1)[0])


def _mean_by_chat(names: Sequence[str], scores: np.ndarray) -> list[float]:
    """Mean score of every chat that has one: the chat, not the sample, is the unit of inference."""
    rows: dict[str, list[float]] = {}
    for name, score in zip(names, scores, strict=True):
        if np.isfinite(score):
            rows.setdefault(name, []).append(float(score))
    return [float(np.mean(values)) for values in rows.values()]


def _seed(seed: int, chat: str) -> int:
    """One seed a chat, whatever direction and dose."""
    digest = hashlib.blake2b(f"{seed}/{chat}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1
