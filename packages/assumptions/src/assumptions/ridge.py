"""Ridge regression with one factorisation for every target and every strength.

min_W |Y - X W - b|^2 + lambda |W|^2 on centred data: W = Q (s + lambda)^-1 Q^T X^T Y with X^T X = Q diag(s) Q^T, or by
the rows' Gram matrix where there are fewer rows than columns. The intercept is not penalised. Double precision: the
same coefficients as scikit-learn's Ridge (an exactness test), at the cost of one eigendecomposition instead of one
solve per target and strength.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)


class Linear(NamedTuple):
    """A read-out for K targets: predictions are X @ weight_DK + intercept_K."""

    weight_DK: Float[Tensor, "D K"]
    intercept_K: Float[Tensor, "K"]

    def predict(self, resid_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """Predicted targets (B K) of rows (B D)."""
        return resid_BD.double() @ self.weight_DK + self.intercept_K


class Factors:
    """The factorised training rows; `solve` then costs one product per strength."""

    def __init__(self, resid_BD: Float[Tensor, "B D"]) -> None:
        rows_BD = resid_BD.double()
        self.mean_D = rows_BD.mean(0)
        self.centred_BD = rows_BD - self.mean_D
        self.primal = rows_BD.shape[0] >= rows_BD.shape[1]
        gram = self.centred_BD.T @ self.centred_BD if self.primal else self.centred_BD @ self.centred_BD.T
        eigenvalues, self.basis = torch.linalg.eigh(gram)
        self.eigenvalues = eigenvalues.clamp_min(0)

    def solve(self, targets_BK: Float[Tensor, "B K"], strength: float) -> Linear:
        """Return the ridge solution of strength lambda > 0 for all targets (B K)."""
        if strength <= 0:
            raise ValueError(f"the strength of a ridge must be positive, got {strength}")
        mean_K = targets_BK.double().mean(0)
        centred_BK = targets_BK.double() - mean_K
        scale = (1.0 / (self.eigenvalues + strength)).unsqueeze(1)
        if self.primal:
            weight_DK = self.basis @ (scale * (self.basis.T @ (self.centred_BD.T @ centred_BK)))
        else:
            weight_DK = self.centred_BD.T @ (self.basis @ (scale * (self.basis.T @ centred_BK)))
        return Linear(weight_DK, mean_K - self.mean_D @ weight_DK)


def r2(predicted_BK: Float[Tensor, "B K"], targets_BK: Float[Tensor, "B K"]) -> Float[Tensor, "K"]:
    """Coefficient of determination per target, against the mean of these targets; nan for a constant target."""
    targets_BK = targets_BK.double()
    residual_K = (targets_BK - predicted_BK).square().sum(0)
    total_K = (targets_BK - targets_BK.mean(0)).square().sum(0)
    return torch.where(total_K > 0, 1.0 - residual_K / total_K, torch.nan)
