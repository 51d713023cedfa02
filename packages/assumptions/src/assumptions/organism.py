"""Rung A of the planted organism: activations with known directions, without any model, and what theory says of them.

x = c (a - 1/2) V + eps, with latents a ~ U(0,1)^K, orthonormal rows of V, and noise of variance sigma^2 per coordinate.
With signal variance S = c^2 / 12 and rho = S / (S + sigma^2), for n training rows of width p:

    best R2 of any linear read-out of a_d                    rho
    cosine of the least-squares direction with v_d           1 / sqrt(1 + (p - 1) / (rho (n - p - 1)))
    cosine of the pattern direction Cov(x, y) with v_d       1 / sqrt(1 + (p - 1) (1 - rho) / (rho n))

With noise that is not isotropic the least-squares (filter) direction leaves v_d for good, the pattern stays.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Planted(NamedTuple):
    """Activations, the latents they were made from, and the directions that carry them (unit rows)."""

    resid_BD: Float[Tensor, "B D"]
    latents_BK: Float[Tensor, "B K"]
    directions_KD: Float[Tensor, "K D"]


def plant(
    rows: int,
    width: int,
    *,
    latents: int = 9,
    strength: float = 1.0,
    noise: float = 0.2,
    common_noise: float = 0.0,
    seed: int = 0,
) -> Planted:
    """Draw planted activations; `noise` is sigma, `common_noise` adds one shared direction overlapping every v_d.

    Raises ValueError when the width cannot hold the latents' orthonormal directions.
    """
    if width <= latents:
        raise ValueError(
            f"width {width} cannot hold {latents} orthonormal directions and noise; take a larger one"
        )
    draw = torch.Generator().manual_seed(seed)
    directions_KD = torch.linalg.qr(_normal(draw, width, latents))[0].T.contiguous()
    latents_BK = torch.rand(rows, latents, generator=draw, dtype=torch.float64)
    resid_BD = strength * (latents_BK - 0.5) @ directions_KD + noise * _normal(draw, rows, width)
    shared_D = directions_KD.sum(0) + math.sqrt(latents) * _orthogonal_unit(directions_KD, draw)
    resid_BD = resid_BD + common_noise * _normal(draw, rows, 1) * shared_D / shared_D.norm()
    return Planted(resid_BD, latents_BK, directions_KD)


def signal_share(strength: float, noise: float) -> float:
    """rho = S / (S + sigma^2): the ceiling of R2."""
    signal = strength**2 / 12.0
    return signal / (signal + noise**2)


def filter_cosine(rho: float, rows: int, width: int) -> float:
    """Expected cosine of the least-squares direction with the planted one; needs rows > width + 1."""
    return 1.0 / math.sqrt(1.0 + (width - 1) / (rho * (rows - width - 1)))


def pattern_cosine(rho: float, rows: int, width: int) -> float:
    """Expected cosine of the covariance direction with the planted one."""
    return 1.0 / math.sqrt(1.0 + (width - 1) * (1.0 - rho) / (rho * rows))


def _normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def _orthogonal_unit(directions_KD: Float[Tensor, "K D"], draw: torch.Generator) -> Float[Tensor, "D"]:
    free_D = _normal(draw, directions_KD.shape[1])
    free_D = free_D - directions_KD.T @ (directions_KD @ free_D)
    return free_D / free_D.norm()
