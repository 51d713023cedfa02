"""Rung C: what the study measures on an embedded model, beside the truth that was planted in it.

1. Elicitation: the scores it states, and the expected ones of its digits, against the posterior mean: R2 by dimension.
2. Steering at the planted block: the true directions, the probes' and the pattern directions, and random ones, all
   pushed by SCALE delta along unit vectors, delta from -0.6 to 0.6. Slopes of the re-elicited scores per unit delta
   (`closure`); and the probes' and bisectors that labels without the noise of stated ones give, expected scores;
   ideal is the generator's own, below 1 because latents are clipped to [0, 1].
3. Replies: the probability of every outcome's high form against the rule, and its change under steering against the
   sign of the rule's weight, wherever that is not zero.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from assumptions.chats import Chat
from assumptions.closure import Closure, close, closure_figures
from assumptions.control import directions_by_block
from assumptions.dimensions import NAMES
from assumptions.directions import Ground
from assumptions.forced import forced_scores
from assumptions.instruments import instrument
from assumptions.steered import Grounds
from assumptions.steering import Direction, Fitted, random_directions
from shared.models import Model
from shared.tinyworld import EMBEDDED, social
from shared.tinyworld.examiner import Examiner

DELTAS = (-0.6, -0.3, 0.0, 0.3, 0.6)
RANDOM = 5  # random directions of every dimension
FITTED = ("ridge", "pattern", "ridge_expected", "bisector_expected")


@dataclass(frozen=True)
class Planted:
    """What was planted: unit directions in the order of NAMES, the block whose output holds them, their scale."""

    directions_KD: Float[Tensor, "K D"]
    block: int
    scale: float

    def directions(self, ground: Ground) -> list[Direction]:
        """The true directions; a `raw` dose of scale times delta shifts a latent by delta."""
        return [
            ground.direction(f"{name}.planted", name, "planted", vector_D)
            for name, vector_D in zip(NAMES, self.directions_KD, strict=True)
        ]


def planted_in(name: str) -> Planted:
    """What was planted in an embedded model, by the name that loads it."""
    from safetensors import safe_open

    with safe_open(EMBEDDED[name] / "planted/directions.safetensors", framework="pt") as file:
        directions_9D, meta = file.get_tensor("directions"), file.metadata()
    order = [social.DIMENSIONS.index(dimension) for dimension in NAMES]
    return Planted(directions_9D[order].double(), int(meta["block"]), float(meta["scale"]))


def r2_by_dimension(scores_BK: Float[ndarray, "B K"], truth_BK: Float[ndarray, "B K"]) -> dict[str, float]:
    """1 - squared error over variance, of every dimension; rows with a missing score are left out."""
    known = np.isfinite(scores_BK).all(1)
    error_K = ((scores_BK - truth_BK)[known] ** 2).sum(0)
    total_K = ((truth_BK[known] - truth_BK[known].mean(0)) ** 2).sum(0)
    return dict(zip(NAMES, (1 - error_K / total_K).tolist(), strict=True))


def steer_and_ask(
    model: Model,
    planted: Planted,
    families: Mapping[str, Sequence[Direction]],
    chats: Sequence[Chat],
    progress: Callable[[Sequence[Direction]], Iterable[Direction]] = iter,
) -> dict[str, Closure]:
    """The closure of every kind of direction, on all chats, doses in units of delta."""
    asked = instrument("tinyworld_nine")

    def scores_under(edits: Any) -> Float[ndarray, "B K"]:
        return forced_scores(model, asked, chats, edits)

    return {
        kind: close(
            [replace(one, projection_sd=planted.scale) for one in directions],
            DELTAS,
            scores_under,
            NAMES,
            progress=progress,
        )
        for kind, directions in families.items()
    }


def truth_families(planted: Planted, grounds: Grounds, seed: int = 0) -> dict[str, list[Direction]]:
    """The four kinds of direction at the planted block: true, the probes', the patterns', and `RANDOM` beside each."""
    ground = Ground.of(grounds.features, grounds.split.train, planted.block)
    true = planted.directions(ground)
    return {
        "true": true,
        "ridge": fitted_directions(planted, grounds, "probe"),
        "pattern": fitted_directions(planted, grounds, "pattern"),
        "random": [control for one in true for control in random_directions(one, RANDOM, seed)],
    }


def fitted_directions(planted: Planted, grounds: Grounds, kind: Fitted) -> list[Direction]:
    """The directions that the labels of `grounds` give at the planted block, one a dimension."""
    found = []
    for name in NAMES:
        found += directions_by_block(
            grounds.features, grounds.labels_BK, grounds.probes, grounds.split, name, [planted.block], kind
        )
    return found


def truth_of(
    model: Model,
    name: str,
    grounds: Grounds,
    stated_BK: Float[ndarray, "B K"],
    posterior_BK: Float[ndarray, "B K"],
    count: int,
    progress: Callable[[Sequence[Direction]], Iterable[Direction]] = iter,
) -> dict[str, Any]:
    """All figures of rung C; reading on the test messages, steering on the first `count` of them.

    `stated_BK` and `posterior_BK` are the elicited scores and the posterior means of the rows of `grounds`.
    """
    planted, test = planted_in(name), grounds.split.test
    chats = [grounds.chats[i] for i in test]
    expected_BK = forced_scores(model, instrument("tinyworld_nine"), grounds.chats)
    families = truth_families(planted, grounds)
    relabelled = replace(grounds, labels_BK=torch.from_numpy(expected_BK).clamp(0, 1))
    families["ridge_expected"] = fitted_directions(planted, relabelled, "probe")
    families["bisector_expected"] = fitted_directions(planted, relabelled, "bisector")
    closures = steer_and_ask(model, planted, families, chats[:count], progress)
    return {
        "block": planted.block,
        "elicited_r2": r2_by_dimension(expected_BK[test], posterior_BK[test]),
        "stated_r2": r2_by_dimension(stated_BK[test], posterior_BK[test]),
        "reply": reply_figures(model, planted, families, chats[:count]),
        "steering": truth_figures(closures, chats[:count]),
    }


def truth_figures(closures: dict[str, Closure], chats: Sequence[Chat]) -> dict[str, Any]:
    """Slopes by kind and dimension, shares of the true slope, and the generator's own slope as ideal."""
    figures: dict[str, Any] = {kind: closure_figures(one) for kind, one in closures.items()}
    true = figures["true"]["slope"]
    for kind in (name for name in FITTED if name in figures):
        slopes, mean = figures[kind]["slope"], figures[kind]["slope_mean"]
        figures[kind] |= {"of_true": {name: slope / true[name] for name, slope in slopes.items()}}
        figures[kind] |= {"of_true_mean": mean / figures["true"]["slope_mean"]}
    figures["random"] = random_figures(closures["random"])
    return figures | {"ideal_slope": ideal_slope(chats)}


