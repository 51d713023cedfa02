"""Run the real model with only some edges between neurons intact: path patching (digest 1.6, last paragraph; D8).

An edge s -> t is the direct path from neuron s to target t (a later neuron or a logit): the residual stream and all
attention in between, no other MLP. The circuit of an edge set E gives every target t an input of its own, in which

    source s writes      its value in the circuit       where s -> t is in E,
                         its reference                  where it is not,

and everything else is the real model: norms, attention patterns and gates are computed from that input, nothing is
frozen or linearised. A target's value is what the model makes of its input; sources pass it on along E alone. Token
embeddings are intact for all, as they are for circuits of nodes, so that

    all pairs of all neurons = the full model, no edge = every neuron at its reference,
    all pairs of a node set C = the pathway of C (`circuits.pathways`), exactly.

`cut=True` is the complement: the full model in which only the edges of E carry the reference.

The algorithm is one forward pass of the model. Its rows are examples times *streams*, one for every different set of
sources that some target sees (targets of one set share it). The pass is patched at each layer's neurons: read the
layer's targets, each from its own stream, then write the layer's neurons into every stream: the value just read where
the stream keeps the source, the reference where not. Earlier layers are then final when a later one reads, so one pass
does what hooks would do target by target. Cost: as many forward passes an example as there are streams; targets that
no edges lead on to a logit need none.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.edges import Neurons
from circuits.metric import Metric
from circuits.pathways import neuron_sites
from circuits.problem import read_out
from shared.errors import UserError
from shared.hooks import edit
from shared.interventions import Intervention

if TYPE_CHECKING:
    from shared.models import Model
    from shared.tokens import TokenBatch


@dataclass(frozen=True)
class EdgeSet:
    """Edges among n neurons and from them to the K targets of a metric: a mask, targets (n neurons, then K) in rows."""

    neurons: Neurons
    mask_Sn: Bool[Tensor, "S n"]

    def __len__(self) -> int:
        return int(self.mask_Sn.sum())


def causal_pairs(neurons: Neurons, positions_BK: Int[Tensor, "B K"]) -> Bool[Tensor, "S n"]:
    """Return which of all pairs can be edges: the source in an earlier layer, and not after the target's token."""
    layer_n, position_n = neurons.layer_n, neurons.position_n
    last_K = positions_BK.amax(0)
    among_nn = (layer_n < layer_n[:, None]) & (position_n <= position_n[:, None])
    return torch.cat([among_nn, position_n <= last_K[:, None]])


