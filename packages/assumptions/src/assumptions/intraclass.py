"""Intraclass correlation of repeated measurements: ICC(2,1), absolute agreement, and ICC(3,1), consistency.

n subjects are measured under k conditions, one number in each cell. The two-way analysis of variance splits the sum of
squares into rows (MSR, n-1), columns (MSC, k-1) and residual (MSE, (n-1)(k-1)), and (Shrout and Fleiss 1979)

    ICC(2,1) = (MSR - MSE) / (MSR + (k-1) MSE + k (MSC - MSE) / n)     conditions are a sample of possible ones
    ICC(3,1) = (MSR - MSE) / (MSR + (k-1) MSE)                         these very conditions; their means do not count

with the F intervals of McGraw and Wong (1996). Without any variance neither is defined, and both are nan: scores that
never move are not reliable, they say nothing.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from shared.errors import UserError
from shared.stats import Interval

_NOTHING = 1e-12  # a mean square this much smaller than another is rounding


class Reliability(NamedTuple):
    """Both coefficients with their intervals; n subjects, k conditions."""

    agreement: Interval
    consistency: Interval
    subjects: int
    conditions: int


class MeanSquares(NamedTuple):
    """Mean squares of rows, columns and residual."""

    rows: float
    columns: float
    residual: float


def intraclass(values_nk: Float[np.ndarray, "n k"], level: float = 0.95) -> Reliability:
    """ICC(2,1) and ICC(3,1) of n subjects under k conditions; UserError for fewer than 2 of either or missing cells."""
    n, k = values_nk.shape
    if n < 2 or k < 2:
        raise UserError(
            f"an intraclass correlation needs at least 2 subjects and 2 conditions, got {n} and {k}"
        )
    if not np.isfinite(values_nk).all():
        raise UserError("an intraclass correlation has no missing cells: leave out subjects that lack one")
    squares = mean_squares(values_nk)
    scale = max(float(np.abs(values_nk).max()) ** 2, 1.0)
    if squares.rows <= _NOTHING * scale and squares.residual <= _NOTHING * scale:
        undefined = Interval(float("nan"), float("nan"), float("nan"))
        return Reliability(undefined, undefined, n, k)
    return Reliability(_agreement(squares, n, k, level), _consistency(squares, n, k, level), n, k)


def mean_squares(values_nk: Float[np.ndarray, "n k"]) -> MeanSquares:
    """The mean squares of the two-way analysis of variance without replication."""
    n, k = values_nk.shape
    rows, columns, grand = values_nk.mean(axis=1), values_nk.mean(axis=0), values_nk.mean()
    residual = values_nk - rows[:, None] - columns[None, :] + grand
    return MeanSquares(
        float(k * ((rows - grand) ** 2).sum() / (n - 1)),
        float(n * ((columns - grand) ** 2).sum() / (k - 1)),
        float((residual**2).sum() / ((n - 1) * (k - 1))),
    )


def _consistency(squares: MeanSquares, n: int, k: int, level: float) -> Interval:
    from scipy.stats import f

    msr, _, mse = squares
    estimate = (msr - mse) / (msr + (k - 1) * mse)
    if mse <= _NOTHING * msr:
        return Interval(estimate, estimate, estimate)
    upper, df = (1 + level) / 2, (n - 1) * (k - 1)
    low, high = msr / mse / f.ppf(upper, n - 1, df), msr / mse * f.ppf(upper, df, n - 1)
    return Interval(estimate, float((low - 1) / (low + k - 1)), float((high - 1) / (high + k - 1)))


def _agreement(squares: MeanSquares, n: int, k: int, level: float) -> Interval:
    from scipy.stats import f

    msr, msc, mse = squares
    estimate = (msr - mse) / (msr + (k - 1) * mse + k * (msc - mse) / n)
    if msc + mse <= _NOTHING * msr:
        return Interval(estimate, estimate, estimate)
    # Satterthwaite's degrees of freedom of the error, which mixes columns and residual; a negative estimate, for which
    # the approximation breaks down, takes those of 0
    known = max(estimate, 0.0)
    a, b = k * known / (n * (1 - known)), 1 + k * known * (n - 1) / (n * (1 - known))
    parts = (a * msc) ** 2 / (k - 1) + (b * mse) ** 2 / ((n - 1) * (k - 1))
    df = (a * msc + b * mse) ** 2 / parts
    upper, error = (1 + level) / 2, k * msc + (k * n - k - n) * mse
    low, high = f.ppf(upper, n - 1, df), f.ppf(upper, df, n - 1)
    return Interval(
        estimate,
        float(n * (msr - low * mse) / (low * error + n * msr)),
        float(n * (high * msr - mse) / (error + n * high * msr)),
    )
