"""Mediation: how much of what steering does to sycophancy goes through the assumption that the model then states.

With X the dose, M the re-elicited score of the steered dimension and Y the judged sycophancy of the reply, both under
the edit, in message i (the differences between messages dwarf the effects; every message is its own control):

    M = i + a X                the dose moves the stated assumption
    Y = i + c X                total effect
    Y = i + f(X) + b M         what the assumption adds at a given dose; f is any function of the dose

    indirect = a b     direct = c' = the least-squares slope of f     c = c' + a b exactly
    share    = a b / c

f is free because scores and replies saturate alike at large doses: with f linear, M would be credited with whatever
saturates beside it (on the embedded world's rule a mediator that carries nothing gets a share of .17, here .02). So b
comes from messages that the same dose moves differently; two doses leave f linear.

Intervals are percentile bootstraps over messages, all doses of a message together. That the indirect effect is causal
rests on nothing else moving M and Y within a message at a given dose; random directions of the same doses show what
happens without a meaning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from shared.errors import UserError
from shared.stats import Interval

NOTHING = 1e-9  # a total effect below it is rounding, and has no shares


class Paths(NamedTuple):
    """The coefficients: dose to assumption, assumption to outcome, total, direct, indirect."""

    a: float
    b: float
    total: float
    direct: float
    indirect: float


@dataclass(frozen=True)
class Mediation:
    """Paths with bootstrap intervals over messages; `share` is indirect over total."""

    a: Interval
    b: Interval
    total: Interval
    direct: Interval
    indirect: Interval
    share: Interval
    messages: int


def paths(gram: Float[ndarray, "P P"]) -> Paths:
    """Least-squares paths from cross products of centred columns: dose, indicators of its levels, assumption, outcome.

    nan where the dose does not vary, or the assumption does not beyond message and dose.
    """
    x, m, y, levels = 0, -2, -1, slice(1, -2)
    xx, mm = gram[x, x], gram[m, m]
    if xx == 0:
        return Paths(*[float("nan")] * 5)
    a, total = gram[x, m] / xx, gram[x, y] / xx
    given = gram[m, levels] @ np.linalg.pinv(gram[levels, levels], hermitian=True)
    rest = mm - given @ gram[levels, m]  # of the assumption, given the dose
    b = (gram[m, y] - given @ gram[levels, y]) / rest if rest > 1e-12 * max(mm, 1e-300) else float("nan")
    return Paths(float(a), float(b), float(total), float(total - a * b), float(a * b))


def mediate(
    messages: Sequence[str],
    dose: Float[ndarray, " N"],
    assumption: Float[ndarray, " N"],
    outcome: Float[ndarray, " N"],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Mediation:
    """Mediation over N rows, one a message and dose; rows with a missing value are left out.

    Raises UserError with fewer than two messages that were seen at two doses.
    """
    known = np.isfinite(dose) & np.isfinite(assumption) & np.isfinite(outcome)
    rows: dict[str, list[int]] = {}
    for i in np.flatnonzero(known):
        rows.setdefault(messages[i], []).append(int(i))
    levels = np.equal.outer(dose, np.unique(dose[known]))
    columns = np.column_stack([dose, levels, assumption, outcome])
    grams = [_gram(columns[of]) for of in rows.values() if len(set(dose[of])) > 1]
    if len(grams) < 2:
        raise UserError("mediation needs at least two messages, each scored and judged at two doses")
    draw = np.random.default_rng(seed)
    chosen = draw.integers(len(grams), size=(resamples, len(grams)))
    drawn = np.array([paths(np.sum([grams[i] for i in some], axis=0)) for some in chosen])
    whole = paths(np.sum(grams, axis=0))
    found = {
        name: _interval(getattr(whole, name), drawn[:, k], level) for k, name in enumerate(Paths._fields)
    }
    indirect, total = drawn[:, Paths._fields.index("indirect")], drawn[:, Paths._fields.index("total")]
    shares = np.divide(indirect, total, out=np.full_like(total, np.nan), where=np.abs(total) > NOTHING)
    share = _interval(
        whole.indirect / whole.total if abs(whole.total) > NOTHING else float("nan"), shares, level
    )
    return Mediation(**found, share=share, messages=len(grams))


def _interval(estimate: float, drawn: Float[ndarray, " R"], level: float) -> Interval:
    """The estimate with the percentiles of its finite resamples; nan where there are none."""
    finite = drawn[np.isfinite(drawn)]
    tail = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(finite, tail) if finite.size else (np.nan, np.nan)
    return Interval(estimate, float(low), float(high))


def _gram(columns: Float[ndarray, "M P"]) -> Float[ndarray, "P P"]:
    """Cross products of one message's columns less their means over its rows."""
    centred = columns - columns.mean(0)
    return np.asarray(centred.T @ centred)
