"""LoRA and ReFT acting on the tokens of one phase (PreFT, digest section 1.1 and 1.4).

With m_t = 1 on the tokens of the adapter's phase (`shared.tokens.phase_mask`) and 0 elsewhere, tokens as rows:

    LoRA      y_t  = W0 x_t + m_t s B (A x_t)          at linear layers, s = alpha / r (rsLoRA: alpha / sqrt(r))
    DiReFT    h'_t = h_t + m_t R^T (W h_t + b)         at the output of a block, rows of R orthonormal
    LoReFT    h'_t = h_t + m_t R^T (W h_t + b - R h_t)   same
    NoDiReFT, NoReFT: as DiReFT, LoReFT with R unconstrained

A fresh adapter changes nothing, bit for bit: B = 0; W = 0 and b = 0; W = R and b = 0. R stays orthonormal by a QR
retraction after every optimiser step (`Adapter.retract_`), so that what is saved is what was trained.

An adapter is a module of its own. It acts on a Hugging Face model only inside `with adapter.applied(model, mask_BT)`,
through forward hooks; the model and its weights are never changed.

Letters: B batch, T token, D width, I and O in- and out-features of a linear layer, R rank.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from preft.adapter_config import AdapterConfig, AdapterError, Method
from preft.targets import target_paths
from shared.architecture import Architecture, features
from shared.history import History
from shared.tokens import Phase

ORTHONORMAL = ("direft", "loreft")  # methods whose R has orthonormal rows
SUBTRACTING = ("loreft", "noreft")  # methods that take R h away


class Factors(NamedTuple):
    """A low-rank update as it is saved and served: x -> s B A x, for ReFT on (h, 1)."""

    A: Float[Tensor, "R I"]
    B: Float[Tensor, "O R"]


class LoRADelta(nn.Module):
    """s B (A x), with A uniform as in a linear layer and B = 0."""

    def __init__(
        self, inputs: int, outputs: int, rank: int, scale: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.scale = scale
        bound = 1 / math.sqrt(inputs)
        self.A_RI = nn.Parameter((torch.rand(rank, inputs, generator=generator) * 2 - 1) * bound)
        self.B_OR = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        return (x @ self.A_RI.T) @ self.B_OR.T * self.scale

    def factors(self) -> Factors:
        return Factors(self.A_RI, self.B_OR)

    def load_(self, factors: Factors) -> None:
        self.A_RI.copy_(factors.A)
        self.B_OR.copy_(factors.B)

    def retract_(self) -> None:
        """Nothing to restore: the factors are free."""


class ReFTDelta(nn.Module):
    """R^T (W h + b), minus R^T R h where the method subtracts; fresh: W = 0 (subtracting: W = R), b = 0.

    R starts with random orthonormal rows; `retract_` keeps them so where the method asks for it.
    """

    def __init__(self, width: int, rank: int, method: Method, generator: torch.Generator) -> None:
        super().__init__()
        self.subtracts, self.orthonormal = method in SUBTRACTING, method in ORTHONORMAL
        if rank > width:
            raise AdapterError(f"{method} of rank {rank} does not fit a width of {width}")
        self.R_RD = nn.Parameter(orthonormal_rows(torch.randn(rank, width, generator=generator)))
        start_RD = self.R_RD.detach().clone() if self.subtracts else torch.zeros(rank, width)
        self.W_RD = nn.Parameter(start_RD)
        self.b_R = nn.Parameter(torch.zeros(rank))

    @property
    def inner_RD(self) -> Float[Tensor, "R D"]:
        return self.W_RD - self.R_RD if self.subtracts else self.W_RD

    def forward(self, h: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return (h @ self.inner_RD.T + self.b_R) @ self.R_RD

    def factors(self) -> Factors:
        return Factors(torch.cat([self.inner_RD, self.b_R[:, None]], dim=1), self.R_RD.T)

    def load_(self, factors: Factors) -> None:
        self.R_RD.copy_(factors.B.T)
        self.W_RD.copy_(factors.A[:, :-1] + factors.B.T if self.subtracts else factors.A[:, :-1])
        self.b_R.copy_(factors.A[:, -1])

    def retract_(self) -> None:
        """Make the rows of R orthonormal again, where the method asks for it."""
        if self.orthonormal:
            self.R_RD.copy_(orthonormal_rows(self.R_RD))


Delta = LoRADelta | ReFTDelta
MaskOf = Callable[[Phase], Bool[Tensor, "B T"]]  # the tokens of a phase, in the batch at hand


def orthonormal_rows(x_RD: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
    """Rows of the same span made orthonormal by QR; orthonormal rows come back as they are, up to rounding."""
    q_DR, r_RR = torch.linalg.qr(x_RD.T)
    signs_R = torch.where(torch.diagonal(r_RR) < 0, -1.0, 1.0)
    return (q_DR * signs_R).T.contiguous()


class Adapter(nn.Module):
    """One adapter: its configuration and one `Delta` for every module it acts on, by the module's path."""

    def __init__(self, config: AdapterConfig, deltas: dict[str, Delta]) -> None:
        super().__init__()
        self.config = config
        self.paths = tuple(deltas)
        self.deltas = nn.ModuleList(deltas.values())

    @classmethod
    def create(cls, hf: nn.Module, config: AdapterConfig, seed: int = 0) -> "Adapter":
        """A fresh adapter for a Hugging Face model, on its device, in float32; changes nothing until it is trained.

        AdapterError for a model that is spread over several devices.
        """
        generator = torch.Generator().manual_seed(seed)
        width = Architecture(hf).width
        deltas: dict[str, Delta] = {}
        for path in target_paths(hf, config):
            rank = config.rank_of(path)
            if config.is_lora:
                sizes = features(hf.get_submodule(path))
                deltas[path] = LoRADelta(*sizes, rank, config.scale_of(path), generator)
            else:
                deltas[path] = ReFTDelta(width, rank, config.method, generator)
        return cls(config, deltas).to(_device(hf))

    def parts(self) -> Iterator[tuple[str, Any]]:
        """Path and delta of every module the adapter acts on."""
        yield from zip(self.paths, self.deltas)

    def n_parameters(self) -> int:
        """Number of trained values."""
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def retract_(self) -> None:
        """Restore the constraints of the method (orthonormal R) after an optimiser step."""
        for _, delta in self.parts():
            delta.retract_()

    @property
    def history(self) -> History:
        """What earlier assistant turns count as."""
        return self.config.history

    def applied(self, hf: nn.Module, mask_BT: Bool[Tensor, "B T"]) -> AbstractContextManager[None]:
        """Inside, the model's forward passes carry the adapter on the tokens where the mask is true."""
        return applied_together(hf, [Acting(self, 1.0, mask_BT)])

    def applied_to(self, hf: nn.Module, mask_of: MaskOf) -> AbstractContextManager[None]:
        """`applied` on the tokens of the adapter's phase; `mask_of` gives the mask of a phase."""
        return self.applied(hf, mask_of(self.config.phase))


