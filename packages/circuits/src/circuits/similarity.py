"""Which neurons do the same: similarity of signed neurons over contexts (digest 1.9, after ADAG, arXiv 2604.07615).

In one context c two signed neurons are alike as far as both their profiles are:

    s_c(i, j) = harmonic mean of max(0, cos(attribution_i, attribution_j))
                             and max(0, cos(contribution_i, contribution_j))

and s(i, j) is the mean of s_c over the contexts in which both occur, 0 where they never do. The harmonic mean comes
first: averaging each view first, or an arithmetic mean, gives other matrices, in which a pair may look alike that never
was so in any one context. `support` says in how many contexts a pair was seen: a mean of one context is no evidence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.profiles import Profile, Signed


@dataclass(frozen=True)
class Similarity:
    """Mean similarity of n signed neurons, and the number of contexts in which each pair occurs."""

    neurons: tuple[Signed, ...]
    mean_nn: Float[Tensor, "n n"]
    support_nn: Int[Tensor, "n n"]


def context_similarity(one: Profile) -> Float[Tensor, "n n"]:
    """Return s_c of all pairs of one context's signed neurons."""
    views = [
        _cosine(rows_nX).clamp_min(0.0).double() for rows_nX in (one.attribution_nT, one.contribution_nK)
    ]
    total_nn = views[0] + views[1]
    harmonic_nn = 2 * views[0] * views[1] / total_nn.clamp_min(torch.finfo(total_nn.dtype).tiny)
    return harmonic_nn.masked_fill(total_nn == 0, 0.0)


def _cosine(rows_nX: Tensor) -> Tensor:
    unit_nX = torch.nn.functional.normalize(rows_nX.double(), dim=1)
    return unit_nX @ unit_nX.T


def mean_similarity(
    profiles: Sequence[Profile], neurons: Sequence[Signed], min_support: int = 1
) -> Similarity:
    """Return the mean similarity of the given neurons; pairs seen together in fewer contexts than asked get 0."""
    order = {neuron: number for number, neuron in enumerate(neurons)}
    total_nn = torch.zeros(len(order), len(order), dtype=torch.float64)
    support_nn = torch.zeros(len(order), len(order), dtype=torch.long)
    for one in profiles:
        here = [number for number, neuron in enumerate(one.neurons) if neuron in order]
        at = torch.tensor([order[one.neurons[number]] for number in here], dtype=torch.long)
        grid = (at[:, None], at[None, :])
        total_nn[grid] += context_similarity(one)[here][:, here].cpu()
        support_nn[grid] += 1
    mean_nn = (total_nn / support_nn.clamp_min(1)).masked_fill(support_nn < min_support, 0.0)
    return Similarity(tuple(neurons), mean_nn, support_nn)
