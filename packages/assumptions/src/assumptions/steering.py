"""Steering along a direction: h <- h + alpha v at a block's output, v of unit norm (paper section on steering).

alpha > 0 raises the labelled score: the read-out <h, v> grows by exactly alpha at every position in scope. A dose is
alpha in a unit: `raw`; `proj_sd`, standard deviations of the projection over the training rows; `resid_norm`, mean
norms of the pooled residual stream. A dose means the same push for a probe direction and for its random controls: they
share block and scale (norm-matched). The scope is the prompt's tokens, the generated ones, or all.

Instead of being pushed, a read-out may be clamped: at every token in scope the projection on the probe's direction is
set to the value at which the probe reads the wanted score, whatever the message was.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from assumptions.probes import Probe
from shared.errors import UserError
from shared.interventions import Add, LowRank
from shared.tokens import Phase

Unit = Literal["raw", "proj_sd", "resid_norm"]
Kind = Literal[
    "probe", "pattern", "bisector", "planted", "means", "shuffled", "sycophancy", "composite", "random"
]
Fitted = Literal["probe", "pattern", "bisector"]  # those that a probe gives
Scope = Literal["prompt", "generation", "all"]
PHASES: dict[str, Phase] = {"prompt": Phase.PREFILL, "generation": Phase.DECODE, "all": Phase.ALL}


@dataclass(frozen=True)
class Direction:
    """A unit direction at the output of a block, with the scales of its doses; `name` is unique within a study."""

    name: str
    dimension: str
    kind: Kind
    block: int
    unit_D: Float[Tensor, "D"]
    projection_sd: float
    resid_norm: float

    @property
    def site(self) -> str:
        """Where the direction is added: the site it was read at."""
        return f"blocks.{self.block}.output"

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over name, block, scales and vector: what was made with a direction is known by it."""
        content = repr((self.name, self.block, self.projection_sd, self.resid_norm)).encode()
        return hashlib.sha256(content + self.unit_D.double().numpy().tobytes()).hexdigest()[:16]

    def alpha(self, dose: float, unit: Unit = "proj_sd") -> float:
        """The absolute strength of a dose."""
        return dose * {"raw": 1.0, "proj_sd": self.projection_sd, "resid_norm": self.resid_norm}[unit]

    def interventions(self, dose: float, unit: Unit = "proj_sd", scope: Scope = "all") -> list[Add]:
        """The edit of a dose, for `shared.hooks.edit` or for `save_interventions`; dose 0 edits nothing at all."""
        if dose == 0:
            return []
        return [Add(self.site, self.unit_D.float(), self.alpha(dose, unit), phase=PHASES[scope])]


def probe_direction(probe: Probe) -> Direction:
    """The filter direction: the probe's own coefficients."""
    return _direction(probe, "probe", probe.weight_D, probe.projection_sd)


def pattern_direction(probe: Probe) -> Direction:
    """The pattern direction Cov(h, score)."""
    return _direction(probe, "pattern", probe.pattern_D, probe.pattern_sd)


def clamp(probes: Sequence[Probe], scores: Sequence[float], scope: Scope = "all") -> LowRank:
    """The edit under which each probe, all at one block, reads its score from any span within the scope.

    Probes whose directions overlap are clamped together. UserError for probes of several blocks, or parallel ones.
    """
    if len({probe.block for probe in probes}) != 1:
        raise UserError("probes that are clamped together must read one block; clamp each block by itself")
    weights_RD = torch.stack([probe.weight_D.double() for probe in probes])
    wanted_R = torch.tensor(
        [
            probe.calibration.inverse(score) - probe.intercept
            for probe, score in zip(probes, scores, strict=True)
        ],
        dtype=torch.float64,
    )
    # W = L Q with orthonormal rows of Q: W h = wanted where Q h = L^-1 wanted.
    q_DR, r_RR = torch.linalg.qr(weights_RD.T)
    diagonal_R = r_RR.diagonal().abs()
    if diagonal_R.min() < 1e-6 * diagonal_R.max():
        raise UserError("two probes to be clamped read the same direction; drop one of them")
    targets_R = torch.linalg.solve_triangular(r_RR.T, wanted_R[:, None], upper=False).squeeze(1)
    return LowRank.clamp(probes[0].site, q_DR.T.float(), targets_R.float(), phase=PHASES[scope])


def random_directions(matched: Direction, count: int, seed: int = 0) -> list[Direction]:
    """Random unit directions at the same block with the same scales: equal doses push equally far.

    Those of another dimension, block or seed are others: no control is shared.
    """
    draw = np.random.default_rng([seed, matched.block, *matched.dimension.encode()])
    directions = []
    for number in range(count):
        drawn_D = torch.from_numpy(draw.standard_normal(len(matched.unit_D)))
        name = f"{matched.dimension}.random{number}"
        directions.append(replace(matched, name=name, kind="random", unit_D=drawn_D / drawn_D.norm()))
    return directions


def cosines(directions: Sequence[Direction]) -> Float[Tensor, "K K"]:
    """Cosine similarity of all pairs of directions."""
    unit_KD = torch.stack([direction.unit_D.double() for direction in directions])
    return unit_KD @ unit_KD.T


def _direction(probe: Probe, kind: Kind, vector_D: Float[Tensor, "D"], sd: float) -> Direction:
    unit_D = unit_vector(vector_D, f"the {kind} direction of {probe.dimension}")
    return Direction(
        f"{probe.dimension}.{kind}", probe.dimension, kind, probe.block, unit_D, sd, probe.resid_norm
    )


def unit_vector(vector_D: Float[Tensor, "D"], what: str) -> Float[Tensor, "D"]:
    """The vector at norm 1, in float64; UserError says that `what` is zero."""
    norm = float(vector_D.norm())
    if not norm > 0:
        raise UserError(f"{what} is zero: there is nothing to steer along")
    return vector_D.double() / norm
