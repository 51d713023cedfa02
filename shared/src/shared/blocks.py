"""Weights, norms and settings of one block as plain tensors, the same for every family.

What a linear replacement of the backward pass needs (RelP; circuits digest 1.4): every projection as an [out, in]
matrix cut out of fused weights by the architecture table, every norm with its effective gain, and the settings of
attention. The tensors are views of the model's parameters wherever the layout allows (per-head fused weights are
copied); never write to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from shared.errors import UserError

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
class BlockView:
    """One block's weights [out, in], biases (None where absent), norms (None where absent) and settings.

    A block computes, with n the norms and P the post-norms (identity where None):
    attn_out = P1(W_o heads + b_o), mlp_out = P2(W_down (act(W_gate x) * W_up x) + b_down), x = n2(residual);
    ungated families have W_gate None and neurons act(W_up x + b_up). `parallel`: the MLP reads the block's input.
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
    W_gate: Tensor | None
    W_up: Tensor
    W_down: Tensor
    b_gate: Tensor | None
    b_up: Tensor | None
    b_down: Tensor | None
    activation: str
    attention_scale: float
    attention_softcap: float | None
    sliding_window: int | None
    parallel: bool


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
    gate = linear(module(row.gate), architecture.columns("gate")) if row.gate else (None, None)
    up, down = linear(module(row.up), architecture.columns("up")), linear(module(row.down))
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
        W_gate=gate[0],
        W_up=up[0],
        W_down=down[0],
        b_gate=gate[1],
        b_up=up[1],
        b_down=down[1],
        activation=architecture.activation,
        attention_scale=float(attention.scaling),
        attention_softcap=getattr(architecture.config, "attn_logit_softcapping", None),
        sliding_window=sliding_window(architecture, layer),
        parallel=architecture.parallel,
    )


def sliding_window(architecture: Architecture, layer: int) -> int | None:
    """Number of tokens that a block's attention sees, or None for all of them."""
    types = getattr(architecture.config, "layer_types", None)
    if types is not None and types[layer] != "sliding_attention":
        return None
    return getattr(architecture.config, "sliding_window", None)
