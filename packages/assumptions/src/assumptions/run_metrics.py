"""What a study leaves in metrics.json: figures of elicitation, probes and steering under stable keys."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from assumptions.dimensions import NAMES, SIGNS
from assumptions.doses import Curve
from assumptions.elicitation import Elicitation
from assumptions.evaluation import ProbeScore
from assumptions.sources import Messages
from shared.stats import spearman


def elicitation_metrics(elicitation: Elicitation, messages: Messages) -> dict[str, Any]:
    """Share of valid JSON, answers by status, and Spearman with the posterior mean by dimension where it is known."""
    metrics: dict[str, Any] = {
        "json_valid": elicitation.valid_share(),
        "elicitation_health": elicitation.health(),
    }
    if messages.posterior_BK is not None:
        scores = elicitation.scores([chat.id for chat in messages.chats], NAMES)
        read = np.isfinite(scores).all(axis=1)
        metrics["spearman"] = {
            name: float(spearman(scores[read, k], messages.posterior_BK[read, k]))
            for k, name in enumerate(NAMES)
        }
    return metrics


def probe_metrics(score: ProbeScore) -> dict[str, float | int | None]:
    """The figures of one probe that go into metrics.json."""
    return {
        "r2": score.r2,
        "spearman": score.spearman,
        "auroc": score.auroc.auroc,
        "auroc_quantile": score.auroc_quantile.auroc,
        "r2_shuffled": score.r2_shuffled,
        "spearman_shuffled": score.spearman_shuffled,
        "auroc_shuffled": score.auroc_shuffled,
        "auroc_quantile_shuffled": score.auroc_quantile_shuffled,
        "r2_bag_of_words": score.r2_bag_of_words,
        "rmse": score.rmse,
        "block": score.block,
    }


def steering_metrics(curves: dict[str, list[Curve]]) -> dict[str, Any]:
    """Spearman's rho and slope of dose against judged sycophancy, of the directions and of their random controls."""
    rho: dict[str, float] = {name: lines[0].rho for name, lines in curves.items()}
    slope: dict[str, float] = {name: lines[0].slope for name, lines in curves.items()}
    for name, lines in curves.items():
        rho |= {f"{name}_random{i}": line.rho for i, line in enumerate(lines[1:])}
        slope |= {f"{name}_random{i}": line.slope for i, line in enumerate(lines[1:])}
    return {
        "dose_response_rho": rho,
        "dose_response_slope": slope,
        "slope_over_largest_random": {name: _over_random(lines) for name, lines in curves.items()},
        "expected_sign": {name: SIGNS[name] for name in curves},
        "judged": {name: by_dose(lines[0]) for name, lines in curves.items()},
    }


def by_dose(curve: Curve) -> dict[str, float]:
    """Share of the replies that could be judged, by dose."""
    return {f"{dose:g}": share for dose, share in zip(curve.doses, curve.judged, strict=True)}


def _over_random(lines: Sequence[Curve]) -> float | None:
    """Slope of the direction in units of the steepest random control's; None without controls or with flat ones."""
    steepest = max((abs(line.slope) for line in lines[1:] if np.isfinite(line.slope)), default=0.0)
    return lines[0].slope / steepest if steepest > 1e-9 else None
