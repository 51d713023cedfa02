"""Mediation: how much of what steering does to sycophancy goes through the assumption that the model then states.

With X the dose, M the re-elicited score of the steered dimension and Y the judged sycophancy of the reply, both under
the edit, centred within message (the differences between messages dwarf the effects; every message is its own control):

    M = a X            the dose moves the stated assumption
    Y = c X            total effect
    Y = c' X + b M     direct effect c', and what the assumption adds at a given dose

    indirect = a b     c = c' + a b exactly, for least squares on the same rows
    share    = a b / c

Intervals are percentile bootstraps over messages, all doses of a message together. That the indirect effect is causal
rests on nothing else moving M and Y within a message; random directions of the same doses show what happens without a
meaning.
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


def paths(
    dose: Float[ndarray, " N"], assumption: Float[ndarray, " N"], outcome: Float[ndarray, " N"]
) -> Paths:
    """Least-squares paths of centred rows; nan where the dose does not vary."""
    x, m, y = dose, assumption, outcome
    xx, xm, xy, mm, my = x @ x, x @ m, x @ y, m @ m, m @ y
    if xx == 0:
        return Paths(*[float("nan")] * 5)
    a, total = xm / xx, xy / xx
    rest = mm - xm * a  # of the assumption, given the dose
    b = (my - a * xy) / rest if rest > 1e-12 * max(mm, 1e-300) else float("nan")
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
    groups = [_centred(dose, assumption, outcome, of) for of in rows.values() if len(set(dose[of])) > 1]
    if len(groups) < 2:
        raise UserError("mediation needs at least two messages, each scored and judged at two doses")
    draw = np.random.default_rng(seed)
    chosen = draw.integers(len(groups), size=(resamples, len(groups)))
    drawn = np.array([paths(*np.concatenate([groups[i] for i in some], axis=1)) for some in chosen])
    whole = paths(*np.concatenate(groups, axis=1))
    found = {
        name: _interval(getattr(whole, name), drawn[:, k], level) for k, name in enumerate(Paths._fields)
    }
    indirect, total = drawn[:, Paths._fields.index("indirect")], drawn[:, Paths._fields.index("total")]
    shares = np.divide(indirect, total, out=np.full_like(total, np.nan), where=np.abs(total) > NOTHING)
    share = _interval(
        whole.indirect / whole.total if abs(whole.total) > NOTHING else float("nan"), shares, level
    )
    return Mediation(**found, share=share, messages=len(groups))


def _interval(estimate: float, drawn: Float[ndarray, " R"], level: float) -> Interval:
    """The estimate with the percentiles of its finite resamples; nan where there are none."""
    finite = drawn[np.isfinite(drawn)]
    tail = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(finite, tail) if finite.size else (np.nan, np.nan)
    return Interval(estimate, float(low), float(high))


def _centred(
    dose: Float[ndarray, " N"],
    assumption: Float[ndarray, " N"],
    outcome: Float[ndarray, " N"],
    rows: Sequence[int],
) -> Float[ndarray, "3 M"]:
    """Dose, assumption and outcome of one message less their means over its doses."""
    three = np.stack([dose[list(rows)], assumption[list(rows)], outcome[list(rows)]])
    return np.asarray(three - three.mean(1, keepdims=True))
