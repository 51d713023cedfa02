"""The backward rules of RelP: which local coefficient each non-linearity is replaced by.

The forward pass is unchanged; every non-linear component is then read as a linear map whose coefficient is frozen at
the observed activations (paper section 3, RelP; Appendix B for conservation):

1. element-wise activation: the secant `act(z) = kappa(z) z`, with kappa in a form that never divides by z;
2. gate product `a = s u` with `s = kappa z`: the half rule, `da/ds = u / 2` and `da/du = s / 2`, so that the
   coefficients times the inputs add up to `a` again;
3. norms keep their observed scale, attention keeps its observed pattern (see `circuits.linearize`);
4. a router keeps its choice and its weights: a neuron of a mixture of experts is pi act(z) u with pi constant, zero
   where its expert was not chosen.

Together, a neuron is `a = p z + q u` with `p = kappa u / 2` and `q = kappa z / 2`: an exact identity at the observed
point, and linear in (z, u). The switches of `Rules` are the paper's ablations of the method.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from shared.errors import UserError


class RulesError(UserError):
    """An activation function has no secant rule."""


@dataclass(frozen=True)
class Rules:
    """Switches of the linearisation; the defaults are RelP, the others its ablations.

    `half=False` gives both factors of the gate product full credit (breaks conservation); `gate="detached"` treats
    the whole of act(z) as a constant, so that all credit goes to u. `qk="open"` lets credit through queries and keys,
    `norm="open"` differentiates norms (both break conservation, and leave no frozen network: see `circuits.surrogate`).
    """

    half: bool = True
    gate: Literal["secant", "detached"] = "secant"
    qk: Literal["frozen", "open"] = "frozen"
    norm: Literal["frozen", "open"] = "frozen"

    @property
    def linear(self) -> bool:
        """Whether these rules leave a linear network with constant coefficients."""
        return self.qk == "frozen" and self.norm == "frozen"


class NeuronCoefficients(NamedTuple):
    """The frozen coefficients of a layer's neurons: a = gate * z + up * u (gate is None in an ungated MLP)."""

    gate: Float[Tensor, "B T N"] | None
    up: Float[Tensor, "B T N"]

    def routed(self, routing_BTN: Float[Tensor, "B T N"]) -> "NeuronCoefficients":
        """Return them with each neuron's routing weight as a factor; their memory is used."""
        return NeuronCoefficients(
            None if self.gate is None else self.gate.mul_(routing_BTN), self.up.mul_(routing_BTN)
        )


def _tanh_gelu(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-z / math.sqrt(2))


SECANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.sigmoid,
    "swish": torch.sigmoid,
    "gelu": _normal_cdf,
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "quick_gelu": lambda z: torch.sigmoid(1.702 * z),
    "relu": lambda z: (z > 0).to(z.dtype),
    "relu2": torch.relu,
    "linear": torch.ones_like,
}


def secant(activation: str, z: Tensor) -> Tensor:
    """Return kappa(z) with act(z) = kappa(z) z, any shape; unknown activations raise RulesError."""
    if activation not in SECANTS:
        known = ", ".join(sorted(SECANTS))
        raise RulesError(f"no secant rule for the activation {activation!r}; rules exist for: {known}")
    return SECANTS[activation](z)


def neuron_coefficients(
    activation: str, gate_BTN: Float[Tensor, "B T N"] | None, up_BTN: Float[Tensor, "B T N"], rules: Rules
) -> NeuronCoefficients:
    """Return the coefficients of one layer's neurons from its pre-activations (`gate` is None where ungated)."""
    if gate_BTN is None:
        return NeuronCoefficients(None, secant(activation, up_BTN))
    kappa_BTN = secant(activation, gate_BTN)
    if rules.gate == "detached":
        return NeuronCoefficients(torch.zeros_like(up_BTN), kappa_BTN * gate_BTN)
    share_BTN = kappa_BTN.mul_(0.5) if rules.half else kappa_BTN
    return NeuronCoefficients(share_BTN * up_BTN, share_BTN.mul_(gate_BTN))


def soft_cap_coefficient(logits: Tensor, cap: float | None) -> Tensor:
    """Return tanh(y / C) / (y / C) for pre-cap logits y (1 at zero and where there is no cap)."""
    if cap is None:
        return torch.ones_like(logits)
    ratio = logits / cap
    safe = torch.where(ratio == 0, torch.ones_like(ratio), ratio)
    return torch.where(ratio == 0, torch.ones_like(ratio), torch.tanh(safe) / safe)
