"""Rung A of the planted organism: activations with known directions, without any model, and what theory says of them.

x = c (a - 1/2) V + eps, with latents a ~ U(0,1)^K, orthonormal rows of V, and noise of variance sigma^2 per coordinate.
With signal variance S = c^2 / 12 and rho = S / (S + sigma^2), for n training rows of width p:

    best R2 of any linear read-out of a_d                    rho
    cosine of the least-squares direction with v_d           1 / sqrt(1 + (p - 1) / (rho (n - p - 1)))
    cosine of the pattern direction Cov(x, y) with v_d       1 / sqrt(1 + (p - 1) (1 - rho) / (rho n))

With noise that is not isotropic the least-squares (filter) direction tends to Cov(x)^-1 v_d and leaves v_d for good,
while the pattern direction stays.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Planted(NamedTuple):
    """Activations, the latents they were made from, the directions that carry them (unit rows), the noise's SD."""

    resid_BD: Float[Tensor, "B D"]
    latents_BK: Float[Tensor, "B K"]
    directions_KD: Float[Tensor, "K D"]
    noise_D: Float[Tensor, "D"]


def plant(
    rows: int,
    width: int,
    *,
    latents: int = 9,
    strength: float = 1.0,
    noise: float = 0.2,
    spread: float = 0.0,
    seed: int = 0,
) -> Planted:
    """Draw planted activations; coordinate i has noise of SD `noise` * exp(`spread` z_i), z_i normal.

    Raises ValueError when the width cannot hold the latents' orthonormal directions.
    """
    if width <= latents:
        raise ValueError(
            f"width {width} cannot hold {latents} orthonormal directions and noise; take a larger one"
        )
    draw = torch.Generator().manual_seed(seed)
    directions_KD = torch.linalg.qr(_normal(draw, width, latents))[0].T.contiguous()
    noise_D = noise * torch.exp(spread * _normal(draw, width))
    latents_BK = torch.rand(rows, latents, generator=draw, dtype=torch.float64)
    resid_BD = strength * (latents_BK - 0.5) @ directions_KD + noise_D * _normal(draw, rows, width)
    return Planted(resid_BD, latents_BK, directions_KD, noise_D)


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


def filter_limit(planted: Planted, strength: float) -> Float[Tensor, "K"]:
    """Cosine of the least-squares direction with each planted one, given endless rows: of Cov(x)^-1 v_d with v_d."""
    covariance_DD = strength**2 / 12.0 * planted.directions_KD.T @ planted.directions_KD
    covariance_DD = covariance_DD + torch.diag(planted.noise_D.square())
    filters_KD = torch.linalg.solve(covariance_DD, planted.directions_KD.T).T
    return (filters_KD * planted.directions_KD).sum(1) / filters_KD.norm(dim=1)


def _normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float64)
