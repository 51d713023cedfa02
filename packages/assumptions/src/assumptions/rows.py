"""Rows of activations at one place, in memory or on disk, read in chunks so that no more than a chunk need be held.

A candidate of the search is a `Rows`: the pooled activations at one site, or those of several sites side by side.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = 4096  # rows of a matrix in memory that are converted at a time


@runtime_checkable
class Rows(Protocol):
    """Rows of one width, read in the order of their indices."""

    @property
    def width(self) -> int:
        """D, the number of columns."""
        ...

    def chunks(self, rows: Sequence[int]) -> Iterator[Float[Tensor, "B D"]]:
        """Yield the given rows, ascending, a few at a time and in this order."""
        ...


@dataclass(frozen=True)
class InMemory:
    """The rows of a matrix."""

    resid_BD: Float[Tensor, "B D"]

    @property
    def width(self) -> int:
        """D, the number of columns."""
        return self.resid_BD.shape[1]

    def chunks(self, rows: Sequence[int]) -> Iterator[Float[Tensor, "B D"]]:
        """Yield the given rows."""
        for start in range(0, len(rows), CHUNK):
            yield self.resid_BD[list(rows[start : start + CHUNK])]


@dataclass(frozen=True)
class SideBySide:
    """The columns of several places as one wide row; the parts must come in equal chunks."""

    parts: tuple[Rows, ...]

    @property
    def width(self) -> int:
        """Sum of the parts' columns."""
        return sum(part.width for part in self.parts)

    def chunks(self, rows: Sequence[int]) -> Iterator[Float[Tensor, "B D"]]:
        """Yield the given rows of all parts, joined."""
        for pieces in zip(*(part.chunks(rows) for part in self.parts), strict=True):
            yield torch.cat(pieces, dim=1)


def beside(parts: Sequence[Rows]) -> Rows:
    """One place, or several side by side."""
    return parts[0] if len(parts) == 1 else SideBySide(tuple(parts))


def gather(source: Rows, rows: Sequence[int]) -> Float[Tensor, "B D"]:
    """The given rows in double precision, all at once."""
    return torch.cat([chunk_BD.double() for chunk_BD in source.chunks(rows)])


def covariance(source: Rows, rows: Sequence[int], labels_BK: Float[Tensor, "B K"]) -> Float[Tensor, "D K"]:
    """Cov(h, y) over the rows for every target, in one pass; `labels_BK` holds the targets of `rows`."""
    centred_BK, start = labels_BK.double() - labels_BK.double().mean(0), 0
    sum_DK = torch.zeros(source.width, labels_BK.shape[1], dtype=torch.float64)
    for chunk_BD in source.chunks(rows):
        sum_DK += chunk_BD.double().T @ centred_BK[start : start + len(chunk_BD)]
        start += len(chunk_BD)
    return sum_DK / len(rows)


def blocks_in_memory(pooled_LBD: Float[Tensor, "L B D"]) -> list[Rows]:
    """One candidate a block."""
    return [InMemory(pooled_BD) for pooled_BD in pooled_LBD]