def run_edges(
    model: "Model",
    batch: "TokenBatch",
    metric: Metric,
    edges: EdgeSet,
    reference_BLTN: Float[Tensor, "#B L #T N"],
    *,
    cut: bool = False,
    max_tokens: int = 16384,
) -> Float[Tensor, "B K"]:
    """Return every example's targets in the circuit of an edge set, or with `cut` in the model without these edges.

    All rows of the batch have one length; `max_tokens` bounds the tokens of one forward pass where more examples than
    one are in it.
    """
    batch = batch.to(model.device)
    _check(batch, metric, edges)
    routes = _Routes.of(edges, cut)
    step = max(1, max_tokens // (len(routes.keep_Rn) * batch.input_ids_BT.shape[1]))
    parts = []
    for rows in torch.arange(len(batch)).split(step):
        reference = reference_BLTN if len(reference_BLTN) == 1 else reference_BLTN[rows]
        parts.append(_run(model, _rows(batch, rows), _metric_rows(metric, rows), edges, routes, reference))
    return torch.cat(parts)


def _check(batch: "TokenBatch", metric: Metric, edges: EdgeSet) -> None:
    if not batch.attention_mask_BT.bool().all():
        lengths = sorted(set(batch.attention_mask_BT.sum(-1).tolist()))
        raise UserError(f"edges have positions: prompts of one length, please; got lengths {lengths}")
    causal_Sn = causal_pairs(edges.neurons, metric.positions_BK)
    if edges.mask_Sn.shape != causal_Sn.shape:
        raise UserError(f"edges of shape {tuple(edges.mask_Sn.shape)}, expected {tuple(causal_Sn.shape)}")
    wrong_e2 = (edges.mask_Sn & ~causal_Sn).nonzero()
    if len(wrong_e2):
        target, source = wrong_e2[0].tolist()
        raise UserError(
            f"{len(wrong_e2)} edges lead back in layers or tokens, the first from neuron {source} to target {target}: "
            "take edges from causal_pairs"
        )


def _reaching(edges: EdgeSet) -> Bool[Tensor, " S"]:
    """Return which targets reach a logit along the edges; the values of the others are never asked for."""
    n = len(edges.neurons)
    reach_S = torch.ones_like(edges.mask_Sn[:, 0])
    reach_S[:n] = edges.mask_Sn[n:].any(0)
    for layer in edges.neurons.layer_n.unique().flip(0):
        passing_n = reach_S[:n] & (edges.neurons.layer_n == layer)
        reach_S[:n] |= edges.mask_Sn[:n][passing_n].any(0)
    return reach_S


@dataclass(frozen=True)
class _Routes:
    """Which sources each of R streams keeps, each target's stream, and (for cuts) the stream of all other neurons."""

    keep_Rn: Bool[Tensor, "R n"]
    stream_S: Int[Tensor, " S"]
    common: int | None

    @classmethod
    def of(cls, edges: EdgeSet, cut: bool) -> "_Routes":
        """Give one stream to each different set of sources; neurons that are no targets keep all of them."""
        keep_Sn = ~edges.mask_Sn if cut else edges.mask_Sn & _reaching(edges)[:, None]
        everything_1n = torch.ones_like(keep_Sn[:1])
        keep_Rn, stream_S = torch.cat([keep_Sn, everything_1n] if cut else [keep_Sn]).unique(
            dim=0, return_inverse=True
        )
        return cls(keep_Rn, stream_S[: len(keep_Sn)], int(stream_S[-1]) if cut else None)


@dataclass(eq=False)
class _Streams:
    """What the pass has found so far: the value of every target neuron, layer by layer."""

    edges: EdgeSet
    routes: _Routes
    reference_BLTN: Tensor
    value_Bn: Tensor

    def patched(self, layer: int, x_XTN: Tensor) -> Tensor:
        """Read this layer's targets, each from its own stream (rows X = B * R), and write what each stream sees."""
        routes, neurons = self.routes, self.edges.neurons
        x_BRTN = x_XTN.unflatten(0, (-1, len(routes.keep_Rn)))
        here = (neurons.layer_n == layer).nonzero()[:, 0]
        at, index = neurons.position_n[here], neurons.index_n[here]
        value_Bh = x_BRTN[:, routes.stream_S[here], at, index]
        self.value_Bn[:, here] = value_Bh
        reference_BTN = self.reference_BLTN[:, layer].to(x_XTN).expand(len(x_BRTN), *x_XTN.shape[1:])
        others_BTN = reference_BTN if routes.common is None else x_BRTN[:, routes.common]
        written_BRTN = others_BTN[:, None].repeat(1, x_BRTN.shape[1], 1, 1)
        cut_Bh = reference_BTN[:, at, index]
        keep_Rh = routes.keep_Rn[:, here]
        written_BRTN[:, :, at, index] = torch.where(keep_Rh, value_Bh[:, None], cut_Bh[:, None])
        return written_BRTN.flatten(0, 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Patch(Intervention):
    """One layer's step of the pass: all streams at once."""

    streams: _Streams
    layer: int

    def edited(self, x: Tensor) -> Tensor:
        """The layer's neurons as each stream sees them."""
        return self.streams.patched(self.layer, x)


def _run(
    model: "Model",
    batch: "TokenBatch",
    metric: Metric,
    edges: EdgeSet,
    routes: _Routes,
    reference_BLTN: Tensor,
) -> Float[Tensor, "B K"]:
    n_rows, n_streams = len(batch), len(routes.keep_Rn)
    value_Bn = torch.zeros(n_rows, len(edges.neurons), dtype=model.dtype, device=model.device)
    streams = _Streams(edges, routes, reference_BLTN, value_Bn)
    patches = [_Patch(site, streams=streams, layer=layer) for layer, site in enumerate(neuron_sites(model))]
    repeated = _rows(batch, torch.arange(n_rows).repeat_interleave(n_streams))
    with torch.no_grad(), edit(model, patches):
        seen, read_XSX = read_out(model, repeated, metric)
    stream_K = routes.stream_S[len(edges.neurons) :]
    read_BRSX = read_XSX.unflatten(0, (n_rows, n_streams))
    columns = [seen.value(read_BRSX[:, stream])[:, target] for target, stream in enumerate(stream_K.tolist())]
    return torch.stack(columns, dim=1)


def _rows(batch: "TokenBatch", rows: Tensor) -> "TokenBatch":
    from shared.tokens import TokenBatch

    rows = rows.to(batch.input_ids_BT.device)
    names = ("input_ids_BT", "attention_mask_BT", "position_ids_BT", "prompt_lengths_B")
    return TokenBatch(**{name: getattr(batch, name)[rows] for name in names})


def _metric_rows(metric: Metric, rows: Tensor) -> Metric:
    tokens = tuple(metric.tokens[row] for row in rows.tolist())
    return replace(
        metric, weights_BKV=metric.weights_BKV[rows], positions_BK=metric.positions_BK[rows], tokens=tokens
    )
