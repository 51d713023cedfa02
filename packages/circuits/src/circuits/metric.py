"""What a circuit explains: read-outs of the logits, or of the residual stream, at chosen positions (paper section 3.1).

A metric holds, for each example, K targets: weights over the vocabulary (or over the width of a residual site) and the
position they read. A logit difference has two non-zero weights; a demeaned logit subtracts 1/V everywhere, which makes
it independent of the free constant that logits have; a direction weighs the residual stream itself. `Metric.value` is
differentiable, so that every estimator shares one definition.

A log-probability is not linear in the logits. `weights` are then its derivative at the observed logits, one_hot - p,
and what they leave is the entropy of p:   log p(t) = sum_v weights_v logit_v - H(p).   `Metric.rest` is that constant,
which the ledger shows as a source of its own.

Shape letters: B batch, K targets, T token, V vocabulary (or the width D, for a direction).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.layers import working
from shared.errors import UserError

LOGITS = "logits"


class MetricError(UserError):
    """The targets do not fit the batch or the tokenizer."""


@dataclass(frozen=True)
class Metric:
    """K read-outs for each of B examples: weights, position read, and the token of each target.

    `site` says what is read: the logits, `final_norm` (input of the unembedding) or `blocks.L.output`. `name` says it
    in words and is reported with every result. Weights are kept in working precision, whatever the model's.
    """

    name: str
    weights_BKV: Float[Tensor, "B K V"]
    positions_BK: Int[Tensor, "B K"]
    tokens: tuple[tuple[int, ...], ...]
    site: str = LOGITS

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights_BKV", working(self.weights_BKV))

    def gather(self, x_BTX: Float[Tensor, "B T X"]) -> Float[Tensor, "B K X"]:
        """Return the rows of x at the positions read."""
        return x_BTX.gather(1, self.positions_BK[..., None].expand(-1, -1, x_BTX.shape[-1]))

    def value(self, read_BTV: Float[Tensor, "B T V"]) -> Float[Tensor, "B K"]:
        """Return the value of every target from the tensor at the metric's site (the logits)."""
        return (self.gather(read_BTV) * self.weights_BKV).sum(-1)

    def rest(self, read_BTV: Float[Tensor, "B T V"]) -> Float[Tensor, "B K"]:
        """Return the part of the value that is no weighted sum of what is read: zero for a linear metric."""
        return torch.zeros_like(self.value(read_BTV))

    def row(self, index: int, keep: Int[Tensor, " S"]) -> "Metric":
        """Return the metric of one example whose positions `keep` (increasing) are kept."""
        one = slice(index, index + 1)
        positions_BK = torch.searchsorted(keep, self.positions_BK[one].contiguous())
        return replace(
            self,
            weights_BKV=self.weights_BKV[one],
            positions_BK=positions_BK,
            tokens=self.tokens[index : index + 1],
        )

    def needed(self) -> "Metric":
        """Return the metric of one example without the empty targets that another example's number gave it."""
        named = slice(len(self.tokens[0]) or None)  # directions have no tokens
        return replace(self, weights_BKV=self.weights_BKV[:, named], positions_BK=self.positions_BK[:, named])

    def repeated(self, index: int, times: int) -> "Metric":
        """Return the metric of one example, `times` over."""
        return replace(
            self,
            weights_BKV=self.weights_BKV[index].expand(times, -1, -1),
            positions_BK=self.positions_BK[index].expand(times, -1),
            tokens=(self.tokens[index],) * times,
        )


