"""What is to be explained: a batch at its observed point, the metric, the node basis, and what nodes are compared with.

`pose` runs the model once. The reference of a node is zero unless one is given: a mean over counterfactual prompts for
each position (`circuits.pathways.mean_reference`), or the node's value in a paired prompt
(`circuits.pathways.node_activations`). Estimators that move the inputs need a reference of the embeddings too: the
same functions with the basis "embeddings".
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.bases import NEURONS, Basis, basis_named
from circuits.frozen import FrozenNetwork
from circuits.linearize import Observed, freeze, observe
from circuits.memory import require_memory
from circuits.metric import LOGITS, Metric
from circuits.pathways import zero_reference
from circuits.rules import Rules
from shared.errors import UserError
from shared.hooks import capture

if TYPE_CHECKING:
    from shared.models import Model
    from shared.tokens import TokenBatch

MakeMetric = Callable[[Float[Tensor, "B T V"], Int[Tensor, " B"]], Metric]


@dataclass(frozen=True)
class Problem:
    """A batch at its observed point, the metric, the node basis and the references (X: the basis's coordinates).

    `activations_BLTN` and `reference_BLTN` hold coordinates: as many as nodes, except in the bases heads and
    embeddings, where a node is several.
    """

    model: "Model"
    batch: "TokenBatch"
    metric: Metric
    network: FrozenNetwork
    activations_BLTN: Float[Tensor, "B L T X"]
    reference_BLTN: Float[Tensor, "#B L #T X"]
    basis: Basis = NEURONS
    embed_reference_BTD: Float[Tensor, "#B #T D"] | None = None

    @property
    def delta_BLTN(self) -> Float[Tensor, "B L T X"]:
        """Activation minus reference by coordinate, zero at padding."""
        return self._real(self.activations_BLTN - self.reference_BLTN)

    @property
    def embed_delta_BTD(self) -> Float[Tensor, "B T D"]:
        """What enters block 0 minus its reference (zero unless one was given), zero at padding."""
        embed_BTD, reference = self.network.embed_BTD, self.embed_reference_BTD
        return self._real(embed_BTD if reference is None else embed_BTD - reference)

    @property
    def sites(self) -> list[str]:
        """The basis's site in every layer."""
        return self.basis.sites(self.model.architecture)

    @property
    def n_targets(self) -> int:
        """K."""
        return self.metric.positions_BK.shape[1]

    def _real(self, x: Tensor) -> Tensor:
        real_BT = self.network.real_BT
        if real_BT.all():
            return x
        return x.masked_fill(~real_BT[:, None, :, None] if x.ndim == 4 else ~real_BT[..., None], 0.0)

    def values(self) -> Float[Tensor, "B K"]:
        """Value of every target in a run of the model under its active edits, part of autograd's graph if enabled."""
        return measure(self.model, self.batch, self.metric)

    def scores(self, gradient_BKLTX: Float[Tensor, "B K L T X"]) -> Float[Tensor, "B K L T N"]:
        """Return gradient times difference from the reference, node by node; the gradient's memory is used."""
        return self.basis.sum(gradient_BKLTX.mul_(self.delta_BLTN[:, None]), self.model.architecture)


def measure(model: "Model", batch: "TokenBatch", metric: Metric) -> Float[Tensor, "B K"]:
    """Run the model under its active edits and return every target's value, differentiable if gradients are enabled."""
    seen, read_BSX = read_out(model, batch, metric)
    return seen.value(read_BSX)


def read_out(model: "Model", batch: "TokenBatch", metric: Metric) -> tuple[Metric, Float[Tensor, "B S X"]]:
    """Run the model under its active edits and return what a metric reads: the logits, or the stream at its site.

    Logits are computed from the first column that is read; the metric comes back with its positions counted from there.
    """
    if metric.site == LOGITS:
        n_columns = batch.input_ids_BT.shape[1]
        first = int(metric.positions_BK.min()) if metric.positions_BK.numel() else 0
        return replace(metric, positions_BK=metric.positions_BK - first), model(batch, n_columns - first)
    with capture(model, [metric.site]) as acts:
        model(batch)
    return metric, acts[metric.site]


def pose(
    model: "Model",
    batch: "TokenBatch",
    make_metric: MakeMetric,
    reference_BLTN: Float[Tensor, "#B L #T X"] | None = None,
    rules: Rules | None = None,
    *,
    basis: str = "neurons",
    embed_reference_BTD: Float[Tensor, "#B #T D"] | None = None,
) -> Problem:
    """Run the model once and state the problem; `make_metric(logits_BTV, last_positions_B)` gives the metric.

    References are zero unless given (see the module docstring). Raises UserError where one does not fit the batch, and
    NotEnoughMemoryError before the pass where it would not fit into memory.
    """
    require_memory(model, batch)
    nodes, observed = basis_named(basis), observe(model, batch)
    acts_BLTX = _activations(model, observed, nodes)
    reference_BLTX = zero_reference(model, basis) if reference_BLTN is None else reference_BLTN
    _check_reference("reference", reference_BLTX, acts_BLTX)
    if embed_reference_BTD is not None:
        _check_reference("reference of the embeddings", embed_reference_BTD, observed.acts["embed"])
        embed_reference_BTD = embed_reference_BTD.to(acts_BLTX)
    network = freeze(model, observed, rules)
    return Problem(
        model=model,
        batch=observed.batch,
        metric=make_metric(network.logits_BTV, observed.batch.last_columns_B),
        network=network,
        activations_BLTN=acts_BLTX,
        reference_BLTN=reference_BLTX.to(acts_BLTX),
        basis=nodes,
        embed_reference_BTD=embed_reference_BTD,
    )


def _activations(model: "Model", observed: Observed, basis: Basis) -> Float[Tensor, "B L T X"]:
    if basis.kind == "output":
        layers = [observed.output(layer) for layer in range(model.architecture.n_layers)]
    else:
        layers = [observed.acts[site] for site in basis.sites(model.architecture)]
    return torch.stack(layers, dim=1)


def _check_reference(name: str, reference: Tensor, observed: Tensor) -> None:
    pairs = list(zip(reference.shape, observed.shape, strict=False))
    fits = reference.ndim == observed.ndim and all(size in (1, wanted) for size, wanted in pairs)
    if not fits:
        raise UserError(
            f"the {name} has shape {tuple(reference.shape)}, the batch needs {tuple(observed.shape)} (rows and "
            "positions may be 1): take it on prompts of the same length and in the same node basis"
        )
