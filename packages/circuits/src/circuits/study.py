"""A circuit over a data set: scores averaged over training pairs, then judged on test pairs (paper section 4).

1. Training and test pairs of one task and one length; the reference is every neuron's mean over the counterfactual
   prompts of the training pairs, for each position (or zero).
2. A node's score is its signed mean over the training examples: examples where it is absent count as zero.
3. Circuits are the top k nodes by absolute mean score; faithfulness and completeness are taken on the test pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attribution import Problem, attribute, pose
from circuits.faithfulness import CurvePoint, curve
from circuits.metric import Metric, logit_difference
from circuits.pathways import mean_reference, zero_reference
from circuits.relp import relp
from circuits.rules import Rules
from circuits.tasks import PairBatch, collate, common_length, equal_lengths
from shared.tinyworld.tasks import Pair

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


def make_study(
    model: "Model", name: str, train: Sequence[Pair], test: Sequence[Pair], reference: str = "mean"
) -> Study:
    """Encode both halves at one length and take the reference from the training half.

    The length is the training half's most frequent one among those that the test half has too.
    """
    length = common_length(equal_lengths(model, train), equal_lengths(model, test))
    train_batch, test_batch = collate(model, train, length), collate(model, test, length)
    if reference == "zero":
        return Study(model, name, train_batch, test_batch, zero_reference(model))
    return Study(model, name, train_batch, test_batch, mean_reference(model, train_batch.corrupt))


def pose_pairs(study: Study, pairs: PairBatch, rules: Rules | None = None) -> Problem:
    """State the attribution problem of a batch of pairs: their logit differences, against the study's reference."""

    def make_metric(logits_BTV: Tensor, positions_B: Tensor) -> Metric:
        return logit_difference(logits_BTV, positions_B, pairs.answers, pairs.wrongs)

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
    batch = study.test
    empty_V = torch.zeros(
        study.model.architecture.vocab_size, dtype=study.model.dtype, device=study.model.device
    )
    logits_BTV = empty_V.expand(len(batch), 1, -1)  # a logit difference needs their shape and type only
    metric = logit_difference(logits_BTV, batch.clean.last_columns_B, batch.answers, batch.wrongs)
    return curve(study.model, batch.clean, metric, scores_LTN[None], sizes, study.reference_BLTN)