@dataclass(frozen=True)
class LogProbability(Metric):
    """The log-probability of one token a target; `weights_BKV` is its derivative by the logits."""

    def value(self, read_BTV: Float[Tensor, "B T V"]) -> Float[Tensor, "B K"]:
        """Return log p of every target's token."""
        ids_BK = torch.tensor(self.tokens, device=read_BTV.device)
        rows_BKV = self.gather(read_BTV).to(self.weights_BKV)
        return rows_BKV.log_softmax(-1).gather(-1, ids_BK[..., None])[..., 0]

    def rest(self, read_BTV: Float[Tensor, "B T V"]) -> Float[Tensor, "B K"]:
        """Return log p less its linear part, at the observed logits: minus the entropy."""
        return self.value(read_BTV) - super().value(read_BTV)


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
    ids_BK = _ids(tokens, logits_BTV)
    weights_BKV = working(torch.nn.functional.one_hot(ids_BK, logits_BTV.shape[-1]).to(logits_BTV.dtype))
    if demean:
        weights_BKV = weights_BKV - 1 / logits_BTV.shape[-1]
    name = "demeaned logit" if demean else "logit"
    return Metric(name, weights_BKV, _expand(positions_B, ids_BK.shape[1]), _rows(tokens))


def log_probability(
    logits_BTV: Float[Tensor, "B T V"], positions_B: Int[Tensor, " B"], tokens: Sequence[Sequence[int]]
) -> LogProbability:
    """Return the log-probabilities of K tokens an example."""
    ids_BK = _ids(tokens, logits_BTV)
    rows_BV = working(logits_BTV[torch.arange(len(positions_B), device=logits_BTV.device), positions_B])
    chosen_BKV = torch.nn.functional.one_hot(ids_BK, logits_BTV.shape[-1]).to(rows_BV.dtype)
    weights_BKV = chosen_BKV - rows_BV.softmax(-1)[:, None]
    return LogProbability(
        "log-probability", weights_BKV, _expand(positions_B, ids_BK.shape[1]), _rows(tokens)
    )


def top_logits(
    logits_BTV: Float[Tensor, "B T V"],
    positions_B: Int[Tensor, " B"],
    k: int = 5,
    demean: bool = True,
    mass: float | None = None,
) -> Metric:
    """Return the k largest logits at each row's position as k targets.

    With `mass`, only as many of them as reach that probability together (circuit-tracer: 10 and .95); a row that needs
    fewer than another has targets of weight zero, without a token, at its end.
    """
    rows_BV = logits_BTV[torch.arange(len(positions_B), device=logits_BTV.device), positions_B]
    ids_BK = rows_BV.topk(min(k, rows_BV.shape[-1]), dim=-1).indices
    if mass is None:
        return token_logits(logits_BTV, positions_B, ids_BK.tolist(), demean)
    if not 0 < mass <= 1:
        raise MetricError(f"mass is a probability above 0 and at most 1, got {mass}")
    share_BK = rows_BV.softmax(-1).gather(-1, ids_BK)
    needed_BK = share_BK.cumsum(-1) - share_BK < mass
    counts = needed_BK.sum(-1).tolist()
    metric = token_logits(logits_BTV, positions_B, ids_BK[:, : max(counts)].tolist(), demean)
    kept = tuple(row[:count] for row, count in zip(metric.tokens, counts, strict=True))
    weights_BKV = metric.weights_BKV * needed_BK[:, : max(counts), None]
    return replace(metric, weights_BKV=weights_BKV, tokens=kept)


def direction(
    vectors_KD: Float[Tensor, "K D"], positions_B: Int[Tensor, " B"], site: str = "final_norm"
) -> Metric:
    """Return the residual stream's components along K directions, at `final_norm` or a `blocks.L.output`."""
    if site != "final_norm" and not site.endswith(".output"):
        raise MetricError(f"a direction is read at final_norm or at a blocks.L.output, not at {site!r}")
    weights_BKV = vectors_KD.expand(len(positions_B), -1, -1)
    positions_BK = _expand(positions_B, len(vectors_KD))
    return Metric(f"direction at {site}", weights_BKV, positions_BK, ((),) * len(positions_B), site)


def _ids(tokens: Sequence[Sequence[int]], logits_BTV: Tensor) -> Int[Tensor, "B K"]:
    if len({len(row) for row in tokens}) != 1:
        raise MetricError(
            "every example needs the same number of target tokens; pad the shorter lists or split"
        )
    return torch.tensor([list(row) for row in tokens], device=logits_BTV.device)


def _rows(tokens: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(token) for token in row) for row in tokens)
