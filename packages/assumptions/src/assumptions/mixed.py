"""A linear mixed model with crossed random intercepts, by REML: enough for a survey of participants and queries.

    y = beta_0 + beta_1 x + sum_g u_g[group of the row] + e      u_g ~ N(0, s_g^2), e ~ N(0, s^2)

With theta_g = s_g^2 / s^2 and V = I + sum_g theta_g Z_g Z_g', the restricted likelihood, s^2 and beta profiled out, is

    -2 l(theta) = (n - 2) log(y' P y / (n - 2)) + log |V| + log |X' V^-1 X| + constants

and is maximised over log theta (Nelder-Mead). V^-1 and |V| come from the q x q matrix of the group levels (Woodbury,
T = diag(theta)^-1 + Z'Z), whose cross products are taken once: the optimiser never sees the n rows. Intervals of
beta_1 are Wald's, normal; a balanced design has closed forms, which the tests compare with. Intercepts alone are
random: where the effect of x differs from query to query, the interval speaks of these queries, not of others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from shared.errors import UserError
from shared.stats import Interval

SMALLEST = 1e-8  # theta is kept above it: a variance at its bound is as good as none


@dataclass(frozen=True)
class MixedFit:
    """Intercept, slope of x with its 95% interval and standard error, and standard deviations of groups and rest."""

    intercept: float
    slope: Interval
    standard_error: float
    group_sd: tuple[float, ...]
    residual_sd: float
    rows: int


def fit_mixed(
    y_N: Float[ndarray, " N"], x_N: Float[ndarray, " N"], groups: Sequence[Sequence[str]]
) -> MixedFit:
    """Fit the model to N rows; `groups` holds, for every grouping, the group of each row.

    Raises UserError where x does not vary, a grouping has one level, or rows are too few.
    """
    from scipy.optimize import minimize

    y_N, x_N = np.asarray(y_N, dtype=float), np.asarray(x_N, dtype=float)
    levels = [sorted(set(column)) for column in groups]
    if len(y_N) < 4 or np.ptp(x_N) == 0 or any(len(one) < 2 for one in levels):
        raise UserError(
            "a mixed model needs at least four rows, two values of x and two levels of every grouping"
        )
    Z_NQ = np.concatenate(
        [np.equal.outer(np.array(column), np.array(of)) for column, of in zip(groups, levels, strict=True)],
        axis=1,
    ).astype(float)
    both_N3 = np.column_stack([np.ones(len(y_N)), x_N, y_N])
    sizes = [len(one) for one in levels]
    problem = _Problem(both_N3.T @ both_N3, Z_NQ.T @ both_N3, Z_NQ.T @ Z_NQ, sizes, len(y_N))
    start = np.zeros(len(sizes))
    best = minimize(
        problem.deviance,
        start,
        method="Nelder-Mead",
        options={"xatol": 1e-7, "fatol": 1e-10, "maxiter": 4000},
    )
    theta = problem.theta(best.x)
    beta_2, covariance_22, variance = problem.solve(theta)
    error = float(np.sqrt(covariance_22[1, 1]))
    slope = float(beta_2[1])
    return MixedFit(
        float(beta_2[0]),
        Interval(slope, slope - 1.959964 * error, slope + 1.959964 * error),
        error,
        tuple(float(np.sqrt(t * variance)) for t in theta),
        float(np.sqrt(variance)),
        len(y_N),
    )


@dataclass(frozen=True)
class _Problem:
    """Cross products of [1 x y] and the indicators Z of the group levels: the likelihood asks no more of the rows."""

    gram_33: Float[ndarray, "3 3"]
    mixed_Q3: Float[ndarray, "Q 3"]
    levels_QQ: Float[ndarray, "Q Q"]
    sizes: Sequence[int]
    rows: int

    def theta(self, logs: Float[ndarray, " G"]) -> Float[ndarray, " G"]:
        """Variance ratios from the optimiser's unbounded parameters."""
        return np.asarray(np.maximum(np.exp(np.clip(logs, -40, 40)), SMALLEST))

    def parts(self, theta: Float[ndarray, " G"]) -> tuple[Float[ndarray, "3 3"], float]:
        """[1 x y]' V^-1 [1 x y] and log |V|."""
        per_level = np.repeat(theta, self.sizes)
        inner_QQ = np.diag(1 / per_level) + self.levels_QQ
        within_33 = self.gram_33 - self.mixed_Q3.T @ np.linalg.solve(inner_QQ, self.mixed_Q3)
        return within_33, float(np.linalg.slogdet(inner_QQ)[1] + np.log(per_level).sum())

    def deviance(self, logs: Float[ndarray, " G"]) -> float:
        """-2 times the restricted log-likelihood, up to a constant."""
        within_33, log_v = self.parts(self.theta(logs))
        free = self.rows - 2
        rest = within_33[2, 2] - within_33[2, :2] @ np.linalg.solve(within_33[:2, :2], within_33[:2, 2])
        return float(
            free * np.log(max(rest, 1e-300) / free) + log_v + np.linalg.slogdet(within_33[:2, :2])[1]
        )

    def solve(self, theta: Float[ndarray, " G"]) -> tuple[ndarray, ndarray, float]:
        """Beta, its covariance, and the residual variance at these ratios."""
        within_33, _ = self.parts(theta)
        beta_2 = np.linalg.solve(within_33[:2, :2], within_33[:2, 2])
        variance = float((within_33[2, 2] - within_33[2, :2] @ beta_2) / (self.rows - 2))
        return beta_2, np.linalg.inv(within_33[:2, :2]) * variance, variance
