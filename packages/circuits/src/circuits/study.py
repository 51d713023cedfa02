"""A circuit over a data set: scores averaged over training pairs, then judged on test pairs (paper section 4).

1. Training and test pairs of one task and one length, about different things (`circuits.tasks.draw`); the reference is
   every neuron's mean over the counterfactual prompts of the training pairs, for each position (or zero).
2. A node's score is its signed mean over the training examples: examples where it is absent count as zero.
3. Circuits are the top k nodes by absolute mean score; faithfulness and completeness are taken on the test pairs. The
   size that reaches a target is found on the training pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.attribution import Problem, attribute, pose
from circuits.edge_circuits import edge_curve
from circuits.edges import Neurons
from circuits.faithfulness import CurvePoint, curve, evaluate, smallest_size
from circuits.metric import Metric, logit_difference
from circuits.pathways import REFERENCES, make_reference
from circuits.relp import relp
from circuits.rules import Rules
from circuits.tasks import Example, PairBatch, collate

if TYPE_CHECKING:
    from shared.models import Model


@dataclass(frozen=True)
class Study:
    """One task on one model: the two halves of the data and what ablated nodes are set to."""

    model: "Model"
    name: str
    train: PairBatch
    test: PairBatch
    reference_BLTN: Float[Tensor, "1 L #T N"]

    @property
    def length(self) -> int:
        """Tokens of every prompt."""
        return self.train.clean.input_ids_BT.shape[1]


def first_pairs(study: Study, n: int) -> Study:
    """Return the study with the first n pairs of both halves and the same reference, for what is costly."""
    train, test = (collate(study.model, half.examples[:n]) for half in (study.train, study.test))
    return replace(study, train=train, test=test)


def make_study(
    model: "Model", name: str, train: Sequence[Example], test: Sequence[Example], reference: str = "mean"
) -> Study:
    """Encode both halves (of one length) and take the reference from the training half."""
    train_batch, test_batch = collate(model, train), collate(model, test)
    reference_BLTN = make_reference(model, reference, train_batch.corrupt)
    return Study(model, name, train_batch, test_batch, reference_BLTN)


def pair_metric(study: Study, pairs: PairBatch) -> Metric:
    """Return the pairs' metric: the difference of the two answers' logits at each clean prompt's last token."""
    empty_V = torch.zeros(
        study.model.architecture.vocab_size, dtype=study.model.dtype, device=study.model.device
    )
    logits_BTV = empty_V.expand(len(pairs), 1, -1)  # a logit difference needs their shape and type only
    return logit_difference(
        logits_BTV, pairs.clean.last_columns_B.to(empty_V.device), pairs.answers, pairs.wrongs
    )


def pose_pairs(study: Study, pairs: PairBatch, rules: Rules | None = None) -> Problem:
    """State the attribution problem of a batch of pairs: their logit differences, against the study's reference."""

    def make_metric(logits_BTV: Tensor, positions_B: Tensor) -> Metric:
        return pair_metric(study, pairs)

    return pose(study.model, pairs.clean, make_metric, study.reference_BLTN, rules)


def conservation_error(problem: Problem) -> float:
    """Return the worst conservation error of the problem's examples (digest I1)."""
    return relp(problem.network, problem.metric).ledger.error()


def mean_scores(problem: Problem, estimator: str, seed: int = 0) -> Float[Tensor, "L T N"]:
    """Return each node's signed mean score over the problem's examples."""
    return attribute(problem, estimator, seed)[:, 0].mean(0)


def held_out_curve(
    study: Study, scores_LTN: Float[Tensor, "L T N"], sizes: Sequence[int]
) -> list[CurvePoint]:
    """Return the values of the top-k circuits of one ranking on the test pairs."""
    return _curve(study, study.test, scores_LTN, sizes)


def size_on_training(
    study: Study, scores_LTN: Float[Tensor, "L T N"], sizes: Sequence[int], target: float
) -> int | None:
    """Return the smallest size whose circuit reaches the target faithfulness on the training pairs, None if none does.

    Its test value is then no choice made on test pairs.
    """
    return smallest_size(_curve(study, study.train, scores_LTN, sizes), target)


def _curve(
    study: Study, pairs: PairBatch, scores_LTN: Float[Tensor, "L T N"], sizes: Sequence[int]
) -> list[CurvePoint]:
    metric, clean = pair_metric(study, pairs), pairs.clean
    points = curve(study.model, clean, metric, scores_LTN[None], sizes, study.reference_BLTN)
    return [replace(point, clusters=pairs.clusters) for point in points]


def under_every_reference(
    study: Study, keep_LTN: Bool[Tensor, "L T N"], seed: int = 0
) -> dict[str, CurvePoint]:
    """Return one circuit's values on the test pairs with the other nodes at mean, zero, or resampled activations."""
    test, metric, points = study.test, pair_metric(study, study.test), {}
    for kind in REFERENCES:
        reference_BLTN = make_reference(study.model, kind, study.train.corrupt, len(test), seed)
        (point,) = evaluate(study.model, test.clean, metric, [keep_LTN[None]], reference_BLTN)
        points[kind] = replace(point, clusters=test.clusters)
    return points


def held_out_edge_curve(
    study: Study, neurons: Neurons, scores_Sn: Float[Tensor, "S n"], sizes: Sequence[int]
) -> list[CurvePoint]:
    """Return the values of the top-k edges of one ranking on the test pairs, by path patching."""
    metric, test = pair_metric(study, study.test), study.test
    points = edge_curve(study.model, test.clean, metric, neurons, scores_Sn, sizes, study.reference_BLTN)
    return [replace(point, clusters=test.clusters) for point in points]


Curves = Mapping[str, list[CurvePoint]]


def by_size(curves: Curves, kind: str) -> dict[str, dict[str, float]]:
    """Return every curve's faithfulness or completeness (`kind`) by size."""
    return {
        name: {str(p.size): getattr(p, kind)().estimate for p in points} for name, points in curves.items()
    }


def intervals_by_size(curves: Curves, kind: str) -> dict[str, dict[str, list[float]]]:
    """Return every curve's 95 % intervals by size."""
    return {
        name: {str(p.size): list(getattr(p, kind)()[1:]) for p in points} for name, points in curves.items()
    }
