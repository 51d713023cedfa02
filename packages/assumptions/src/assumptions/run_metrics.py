"""What a study leaves in metrics.json: figures of elicitation, probes and steering under stable keys."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from assumptions.dimensions import NAMES, SIGNS
from assumptions.doses import Curve
from assumptions.evaluation import ProbeScore
from assumptions.metrics import Figures
from assumptions.ranges import DoseRange
from assumptions.scoring import Scoring
from assumptions.sources import Messages
from assumptions.steered import Steered
from shared.serialize import plain
from shared.stats import spearman


def elicitation_metrics(scoring: Scoring, messages: Messages) -> dict[str, Any]:
    """Share of valid JSON, answers by status, and Spearman with the posterior mean by dimension where it is known."""
    metrics: dict[str, Any] = {
        "json_valid": scoring.answers.valid_share(),
        "elicitation_health": scoring.answers.health(),
    }
    if messages.posterior_BK is not None:
        scores = scoring.scored.scores([chat.id for chat in messages.chats], NAMES)
        read = np.isfinite(scores).all(axis=1)
        metrics["spearman"] = {
            name: float(spearman(scores[read, k], messages.posterior_BK[read, k]))
            for k, name in enumerate(NAMES)
        }
    return metrics


def probe_metrics(score: ProbeScore) -> dict[str, Any]:
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
        "r2_baselines": score.baselines,
        "r2_partial": score.partial_r2,
        "intervals": score.intervals._asdict(),
        "stability": score.stability._asdict(),
        "calibration_error": score.calibration_error,
        "rmse": score.rmse,
        "block": score.block,
    }


def left_out_metrics(scores: Mapping[str, Mapping[str, Figures]]) -> dict[str, Any]:
    """By source that was left out and dimension: the figures that go into metrics.json."""
    return {
        source: {
            name: {"r2": one.r2, "spearman": one.spearman, "auroc": one.auroc.auroc}
            for name, one in by_name.items()
        }
        for source, by_name in scores.items()
    }


def steering_metrics(steered: Steered) -> dict[str, Any]:
    """Rho and slope of dose against judged sycophancy, of directions and controls; words and side effects beside."""
    curves = steered.curves
    lines = {
        _key(name, line): line
        for name, of_name in curves.items()
        for line in of_name
        if line is of_name[0] or line.kind == "random"
    }
    return {
        "dose_response_rho": {key: line.rho for key, line in lines.items()},
        "dose_response_slope": {key: line.slope for key, line in lines.items()},
        "control_slopes": {
            name: {line.kind: line.slope for line in of_name[1:] if line.kind != "random"}
            for name, of_name in curves.items()
        },
        "slope_over_largest_random": {name: _over_random(of_name) for name, of_name in curves.items()},
        "expected_sign": {name: SIGNS[name] for name in curves},
        "judged": {name: by_dose(of_name[0]) for name, of_name in curves.items()},
        "words": {name: {one.condition: plain(one) for one in some} for name, some in steered.words.items()},
        "side_effects": steered.side_effects,
    }


def range_metrics(ranges: Mapping[str, DoseRange]) -> dict[str, Any]:
    """The range of doses found for every direction; nothing where the doses were given."""
    return {"dose_range": {name: plain(one) for name, one in ranges.items()}} if ranges else {}


def by_dose(curve: Curve) -> dict[str, float]:
    """Share of the replies that could be judged, by dose."""
    return {f"{dose:g}": share for dose, share in zip(curve.doses, curve.judged, strict=True)}


def _key(name: str, line: Curve) -> str:
    """The direction's own curve under its dimension's name, a random control's with its number behind."""
    return f"{name}_{line.direction.removeprefix(f'{name}.')}" if line.kind == "random" else name


def _over_random(lines: Sequence[Curve]) -> float | None:
    """Slope of the direction in units of the steepest random control's; None without controls or with flat ones."""
    random = [abs(line.slope) for line in lines[1:] if line.kind == "random" and np.isfinite(line.slope)]
    steepest = max(random, default=0.0)
    return lines[0].slope / steepest if steepest > 1e-9 else None
