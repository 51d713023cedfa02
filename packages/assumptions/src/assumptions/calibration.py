"""From a linear read-out to a score in [0, 1], by a monotone map fitted on the validation rows.

`linear`: slope x + offset by least squares, cut at 0 and 1; what a ridge shrank or overstated is put right, and a push
still moves the score in proportion. `platt`: sigmoid(slope x + offset), the maximum-likelihood one for scores taken as
probabilities (Platt 1999); for read-outs of log odds. `isotonic`: the best increasing map (scikit-learn), for many
validation rows. A read-out that falls where the scores rise is made flat, never turned round.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import UserError

Method = Literal["linear", "platt", "isotonic"]


@dataclass(frozen=True)
class Calibration:
    """A monotone map of read-outs to scores; knots belong to `isotonic`, slope and offset to the others."""

    method: Method = "linear"
    slope: float = 1.0
    offset: float = 0.0
    knots: tuple[tuple[float, float], ...] = ()

    def __call__(self, values_B: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Scores in [0, 1] of read-outs (B)."""
        if self.method == "isotonic":
            x, y = zip(*self.knots, strict=True)
            return torch.from_numpy(np.interp(values_B.numpy(), x, y))
        line_B = self.slope * values_B + self.offset
        return torch.sigmoid(line_B) if self.method == "platt" else line_B.clamp(0.0, 1.0)

    def inverse(self, score: float) -> float:
        """The read-out whose score this is; of several the middle one, of none (`isotonic`) the nearest.

        UserError where the map is flat, and for `platt` at 0 and 1, which no read-out has.
        """
        if self.method == "isotonic":
            return self._between_knots(score)
        if self.slope == 0:
            raise UserError(
                "the read-out says nothing of the score (its calibration is flat): it cannot be inverted"
            )
        if self.method == "linear":
            return (score - self.offset) / self.slope
        if not 0 < score < 1:
            raise UserError(f"a score of {score:g} has no read-out: take one between 0 and 1")
        return float((np.log(score / (1 - score)) - self.offset) / self.slope)

    def _between_knots(self, score: float) -> float:
        x, y = map(np.array, zip(*self.knots, strict=True))
        last, first = int(np.searchsorted(y, score, "right")) - 1, int(np.searchsorted(y, score, "left"))
        if last < 0 or first == len(y):
            return float(x[0] if last < 0 else x[-1])
        if last >= first:
            return float(x[first] + x[last]) / 2
        return float(x[last] + (score - y[last]) / (y[first] - y[last]) * (x[first] - x[last]))


UNCALIBRATED = Calibration()


def calibrate(method: Method, values_B: Float[Tensor, " B"], scores_B: Float[Tensor, " B"]) -> Calibration:
    """Fit the map from read-outs to scores in [0, 1] on rows that did not fit the read-out."""
    values, scores = values_B.double().numpy(), scores_B.double().numpy()
    if method == "linear":
        return _linear(values, scores)
    if method == "platt":
        return _platt(values, scores)
    from sklearn.isotonic import IsotonicRegression

    fitted = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(values, scores)
    x, y = fitted.X_thresholds_.tolist(), fitted.y_thresholds_.tolist()
    return Calibration("isotonic", knots=tuple(zip(x, y, strict=True)))


def as_outcomes(
    scores: NDArray[np.float64],
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """Scores in [0, 1] as weighted yes and no: (rows, outcome 0 or 1, weight), each row's weights summing to one.

    A logistic regression on these is the cross-entropy fit of the scores themselves.
    """
    rows = np.tile(np.arange(len(scores)), 2)
    outcomes = np.repeat([1, 0], len(scores))
    weights = np.concatenate([scores, 1.0 - scores])
    kept = weights > 0
    return rows[kept], outcomes[kept], weights[kept]


def calibration_error(scores_B: Float[Tensor, " B"], labels_B: Float[Tensor, " B"], bins: int = 10) -> float:
    """Mean absolute gap between mean score and mean label over equally filled bins of the score."""
    order = torch.argsort(scores_B)
    parts: Sequence[Tensor] = [part for part in order.tensor_split(bins) if len(part)]
    gaps = [abs(float(scores_B[part].mean() - labels_B[part].mean())) * len(part) for part in parts]
    return sum(gaps) / len(order)


def _linear(values: NDArray[np.float64], scores: NDArray[np.float64]) -> Calibration:
    centred = values - values.mean()
    slope = float(centred @ scores / (centred @ centred)) if values.std() > 0 else 0.0
    slope = max(slope, 0.0)
    return Calibration("linear", slope, float(scores.mean()) - slope * float(values.mean()))


def _platt(values: NDArray[np.float64], scores: NDArray[np.float64]) -> Calibration:
    from sklearn.linear_model import LogisticRegression

    level = float(np.clip(scores.mean(), 1e-6, 1 - 1e-6))
    flat = Calibration("platt", 0.0, float(np.log(level / (1 - level))))
    spread = float(values.std())
    if not spread > 0 or level in (1e-6, 1 - 1e-6):
        return flat
    rows, outcomes, weights = as_outcomes(scores)
    unit = ((values - values.mean()) / spread)[rows, None]
    fitted = LogisticRegression(C=1e4, max_iter=1000).fit(unit, outcomes, sample_weight=weights)
    slope = float(fitted.coef_[0, 0]) / spread
    if slope <= 0:
        return flat
    return Calibration("platt", slope, float(fitted.intercept_[0]) - slope * float(values.mean()))
