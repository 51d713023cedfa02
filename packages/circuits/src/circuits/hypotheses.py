"""Which neurons stand for a class of prompts: AUROC with a split, permutation p and false-discovery control.

The paper's score (digest 1.9), with what it lacks. The feature of a signed neuron in a prompt is its attribution
summed over the positions where it has that sign, 0 where it is absent. On training prompts its AUROC for each class
(one against the rest, ties a half) selects: at least `high`, or at most `low`, and optionally a mean |attribution|
within the class. What is selected is scored again on test prompts about other things, with a two-sided permutation p
(class labels shuffled over test prompts, or over the clusters that these come in) and Benjamini-Hochberg q over
everything that was selected. A finding holds
when q is at most `alpha` and its test AUROC still lies beyond the threshold. Neurons with the same set of classes
form a group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from circuits.profiles import Signed
from shared.errors import UserError
from shared.stats import auroc


@dataclass(frozen=True)
class Finding:
    """One neuron and class: AUROC on training and on test prompts, p, q, and whether it holds."""

    neuron: Signed
    labelling: str
    value: str
    train_auroc: float
    test_auroc: float
    p: float
    q: float
    holds: bool


@dataclass(frozen=True)
class Thresholds:
    """What is selected on training prompts and what holds on test prompts."""

    high: float = 0.8
    low: float = 0.2
    min_mean: float = 0.0
    alpha: float = 0.05
    permutations: int = 2000
    min_class: int = 3  # a class needs as many prompts in each half, inside and outside

    def __post_init__(self) -> None:
        if not 0 <= self.low < 0.5 < self.high <= 1:
            raise ValueError(f"low and high lie on either side of 0.5, got {self.low} and {self.high}")


def signed_features(
    scores_BLTN: Float[Tensor, "B L T N"], activations_BLTN: Float[Tensor, "B L T N"]
) -> Float[Tensor, "2 B L N"]:
    """Return every neuron's attribution summed over positions, those with negative activation first."""
    negative_BLTN = activations_BLTN < 0
    return torch.stack([
        scores_BLTN.masked_fill(~negative_BLTN, 0.0).sum(2), scores_BLTN.masked_fill(negative_BLTN, 0.0).sum(2)
    ])  # fmt: skip


def strongest_features(
    features_2BLN: Float[Tensor, "2 B L N"], limit: int
) -> tuple[list[Signed], Bool[Tensor, "2 L N"]]:
    """Return the signed neurons of largest mean absolute attribution, and their mask (which orders them)."""
    mean_2LN = features_2BLN.abs().mean(1)
    flat = torch.zeros_like(mean_2LN, dtype=torch.bool).flatten()
    flat[mean_2LN.flatten().topk(min(limit, flat.numel())).indices] = True
    mask_2LN = flat.reshape(mean_2LN.shape) & (mean_2LN > 0)
    names = [Signed(layer, neuron, 2 * side - 1) for side, layer, neuron in mask_2LN.nonzero().tolist()]
    return names, mask_2LN


def chosen_features(features_2BLN: Tensor, mask_2LN: Tensor) -> NDArray[np.float64]:
    """Return the masked features as a matrix of prompts by signed neurons, in the mask's order."""
    columns_BM = features_2BLN.permute(1, 0, 2, 3)[:, mask_2LN]
    return columns_BM.double().cpu().numpy()


def score_hypotheses(
    neurons: Sequence[Signed],
    train_BM: NDArray[np.float64],
    train_labels: Mapping[str, Sequence[str]],
    test_BM: NDArray[np.float64],
    test_labels: Mapping[str, Sequence[str]],
    thresholds: Thresholds | None = None,
    seed: int = 0,
    test_clusters: Sequence[str] | None = None,
) -> list[Finding]:
    """Return every (neuron, class) selected on training prompts with its test score, p and q; the best first.

    `test_clusters` gives what each test prompt is about (see `permuted_labels`).
    """
    from scipy.stats import false_discovery_control

    thresholds = thresholds or Thresholds()
    if set(train_labels) != set(test_labels):
        raise UserError("training and test prompts must have the same labellings")
    rng = np.random.default_rng(seed)
    rows: list[tuple[Signed, str, str, float, float, float]] = []
    for labelling in sorted(train_labels):
        train, test = np.asarray(train_labels[labelling]), np.asarray(test_labels[labelling])
        for value in sorted(set(train) & set(test)):
            if min(_smaller_side(train == value), _smaller_side(test == value)) < thresholds.min_class:
                continue
            rows += [
                (neurons[column], labelling, str(value), trained, tested, p)
                for column, trained, tested, p in _score_class(
                    train_BM, train == value, test_BM, test == value, thresholds, rng, test_clusters
                )
            ]
    if not rows:
        return []
    q = false_discovery_control([row[-1] for row in rows])
    findings = [
        Finding(*row, q=float(value), holds=_holds(row[3], row[4], float(value), thresholds))
        for row, value in zip(rows, q, strict=True)
    ]
    return sorted(findings, key=lambda one: (not one.holds, one.q, -abs(one.test_auroc - 0.5)))


