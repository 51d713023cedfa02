"""Choose block and ridge strength on validation rows, report on test rows once (paper section on probes).

1. Factorise the training rows of every block once; solve every target and strength from it.
2. For each target keep the (block, strength) with the highest validation R2.
3. Only the kept read-out sees the test rows.
Shuffled labels are further targets of the same search, so that the control profits from the search as much as the
probes do: on noise its test R2 is at most zero on average, whatever the number of blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from assumptions.ridge import STRENGTHS, Factors, r2
from assumptions.splits import Split


@dataclass(frozen=True)
class Chosen:
    """The read-out kept for one target: index of the block in the features, strength, coefficients, validation R2."""

    block_index: int
    strength: float
    weight_D: Float[Tensor, "D"]
    intercept: float
    r2_validation: float
    curve: list[float]  # best validation R2 of every block

    def predict(self, resid_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B"]:
        """Predicted target of rows (B D)."""
        return resid_BD.double() @ self.weight_D + self.intercept


def choose(
    pooled_LBD: Float[Tensor, "L B D"],
    targets_BK: Float[Tensor, "B K"],
    split: Split,
    strengths: Sequence[float] = STRENGTHS,
) -> list[Chosen]:
    """Return one read-out per target, fitted on the training rows and chosen on the validation rows."""
    targets_BK = targets_BK.double()
    train_BK, held_BK = targets_BK[split.train], targets_BK[split.validation]
    best: list[Chosen | None] = [None] * targets_BK.shape[1]
    curves: list[list[float]] = [[] for _ in best]
    for index, pooled_BD in enumerate(pooled_LBD):
        factors = Factors(pooled_BD[split.train])
        found_K = [float("-inf")] * len(best)
        for strength in strengths:
            read = factors.solve(train_BK, strength)
            scores_K = (
                r2(read.predict(pooled_BD[split.validation]), held_BK).nan_to_num(nan=float("-inf")).tolist()
            )
            for k, score in enumerate(scores_K):
                found_K[k] = max(found_K[k], score)
                former = best[k]
                if former is None or score > former.r2_validation:
                    weight_D, intercept = read.weight_DK[:, k].clone(), float(read.intercept_K[k])
                    best[k] = Chosen(index, strength, weight_D, intercept, score, curves[k])
        for k, curve in enumerate(curves):
            curve.append(found_K[k])
    return [chosen for chosen in best if chosen is not None]


def held_out_r2(
    chosen: Sequence[Chosen],
    pooled_LBD: Float[Tensor, "L B D"],
    targets_BK: Float[Tensor, "B K"],
    split: Split,
) -> list[float]:
    """R2 of each chosen read-out on the test rows of its own block."""
    scores = []
    for k, one in enumerate(chosen):
        predicted_B1 = one.predict(pooled_LBD[one.block_index][split.test]).unsqueeze(1)
        scores.append(float(r2(predicted_B1, targets_BK[split.test][:, k : k + 1])[0]))
    return scores


def shuffled_r2(
    pooled_LBD: Float[Tensor, "L B D"],
    targets_BK: Float[Tensor, "B K"],
    split: Split,
    repeats: int = 5,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
) -> list[float]:
    """Mean test R2 per target when the rows of the labels are permuted before the whole search."""
    draw = torch.Generator().manual_seed(seed)
    shuffled = [targets_BK[torch.randperm(len(targets_BK), generator=draw)] for _ in range(repeats)]
    stacked_BK = torch.cat(shuffled, dim=1)
    scores = held_out_r2(choose(pooled_LBD, stacked_BK, split, strengths), pooled_LBD, stacked_BK, split)
    return torch.tensor(scores).reshape(repeats, -1).nanmean(0).tolist()
