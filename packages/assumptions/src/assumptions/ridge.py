"""Ridge regression from the second moments: one pass over the rows for every target and every strength.

    min_W |Y - X W - b|^2 + lambda |W|^2, the intercept not penalised:  (X'X + lambda I) W = X'Y with X, Y centred

1. One pass accumulates X'X and X'Y in double precision over chunks of rows, less a provisional mean (the first
   chunk's), so that a large common part cancels before it is squared; the true mean is taken out at the end.
2. Every strength costs one Cholesky factorisation, whatever the number of targets.
3. Where there are fewer rows than columns, the rows' Gram matrix takes the place of X'X: W = X' (X X' + lambda I)^-1 Y.
The memory is three matrices of D x D and a chunk, whatever the number of rows; coefficients are those of scikit-learn's
Ridge (an exactness test). A strength too small for double precision to tell from zero is refused, never replaced.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from assumptions.rows import Rows, gather
from shared.errors import UserError

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)


class Unresolved(UserError):
    """A ridge strength that double precision cannot tell from zero on these rows."""


class Linear(NamedTuple):
    """A read-out for K targets: predictions are X @ weight_DK + intercept_K."""

    weight_DK: Float[Tensor, "D K"]
    intercept_K: Float[Tensor, "K"]

    def predict(self, resid_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """Predicted targets (B K) of rows (B D)."""
        return resid_BD.double() @ self.weight_DK + self.intercept_K

    def read(self, source: Rows, rows: Sequence[int]) -> Float[Tensor, "B K"]:
        """Predicted targets (B K) of some rows, a chunk at a time."""
        return torch.cat([self.predict(chunk_BD) for chunk_BD in source.chunks(rows)])


class Factors:
    """The centred moments of the training rows with all targets; `solve` costs one factorisation a strength."""

    def __init__(self, source: Rows, rows: Sequence[int], targets_BK: Float[Tensor, "N K"]) -> None:
        """`targets_BK` holds the targets of `rows`, in their order."""
        targets_BK = targets_BK.double()
        self.target_mean_K = targets_BK.mean(0)
        centred_BK = targets_BK - self.target_mean_K
        self.primal = len(rows) >= source.width
        if self.primal:
            self.gram, self.cross_K, self.mean_D = _moments(source, rows, centred_BK)
        else:
            resid_BD = gather(source, rows)
            self.mean_D = resid_BD.mean(0)
            self.centred_BD = resid_BD - self.mean_D
            self.gram, self.cross_K = self.centred_BD @ self.centred_BD.T, centred_BK

    def solve(self, strength: float) -> Linear:
        """The ridge solution of strength lambda > 0 for all targets; `Unresolved` when lambda is too small."""
        if not strength > 0:
            raise UserError(f"the strength of a ridge must be positive, got {strength}")
        shifted = self.gram.clone()
        shifted.diagonal().add_(strength)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if failed:
            raise Unresolved(
                f"a ridge of strength {strength} is not resolved on these rows: take a larger one"
            )
        weight_DK = torch.cholesky_solve(self.cross_K, factor)
        if not self.primal:
            weight_DK = self.centred_BD.T @ weight_DK
        return Linear(weight_DK, self.target_mean_K - self.mean_D @ weight_DK)


def ridge_path(
    source: Rows, rows: Sequence[int], targets_BK: Float[Tensor, "N K"], strengths: Sequence[float]
) -> Iterator[tuple[float, Linear]]:
    """Yield (strength, solution) of all strengths that are resolved on these rows."""
    factors = Factors(source, rows, targets_BK)
    for strength in strengths:
        with suppress(Unresolved):
            yield strength, factors.solve(strength)


def r2(predicted_BK: Float[Tensor, "B K"], targets_BK: Float[Tensor, "B K"]) -> Float[Tensor, "K"]:
    """Coefficient of determination per target, against the mean of these targets; nan for a constant target."""
    targets_BK = targets_BK.double()
    residual_K = (targets_BK - predicted_BK).square().sum(0)
    total_K = (targets_BK - targets_BK.mean(0)).square().sum(0)
    return torch.where(total_K > 0, 1.0 - residual_K / total_K, torch.nan)


def _moments(
    source: Rows, rows: Sequence[int], centred_BK: Float[Tensor, "N K"]
) -> tuple[Float[Tensor, "D D"], Float[Tensor, "D K"], Float[Tensor, "D"]]:
    """X'X and X'Y about the mean, and the mean, in one pass."""
    width = source.width
    gram_DD = torch.zeros(width, width, dtype=torch.float64)
    cross_DK = torch.zeros(width, centred_BK.shape[1], dtype=torch.float64)
    sum_D, shift_D, start = torch.zeros(width, dtype=torch.float64), None, 0
    for chunk_BD in source.chunks(rows):
        if shift_D is None:
            shift_D = chunk_BD.double().mean(0)
        moved_BD = chunk_BD.double() - shift_D
        gram_DD.addmm_(moved_BD.T, moved_BD)
        cross_DK.addmm_(moved_BD.T, centred_BK[start : start + len(moved_BD)])
        sum_D += moved_BD.sum(0)
        start += len(moved_BD)
    if shift_D is None:
        raise UserError("a ridge needs at least one row")
    # The targets are centred, so X'Y needs no correction for the provisional mean.
    gram_DD.addr_(sum_D, sum_D, alpha=-1.0 / len(rows))
    return gram_DD, cross_DK, shift_D + sum_D / len(rows)
