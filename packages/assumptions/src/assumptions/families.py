"""Kinds of linear probes: each a path of read-outs over strengths, and the share it explains of the validation rows.

- `ridge`: least squares with a penalty, unstandardised as in the paper; shared factorisation (`ridge`), streamed.
- `pls`: partial least squares on standardised activations (scikit-learn pipeline), strength = number of components.
  The components are nested, so one fit with the most of them holds the solutions of all smaller numbers.
- `logistic`: logistic regression on standardised activations (scikit-learn pipeline), strength = 1 / C. Scores from 0
  to 1 are weighted outcomes (`calibration.as_outcomes`); 0 and 1 are the usual case, say labels of sycophancy.

Every pipeline is folded back into one weight a column and an intercept, so all families are saved, applied and steered
alike. `pls` and `logistic` hold their training rows in memory; `ridge` streams them.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from assumptions.calibration import Method, as_outcomes
from assumptions.ridge import STRENGTHS, Linear, r2, ridge_path
from assumptions.rows import Rows, gather
from shared.errors import UserError

FamilyName = Literal["ridge", "pls", "logistic"]
Path = Callable[[Rows, Sequence[int], Float[Tensor, "N K"], Sequence[float]], Iterator[tuple[float, Linear]]]
COMPONENTS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
LOGISTIC_STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)


@dataclass(frozen=True)
class Family:
    """How read-outs are fitted, by which share explained they are chosen, which score a value of theirs stands for.

    `calibration` is the map to scores where none is chosen.
    """

    name: FamilyName
    strengths: tuple[float, ...]
    path: Path
    explained: Callable[[Float[Tensor, "B K"], Float[Tensor, "B K"]], Float[Tensor, "K"]]
    estimate: Callable[[Tensor], Tensor]
    calibration: Method


def pls_path(
    source: Rows, rows: Sequence[int], targets_BK: Float[Tensor, "N K"], strengths: Sequence[float]
) -> Iterator[tuple[float, Linear]]:
    """Yield (number of components, read-out) for all numbers that the rows can give."""
    resid = gather(source, rows).numpy()
    counts = [int(strength) for strength in strengths if int(strength) <= min(len(resid) - 1, resid.shape[1])]
    fits = [_fit_pls(resid, target_B.numpy(), max(counts)) for target_B in targets_BK.double().T]
    for count in counts:
        yield float(count), _join([_fold(fit[0], *_pls_coefficients(fit[1], count)) for fit in fits])


def logistic_path(
    source: Rows, rows: Sequence[int], targets_BK: Float[Tensor, "N K"], strengths: Sequence[float]
) -> Iterator[tuple[float, Linear]]:
    """Yield (1 / C, read-out of the log odds) for all strengths."""
    from sklearn.linear_model import LogisticRegression

    resid = gather(source, rows).numpy()
    for strength in strengths:
        reads = []
        for target_B in targets_BK.double().T:
            index, outcomes, weights = as_outcomes(target_B.numpy())
            pipeline = _standardised(LogisticRegression(C=1.0 / strength, max_iter=5000))
            pipeline.fit(
                resid[index],
                outcomes,
                standardscaler__sample_weight=weights,
                logisticregression__sample_weight=weights,
            )
            scaler, model = pipeline[0], pipeline[1]
            reads.append(_fold(scaler, model.coef_[0], float(model.intercept_[0])))
        yield float(strength), _join(reads)


def deviance_explained(
    log_odds_BK: Float[Tensor, "B K"], targets_BK: Float[Tensor, "B K"]
) -> Float[Tensor, "K"]:
    """Share of the cross-entropy in excess of the scores' own that log odds explain; 1 is perfect, 0 the mean's."""
    targets_BK = targets_BK.double()
    mean_BK = targets_BK.mean(0).clamp(1e-12, 1 - 1e-12).logit().expand_as(targets_BK)
    entropy = torch.special.entr(targets_BK) + torch.special.entr(1 - targets_BK)

    def excess(log_odds: Tensor) -> Tensor:
        losses = torch.nn.functional.binary_cross_entropy_with_logits(log_odds, targets_BK, reduction="none")
        return (losses - entropy).sum(0)

    total_K = excess(mean_BK)
    return torch.where(total_K > 1e-12, 1.0 - excess(log_odds_BK) / total_K, torch.nan)


def as_it_is(values: Tensor) -> Tensor:
    """The estimate of a least-squares read-out: its value."""
    return values


def family(name: str) -> Family:
    """The family of a name; UserError lists them when there is none."""
    if name not in FAMILIES:
        raise UserError(f"no family of probes is called {name!r}; there are {', '.join(FAMILIES)}")
    return FAMILIES[name]


FAMILIES: dict[str, Family] = {
    "ridge": Family("ridge", STRENGTHS, ridge_path, r2, as_it_is, "linear"),
    "pls": Family("pls", COMPONENTS, pls_path, r2, as_it_is, "linear"),
    "logistic": Family(
        "logistic", LOGISTIC_STRENGTHS, logistic_path, deviance_explained, torch.sigmoid, "platt"
    ),
}


def _standardised(estimator: Any) -> Any:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), estimator)


def _fit_pls(resid: NDArray[np.float64], target: NDArray[np.float64], count: int) -> Any:
    from sklearn.cross_decomposition import PLSRegression

    pipeline = _standardised(PLSRegression(n_components=count, scale=False))
    with warnings.catch_warnings():
        # The target may be explained before the last component; the further ones are then zero.
        warnings.filterwarnings("ignore", message=".*residual is constant.*", category=UserWarning)
        return pipeline.fit(resid, target)


def _pls_coefficients(model: Any, count: int) -> tuple[NDArray[np.float64], float]:
    """Coefficients and intercept of the first components; the standardised columns have mean zero."""
    return model.x_rotations_[:, :count] @ model.y_loadings_[0, :count], float(model.intercept_[0])


def _fold(scaler: Any, coefficients: NDArray[np.float64], intercept: float) -> Linear:
    """A read-out of standardised columns as one of the columns themselves."""
    weight_D1 = torch.from_numpy(coefficients / scaler.scale_)[:, None]
    return Linear(weight_D1, intercept - torch.from_numpy(scaler.mean_) @ weight_D1)


def _join(reads: Sequence[Linear]) -> Linear:
    """Read-outs of single targets as one."""
    weights, intercepts = zip(*reads, strict=True)
    return Linear(torch.cat(weights, dim=1), torch.cat(intercepts))
