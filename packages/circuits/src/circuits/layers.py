"""One block of the frozen network: its weights, its frozen coefficients, and its linear steps both ways.

With x the residual stream entering the block, everything below is linear once the coefficients (norm scales c,
attention pattern A, neuron coefficients p and q) are held at their observed values:

    attention:  x + c_post * (W_O A (W_V c x + b_V) + b_O)
    neurons:    a = p (W_g c x + b_g) + q (W_u c x + b_u)
    MLP write:  x + c_post * (W_d a + b_d)

The transposed steps act on cotangents g (B K T D: K targets an example) and are plain products: no autograd, any
number of targets at once, the module of the user's model never touched (paper section 3; digest 3.1).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Cotangent = Float[Tensor, "B K T D"]


@dataclass(frozen=True)
class FrozenNorm:
    """y = scale * x (minus the mean of x first where `centred`) + shift, with the scale frozen per position."""

    scale_BTD: Float[Tensor, "B T #D"]
    shift_D: Float[Tensor, " D"] | None = None
    centred: bool = False

    def forward(self, x_BKTD: Cotangent, shift: bool = True) -> Cotangent:
        """Apply the frozen norm; `shift=False` gives its linear part alone."""
        x_BKTD = x_BKTD - x_BKTD.mean(-1, keepdim=True) if self.centred else x_BKTD
        y_BKTD = x_BKTD * self.scale_BTD[:, None]
        return y_BKTD + self.shift_D if shift and self.shift_D is not None else y_BKTD

    def transpose(self, g_BKTD: Cotangent) -> Cotangent:
        """Pull a cotangent on the output back to the input."""
        g_BKTD = g_BKTD * self.scale_BTD[:, None]
        return g_BKTD - g_BKTD.mean(-1, keepdim=True) if self.centred else g_BKTD


@dataclass(frozen=True)
class BlockWeights:
    """The linear maps of one block as plain tensors (rows are outputs); X is G*d, Y is H*d; biases may be absent."""

    value_XD: Float[Tensor, "X D"]
    value_bias_X: Float[Tensor, " X"] | None
    out_DY: Float[Tensor, "D Y"]
    out_bias_D: Float[Tensor, " D"] | None
    gate_ND: Float[Tensor, "N D"] | None
    gate_bias_N: Float[Tensor, " N"] | None
    up_ND: Float[Tensor, "N D"]
    up_bias_N: Float[Tensor, " N"] | None
    down_DN: Float[Tensor, "D N"]
    down_bias_D: Float[Tensor, " D"] | None


@dataclass(frozen=True)
class FrozenAttention:
    """What rebuilds one layer's pattern: rotated queries and keys, scale, soft cap, and who may look at whom."""

    query_BHTd: Float[Tensor, "B H T d"]
    key_BGTd: Float[Tensor, "B G T d"]
    scaling: float
    soft_cap: float | None
    allowed_BTT: Bool[Tensor, "B T T"]
    softmax_dtype: torch.dtype

    def pattern(self, start: int = 0, stop: int | None = None) -> Float[Tensor, "B H Q T"]:
        """Return the attention pattern of query rows start to stop; rows that may see nothing are zero."""
        query_BHQd = self.query_BHTd[:, :, start:stop]
        groups = query_BHQd.shape[1] // self.key_BGTd.shape[1]
        key_BHTd = self.key_BGTd.repeat_interleave(groups, dim=1)
        score_BHQT = query_BHQd @ key_BHTd.transpose(-1, -2) * self.scaling
        if self.soft_cap is not None:
            score_BHQT = self.soft_cap * torch.tanh(score_BHQT / self.soft_cap)
        blocked_B1QT = ~self.allowed_BTT[:, None, start:stop]
        pattern_BHQT = score_BHQT.masked_fill(blocked_B1QT, -torch.inf).softmax(-1, self.softmax_dtype)
        return pattern_BHQT.to(score_BHQT.dtype).masked_fill(blocked_B1QT, 0.0)

    def mix(self, value_BKTX: Float[Tensor, "B K T X"]) -> Float[Tensor, "B K T Y"]:
        """Apply the pattern to values: A v, key/value heads repeated over their query heads."""
        n_heads, n_groups = self.query_BHTd.shape[1], self.key_BGTd.shape[1]
        value_BKTGd = value_BKTX.unflatten(-1, (n_groups, -1))
        value_BKTHd = value_BKTGd.repeat_interleave(n_heads // n_groups, dim=3)
        return torch.einsum("bhqt,bkthd->bkqhd", self.pattern(), value_BKTHd).flatten(-2)

    def mix_transpose(self, g_BKTY: Float[Tensor, "B K T Y"], block: int = 512) -> Float[Tensor, "B K T X"]:
        """Pull a cotangent on the heads back to the values, rebuilding the pattern `block` query rows at a time."""
        n_heads, n_groups = self.query_BHTd.shape[1], self.key_BGTd.shape[1]
        g_BKTHd = g_BKTY.unflatten(-1, (n_heads, -1))
        total_BKTHd = torch.zeros_like(g_BKTHd)
        for start in range(0, g_BKTHd.shape[2], block):
            rows = g_BKTHd[:, :, start : start + block]
            total_BKTHd += torch.einsum("bhqt,bkqhd->bkthd", self.pattern(start, start + block), rows)
        return total_BKTHd.unflatten(3, (n_groups, -1)).sum(4).flatten(-2)


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
    parallel: bool

    def attention_forward(self, x_BKTD: Cotangent, bias: bool = True) -> Cotangent:
        """Return what attention adds to the residual stream; `bias=False` gives the linear part alone."""
        w = self.weights
        value_BKTX = self.attn_norm.forward(x_BKTD, bias) @ w.value_XD.T
        if bias and w.value_bias_X is not None:
            value_BKTX = value_BKTX + w.value_bias_X
        raw_BKTD = self.attention.mix(value_BKTX) @ w.out_DY.T
        if bias and w.out_bias_D is not None:
            raw_BKTD = raw_BKTD + w.out_bias_D
        return self.attn_post.forward(raw_BKTD, bias)

    def attention_transpose(self, g_BKTD: Cotangent) -> Cotangent:
        """Pull a cotangent on the residual stream after attention back through the OV paths alone."""
        g_BKTY = self.attn_post.transpose(g_BKTD) @ self.weights.out_DY
        return self.attn_norm.transpose(self.attention.mix_transpose(g_BKTY) @ self.weights.value_XD)

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
        if self.gate_BTN is not None and self.weights.gate_ND is not None:
            out_BKTN = out_BKTN + (normed_BKTD @ self.weights.gate_ND.T) * self.gate_BTN[:, None]
        return out_BKTN + self.neuron_bias()[:, None] if bias else out_BKTN

    def neurons_transpose(self, g_BKTN: Float[Tensor, "B K T N"]) -> Cotangent:
        """Pull a cotangent on the neurons back to the residual stream that the MLP reads."""
        g_BKTD = (g_BKTN * self.up_BTN[:, None]) @ self.weights.up_ND
        if self.gate_BTN is not None and self.weights.gate_ND is not None:
            g_BKTD = g_BKTD + (g_BKTN * self.gate_BTN[:, None]) @ self.weights.gate_ND
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
        shape = (*self.neurons_BTN.shape[:2], self.weights.down_DN.shape[0])
        raw_BTD = self.neurons_BTN.new_zeros(shape)
        if self.weights.down_bias_D is not None:
            raw_BTD = raw_BTD + self.weights.down_bias_D
        return self.mlp_post.forward(raw_BTD[:, None])[:, 0]
