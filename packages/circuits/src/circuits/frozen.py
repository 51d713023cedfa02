"""The whole frozen network: seeds at the logits, one backward sweep, and its forward pass for real edits.

`FrozenNetwork` holds the blocks of one batch at its observed point. Two readings of it:

- `sweep(seed)` walks the blocks from the last to the first and yields, per block, the cotangents that attribution
  reads: total effects on every neuron, on every bias, and at the bottom on the embeddings (one pass for K targets);
- `forward(embed)` runs the network forward with its coefficients held, so that an edit can really be made in it: the
  ground truth of direct and total effects, and the forward-mode token maps.

Conservation (paper Appendix B; digest I1): value = sum over embeddings + sum over bias nodes, exactly.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.frozen_attention import Columns
from circuits.layers import Cotangent, FrozenBlock, FrozenNorm
from circuits.metric import LOGITS, Metric, MetricError
from circuits.rules import Rules, soft_cap_coefficient

NeuronHook = Callable[[int, Float[Tensor, "B K T N"]], Float[Tensor, "B K T N"]]


class Level(NamedTuple):
    """What one block's backward step shows: cotangents on its output, its neurons, what attention adds, its input."""

    layer: int
    output_BKTD: Cotangent
    neurons_BKTN: Float[Tensor, "B K T N"]
    attention_BKTD: Cotangent
    input_BKTD: Cotangent


