"""One linear probe a dimension: a calibrated read-out of a score at a block's output (paper section on probes).

value = <w, h_b> + intercept, with h_b the pooled output of block b; its calibration makes a score in [0, 1] of it.
Besides the filter direction w a probe keeps the pattern direction Cov(h, y), which under noise that is not isotropic is
closer to what carries the score; both scales in which steering strength is stated (SD of the projection over training
rows, mean norm of the residual stream); and what it was fitted on, so that a probe on other weights, another template
or its own training rows is refused. A probe of several blocks side by side has no single direction to steer along.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from assumptions.calibration import UNCALIBRATED, Calibration, Method, calibrate
from assumptions.families import FamilyName, family
from assumptions.features import ActivationSet
from assumptions.rendering import Form
from assumptions.rows import Rows, covariance
from assumptions.selection import Chosen, Progress, choose
from assumptions.splits import Split
from shared.errors import UserError


@dataclass(frozen=True)
class Probe:
    """The read-out of one dimension at the output of one block (or of several, side by side)."""

    dimension: str
    sites: tuple[str, ...]
    weight_D: Float[Tensor, "D"]
    intercept: float
    pattern_D: Float[Tensor, "D"]
    strength: float
    projection_sd: float
    pattern_sd: float
    resid_norm: float
    r2_validation: float  # `logistic`: the share of the deviance
    family: FamilyName = "ridge"
    calibration: Calibration = UNCALIBRATED

    def __post_init__(self) -> None:
        for site in self.sites:
            _block_of(site)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks whose outputs are read, counted from 0."""
        return tuple(_block_of(site) for site in self.sites)

    @property
    def site(self) -> str:
        """Where the probe reads, and where its direction is added; UserError when it reads several places."""
        if len(self.sites) > 1:
            raise UserError(
                f"the probe of {self.dimension} reads {', '.join(self.sites)} together: it has no single direction"
            )
        return self.sites[0]

    @property
    def block(self) -> int:
        """The block whose output is read; UserError when there are several."""
        return _block_of(self.site)

    def value(self, features: ActivationSet, rows: Sequence[int] | None = None) -> Float[Tensor, " B"]:
        """The linear read-out (B) of all rows, or of some, ascending."""
        kept = range(len(features.row_hashes)) if rows is None else rows
        return torch.cat(
            [
                chunk_BD.double() @ self.weight_D + self.intercept
                for chunk_BD in features.at(self.sites).chunks(kept)
            ]
        )

    def predict(self, features: ActivationSet, rows: Sequence[int] | None = None) -> Float[Tensor, " B"]:
        """Predicted scores (B), neither cut nor calibrated (`logistic`: the sigmoid of the value)."""
        return family(self.family).estimate(self.value(features, rows))

    def score(self, features: ActivationSet, rows: Sequence[int] | None = None) -> Float[Tensor, " B"]:
        """Calibrated read-out in [0, 1]."""
        return self.calibration(self.value(features, rows))


@dataclass(frozen=True)
class ProbeSet:
    """The probes of one study with what they were fitted on."""

    probes: dict[str, Probe]
    span: str
    rendering: str
    fingerprint: str
    labeller: str
    trained_on: tuple[str, ...]  # hashes of the training and validation rows
    form: Form = "chat"

    @property
    def data_hash(self) -> str:
        """16 hexadecimal digits over the rows that chose the probes."""
        return hashlib.sha256("".join(sorted(self.trained_on)).encode()).hexdigest()[:16]

    @property
    def weights_hash(self) -> str:
        """16 hexadecimal digits over all that is read and steered with: the card and the tensors of a folder agree."""
        digest = hashlib.sha256()
        for name, probe in sorted(self.probes.items()):
            digest.update(repr((name, probe.sites, probe.intercept, probe.calibration)).encode())
            for vector_D in (probe.weight_D, probe.pattern_D):
                digest.update(vector_D.double().numpy().tobytes())
        return digest.hexdigest()[:16]

    def check(
        self, features: ActivationSet, held_out: bool = True, rows: Sequence[int] | None = None
    ) -> None:
        """UserError when features were read from another model, template or span, or (held out) from training rows.

        `rows` are those that are to be read, by default all.
        """
        for name in ("fingerprint", "form", "rendering", "span"):
            mine, theirs = getattr(self, name), getattr(features, name)
            if mine != theirs:
                raise UserError(
                    f"these probes were fitted with {name} {mine!r}, the features have {theirs!r}"
                )
        hashes = features.row_hashes
        read = set(hashes if rows is None else (hashes[i] for i in rows))
        overlap = set(self.trained_on) & read
        if held_out and overlap:
            raise UserError(f"{len(overlap)} rows were used to fit these probes; evaluate on others")


