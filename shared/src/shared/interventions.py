"""Edits of activations as pure tensor functions: add, low rank, scale, set, ablate, interchange.

Every edit names a site, the tokens it acts on (a phase, and optionally positions within it) and, where it makes sense,
coordinates of the last dimension. `apply(x_BTX, mask_BT)` returns x with the edit at the masked tokens and x itself,
bit for bit, elsewhere. Low-rank forms (preft digest 1.1; tokens as rows, R and W are R x D, b is R):

    DiReFT   h + R^T (W h + b)            A = W        B = R^T   bias = R^T b
    LoReFT   h + R^T (W h + b - R h)      A = W - R    B = R^T   bias = R^T b
    NoReFT   h + W2^T (W1 h + b - W2 h)   A = W1 - W2  B = W2^T  bias = W2^T b
    clamp    h + R^T (t - R h)            A = -R       B = R^T   bias = R^T t       projections set to targets t

A fresh edit (`LowRank.fresh`) is an exact no-op (digest 1.4): W = 0 or W = R, b = 0.
Shape letters: B batch, T token, X size of the site, D width, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from shared.errors import UserError
from shared.tokens import Phase

if TYPE_CHECKING:
    from pathlib import Path

    from shared.architecture import Architecture
    from shared.models import Model

Form = Literal["direft", "loreft", "noreft"]


class InterventionError(UserError):
    """An edit that does not fit the model or its file; the message says why."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Intervention:
    """What all edits share: where (`site`, `indices`) and on which tokens (`phase`, `positions`).

    `positions` are token positions counted without padding; negative ones count from the end of the prompt (-1 is the
    last prompt token). They select within the phase. `indices` are coordinates of the last dimension: None for all, an
    empty list for none (the edit then does nothing).
    """

    site: str = field(kw_only=False)
    phase: Phase | str = Phase.ALL
    positions: Sequence[int] | None = None
    indices: Sequence[int] | None = None

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "phase", Phase(self.phase))
        except ValueError:
            raise InterventionError(
                f"{self.site}: unknown phase {self.phase!r}; phases are {', '.join(Phase)}."
            ) from None
        for name in ("positions", "indices"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, tuple(int(value) for value in values))
        if self.indices is not None and (
            len(set(self.indices)) != len(self.indices) or min(self.indices, default=0) < 0
        ):
            raise InterventionError(f"{self.site}: indices must be distinct and not negative.")

    def edited(self, x: Tensor) -> Tensor:
        """The edited value of `x`, all tokens and the chosen coordinates."""
        raise NotImplementedError

    def width(self) -> int | None:
        """Size that the edit's tensors imply for the coordinates it acts on; None when any size fits."""
        return None

    def apply(self, x_BTX: Float[Tensor, "B T X"], mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, "B T X"]:
        """x with the edit at the tokens of the mask; unchanged elsewhere. `x_BTX` itself is not written to."""
        mask_BT1 = mask_BT.to(x_BTX.device)[..., None]
        if self.indices is None:
            return torch.where(mask_BT1, self.edited(x_BTX), x_BTX)
        indices = self._indices_on(x_BTX.device)
        part = x_BTX[..., indices]
        edited = torch.where(mask_BT1, self.edited(part), part)
        whole_BTX = x_BTX.clone()
        whole_BTX[..., indices] = edited
        return whole_BTX

    def _like(self, value: Tensor | float, x: Tensor) -> Tensor | float:
        """A value in x's device and dtype, cut to `indices` if it was given for the whole site."""
        if not isinstance(value, Tensor):
            return value
        value = value.to(device=x.device, dtype=x.dtype)
        if self.indices is not None and value.ndim and value.shape[-1] != len(self.indices):
            value = value[..., self._indices_on(x.device)]
        return value

    def _indices_on(self, device: torch.device) -> Tensor:
        # The dtype of an empty list would be floating point, which cannot index.
        return torch.tensor(self.indices, dtype=torch.long, device=device)

    def _same_size(self, value: Tensor, x: Tensor, name: str) -> Tensor:
        """A tensor over tokens (and rows) that fits x: each size equal to x's, or 1."""
        if value.ndim > 1 and value.shape[-2] not in (1, x.shape[-2]):
            raise InterventionError(
                f"{self.site}: {name} has {value.shape[-2]} tokens but the batch has {x.shape[-2]}. "
                "Give it for the same padded batch, or restrict the edit to the prefill phase."
            )
        if value.ndim > 2 and value.shape[-3] not in (1, x.shape[-3]):
            raise InterventionError(
                f"{self.site}: {name} has {value.shape[-3]} rows but the batch has {x.shape[-3]}. "
                "Give it one row, or one for each row of the batch."
            )
        return value


