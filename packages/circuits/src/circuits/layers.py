"""One block of the frozen network: its weights, its frozen coefficients, and its linear steps both ways.

With x the residual stream entering the block, everything below is linear once the coefficients (norm scales c,
attention pattern A, neuron coefficients p and q) are held at their observed values:

    attention:  x + c_post * (W_O A (W_V c x + b_V) + b_O)
    neurons:    a = p (W_g c x + b_g) + q (W_u c x + b_u)
    MLP write:  x + c_post * (W_d a + b_d)

The transposed steps act on cotangents g (B K T D: K targets an example) and are plain products: no autograd, any
number of targets at once, the module of the user's model never touched (paper section 3; digest 3.1).
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.frozen_attention import Columns, FrozenAttention

if TYPE_CHECKING:
    from shared.blocks import BlockView

Cotangent = Float[Tensor, "B K T D"]


@dataclass(frozen=True)
class FrozenNorm:
    """y = scale * x (minus the mean of x first where `centred`) + shift, with the scale frozen per position."""

    scale_BTD: Float[Tensor, "B T #D"]
    shift_D: Float[Tensor, " D"] | None = None
    centred: bool = False
    identical: bool = False  # y = x: no product with a scale of ones

    @classmethod
    def identity(cls, x_BTD: Float[Tensor, "B T D"]) -> "FrozenNorm":
        """Return the norm that is none, for a stream like x."""
        return cls(torch.ones_like(x_BTD[..., :1]), identical=True)

    def forward(self, x_BKTD: Cotangent, shift: bool = True) -> Cotangent:
        """Apply the frozen norm; `shift=False` gives its linear part alone."""
        if self.identical:
            return x_BKTD
        x_BKTD = x_BKTD - x_BKTD.mean(-1, keepdim=True) if self.centred else x_BKTD
        y_BKTD = x_BKTD * self.scale_BTD[:, None]
        return y_BKTD + self.shift_D if shift and self.shift_D is not None else y_BKTD

    def transpose(self, g_BKTD: Cotangent) -> Cotangent:
        """Pull a cotangent on the output back to the input."""
        if self.identical:
            return g_BKTD
        g_BKTD = g_BKTD * self.scale_BTD[:, None]
        return g_BKTD - g_BKTD.mean(-1, keepdim=True) if self.centred else g_BKTD

    def add_transpose_(self, total_BKTD: Cotangent, g_BKTD: Cotangent) -> None:
        """Add the same to a total in place, without the product's tensor where it can be."""
        if self.identical or self.centred:
            total_BKTD += self.transpose(g_BKTD)
        else:
            total_BKTD.addcmul_(g_BKTD, self.scale_BTD[:, None])

    def select(self, rows: slice, keep: Columns) -> "FrozenNorm":
        """Return the norm of some examples at the columns `keep`."""
        return replace(self, scale_BTD=self.scale_BTD[rows][:, keep])


@dataclass(frozen=True)
class BlockWeights:
    """The linear maps of one block (rows are outputs) in working precision; X is G*d, Y is H*d, biases may be absent.

    Nothing is copied for good: a half-precision matrix is widened, and those of experts are put side by side, for each
    product, and dropped after it.
    """

    view: "BlockView"

    @property
    def value_XD(self) -> Float[Tensor, "X D"]:
        """Value projection."""
        return working(self.view.W_v)

    @property
    def value_bias_X(self) -> Float[Tensor, " X"] | None:
        """Its bias."""
        return optional(self.view.b_v)

    @property
    def out_DY(self) -> Float[Tensor, "D Y"]:
        """Output projection of attention."""
        return working(self.view.W_o)

    @property
    def out_bias_D(self) -> Float[Tensor, " D"] | None:
        """Its bias."""
        return optional(self.view.b_o)

    @property
    def gate_ND(self) -> Float[Tensor, "N D"] | None:
        """Gate projection, where the MLP is gated."""
        return optional(self.view.W_gate)

    @property
    def gate_bias_N(self) -> Float[Tensor, " N"] | None:
        """Its bias."""
        return optional(self.view.b_gate)

    @property
    def up_ND(self) -> Float[Tensor, "N D"]:
        """Up projection."""
        return working(self.view.W_up)

    @property
    def up_bias_N(self) -> Float[Tensor, " N"] | None:
        """Its bias."""
        return optional(self.view.b_up)

    @property
    def down_DN(self) -> Float[Tensor, "D N"]:
        """Down projection."""
        return working(self.view.W_down)

    @property
    def down_bias_D(self) -> Float[Tensor, " D"] | None:
        """Its bias."""
        return optional(self.view.b_down)


