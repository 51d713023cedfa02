"""Supernodes: spectral clusters of signed neurons, their number chosen on held-out stability (digest 1.9).

1. Spectral clustering (normalised Laplacian, k-means; scikit-learn) of the mean similarity.
2. For each candidate number the contexts are halved several times; each half is clustered alone, and the adjusted Rand
   index (ARI) of the two says how far the clusters are the data's and not the half's. The number with the largest mean
   ARI is taken; of equals (to two decimals) the one whose clusters cohere most on the other half.
3. Beside it stand baselines that any clustering beats if it says something: labels shuffled (ARI about 0), and layers
   as clusters (if the ARI with them is large, the clusters are only layers). `cohesion` is the mean similarity within
   clusters less that between them, on the half that did not make them, for each of the three.
4. On new prompts the map is frozen: `coverage` is the share of contribution that known neurons have; unknown neurons
   stay unknown.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuits.profiles import Profile, Signed
from circuits.similarity import Similarity, mean_similarity
from shared.errors import UserError

FLOOR = 1e-3  # similarity of neurons that share nothing: the graph stays connected, as the Laplacian needs


class ClusterError(UserError):
    """Too few contexts or neurons to cluster; the message says which."""


@dataclass(frozen=True)
class Stability:
    """How one number of clusters fares on held-out halves; ARI and cohesion, each beside its baselines."""

    number: int
    ari: float
    ari_shuffled: float
    ari_layers: float
    cohesion: float
    cohesion_shuffled: float
    cohesion_layers: float


@dataclass(frozen=True)
class Clustering:
    """The clusters of n signed neurons: a label each, the similarity they come from, how their number was chosen."""

    similarity: Similarity
    labels: tuple[int, ...]
    stability: tuple[Stability, ...]
    number: int  # the one that was chosen; k-means may leave a cluster empty

    def members(self) -> list[list[Signed]]:
        """Return the signed neurons of every cluster."""
        rows = list(zip(self.similarity.neurons, self.labels, strict=True))
        return [[neuron for neuron, label in rows if label == one] for one in sorted(set(self.labels))]

    def support(self) -> list[float]:
        """Return, for every cluster, the mean number of contexts in which a pair of its neurons was seen."""
        label_n = np.array(self.labels)
        grids = ((label_n == one) for one in sorted(set(self.labels)))
        return [float(self.similarity.support_nn[torch.from_numpy(chosen)][:, torch.from_numpy(chosen)].double().mean())
                for chosen in grids]  # fmt: skip


def spectral(similarity_nn: Float[Tensor, "n n"], number: int, seed: int = 0) -> NDArray[np.int64]:
    """Return a label for each of n neurons; ClusterError where there are fewer than number + 2."""
    from sklearn.cluster import SpectralClustering

    if len(similarity_nn) < number + 2:
        raise ClusterError(f"{len(similarity_nn)} neurons are too few for {number} clusters: ask for fewer")
    affinity = similarity_nn.double().cpu().numpy() + FLOOR
    np.fill_diagonal(affinity, 1.0 + FLOOR)
    model = SpectralClustering(number, affinity="precomputed", random_state=seed, n_init=10)
    return np.asarray(model.fit_predict((affinity + affinity.T) / 2), dtype=np.int64)


def cluster(
    profiles: Sequence[Profile],
    neurons: Sequence[Signed],
    numbers: Sequence[int],
    *,
    min_support: int = 2,
    halvings: int = 5,
    seed: int = 0,
) -> Clustering:
    """Cluster the neurons over all contexts into the most stable of the candidate numbers."""
    if len(profiles) < 4:
        raise ClusterError(f"stability needs at least 4 contexts, got {len(profiles)}")
    similarity = mean_similarity(profiles, neurons, min_support)
    stability = tuple(measure_stability(profiles, neurons, number, halvings, seed) for number in numbers)
    best = max(stability, key=lambda one: (round(one.ari, 2), one.cohesion))
    labels = spectral(similarity.mean_nn, best.number, seed)
    return Clustering(similarity, tuple(int(label) for label in labels), stability, best.number)


def measure_stability(
    profiles: Sequence[Profile], neurons: Sequence[Signed], number: int, halvings: int = 5, seed: int = 0
) -> Stability:
    """Return the mean stability of one number of clusters over random halvings of the contexts."""
    rng = np.random.default_rng(seed)
    rows = [_halving(profiles, neurons, number, rng, seed) for _ in range(halvings)]
    return Stability(number, *(float(value) for value in np.mean(rows, axis=0)))


def _halving(
    profiles: Sequence[Profile],
    neurons: Sequence[Signed],
    number: int,
    rng: np.random.Generator,
    seed: int,
) -> list[float]:
    from sklearn.metrics import adjusted_rand_score

    order = rng.permutation(len(profiles))
    halves = [[profiles[row] for row in part] for part in np.array_split(order, 2)]
    seen = [{neuron for one in half for neuron in one.neurons} for half in halves]
    both = [neuron for neuron in neurons if neuron in seen[0] and neuron in seen[1]]
    first_nn, second_nn = (mean_similarity(half, both).mean_nn for half in halves)
    labels, others = spectral(first_nn, number, seed), spectral(second_nn, number, seed)
    shuffled, layers = rng.permutation(labels), np.array([neuron.layer for neuron in both])
    return [
        adjusted_rand_score(labels, others),
        adjusted_rand_score(shuffled, others),
        adjusted_rand_score(labels, layers),
        *(cohesion(second_nn, marks) for marks in (labels, shuffled, layers)),
    ]


def cohesion(similarity_nn: Float[Tensor, "n n"], labels: NDArray) -> float:
    """Return the mean similarity of pairs within a cluster less that of other pairs (0 where either is empty)."""
    values, off = similarity_nn.cpu().numpy(), ~np.eye(len(labels), dtype=bool)
    same = labels[:, None] == labels[None, :]
    within, between = values[same & off], values[~same]
    return float(within.mean() - between.mean()) if within.size and between.size else 0.0


def coverage(profiles: Sequence[Profile], known: Sequence[Signed]) -> float:
    """Return the share of absolute contribution in these contexts that the known neurons have."""
    chosen = set(known)
    masses = [(one.mass_n().tolist(), one.neurons) for one in profiles]
    kept = sum(mass for row, names in masses for mass, name in zip(row, names, strict=True) if name in chosen)
    total = sum(mass for row, _ in masses for mass in row)
    return kept / total if total else 0.0