@dataclass(frozen=True, eq=False, kw_only=True)
class Add(Intervention):
    """x + strength * vector."""

    vector_D: Float[Tensor, " X"] = field(kw_only=False)
    strength: float = field(default=1.0, kw_only=False)

    def edited(self, x: Tensor) -> Tensor:
        """x + strength * vector."""
        return x + self.strength * self._like(self.vector_D, x)

    def width(self) -> int | None:
        """Length of the vector."""
        return self.vector_D.shape[-1]


@dataclass(frozen=True, eq=False, kw_only=True)
class LowRank(Intervention):
    """x + strength * (B (A x) + bias); A is R x D, B is D x R, bias is D."""

    A_RD: Float[Tensor, "R X"] = field(kw_only=False)
    B_DR: Float[Tensor, "X R"] = field(kw_only=False)
    bias_D: Float[Tensor, " X"] | None = field(default=None, kw_only=False)
    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.A_RD.shape != self.B_DR.T.shape:
            raise InterventionError(
                f"{self.site}: A {tuple(self.A_RD.shape)} and B {tuple(self.B_DR.shape)} do not fit each other."
            )
        if self.bias_D is not None and self.bias_D.shape != self.B_DR.shape[:1]:
            raise InterventionError(f"{self.site}: bias {tuple(self.bias_D.shape)} does not fit B.")

    def edited(self, x: Tensor) -> Tensor:
        """x + strength * (B (A x) + bias)."""
        A, B = (tensor.to(device=x.device, dtype=x.dtype) for tensor in (self.A_RD, self.B_DR))
        delta = x @ A.T @ B.T
        if self.bias_D is not None:
            delta = delta + self.bias_D.to(delta)
        return x + self.strength * delta

    def width(self) -> int | None:
        """Width D of the residual stream the pair was made for."""
        return self.A_RD.shape[-1]

    @classmethod
    def direft(
        cls,
        site: str,
        R_RD: Float[Tensor, "R D"],
        W_RD: Float[Tensor, "R D"],
        b_R: Float[Tensor, " R"] | None = None,
        *,
        phase: Phase | str = Phase.ALL,
        positions: Sequence[int] | None = None,
        strength: float = 1.0,
    ) -> LowRank:
        """h + R^T (W h + b), materialised as a low-rank pair."""
        bias_D = None if b_R is None else R_RD.T @ b_R
        return cls(site, W_RD, R_RD.T, bias_D, phase=Phase(phase), positions=positions, strength=strength)

    @classmethod
    def loreft(
        cls,
        site: str,
        R_RD: Float[Tensor, "R D"],
        W_RD: Float[Tensor, "R D"],
        b_R: Float[Tensor, " R"] | None = None,
        *,
        phase: Phase | str = Phase.ALL,
        positions: Sequence[int] | None = None,
        strength: float = 1.0,
    ) -> LowRank:
        """h + R^T (W h + b - R h); NoReFT is the same with W1 for W and an unconstrained W2 for R."""
        return cls.direft(site, R_RD, W_RD - R_RD, b_R, phase=phase, positions=positions, strength=strength)

    noreft = loreft

    @classmethod
    def clamp(
        cls,
        site: str,
        directions_RD: Float[Tensor, "R D"],
        targets_R: Float[Tensor, " R"],
        *,
        phase: Phase | str = Phase.ALL,
        positions: Sequence[int] | None = None,
    ) -> LowRank:
        """h + R^T (t - R h): the projection on each orthonormal direction becomes its target, the rest of h stays.

        It is LoReFT with W = 0 and b = t. InterventionError when the rows of R are not orthonormal (to 1e-4).
        """
        gram_RR = directions_RD.double() @ directions_RD.double().T
        if (gram_RR - torch.eye(len(gram_RR), dtype=torch.float64)).abs().max() > 1e-4:
            raise InterventionError(
                f"{site}: clamped directions must be orthonormal; orthonormalise them first."
            )
        nothing_RD = torch.zeros_like(directions_RD)
        return cls.loreft(site, directions_RD, nothing_RD, targets_R, phase=phase, positions=positions)

    @classmethod
    def fresh(
        cls,
        site: str,
        width: int,
        rank: int,
        form: Form = "direft",
        seed: int = 0,
        *,
        phase: Phase | str = Phase.ALL,
        positions: Sequence[int] | None = None,
    ) -> LowRank:
        """An exact no-op to start training from: orthonormal R, and W = 0 (DiReFT) or W = R (LoReFT, NoReFT)."""
        if not 0 < rank <= width:
            raise InterventionError(f"{site}: rank {rank} is not between 1 and the width {width}.")
        generator = torch.Generator().manual_seed(seed)
        R_RD = torch.linalg.qr(torch.randn(width, rank, generator=generator))[0].T.contiguous()
        b_R = torch.zeros(rank)
        if form == "direft":
            return cls.direft(site, R_RD, torch.zeros_like(R_RD), b_R, phase=phase, positions=positions)
        return cls.loreft(site, R_RD, R_RD, b_R, phase=phase, positions=positions)