def working(tensor: Tensor) -> Tensor:
    """A tensor in the precision coefficients are kept in: float32, or float64 for a float64 model."""
    tensor = tensor.detach()
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def optional(tensor: Tensor | None) -> Tensor | None:
    """The same of a tensor that may be absent."""
    return None if tensor is None else working(tensor)


@dataclass(frozen=True)
class FrozenBlock:
    """One block at its observed point; `parallel` blocks feed attention and MLP from the same residual stream."""

    weights: BlockWeights
    attention: FrozenAttention
    attn_norm: FrozenNorm
    attn_post: FrozenNorm
    mlp_norm: FrozenNorm
    mlp_post: FrozenNorm
    gate_BTN: Float[Tensor, "B T N"] | None
    up_BTN: Float[Tensor, "B T N"]
    neurons_BTN: Float[Tensor, "B T N"]
    output_BTD: Float[Tensor, "B T D"]
    parallel: bool

    @property
    def affine(self) -> bool:
        """Whether the block has any bias or norm shift (most families have none)."""
        view = self.weights.view
        biases = (view.b_v, view.b_o, view.b_gate, view.b_up, view.b_down)
        norms = (self.attn_norm, self.attn_post, self.mlp_norm, self.mlp_post)
        return any(b is not None for b in biases) or any(norm.shift_D is not None for norm in norms)

    def select(self, rows: slice, keep: Columns) -> "FrozenBlock":
        """Return the block of some examples with only the columns `keep` (see `FrozenAttention.select`)."""
        norms = {
            name: getattr(self, name).select(rows, keep)
            for name in ("attn_norm", "attn_post", "mlp_norm", "mlp_post")
        }
        return replace(
            self,
            **norms,
            attention=self.attention.select(rows, keep),
            gate_BTN=None if self.gate_BTN is None else self.gate_BTN[rows][:, keep],
            up_BTN=self.up_BTN[rows][:, keep],
            neurons_BTN=self.neurons_BTN[rows][:, keep],
            output_BTD=self.output_BTD[rows][:, keep],
        )

    def attention_forward(self, x_BKTD: Cotangent, bias: bool = True) -> Cotangent:
        """Return what attention adds to the residual stream; `bias=False` gives the linear part alone."""
        raw_BKTD = self.attention.mix(self._values(x_BKTD, bias)) @ self.weights.out_DY.T
        return self._attention_write(raw_BKTD, self.attn_post, bias)

    def attention_at(self, x_BKTD: Cotangent, columns_S: Int[Tensor, " S"]) -> Float[Tensor, "B K S D"]:
        """Return what attention adds at a few columns (increasing), reading the whole stream."""
        raw_BKSD = self.attention.mix(self._values(x_BKTD, True), columns_S) @ self.weights.out_DY.T
        return self._attention_write(raw_BKSD, self.attn_post.select(slice(None), columns_S), True)

    def _values(self, x_BKTD: Cotangent, bias: bool) -> Float[Tensor, "B K T X"]:
        w = self.weights
        value_BKTX = self.attn_norm.forward(x_BKTD, bias) @ w.value_XD.T
        if bias and w.value_bias_X is not None:
            value_BKTX = value_BKTX + w.value_bias_X
        return value_BKTX

    def _attention_write(self, raw_BKTD: Cotangent, post: FrozenNorm, bias: bool) -> Cotangent:
        if bias and self.weights.out_bias_D is not None:
            raw_BKTD = raw_BKTD + self.weights.out_bias_D
        return post.forward(raw_BKTD, bias)

    def heads_transpose(self, g_BKTD: Cotangent) -> Float[Tensor, "B K T Y"]:
        """Return the effect of one unit of every head coordinate (input of the output projection)."""
        return self.attn_post.transpose(g_BKTD) @ self.weights.out_DY

    def attention_transpose(self, g_BKTD: Cotangent) -> Cotangent:
        """Pull a cotangent on the residual stream after attention back through the OV paths alone."""
        return self.attn_norm.transpose(self._values_transpose(g_BKTD))

    def add_attention_transpose_(self, g_BKTD: Cotangent) -> None:
        """Add the same to the cotangent, in place."""
        self.attn_norm.add_transpose_(g_BKTD, self._values_transpose(g_BKTD))

    def _values_transpose(self, g_BKTD: Cotangent) -> Cotangent:
        return self.attention.mix_transpose(self.heads_transpose(g_BKTD)) @ self.weights.value_XD

    def attention_bias(self) -> Float[Tensor, "B T D"]:
        """Return the constant that value, output and norm biases write at each position (pattern rows sum to 1)."""
        w = self.weights
        value_X = torch.zeros_like(w.value_XD[:, 0])
        if self.attn_norm.shift_D is not None:
            value_X = value_X + w.value_XD @ self.attn_norm.shift_D
        if w.value_bias_X is not None:
            value_X = value_X + w.value_bias_X
        n_heads, n_groups = self.attention.query_BHTd.shape[1], self.attention.key_BGTd.shape[1]
        heads_Y = value_X.unflatten(0, (n_groups, -1)).repeat_interleave(n_heads // n_groups, dim=0).flatten()
        raw_D = w.out_DY @ heads_Y
        raw_D = raw_D if w.out_bias_D is None else raw_D + w.out_bias_D
        shape = (*self.neurons_BTN.shape[:2], raw_D.shape[0])
        return self.attn_post.forward(raw_D.expand(shape)[:, None])[:, 0]

    def neurons_forward(self, x_BKTD: Cotangent, bias: bool = True) -> Float[Tensor, "B K T N"]:
        """Return the neurons for the residual stream that the MLP reads; `bias=False` gives the linear part."""
        normed_BKTD = self.mlp_norm.forward(x_BKTD, shift=False)
        out_BKTN = (normed_BKTD @ self.weights.up_ND.T) * self.up_BTN[:, None]
        if self.gate_BTN is not None and (gate_ND := self.weights.gate_ND) is not None:
            out_BKTN = out_BKTN + (normed_BKTD @ gate_ND.T) * self.gate_BTN[:, None]
        return out_BKTN + self.neuron_bias()[:, None] if bias and self.affine else out_BKTN

    def neurons_transpose(self, g_BKTN: Float[Tensor, "B K T N"]) -> Cotangent:
        """Pull a cotangent on the neurons back to the residual stream that the MLP reads."""
        g_BKTD = (g_BKTN * self.up_BTN[:, None]) @ self.weights.up_ND
        if self.gate_BTN is not None and (gate_ND := self.weights.gate_ND) is not None:
            g_BKTD = g_BKTD + (g_BKTN * self.gate_BTN[:, None]) @ gate_ND
        return self.mlp_norm.transpose(g_BKTD)

    def neuron_bias(self) -> Float[Tensor, "B T N"]:
        """Return the part of each activation that comes from biases in front of it (zero where there are none)."""
        w, shift_D = self.weights, self.mlp_norm.shift_D
        share_BTN = torch.zeros_like(self.neurons_BTN)
        for matrix_ND, bias_N, coefficient_BTN in (
            (w.up_ND, w.up_bias_N, self.up_BTN),
            (w.gate_ND, w.gate_bias_N, self.gate_BTN),
        ):
            if coefficient_BTN is None or matrix_ND is None:
                continue
            if shift_D is not None:
                share_BTN = share_BTN + coefficient_BTN * (matrix_ND @ shift_D)
            if bias_N is not None:
                share_BTN = share_BTN + coefficient_BTN * bias_N
        return share_BTN

    def write_forward(self, a_BKTN: Float[Tensor, "B K T N"], bias: bool = True) -> Cotangent:
        """Return what the MLP with neurons a adds to the residual stream."""
        raw_BKTD = a_BKTN @ self.weights.down_DN.T
        if bias and self.weights.down_bias_D is not None:
            raw_BKTD = raw_BKTD + self.weights.down_bias_D
        return self.mlp_post.forward(raw_BKTD, bias)

    def write_transpose(self, g_BKTD: Cotangent) -> Float[Tensor, "B K T N"]:
        """Return the effect of one unit of every neuron: the cotangent on a, r = c_post g W_d."""
        return self.mlp_post.transpose(g_BKTD) @ self.weights.down_DN

    def mlp_bias(self) -> Float[Tensor, "B T D"]:
        """Return the constant the down projection's bias writes at each position."""
        raw_BTD = torch.zeros_like(self.output_BTD)
        if self.weights.down_bias_D is not None:
            raw_BTD = raw_BTD + self.weights.down_bias_D
        return self.mlp_post.forward(raw_BTD[:, None])[:, 0]
