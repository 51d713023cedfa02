"""What a neuron listens to and what it says: attribution and contribution profiles in one context (digest 1.7 and 1.9).

In the frozen network of one prompt every neuron has two maps:

    attribution   total effect of each input token on its activation (their sum, and biases, is the activation)
    contribution  its total effect on each target

The attribution maps are those of `circuits.maps`. A profile belongs to a signed neuron (layer, neuron, sign of its
activation), summed over the positions where it has this sign.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.attribution import Problem
from circuits.edges import Neurons
from circuits.maps import token_maps
from circuits.relp import relp


class Signed(NamedTuple):
    """A neuron at one sign of its activation: the unit of clusters, hypotheses and descriptions."""

    layer: int
    neuron: int
    sign: int

    def __str__(self) -> str:
        return f"L{self.layer}/N{self.neuron}{'+' if self.sign > 0 else '-'}"


@dataclass(frozen=True)
class Profile:
    """The profiles of one context's signed neurons: attribution over T tokens, contribution over K targets."""

    neurons: tuple[Signed, ...]
    attribution_nT: Float[Tensor, "n T"]
    contribution_nK: Float[Tensor, "n K"]
    token_ids: tuple[int, ...]

    def mass_n(self) -> Float[Tensor, " n"]:
        """Return the absolute contribution of every signed neuron over the targets."""
        return self.contribution_nK.abs().sum(1)


def profile(problem: Problem, row: int, mask_LTN: Bool[Tensor, "L T N"]) -> Profile:
    """Return the profiles of the nodes that a mask selects in one example, without its padding."""
    keep_S = problem.network.real_BT[row].nonzero()[:, 0]
    network, metric = problem.network.row(row), problem.metric.row(row, keep_S)
    neurons = Neurons.from_mask(mask_LTN[:, keep_S])
    acts_n = neurons.gather(torch.stack(network.neurons, dim=1)[0])
    unit_KLTN = relp(network, metric).sensitivity_BKLTN[0]
    contribution_nK = torch.stack([neurons.gather(unit_LTN) for unit_LTN in unit_KLTN], dim=1)
    return _summed(
        neurons, acts_n, token_maps(network, neurons), contribution_nK * acts_n[:, None],
        tuple(network.input_ids_BT[0].tolist()),
    )  # fmt: skip


def _summed(
    neurons: Neurons, acts_n: Tensor, map_nT: Tensor, contribution_nK: Tensor, token_ids: tuple[int, ...]
) -> Profile:
    """Sum nodes over the positions at which a neuron has the same sign."""
    places = zip(
        neurons.layer_n.tolist(),
        neurons.index_n.tolist(),
        torch.where(acts_n < 0, -1, 1).tolist(),
        strict=True,
    )
    signed = [Signed(*place) for place in places]
    order = {neuron: number for number, neuron in enumerate(sorted(set(signed)))}
    index_n = torch.tensor([order[neuron] for neuron in signed], dtype=torch.long, device=acts_n.device)

    def total(x_nX: Tensor) -> Tensor:
        return x_nX.new_zeros(len(order), x_nX.shape[1]).index_add_(0, index_n, x_nX)

    return Profile(tuple(order), total(map_nT), total(contribution_nK), token_ids)


def frequent(profiles: Sequence[Profile], at_least: int, limit: int) -> tuple[Signed, ...]:
    """Return the signed neurons that occur in enough contexts, at most `limit`, those of most absolute contribution."""
    counts: dict[Signed, int] = {}
    masses: dict[Signed, float] = {}
    for one in profiles:
        for neuron, mass in zip(one.neurons, one.mass_n().tolist(), strict=True):
            counts[neuron] = counts.get(neuron, 0) + 1
            masses[neuron] = masses.get(neuron, 0.0) + mass
    enough = [neuron for neuron, count in counts.items() if count >= at_least]
    return tuple(sorted(sorted(enough, key=lambda neuron: -masses[neuron])[:limit]))