def _device(hf: nn.Module) -> torch.device:
    """Where all of the model is."""
    devices = {parameter.device: None for parameter in hf.parameters()}
    if len(devices) > 1:
        raise AdapterError(
            f"the model is spread over {', '.join(map(str, devices))}; an adapter needs it on one device: load it "
            "without device_map, in a smaller dtype or quantised if it does not fit"
        )
    return next(iter(devices))


class Acting(NamedTuple):
    """An adapter at work: the weight of its update and the tokens it acts on."""

    adapter: Adapter
    weight: float
    mask_BT: Bool[Tensor, "B T"]


@contextmanager
def applied_together(hf: nn.Module, acting: Iterable[Acting]) -> Iterator[None]:
    """Inside, the model's forward passes carry all these adapters.

    Updates of one module are computed from the same value and summed: no edit sees another's effect at its own site.
    """
    updates: dict[str, list[_Update]] = {}
    for adapter, weight, mask_BT in acting:
        # A mask without a token (a decode step of a prefill adapter) leaves the bare model.
        if bool(mask_BT.any()):
            for path, delta in adapter.parts():
                updates.setdefault(path, []).append(_Update(delta, weight, mask_BT))
    with ExitStack() as stack:
        for path, several in updates.items():
            stack.callback(hf.get_submodule(path).register_forward_hook(partial(_adapted, several)).remove)
        yield


class _Update(NamedTuple):
    delta: Delta
    weight: float
    mask_BT: Bool[Tensor, "B T"]


def _adapted(updates: list[_Update], _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    total = output
    for delta, weight, mask_BT in updates:
        source = args[0] if isinstance(delta, LoRADelta) else output
        with torch.autocast(output.device.type, enabled=False):
            update = (delta(source.to(torch.float32)) * weight).to(output.dtype)
        total = total + update * mask_BT[..., None].to(output.device, output.dtype)
    return total


def check_mergeable(config: AdapterConfig) -> None:
    """AdapterError unless the adapter may become part of the weights: a LoRA that acts on every token."""
    if config.phase != Phase.ALL:
        raise AdapterError(
            f"an adapter of phase {config.phase.value!r} cannot be merged into the weights: they would then act on "
            "every token. Serve it as an adapter, or train one with phase=all."
        )
    if not config.is_lora:
        raise AdapterError(f"{config.method} edits the residual stream; there is no weight to merge it into")


__all__ = [
    "Acting",
    "Adapter",
    "AdapterConfig",
    "AdapterError",
    "Delta",
    "Factors",
    "LoRADelta",
    "MaskOf",
    "ReFTDelta",
    "applied_together",
    "check_mergeable",
    "orthonormal_rows",
    "target_paths",
]