@dataclass(frozen=True, eq=False, kw_only=True)
class Scale(Intervention):
    """x * factor; a number, or one a coordinate."""

    factor: float | Float[Tensor, " X"] = field(kw_only=False)

    def edited(self, x: Tensor) -> Tensor:
        """x * factor."""
        return x * self._like(self.factor, x)

    def width(self) -> int | None:
        """Length of a vector of factors."""
        return self.factor.shape[-1] if isinstance(self.factor, Tensor) else None


@dataclass(frozen=True, eq=False, kw_only=True)
class Set(Intervention):
    """x := value; a number, or one a coordinate."""

    value: float | Float[Tensor, " X"] = field(kw_only=False)

    def edited(self, x: Tensor) -> Tensor:
        """Value in x's shape."""
        if isinstance(self.value, Tensor):
            return self._like(self.value, x).expand_as(x)  # type: ignore[union-attr]
        return torch.full_like(x, self.value)

    def width(self) -> int | None:
        """Length of a vector of values."""
        return self.value.shape[-1] if isinstance(self.value, Tensor) else None


@dataclass(frozen=True, eq=False, kw_only=True)
class Ablate(Intervention):
    """x := 0, or its mean over reference data: one a coordinate (X), or one a position (T X)."""

    mean: Float[Tensor, "*T X"] | None = None

    def edited(self, x: Tensor) -> Tensor:
        """Zeros, or the mean in x's shape."""
        if self.mean is None:
            return torch.zeros_like(x)
        mean = self._like(self.mean, x)
        return self._same_size(mean, x, "mean").expand_as(x)  # type: ignore[arg-type]

    def width(self) -> int | None:
        """Last dimension of the mean."""
        return None if self.mean is None else self.mean.shape[-1]


@dataclass(frozen=True, eq=False, kw_only=True)
class Interchange(Intervention):
    """x := the value the same site had in another run, column for column."""

    source_BTX: Float[Tensor, "B T X"] = field(kw_only=False)

    def edited(self, x: Tensor) -> Tensor:
        """The source in x's shape."""
        source = self._like(self.source_BTX, x)
        return self._same_size(source, x, "source").expand_as(x)  # type: ignore[arg-type]

    def width(self) -> int | None:
        """Last dimension of the source."""
        return self.source_BTX.shape[-1]


KINDS: dict[str, type[Intervention]] = {
    "add": Add,
    "low_rank": LowRank,
    "scale": Scale,
    "set": Set,
    "ablate": Ablate,
    "interchange": Interchange,
}


def check_fit(intervention: Intervention, architecture: Architecture) -> None:
    """`InterventionError` (or `SiteError`) with the reason when an edit does not fit a model."""
    size = architecture.site_width(intervention.site)
    implied = intervention.width()
    if isinstance(intervention, LowRank) and intervention.indices is not None:
        raise InterventionError(
            f"{intervention.site}: a low-rank edit acts on all coordinates; drop indices."
        )
    if intervention.indices is not None:
        if max(intervention.indices, default=0) >= size:
            raise InterventionError(
                f"{intervention.site}: index {max(intervention.indices)} is beyond its {size} coordinates."
            )
        if implied in (None, len(intervention.indices)):
            return
    if implied is not None and implied != size:
        raise InterventionError(
            f"{intervention.site}: {type(intervention).__name__} was made for size {implied}, but this site of "
            f"{architecture.family} has {size}."
        )


def save_interventions(folder: str | Path, interventions: Sequence[Intervention], model: Model) -> Path:
    """Write interventions as JSON plus safetensors, with format version and the model's fingerprint and shape."""
    from shared.intervention_files import save

    return save(folder, interventions, model)


def load_interventions(folder: str | Path, model: Model, allow_other: bool = False) -> list[Intervention]:
    """Read interventions for a model; `InterventionError` says why they do not fit.

    `allow_other` accepts another fingerprint (another checkpoint of the same shape); shapes are checked always.
    """
    from shared.intervention_files import load

    return load(folder, model, allow_other)
