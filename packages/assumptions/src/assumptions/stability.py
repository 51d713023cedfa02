"""How far a direction is a property of the data rather than of the sample: cosine between two halves of the rows.

The training rows are halved by whole groups, `halvings` times; each half gives a read-out at the probe's own place and
strength, and a pattern direction. With few rows per dimension the cosine is low although both halves predict well:
cosine 0.95 with the truth needs about 9.3 (D - 1) / R2 rows (planted activations, `organism`), so on a real model
this stands beside every direction. Halves of cosine c with a planted direction each have c^2 with each other.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from assumptions.families import Family
from assumptions.rows import Rows, covariance
from assumptions.selection import RIDGE


class Stability(NamedTuple):
    """Mean cosine between the halves' directions, of the filter (the read-out) and of the pattern."""

    filter: float
    pattern: float


def split_half(
    source: Rows,
    rows: Sequence[int],
    groups: Sequence[int],
    labels_BK: Float[Tensor, "B K"],
    strengths: Sequence[float],
    family: Family = RIDGE,
    halvings: int = 3,
    seed: int = 0,
) -> list[Stability]:
    """Stability of the directions of K targets at one place, each at its own strength.

    `rows` index the labels and `groups` (both of all B rows); rows of one group stay in one half.
    """
    draw = torch.Generator().manual_seed(seed)
    names = sorted({groups[i] for i in rows})
    cosines_HK2 = []
    for _ in range(halvings):
        first = {names[i] for i in torch.randperm(len(names), generator=draw)[: len(names) // 2].tolist()}
        halves = [[i for i in rows if (groups[i] in first) is side] for side in (True, False)]
        found = [_directions(source, half, labels_BK[half], strengths, family) for half in halves]
        cosines_HK2.append(torch.nn.functional.cosine_similarity(found[0], found[1], dim=0))
    return [Stability(*pair) for pair in torch.stack(cosines_HK2).mean(0).tolist()]


def _directions(
    source: Rows,
    rows: Sequence[int],
    labels_BK: Float[Tensor, "N K"],
    strengths: Sequence[float],
    family: Family,
) -> Float[Tensor, "D K 2"]:
    """Filter and pattern of every target on some rows."""
    path = dict(family.path(source, rows, labels_BK, sorted(set(strengths))))
    missing_D = torch.full((source.width,), torch.nan, dtype=torch.float64)  # too few rows for that strength
    filters = [
        path[strength].weight_DK[:, k] if strength in path else missing_D
        for k, strength in enumerate(strengths)
    ]
    filters_DK = torch.stack(filters, dim=1)
    return torch.stack([filters_DK, covariance(source, rows, labels_BK)], dim=2)
