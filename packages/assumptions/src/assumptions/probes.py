"""One linear probe a dimension: a calibrated read-out of a score at a block's output (paper section on probes).

score ~ <w, h_b> + intercept, with h_b the pooled output of block b. Besides the filter direction w a probe keeps the
pattern direction Cov(h, y), which under noise that is not isotropic is closer to what carries the score; both scales
in which steering strength is stated (SD of the projection over training rows, mean norm of the residual stream); and
what it was fitted on, so that a probe on other weights, another template or its own training rows is refused.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from assumptions.features import Features
from assumptions.ridge import STRENGTHS
from assumptions.selection import Chosen, choose
from assumptions.splits import Split
from shared.errors import UserError


@dataclass(frozen=True)
class Probe:
    """The read-out of one dimension at the output of block `block` (counted from 0, never negative)."""

    dimension: str
    block: int
    weight_D: Float[Tensor, "D"]
    intercept: float
    pattern_D: Float[Tensor, "D"]
    strength: float
    projection_sd: float
    pattern_sd: float
    resid_norm: float
    r2_validation: float

    def __post_init__(self) -> None:
        if self.block < 0:
            raise UserError(f"block {self.block} is negative: name the block by its index from 0")

    @property
    def site(self) -> str:
        """Where the probe reads, and where its direction is added."""
        return f"blocks.{self.block}.output"

    def predict(self, features: Features) -> Float[Tensor, " B"]:
        """Uncut predictions (B) of pooled activations that hold this probe's site."""
        return features.pooled_LBD[features.sites.index(self.site)].double() @ self.weight_D + self.intercept

    def score(self, features: Features) -> Float[Tensor, " B"]:
        """Calibrated read-out in [0, 1]."""
        return self.predict(features).clamp(0.0, 1.0)


@dataclass(frozen=True)
class ProbeSet:
    """The probes of one study with what they were fitted on."""

    probes: dict[str, Probe]
    span: str
    rendering: str
    fingerprint: str
    labeller: str
    trained_on: tuple[str, ...]  # hashes of the training and validation rows

    @property
    def data_hash(self) -> str:
        """16 hexadecimal digits over the rows that chose the probes."""
        return hashlib.sha256("".join(sorted(self.trained_on)).encode()).hexdigest()[:16]

    @property
    def weights_hash(self) -> str:
        """16 hexadecimal digits over the coefficients: what was made with these probes is known by it."""
        content = b"".join(probe.weight_D.numpy().tobytes() for probe in self.probes.values())
        return hashlib.sha256(content).hexdigest()[:16]

    def check(self, features: Features, held_out: bool = True) -> None:
        """UserError when features were read from another model, template or span, or (held out) from training rows."""
        for name in ("fingerprint", "rendering", "span"):
            mine, theirs = getattr(self, name), getattr(features, name)
            if mine != theirs:
                raise UserError(
                    f"these probes were fitted with {name} {mine!r}, the features have {theirs!r}"
                )
        overlap = set(self.trained_on) & set(features.row_hashes)
        if held_out and overlap:
            raise UserError(f"{len(overlap)} rows were used to fit these probes; evaluate on others")


def fit_probes(
    features: Features,
    labels_BK: Float[Tensor, "B K"],
    dimensions: Sequence[str],
    split: Split,
    labeller: str,
    strengths: Sequence[float] = STRENGTHS,
) -> tuple[ProbeSet, list[Chosen]]:
    """Fit one probe per dimension on scores in [0, 1]; block and strength are chosen on the validation rows.

    Raises UserError when a label is missing or one dimension's training labels are all alike.
    """
    _check_labels(labels_BK, dimensions, split)
    chosen = choose(features.pooled_LBD, labels_BK, split, strengths)
    probes = {
        name: _probe(name, one, features, labels_BK[:, k], split)
        for k, (name, one) in enumerate(zip(dimensions, chosen, strict=True))
    }
    used = tuple(features.row_hashes[i] for i in (*split.train, *split.validation))
    return ProbeSet(probes, features.span, features.rendering, features.fingerprint, labeller, used), chosen


def _probe(name: str, one: Chosen, features: Features, labels_B: Float[Tensor, " B"], split: Split) -> Probe:
    train_BD = features.pooled_LBD[one.block_index][split.train].double()
    centred_B = labels_B[split.train].double() - labels_B[split.train].double().mean()
    pattern_D = (train_BD - train_BD.mean(0)).T @ centred_B / len(centred_B)
    return Probe(
        dimension=name,
        block=_block_of(features.sites[one.block_index]),
        weight_D=one.weight_D,
        intercept=one.intercept,
        pattern_D=pattern_D,
        strength=one.strength,
        projection_sd=_projection_sd(train_BD, one.weight_D),
        pattern_sd=_projection_sd(train_BD, pattern_D),
        resid_norm=float(train_BD.norm(dim=1).mean()),
        r2_validation=one.r2_validation,
    )


def _projection_sd(train_BD: Float[Tensor, "B D"], direction_D: Float[Tensor, "D"]) -> float:
    """SD over rows of <h, v>, v the unit direction."""
    return float((train_BD @ (direction_D / direction_D.norm())).std())


def _block_of(site: str) -> int:
    match = re.fullmatch(r"blocks\.(\d+)\.output", site)
    if match is None:
        raise UserError(f"a probe reads a block's output (blocks.N.output), not {site!r}")
    return int(match[1])


def _check_labels(labels_BK: Float[Tensor, "B K"], dimensions: Sequence[str], split: Split) -> None:
    if not torch.isfinite(labels_BK).all():
        raise UserError(
            "some labels are missing: drop the rows whose scores were not read before fitting probes"
        )
    flat = [name for k, name in enumerate(dimensions) if labels_BK[split.train][:, k].std() < 1e-9]
    if flat:
        raise UserError(f"all training labels are alike for {', '.join(flat)}: there is nothing to fit")
    if min(len(part) for part in (split.train, split.validation, split.test)) < 2:
        raise UserError("every part of the split needs at least two rows: give more")
