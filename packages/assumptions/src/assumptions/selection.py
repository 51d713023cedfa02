"""Choose place and strength on validation rows, report on test rows once (paper section on probes).

1. A candidate is a place of reading: the output of one block, or of several side by side. Of every candidate the family
   gives one read-out a strength and target, from one pass over its training rows.
2. For each target keep the best strength of every candidate by the share explained of the validation rows (R2; of the
   deviance for `logistic`), and of the candidates the earliest whose unexplained share exceeds the best one's by at
   most a share of `TOLERANCE`: later blocks often hold a copy that reads as well and steers less. (A difference in R2
   would not do: .990 against .999 is ten times the error.)
3. Only the kept read-out sees the test rows.
Shuffled labels are further targets of the same search, so that the control profits from the search as much as the
probes do: on noise its test R2 is at most zero on average, whatever the number of blocks.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from assumptions.families import FAMILIES, Family
from assumptions.ridge import Linear, r2
from assumptions.rows import Rows
from assumptions.splits import Split
from shared.errors import UserError

TOLERANCE = 0.1
Progress = Callable[[Sequence[Rows]], Iterable[Rows]]
RIDGE = FAMILIES["ridge"]


@dataclass(frozen=True)
class Chosen:
    """The read-out kept for one target: index of its candidate, strength, coefficients, share explained."""

    candidate: int
    strength: float
    weight_D: Float[Tensor, "D"]
    intercept: float
    r2_validation: float
    curve: list[float]  # best validation figure of every candidate

    def predict(self, resid_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B"]:
        """Predicted target of rows (B D)."""
        return resid_BD.double() @ self.weight_D + self.intercept

    def read(self, source: Rows, rows: Sequence[int]) -> Float[Tensor, "B"]:
        """Predicted target of some rows, a chunk at a time."""
        return torch.cat([self.predict(chunk_BD) for chunk_BD in source.chunks(rows)])


def choose(
    candidates: Sequence[Rows],
    targets_BK: Float[Tensor, "B K"],
    split: Split,
    family: Family = RIDGE,
    strengths: Sequence[float] | None = None,
    tolerance: float = TOLERANCE,
    progress: Progress = iter,
) -> list[Chosen]:
    """Return one read-out per target, fitted on the training rows and chosen on the validation rows.

    `progress` wraps the walk over the candidates, each of which is read once.
    """
    targets_BK = targets_BK.double()
    found = [_best_of(rows, targets_BK, split, family, strengths) for rows in progress(candidates)]
    chosen = []
    for candidates_L in zip(*found, strict=True):
        curve = [one.r2_validation for one in candidates_L]
        index = next(i for i, score in enumerate(curve) if 1 - score <= (1 + tolerance) * (1 - max(curve)))
        chosen.append(replace(candidates_L[index], candidate=index, curve=curve))
    return chosen


def _best_of(
    rows: Rows,
    targets_BK: Float[Tensor, "B K"],
    split: Split,
    family: Family,
    strengths: Sequence[float] | None,
) -> list[Chosen]:
    """The strength with the highest validation figure for every target, at one candidate."""
    path = list(family.path(rows, split.train, targets_BK[split.train], strengths or family.strengths))
    if not path:
        raise UserError(f"no strength of {family.name} can be fitted on these rows: give others")
    together = Linear(*(torch.cat(parts, dim=-1) for parts in zip(*(read for _, read in path), strict=True)))
    predicted_BSK = together.read(rows, split.validation).unflatten(1, (len(path), -1))
    truth_BK = targets_BK[split.validation]
    scores_SK = torch.stack([family.explained(one_BK, truth_BK) for one_BK in predicted_BSK.unbind(1)])
    chosen = []
    for k, scores_S in enumerate(scores_SK.nan_to_num(nan=float("-inf")).T.tolist()):
        strength, read = path[scores_S.index(max(scores_S))]
        weight_D, intercept = read.weight_DK[:, k].clone(), float(read.intercept_K[k])
        chosen.append(Chosen(0, strength, weight_D, intercept, max(scores_S), []))
    return chosen


def held_out_r2(
    chosen: Sequence[Chosen],
    candidates: Sequence[Rows],
    targets_BK: Float[Tensor, "B K"],
    split: Split,
    family: Family = RIDGE,
) -> list[float]:
    """R2 of each chosen read-out's estimate on the test rows of its own candidate."""
    values_BK = torch.stack([one.read(candidates[one.candidate], split.test) for one in chosen], dim=1)
    return [float(score) for score in r2(family.estimate(values_BK), targets_BK[split.test])]


class Shuffled(NamedTuple):
    """One search under permuted labels: the read-outs kept, and the labels they were fitted and are tested on."""

    chosen: list[Chosen]
    targets_BK: Float[Tensor, "B K"]


def shuffled_searches(
    candidates: Sequence[Rows],
    targets_BK: Float[Tensor, "B K"],
    split: Split,
    repeats: int = 5,
    seed: int = 0,
    family: Family = RIDGE,
    strengths: Sequence[float] | None = None,
) -> list[Shuffled]:
    """The whole search with the rows of the labels permuted before it, `repeats` times."""
    draw = torch.Generator().manual_seed(seed)
    shuffled = [targets_BK[torch.randperm(len(targets_BK), generator=draw)] for _ in range(repeats)]
    if not shuffled:
        return []
    chosen = choose(candidates, torch.cat(shuffled, dim=1), split, family, strengths)
    width = targets_BK.shape[1]
    return [Shuffled(chosen[i * width : (i + 1) * width], one) for i, one in enumerate(shuffled)]
