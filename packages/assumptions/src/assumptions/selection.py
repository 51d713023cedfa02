"""Choose block and ridge strength on validation rows, report on test rows once (paper section on probes).

1. Factorise the training rows of every block once; solve every target and strength from it.
2. For each target keep the best strength of every block by validation R2, and of the blocks the earliest whose
   unexplained variance exceeds the best block's by at most a share of `TOLERANCE`: later blocks often hold a copy that
   reads as well and steers less. (A difference in R2 would not do: .990 against .999 is ten times the error.)
3. Only the kept read-out sees the test rows.
Shuffled labels are further targets of the same search, so that the control profits from the search as much as the
probes do: on noise its test R2 is at most zero on average, whatever the number of blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from assumptions.ridge import STRENGTHS, Factors, r2
from assumptions.splits import Split

TOLERANCE = 0.1


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
    tolerance: float = TOLERANCE,
) -> list[Chosen]:
    """Return one read-out per target, fitted on the training rows and chosen on the validation rows."""
    targets_BK = targets_BK.double()
    blocks_LK = [_best_of_block(pooled_BD, targets_BK, split, strengths) for pooled_BD in pooled_LBD]
    chosen = []
    for candidates_L in zip(*blocks_LK, strict=True):
        curve = [one.r2_validation for one in candidates_L]
        index = next(i for i, score in enumerate(curve) if 1 - score <= (1 + tolerance) * (1 - max(curve)))
        chosen.append(replace(candidates_L[index], block_index=index, curve=curve))
    return chosen


def _best_of_block(
    pooled_BD: Float[Tensor, "B D"],
    targets_BK: Float[Tensor, "B K"],
    split: Split,
    strengths: Sequence[float],
) -> list[Chosen]:
    """The strength with the highest validation R2 for every target, at one block."""
    factors = Factors(pooled_BD[split.train])
    best: list[Chosen] = []
    for strength in strengths:
        read = factors.solve(targets_BK[split.train], strength)
        scores_K = r2(read.predict(pooled_BD[split.validation]), targets_BK[split.validation])
        for k, score in enumerate(scores_K.nan_to_num(nan=float("-inf")).tolist()):
            if k == len(best) or score > best[k].r2_validation:
                one = Chosen(0, strength, read.weight_DK[:, k].clone(), float(read.intercept_K[k]), score, [])
                best[k : k + 1] = [one]
    return best


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


class Shuffled(NamedTuple):
    """One search under permuted labels: the read-outs kept, and the labels they were fitted and are tested on."""

    chosen: list[Chosen]
    targets_BK: Float[Tensor, "B K"]


def shuffled_searches(
    pooled_LBD: Float[Tensor, "L B D"],
    targets_BK: Float[Tensor, "B K"],
    split: Split,
    repeats: int = 5,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
) -> list[Shuffled]:
    """The whole search with the rows of the labels permuted before it, `repeats` times."""
    draw = torch.Generator().manual_seed(seed)
    shuffled = [targets_BK[torch.randperm(len(targets_BK), generator=draw)] for _ in range(repeats)]
    if not shuffled:
        return []
    chosen = choose(pooled_LBD, torch.cat(shuffled, dim=1), split, strengths)
    width = targets_BK.shape[1]
    return [Shuffled(chosen[i * width : (i + 1) * width], one) for i, one in enumerate(shuffled)]