def fit_probes(
    features: ActivationSet,
    labels_BK: Float[Tensor, "B K"],
    dimensions: Sequence[str],
    split: Split,
    labeller: str,
    strengths: Sequence[float] | None = None,
    kind: FamilyName = "ridge",
    calibration: Method | None = None,
    candidates: Sequence[tuple[str, ...]] | None = None,
    progress: Progress = iter,
) -> tuple[ProbeSet, list[Chosen]]:
    """Fit one probe per dimension on scores in [0, 1]; place and strength are chosen on the validation rows.

    `candidates` are the places to choose among, each one site or several to be read side by side; by default every site
    alone. `strengths` and `calibration` default to the family's; `progress` wraps the walk over the candidates. Raises
    UserError when a label is missing or outside [0, 1], or when one dimension's training labels are all alike.
    """
    _check_labels(labels_BK, dimensions, split)
    tried = places(features, candidates)
    sources = [features.at(sites) for sites in tried]
    chosen = choose(sources, labels_BK, split, family(kind), strengths, progress=progress)
    probes = {}
    for k, (name, one) in enumerate(zip(dimensions, chosen, strict=True)):
        source, labels_B = sources[one.candidate], labels_BK[:, k].double()
        held = one.read(source, split.validation)
        scales = _scales(source, split.train, labels_B[split.train], one.weight_D)
        probes[name] = Probe(
            dimension=name,
            sites=tried[one.candidate],
            weight_D=one.weight_D,
            intercept=one.intercept,
            strength=one.strength,
            r2_validation=one.r2_validation,
            family=kind,
            calibration=calibrate(calibration or family(kind).calibration, held, labels_B[split.validation]),
            **scales,
        )
    used = tuple(features.row_hashes[i] for i in (*split.train, *split.validation))
    identity = (features.span, features.rendering, features.fingerprint, labeller, used, features.form)
    return ProbeSet(probes, *identity), chosen


def places(
    features: ActivationSet, candidates: Sequence[tuple[str, ...]] | None = None
) -> list[tuple[str, ...]]:
    """The places to choose among: those given, or every site alone."""
    return [(site,) for site in features.sites] if candidates is None else list(candidates)


def _scales(
    source: Rows, rows: Sequence[int], labels_B: Float[Tensor, " B"], weight_D: Float[Tensor, "D"]
) -> dict[str, Any]:
    """Pattern direction, SDs of the projections on both unit directions, and mean norm."""
    pattern_D = covariance(source, rows, labels_B[:, None])[:, 0]
    norms = [chunk_BD.double().norm(dim=1) for chunk_BD in source.chunks(rows)]
    units_D2 = torch.stack([weight_D / weight_D.norm(), pattern_D / pattern_D.norm()], dim=1)
    along_2 = torch.cat([chunk_BD.double() @ units_D2 for chunk_BD in source.chunks(rows)]).std(0)
    return {
        "pattern_D": pattern_D,
        "projection_sd": float(along_2[0]),
        "pattern_sd": float(along_2[1]),
        "resid_norm": float(torch.cat(norms).mean()),
    }


def _block_of(site: str) -> int:
    match = re.fullmatch(r"blocks\.(\d+)\.output", site)
    if match is None:
        raise UserError(f"a probe reads a block's output (blocks.N.output, N counted from 0), not {site!r}")
    return int(match[1])


def _check_labels(labels_BK: Float[Tensor, "B K"], dimensions: Sequence[str], split: Split) -> None:
    if not torch.isfinite(labels_BK).all():
        raise UserError(
            "some labels are missing: drop the rows whose scores were not read before fitting probes"
        )
    if labels_BK.min() < 0 or labels_BK.max() > 1:
        raise UserError("labels are scores in [0, 1]: rescale them before fitting probes")
    flat = [name for k, name in enumerate(dimensions) if labels_BK[split.train][:, k].std() < 1e-9]
    if flat:
        raise UserError(f"all training labels are alike for {', '.join(flat)}: there is nothing to fit")
    if min(len(part) for part in (split.train, split.validation, split.test)) < 2:
        raise UserError("every part of the split needs at least two rows: give more")
