"""What a probe explains beyond length and format: the partial R2 given nuisance features.

1. On the training rows, regress labels and activations on the nuisance features (ordinary least squares).
2. Search a probe from the residual activations to the residual labels at the probe's own place, strength on the
   validation rows: by the theorem of Frisch, Waugh and Lovell the joint regression, nuisances unpenalised.
3. Partial R2 = 1 - SSE(both) / SSE(nuisances alone), on the test rows. It is 0 where the activations add nothing: a
   probe that reads length alone has a high R2 and a partial R2 of 0 (arXiv 2606.02907).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from assumptions.families import Family
from assumptions.rows import Rows
from assumptions.selection import RIDGE, choose
from assumptions.splits import Split

NOTHING = 1e-10  # share of the labels' variance below which the nuisances have explained it all


@dataclass(frozen=True)
class Residual:
    """Rows less what the nuisance features (orthonormal over the training rows) say of them."""

    source: Rows
    nuisance_BZ: Float[Tensor, "B Z"]
    coefficient_ZD: Float[Tensor, "Z D"]

    @property
    def width(self) -> int:
        """D, the number of columns."""
        return self.source.width

    def chunks(self, rows: Sequence[int]) -> Iterator[Float[Tensor, "B D"]]:
        """Yield the residuals of the given rows."""
        start = 0
        for chunk_BD in self.source.chunks(rows):
            part = list(rows[start : start + len(chunk_BD)])
            yield chunk_BD.double() - self.nuisance_BZ[part] @ self.coefficient_ZD
            start += len(part)


def orthonormal(nuisance_BF: Float[Tensor, "B F"], rows: Sequence[int]) -> Float[Tensor, "B Z"]:
    """The nuisance features as columns orthonormal over some rows, of mean zero; constant and redundant ones go."""
    nuisance_BF = nuisance_BF.double()
    centred_BF = nuisance_BF - nuisance_BF[list(rows)].mean(0)
    scale_F = centred_BF[list(rows)].norm(dim=0)
    centred_BF = centred_BF[:, scale_F > 1e-12] / scale_F[scale_F > 1e-12]
    _, values_Z, basis_ZF = torch.linalg.svd(centred_BF[list(rows)], full_matrices=False)
    kept = values_Z > 1e-8  # the columns have norm 1
    return centred_BF @ (basis_ZF[kept].T / values_Z[kept])


def partial_r2(
    source: Rows,
    nuisance_BF: Float[Tensor, "B F"],
    labels_BK: Float[Tensor, "B K"],
    split: Split,
    family: Family = RIDGE,
    strengths: Sequence[float] | None = None,
) -> list[float]:
    """Partial R2 (K) of least-squares read-outs at one place given the nuisance features, on the test rows."""
    labels_BK, train = labels_BK.double(), split.train
    nuisance_BZ = orthonormal(nuisance_BF, train)
    residual_BK = labels_BK - labels_BK[train].mean(0)
    residual_BK = residual_BK - nuisance_BZ @ (nuisance_BZ[train].T @ residual_BK[train])
    place = Residual(source, nuisance_BZ, _explained_part(source, nuisance_BZ, train))
    chosen = choose([place], residual_BK, split, family, strengths)
    scores = []
    for k, one in enumerate(chosen):
        alone = float(residual_BK[split.test, k].square().sum())
        both = float((residual_BK[split.test, k] - one.read(place, split.test)).square().sum())
        total = float((labels_BK[split.test, k] - labels_BK[split.test, k].mean()).square().sum())
        scores.append(1.0 - both / alone if alone > NOTHING * total else 0.0)
    return scores


def _explained_part(
    source: Rows, nuisance_BZ: Float[Tensor, "B Z"], rows: Sequence[int]
) -> Float[Tensor, "Z D"]:
    """Coefficients of the columns on the orthonormal nuisance features, in one pass."""
    coefficient_ZD = torch.zeros(nuisance_BZ.shape[1], source.width, dtype=torch.float64)
    start = 0
    for chunk_BD in source.chunks(rows):
        part = list(rows[start : start + len(chunk_BD)])
        coefficient_ZD += nuisance_BZ[part].T @ chunk_BD.double()
        start += len(part)
    return coefficient_ZD