@dataclass(frozen=True)
class FrozenNetwork:
    """A model's forward pass on one batch, as a linear network with explicit biases (see the module docstring)."""

    blocks: tuple[FrozenBlock, ...]
    final_norm: FrozenNorm
    unembed_VD: Float[Tensor, "V D"]
    unembed_bias_V: Float[Tensor, " V"] | None
    final_BTD: Float[Tensor, "B T D"]
    soft_cap: float | None
    embed_BTD: Float[Tensor, "B T D"]
    position_BTD: Float[Tensor, "B T D"] | None
    logits_BTV: Float[Tensor, "B T V"]
    input_ids_BT: Int[Tensor, "B T"]
    real_BT: Bool[Tensor, "B T"]
    rules: Rules

    @property
    def neurons(self) -> list[Float[Tensor, "B T N"]]:
        """The observed activations of every block's neurons."""
        return [block.neurons_BTN for block in self.blocks]

    def observed(self, metric: Metric) -> Float[Tensor, "B T X"]:
        """Return the tensor that a metric reads, as the model computed it."""
        if metric.site == LOGITS:
            return self.logits_BTV
        return (
            self.final_BTD if metric.site == "final_norm" else self.blocks[self.depth(metric) - 1].output_BTD
        )

    def depth(self, metric: Metric) -> int:
        """Return how many blocks lie below what a metric reads."""
        if not metric.site.startswith("blocks."):
            return len(self.blocks)
        layer = int(metric.site.split(".")[1])
        if layer >= len(self.blocks):
            raise MetricError(f"the model has {len(self.blocks)} blocks, so there is no {metric.site}")
        return layer + 1

    def readout(self, metric: Metric) -> tuple[Float[Tensor, "B K V"], Float[Tensor, "B K D"]]:
        """Return each target's weights on the pre-cap logits and, through the unembedding, on the final norm."""
        if self.soft_cap is None:
            capped_BKV = metric.weights_BKV
        else:
            rows = metric.gather(self.final_BTD) @ self.unembed_VD.T
            rows = rows if self.unembed_bias_V is None else rows + self.unembed_bias_V
            capped_BKV = metric.weights_BKV * soft_cap_coefficient(rows, self.soft_cap)
        return capped_BKV, capped_BKV @ self.unembed_VD

    def seed(self, metric: Metric) -> Cotangent:
        """Return the cotangent of each target on the output of the last block below it (zero off its position)."""
        read_BKD = self.readout(metric)[1] if metric.site == LOGITS else metric.weights_BKV
        g_BKTD = read_BKD.new_zeros(*read_BKD.shape[:2], *self.embed_BTD.shape[1:])
        index = metric.positions_BK[..., None, None].expand(-1, -1, 1, g_BKTD.shape[-1])
        g_BKTD = g_BKTD.scatter(2, index, read_BKD[:, :, None])
        return g_BKTD if metric.site.startswith("blocks.") else self.final_norm.transpose(g_BKTD)

    def logit_bias(self, metric: Metric) -> Float[Tensor, "B K"]:
        """Return the part of each target's value that the final norm's shift and the unembedding's bias give."""
        share_BK = torch.zeros_like(metric.positions_BK, dtype=self.embed_BTD.dtype)
        if metric.site.startswith("blocks."):
            return share_BK
        shift_D = self.final_norm.shift_D
        if metric.site != LOGITS:
            return share_BK if shift_D is None else share_BK + metric.weights_BKV @ shift_D
        capped_BKV, read_BKD = self.readout(metric)
        if shift_D is not None:
            share_BK = share_BK + read_BKD @ shift_D
        if self.unembed_bias_V is not None:
            share_BK = share_BK + capped_BKV @ self.unembed_bias_V
        return share_BK

    def sweep(self, seed_BKTD: Cotangent, depth: int | None = None) -> Iterator[Level]:
        """Walk the blocks backwards from a cotangent on a residual stream, through MLPs and attention.

        The stream is the last one, or the one above `depth` blocks.
        """
        g_BKTD = seed_BKTD
        for layer in reversed(range(len(self.blocks) if depth is None else depth)):
            block, output_BKTD = self.blocks[layer], g_BKTD
            neurons_BKTN = block.write_transpose(output_BKTD)
            middle_BKTD = output_BKTD + block.neurons_transpose(neurons_BKTN)
            attention_BKTD = output_BKTD if block.parallel else middle_BKTD
            g_BKTD = middle_BKTD + block.attention_transpose(attention_BKTD)
            yield Level(layer, output_BKTD, neurons_BKTN, attention_BKTD, g_BKTD)

    def forward(
        self, embed_BKTD: Cotangent, bias: bool = True, on_neurons: NeuronHook | None = None
    ) -> Cotangent:
        """Run the frozen network on any embeddings; `on_neurons(layer, a_BKTN)` may read and replace each layer's
        neurons. Returns the residual stream after the last block."""
        x_BKTD = embed_BKTD
        for layer, block in enumerate(self.blocks):
            attn_BKTD = block.attention_forward(x_BKTD, bias)
            a_BKTN = block.neurons_forward(x_BKTD if block.parallel else x_BKTD + attn_BKTD, bias)
            a_BKTN = a_BKTN if on_neurons is None else on_neurons(layer, a_BKTN)
            x_BKTD = x_BKTD + attn_BKTD + block.write_forward(a_BKTN, bias)
        return x_BKTD

    def value(self, residual_BKTD: Cotangent, metric: Metric, bias: bool = True) -> Float[Tensor, "B K"]:
        """Return each target's value in the frozen network for the residual stream after the last block."""
        value_BK = (self.seed(metric) * residual_BKTD).sum((-1, -2))
        return value_BK + self.logit_bias(metric) if bias else value_BK

    def row(self, index: int) -> "FrozenNetwork":
        """Return the frozen network of one example, its padding cut off (B becomes 1); nothing is copied."""
        keep_S = self.real_BT[index].nonzero()[:, 0]
        first, stop = (int(keep_S[0]), int(keep_S[-1]) + 1) if len(keep_S) else (0, 0)
        contiguous = len(keep_S) == stop - first  # padding lies at the ends
        return self.select(slice(index, index + 1), slice(first, stop) if contiguous else keep_S)

    def select(self, rows: slice, keep: Columns) -> "FrozenNetwork":
        """Return the frozen network of some examples at some columns."""
        tensors: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[rows][:, keep]
            for name in ("final_BTD", "embed_BTD", "position_BTD", "logits_BTV", "input_ids_BT", "real_BT")
        }
        return replace(
            self,
            blocks=tuple(block.select(rows, keep) for block in self.blocks),
            final_norm=self.final_norm.select(rows, keep),
            **tensors,
        )