def _smaller_side(inside: NDArray[np.bool_]) -> int:
    return int(min(inside.sum(), (~inside).sum()))


def _holds(trained: float, tested: float, q: float, thresholds: Thresholds) -> bool:
    beyond = tested >= thresholds.high if trained > 0.5 else tested <= thresholds.low
    return bool(beyond and q <= thresholds.alpha)


def _score_class(
    train_BM: NDArray[np.float64],
    train_in: NDArray[np.bool_],
    test_BM: NDArray[np.float64],
    test_in: NDArray[np.bool_],
    thresholds: Thresholds,
    rng: np.random.Generator,
    clusters: Sequence[str] | None,
) -> list[tuple[int, float, float, float]]:
    """Return column, training AUROC, test AUROC and p of what one class selects."""
    trained_M = np.asarray(auroc(train_BM.T, np.broadcast_to(train_in, train_BM.T.shape)))
    strong_M = np.abs(train_BM[train_in]).mean(0) >= thresholds.min_mean
    chosen = np.flatnonzero(strong_M & ((trained_M >= thresholds.high) | (trained_M <= thresholds.low)))
    if not len(chosen):
        return []
    tested_m, p_m = permutation_auroc(test_BM[:, chosen], test_in, thresholds.permutations, rng, clusters)
    return [
        (int(column), float(trained_M[column]), float(tested), float(p))
        for column, tested, p in zip(chosen, tested_m, p_m, strict=True)
    ]


def permutation_auroc(
    features_Bm: NDArray[np.float64],
    inside_B: NDArray[np.bool_],
    permutations: int,
    rng: np.random.Generator,
    clusters: Sequence[str] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return every column's AUROC and its two-sided permutation p, (1 + as far from a half) / (1 + permutations)."""
    from scipy.stats import rankdata

    ranks_Bm = rankdata(features_Bm, axis=0)
    draws_PB = permuted_labels(inside_B, permutations, rng, clusters)
    observed_1m, drawn_Pm = _areas(inside_B[None], ranks_Bm), _areas(draws_PB, ranks_Bm)
    further_m = (np.abs(drawn_Pm - 0.5) >= np.abs(observed_1m - 0.5) - 1e-12).sum(0)
    return observed_1m[0], (1 + further_m) / (1 + permutations)


def permuted_labels(
    inside_B: NDArray[np.bool_],
    permutations: int,
    rng: np.random.Generator,
    clusters: Sequence[str] | None = None,
) -> NDArray[np.bool_]:
    """Return P x B shufflings of the labels of one class.

    Prompts of one cluster (a noun, a city) resemble each other, so that they are not shuffled one by one: clusters that
    lie wholly inside or outside the class exchange their labels, and those with both shuffle theirs within.
    """
    names = np.arange(len(inside_B)) if clusters is None else np.asarray(clusters)
    cluster_B = np.unique(names, return_inverse=True)[1]
    share_C = np.bincount(cluster_B, inside_B) / np.bincount(cluster_B)
    whole_C = (share_C == 0) | (share_C == 1)
    labels_PC = np.zeros((permutations, len(share_C)), dtype=bool)
    labels_PC[:, whole_C] = rng.permuted(
        np.broadcast_to(share_C[whole_C] == 1, (permutations, int(whole_C.sum()))), axis=1
    )
    draws_PB = labels_PC[:, cluster_B]
    for mixed in np.flatnonzero(~whole_C):
        members = np.flatnonzero(cluster_B == mixed)
        own_PB = np.broadcast_to(inside_B[members], (permutations, len(members)))
        draws_PB[:, members] = rng.permuted(own_PB, axis=1)
    return draws_PB


def _areas(inside_PB: NDArray[np.bool_], ranks_Bm: NDArray[np.float64]) -> NDArray[np.float64]:
    """AUROC of every column under every labelling, from the columns' ranks (P x m)."""
    n_in_P1 = inside_PB.sum(1, keepdims=True)
    pairs_P1 = n_in_P1 * (inside_PB.shape[1] - n_in_P1)
    area_Pm: NDArray[np.float64] = (inside_PB @ ranks_Bm - n_in_P1 * (n_in_P1 + 1) / 2) / pairs_P1
    return area_Pm


def tag_groups(findings: Sequence[Finding]) -> dict[tuple[str, ...], list[Signed]]:
    """Return the neurons of every set of tags ("language=fr", or "not language=fr") that hold, largest groups first."""
    tags: dict[Signed, list[str]] = {}
    for one in findings:
        if one.holds:
            name = f"{one.labelling}={one.value}"
            tags.setdefault(one.neuron, []).append(name if one.test_auroc > 0.5 else f"not {name}")
    groups: dict[tuple[str, ...], list[Signed]] = {}
    for neuron, names in sorted(tags.items()):
        groups.setdefault(tuple(sorted(names)), []).append(neuron)
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))
