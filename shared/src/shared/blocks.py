"""Weights, norms and settings of one block as plain tensors, the same for every family.

What a linear replacement of the backward pass needs (RelP; circuits digest 1.4): every projection as an [out, in]
matrix cut out of fused weights by the architecture table, every norm with its effective gain, and the settings of
attention. The tensors are views of the model's parameters wherever the layout allows (per-head fused weights are
copied); never write to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from shared.errors import UserError
from shared.experts import SparseMlp

if TYPE_CHECKING:
    from shared.architecture import Architecture, Columns


@dataclass(frozen=True)
class NormView:
    """A norm: y = x / rms(x) * gain (kind rms), or (x - mean) / std * gain + bias (kind layer).

    `gain` is effective: Gemma's stored weight w acts as 1 + w and is given here as 1 + w.
    """

    kind: Literal["rms", "layer"]
    gain: Float[Tensor, " D"]
    bias: Float[Tensor, " D"] | None
    eps: float

    def scale(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B 1"]:
        """1 / rms(x) or 1 / std(x), the part of the norm that RelP holds constant."""
        x = x.float()
        if self.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def __call__(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The norm itself, in float32, returned in x's dtype."""
        centred = x.float()
        if self.kind == "layer":
            centred = centred - centred.mean(-1, keepdim=True)
        y = centred * self.scale(x) * self.gain.float()
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype)


@dataclass(frozen=True)
class DenseMlp:
    """The weights of an MLP, with zeros for the neurons that it has fewer than the widest of a mixed model."""

    W_gate: Tensor | None
    W_up: Tensor
    W_down: Tensor
    b_gate: Tensor | None
    b_up: Tensor | None
    b_down: Tensor | None


@dataclass(frozen=True)
class BlockView:
    """One block's weights [out, in], biases (None where absent), norms (None where absent) and settings.

    A block computes, with n the norms and P the post-norms (identity where None):
    attn_out = P1(W_o heads + b_o), mlp_out = P2(W_down (act(W_gate x) * W_up x) + b_down), x = n2(residual);
    ungated families have W_gate None and neurons act(W_up x + b_up). `parallel`: the MLP reads the block's input.
    In a sparse block neurons also have the routing weight as a factor (`shared.experts`).
    """

    layer: int
    attn_norm: NormView | None
    mlp_norm: NormView | None
    attn_post_norm: NormView | None
    mlp_post_norm: NormView | None
    q_norm: NormView | None
    k_norm: NormView | None
    W_q: Tensor
    W_k: Tensor
    W_v: Tensor
    W_o: Tensor
    b_q: Tensor | None
    b_k: Tensor | None
    b_v: Tensor | None
    b_o: Tensor | None
    mlp: "DenseMlp | SparseMlp"
    activation: str
    attention_scale: float
    attention_softcap: float | None
    sliding_window: int | None
    parallel: bool

    @property
    def W_gate(self) -> Tensor | None:
        """Gate projection, None in ungated families."""
        return self.mlp.W_gate

    @property
    def W_up(self) -> Tensor:
        """Up projection."""
        return self.mlp.W_up

    @property
    def W_down(self) -> Tensor:
        """Down projection."""
        return self.mlp.W_down

    @property
    def b_gate(self) -> Tensor | None:
        """Bias of the gate projection."""
        return self.mlp.b_gate

    @property
    def b_up(self) -> Tensor | None:
        """Bias of the up projection."""
        return self.mlp.b_up

    @property
    def b_down(self) -> Tensor | None:
        """Bias of the down projection."""
        return self.mlp.b_down


def norm_view(module: Any, kind: str) -> NormView:
    """The `NormView` of a norm module of the given kind (rms, rms_plus_one, layer)."""
    eps = getattr(module, "variance_epsilon", None) or module.eps
    if kind == "layer":
        return NormView("layer", module.weight, module.bias, float(eps))
    gain = module.weight + 1.0 if kind == "rms_plus_one" else module.weight
    return NormView("rms", gain, None, float(eps))


def linear(module: Any, columns: Columns | None = None) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] of a linear layer (Linear or Conv1D), cut to `columns` of its output."""
    weight, bias = module.weight, module.bias
    if not weight.is_floating_point():
        raise UserError(
            "This model is quantised: its weights are not available as plain matrices. "
            "Load it without quantization to read weights (circuits need them)."
        )
    if hasattr(module, "nf"):  # Conv1D keeps [in, out]
        weight = weight.T
    if columns is None:
        return weight, bias
    return weight[columns], None if bias is None else bias[columns]


def block_view(architecture: Architecture, layer: int) -> BlockView:
    """Assemble the `BlockView` of one block; negative layers count from the end."""
    layer = range(architecture.n_layers)[layer]
    row = architecture.row

    def module(path: str) -> Any:
        return architecture._module(architecture.block_path(layer, path))

    def norm(path: str | None) -> NormView | None:
        return norm_view(module(path), row.norm) if path else None

    attention = module(row.attn)
    q, k, v = (linear(module(getattr(row, kind)), architecture.columns(kind)) for kind in ("q", "k", "v"))
    o = linear(module(row.o))
    mlp: DenseMlp | SparseMlp
    if architecture.experts(layer):
        mlp = SparseMlp(module(str(row.sparse_mlp)), architecture.n_neurons)
    else:
        mlp = dense_mlp(architecture, module)
    return BlockView(
        layer=layer,
        attn_norm=norm(row.attn_norm),
        mlp_norm=norm(row.mlp_norm),
        attn_post_norm=norm(row.attn_post_norm),
        mlp_post_norm=norm(row.mlp_post_norm),
        q_norm=norm(row.q_norm),
        k_norm=norm(row.k_norm),
        W_q=q[0],
        W_k=k[0],
        W_v=v[0],
        W_o=o[0],
        b_q=q[1],
        b_k=k[1],
        b_v=v[1],
        b_o=o[1],
        mlp=mlp,
        activation=architecture.activation,
        attention_scale=float(attention.scaling),
        attention_softcap=getattr(architecture.config, "attn_logit_softcapping", None),
        sliding_window=sliding_window(architecture, layer),
        parallel=architecture.parallel,
    )


def dense_mlp(architecture: Architecture, module: Callable[[str], Any]) -> DenseMlp:
    """The weights of a block's MLP, whose modules `module` finds."""
    row = architecture.row
    W_gate, b_gate = linear(module(row.gate), architecture.columns("gate")) if row.gate else (None, None)
    W_up, b_up = linear(module(row.up), architecture.columns("up"))
    W_down, b_down = linear(module(row.down))
    if (
        missing := architecture.n_neurons - W_down.shape[1]
    ):  # beside wider blocks of experts; without biases there
        W_gate = None if W_gate is None else pad(W_gate, (0, 0, 0, missing))
        W_up, W_down = pad(W_up, (0, 0, 0, missing)), pad(W_down, (0, missing))
    return DenseMlp(W_gate, W_up, W_down, b_gate, b_up, b_down)


def sliding_window(architecture: Architecture, layer: int) -> int | None:
    """Number of tokens that a block's attention sees, or None for all of them."""
    types = getattr(architecture.config, "layer_types", None)
    if types is not None and types[layer] != "sliding_attention":
        return None
    return getattr(architecture.config, "sliding_window", None)
