"""Why does a head look there? The score of one query on one key, as a target of attribution (optional, digest 7).

RelP holds attention patterns, so nothing else explains them. Before the softmax (and the soft cap) a score is

    S = scale <R_q N_q(W_q n(x_q) + b_q), R_k N_k(W_k n(x_k) + b_k)>

with n the block's norm, N the norms of queries and keys where there are any, R the rotary embedding. With the norms
frozen it is linear in the residual stream at the query's position for a given key, and linear in the stream at the
key's position for a given query: two directions of the stream that enters the block. Each is an ordinary metric
(`circuits.metric.direction`), so `relp` and its ledger attribute it to neurons, tokens and biases, and either side's
sum is S less what its own projection's bias gives.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.layers import optional, working
from circuits.linearize import Observed, frozen_norm, heads_of, observe, rotated
from circuits.metric import Metric, MetricError, direction

if TYPE_CHECKING:
    from circuits.frozen import FrozenNetwork
    from shared.models import Model
    from shared.tokens import TokenBatch


class AttentionEdge(NamedTuple):
    """One head of one block (1 or above), the column of the token that looks, and of the token it looks at."""

    layer: int
    head: int
    query: int
    key: int


@dataclass(frozen=True)
class Reason:
    """One side of a score: its direction in the residual stream, and what the projection's bias adds to it."""

    metric: Metric
    constant: float


@dataclass(frozen=True)
class AttentionReasons:
    """A score before softmax and cap, the pattern's weight, and the two sides that explain the score."""

    score: float
    weight: float
    query: Reason
    key: Reason


def attention_reasons(
    model: "Model", batch: "TokenBatch", network: "FrozenNetwork", edge: AttentionEdge
) -> AttentionReasons:
    """Return the score of one attention edge of a batch with one row, and the metrics that explain it.

    `network` is the batch's frozen network; `relp(network, reasons.query.metric)` attributes the query's side.
    """
    _check(model, network, edge)
    observed, attention = observe(model, batch), network.blocks[edge.layer].attention
    group = edge.head // attention.groups
    query_d = attention.query_BHTd[0, edge.head, edge.query]
    key_d = attention.key_BGTd[0, group, edge.key]
    sides = {}
    for kind, row, column, other_d in (
        ("q", edge.head, edge.query, key_d),
        ("k", group, edge.key, query_d),
    ):
        pull_d = _pull(model, observed, edge.layer, kind, row, column, attention.scaling * other_d)
        sides[kind] = _reason(model, network, edge.layer, kind, row, column, pull_d)
    return AttentionReasons(
        score=float(attention.scaling * query_d @ key_d),
        weight=float(attention.pattern(edge.query, edge.query + 1)[0, edge.head, 0, edge.key]),
        query=sides["q"],
        key=sides["k"],
    )


def _check(model: "Model", network: "FrozenNetwork", edge: AttentionEdge) -> None:
    n_rows, n_columns = network.real_BT.shape
    fits = 1 <= edge.layer < len(network.blocks) and 0 <= edge.head < model.architecture.n_heads
    if n_rows != 1 or not fits or not 0 <= edge.key <= edge.query < n_columns:
        raise MetricError(
            f"{edge} is no attention edge of one prompt of {n_columns} tokens: layer 1 to {len(network.blocks) - 1} "
            f"(block 0 reads the embeddings alone), head below {model.architecture.n_heads}, key at or before query"
        )


def _pull(
    model: "Model", observed: Observed, layer: int, kind: str, row: int, column: int, other_d: Tensor
) -> Float[Tensor, " X"]:
    """Return the derivative of the score by the raw projection at its column, norms of queries and keys frozen."""
    raw_BTX = observed.acts[f"blocks.{layer}.{kind}"]
    normed_BTHd = heads_of(model, layer, kind, raw_BTX).detach().requires_grad_()
    with torch.enable_grad():  # the rotary embedding is linear: its transpose, by the model's own code
        turned_BHTd, _ = rotated(model, observed.batch, layer, normed_BTHd, normed_BTHd)
        [pull_BTHd] = torch.autograd.grad((turned_BHTd[0, row, column] * other_d).sum(), normed_BTHd)
    view = getattr(model.architecture.block(layer), f"{kind}_norm")
    raw_BTHd, pull_THd = raw_BTX.unflatten(-1, normed_BTHd.shape[2:]), pull_BTHd[0]
    if view is None:
        return pull_THd[column].flatten()
    if view.gain.numel() == raw_BTX.shape[-1]:  # over all heads together
        norm = frozen_norm(view, raw_BTX, normed_BTHd.detach().flatten(2))
        return norm.transpose(pull_BTHd.flatten(2)[:, None])[0, 0, column]
    norm = frozen_norm(view, raw_BTHd[0], normed_BTHd.detach()[0])
    return (pull_THd * norm.scale_BTD)[column].flatten()


def _reason(
    model: "Model", network: "FrozenNetwork", layer: int, kind: str, row: int, column: int, pull_X: Tensor
) -> Reason:
    """Pull the derivative through the projection and the frozen norm: a direction of the stream below the block."""
    view, norm = network.blocks[layer].weights.view, network.blocks[layer].attn_norm
    weight_XD, bias_X = working(getattr(view, f"W_{kind}")), optional(getattr(view, f"b_{kind}"))
    read_D = pull_X @ weight_XD
    at = torch.tensor([column], device=read_D.device)
    constant = 0.0 if bias_X is None else float(pull_X @ bias_X)
    constant += 0.0 if norm.shift_D is None else float(read_D @ norm.shift_D)
    stream_D = norm.select(slice(0, 1), at).transpose(read_D[None, None, None])[0, 0, 0]
    return Reason(direction(stream_D[None], at, f"blocks.{layer - 1}.output"), constant)
