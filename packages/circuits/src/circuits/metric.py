"""What a circuit explains: one or more linear read-outs of the logits at chosen positions (paper section 3.1).

A metric holds, for each example, K targets: weights over the vocabulary and the position they read. A logit
difference has two non-zero weights; a demeaned logit subtracts 1/V everywhere, which makes it independent of the free
constant that logits have. `Metric.value` is differentiable, so that every estimator shares one definition.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shared.errors import UserError


class MetricError(UserError):
    """The targets do not fit the batch or the tokenizer."""


@dataclass(frozen=True)
class Metric:
    """K read-outs for each of B examples: weights over the vocabulary, position read, and a name for each target."""

    name: str
    weights_BKV: Float[Tensor, "B K V"]
    positions_BK: Int[Tensor, "B K"]
    tokens: tuple[tuple[int, ...], ...]

    def gather(self, x_BTX: Float[Tensor, "B T X"]) -> Float[Tensor, "B K X"]:
        """Return the rows of x at the positions read."""
        return x_BTX.gather(1, self.positions_BK[..., None].expand(-1, -1, x_BTX.shape[-1]))

    def value(self, logits_BTV: Float[Tensor, "B T V"]) -> Float[Tensor, "B K"]:
        """Return the value of every target."""
        return (self.gather(logits_BTV) * self.weights_BKV).sum(-1)

    def row(self, index: int, keep: Int[Tensor, " S"]) -> "Metric":
        """Return the metric of one example whose positions `keep` (increasing) are kept."""
        one = slice(index, index + 1)
        positions_BK = torch.searchsorted(keep, self.positions_BK[one].contiguous())
        return Metric(self.name, self.weights_BKV[one], positions_BK, self.tokens[index : index + 1])


def _expand(positions_B: Tensor, n_targets: int) -> Tensor:
    return positions_B[:, None].expand(-1, n_targets).contiguous()


def logit_difference(
    logits_BTV: Float[Tensor, "B T V"],
    positions_B: Int[Tensor, " B"],
    answers: Sequence[int],
    wrongs: Sequence[int],
) -> Metric:
    """Return logit(answer) - logit(wrong) at each row's position: one target an example."""
    weights_BKV = logits_BTV.new_zeros(len(answers), 1, logits_BTV.shape[-1])
    for row, (answer, wrong) in enumerate(zip(answers, wrongs, strict=True)):
        weights_BKV[row, 0, answer] += 1
        weights_BKV[row, 0, wrong] -= 1
    tokens = tuple((answer,) for answer in answers)
    return Metric("logit difference", weights_BKV, _expand(positions_B, 1), tokens)


def token_logits(
    logits_BTV: Float[Tensor, "B T V"],
    positions_B: Int[Tensor, " B"],
    tokens: Sequence[Sequence[int]],
    demean: bool = True,
) -> Metric:
    """Return the logits of K tokens an example, less the mean logit where `demean` (shift-invariant)."""
    if len({len(row) for row in tokens}) != 1:
        raise MetricError(
            "every example needs the same number of target tokens; pad the shorter lists or split"
        )
    ids_BK = torch.tensor([list(row) for row in tokens], device=logits_BTV.device)
    weights_BKV = torch.nn.functional.one_hot(ids_BK, logits_BTV.shape[-1]).to(logits_BTV.dtype)
    if demean:
        weights_BKV = weights_BKV - 1 / logits_BTV.shape[-1]
    name = "demeaned logit" if demean else "logit"
    rows = tuple(tuple(int(token) for token in row) for row in tokens)
    return Metric(name, weights_BKV, _expand(positions_B, ids_BK.shape[1]), rows)


def top_logits(
    logits_BTV: Float[Tensor, "B T V"], positions_B: Int[Tensor, " B"], k: int = 5, demean: bool = True
) -> Metric:
    """Return the k largest logits at each row's position as k targets."""
    rows_BV = logits_BTV[torch.arange(len(positions_B), device=logits_BTV.device), positions_B]
    return token_logits(logits_BTV, positions_B, rows_BV.topk(k, dim=-1).indices.tolist(), demean)