def random_figures(closure: Closure) -> dict[str, Any]:
    """Slopes of random directions: mean and largest of all; by dimension the largest on its own score and on any."""
    matrix, of = closure.matrix, np.array(closure.targets)
    own = {name: np.abs(matrix[of == name, closure.dimensions.index(name)]) for name in closure.targets}
    return {
        "slope_mean": float(matrix.mean()),
        "slope_largest": float(np.abs(matrix).max()),
        "on_target_largest": {name: float(slopes.max()) for name, slopes in own.items()},
        "any_largest": {name: float(np.abs(matrix[of == name]).max()) for name in own},
    }


def ideal_slope(chats: Sequence[Chat]) -> float:
    """Slope of the generator's own expected score on delta over these messages, mean over dimensions."""
    counts = np.stack([social.read_counts(chat.turn) for chat in chats])
    means = [(social.score_probabilities(counts, np.full(9, delta)) @ social.GRID).mean() for delta in DELTAS]
    return float(np.polyfit(DELTAS, means, 1)[0])


def reply_figures(
    model: Model,
    planted: Planted,
    families: Mapping[str, Sequence[Direction]],
    chats: Sequence[Chat],
    delta: float = 0.6,
) -> dict[str, Any]:
    """Correlation of reply probabilities with the rule by outcome, and the share of right signs under steering."""
    turns = [_turn(chat.turn) for chat in chats]
    examiner = Examiner(
        model.hf, model.tokenizer, planted.directions_KD.float(), planted.block, planted.scale
    )
    given = examiner.reply_expectations(turns)
    rule = social.expected_reply_probabilities(np.stack([turn.counts_9 for turn in turns]))
    found: dict[str, Any] = {
        "correlation": {
            outcome: float(np.corrcoef(given[:, i], rule[:, i])[0, 1])
            for i, outcome in enumerate(social.OUTCOMES)
        }
    }
    for kind in ("true", "ridge", "pattern"):
        right, wanted = 0, 0
        for direction in families[kind]:
            weights_3 = social.WEIGHTS[:, social.DIMENSIONS.index(direction.dimension)]
            push_D = (planted.scale * delta * direction.unit_D).float()
            change_3 = (
                examiner.reply_expectations(turns, push_D) - examiner.reply_expectations(turns, -push_D)
            ).mean(0)
            right += int((np.sign(change_3) == np.sign(weights_3))[weights_3 != 0].sum())
            wanted += int((weights_3 != 0).sum())
        found[f"right_sign_{kind}"] = right / wanted
    return found


def _turn(text: str) -> social.UserTurn:
    """A message as the generator's type, its latents unknown."""
    counts = social.read_counts(text)
    topic = text.removeprefix("About my ").partition(":")[0]
    return social.UserTurn(text, topic, np.full(9, np.nan), counts, social.posterior_mean(counts))
