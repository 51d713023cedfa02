"""Run a model with only some of its neurons clean: the pathway of a node set C (paper section 3.2; digest 1.3).

`m(C)` runs the prompt while every node outside C is set to its reference value, layer by layer inside one forward
pass, so that kept nodes still react to what was ablated before them. The reference is zero, a mean over
counterfactual prompts for each position, or another run's activations (resampling): `make_reference` by name.
Conclusions change with it (digest 1.8), so report more than one.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.bases import NEURONS, basis_named
from shared.errors import UserError
from shared.hooks import capture, edit
from shared.interventions import Intervention

if TYPE_CHECKING:
    from shared.models import Model
    from shared.tokens import TokenBatch


@dataclass(frozen=True, eq=False, kw_only=True)
class Keep(Intervention):
    """x where `keep` is true, the reference elsewhere; both broadcast over the batch."""

    keep_BTX: Bool[Tensor, "#B #T X"]
    reference_BTX: Float[Tensor, "#B #T X"]

    def edited(self, x: Tensor) -> Tensor:
        """Kept entries of x among the reference."""
        return torch.where(self.keep_BTX.to(x.device), x, self.reference_BTX.to(x))

    def width(self) -> int | None:
        """Last dimension of the mask."""
        return self.keep_BTX.shape[-1]


def neuron_sites(model: "Model") -> list[str]:
    """Return the neuron sites of all blocks in order."""
    return NEURONS.sites(model.architecture)


def node_activations(model: "Model", batch: "TokenBatch", basis: str = "neurons") -> Float[Tensor, "B L T X"]:
    """Return the coordinates of all nodes of a basis on the batch (zero at padding; embeddings have one layer)."""
    sites, batch = basis_named(basis).sites(model.architecture), batch.to(model.device)
    with torch.no_grad(), capture(model, sites) as acts:
        model(batch)
    acts_BLTX = torch.stack([acts[site].detach() for site in sites], dim=1)
    return acts_BLTX.masked_fill(~batch.attention_mask_BT.bool()[:, None, :, None], 0.0)


def neuron_activations(model: "Model", batch: "TokenBatch") -> Float[Tensor, "B L T N"]:
    """Return the activations of all neurons on the batch (zero at padding)."""
    return node_activations(model, batch)


def pathway_edits(
    model: "Model",
    keep_BLTN: Bool[Tensor, "#B L #T N"],
    reference_BLTN: Float[Tensor, "#B L #T N"],
) -> list[Keep]:
    """Return the edits, one a layer, that set every neuron outside `keep` to its reference value."""
    return [
        Keep(site, keep_BTX=keep_BLTN[:, layer], reference_BTX=reference_BLTN[:, layer])
        for layer, site in enumerate(neuron_sites(model))
    ]


def run_pathway(
    model: "Model",
    batch: "TokenBatch",
    keep_BLTN: Bool[Tensor, "#B L #T N"],
    reference_BLTN: Float[Tensor, "#B L #T N"],
) -> Float[Tensor, "B T V"]:
    """Return the logits with every neuron outside `keep` at its reference value."""
    with torch.no_grad(), edit(model, pathway_edits(model, keep_BLTN, reference_BLTN)):
        return model(batch)


def mean_reference(model: "Model", batch: "TokenBatch", basis: str = "neurons") -> Float[Tensor, "1 L T X"]:
    """Return every node's mean over the batch at each position; all rows must have the same length."""
    _one_length(batch, "a mean for each position")
    return node_activations(model, batch, basis).mean(0, keepdim=True)


def _one_length(batch: "TokenBatch", what: str) -> None:
    lengths = sorted(set(batch.attention_mask_BT.sum(-1).tolist()))
    if len(lengths) > 1:
        raise UserError(f"{what} needs prompts of one length, got lengths {lengths}: group them first")


def zero_reference(model: "Model", basis: str = "neurons") -> Float[Tensor, "1 L 1 X"]:
    """Return the zero reference."""
    sites = basis_named(basis).sites(model.architecture)
    shape = (1, len(sites), 1, model.architecture.site_width(sites[0]))
    return torch.zeros(shape, dtype=model.dtype, device=model.device)


def resample_reference(
    model: "Model", batch: "TokenBatch", n_rows: int, seed: int = 0
) -> Float[Tensor, "n_rows L T N"]:
    """Return, for each of n_rows examples, the activations of one prompt of the batch, drawn with replacement."""
    _one_length(batch, "another prompt's activations")
    acts_BLTN = neuron_activations(model, batch)
    drawn_B = torch.randint(len(acts_BLTN), (n_rows,), generator=torch.Generator().manual_seed(seed))
    return acts_BLTN[drawn_B.to(acts_BLTN.device)]


REFERENCES = ("mean", "zero", "resample")


def make_reference(
    model: "Model", kind: str, counterfactual: "TokenBatch", n_rows: int = 1, seed: int = 0
) -> Float[Tensor, "#n_rows L #T N"]:
    """Return what ablated neurons are set to: one of REFERENCES, taken from counterfactual prompts of one length.

    `resample` draws one of them for each of n_rows examples; mean and zero are the same for all.
    """
    if kind == "mean":
        return mean_reference(model, counterfactual)
    if kind == "zero":
        return zero_reference(model)
    if kind == "resample":
        return resample_reference(model, counterfactual, n_rows, seed)
    raise UserError(f"unknown reference {kind!r}; there are: {', '.join(REFERENCES)}")
