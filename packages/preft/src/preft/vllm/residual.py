"""ReFT served as a LoRA: a zero linear layer at the output of every decoder block (digest, section 4d).

A linear ReFT edit is h' = h + B (W h + b), with B = R^T (DiReFT: W free; LoReFT: W minus R). The affine map W h + b is
a linear map of (h, 1), so with A = [W | b] the edit is the LoRA of scale 1

    h' = h + B A (h, 1)

on a layer that takes (h, 1) and returns nothing of its own. vLLM's manager wraps that layer like any other linear one,
and loads, slots, evicts and batches its adapters; the stream is replicated, so tensor parallelism needs nothing more.

vLLM's decoder layers return (hidden, residual), whose *sum* is the residual stream. The edit reads the sum and adds its
delta to `hidden`. Layers with another signature are unknown ground: they get no site, and vLLM then refuses a ReFT
adapter because its module name is not in the model.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

SITE = "residual_edit"  # module name of the site inside its decoder layer; part of the adapter's file format
# The constant 1 is followed by zeros, so that rows stay 16-byte aligned in half precision.
PADDING = 8

# Decoder layers known to return (hidden, residual) with hidden + residual = output of the block.
PAIR_LAYERS = frozenset(
    {
        "Gemma2DecoderLayer",
        "Gemma3DecoderLayer",
        "LlamaDecoderLayer",
        "MistralDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen3DecoderLayer",
    }
)


@cache
def site_class() -> type:
    """The class `ResidualSite`, built on first use because its base imports vLLM."""
    from vllm.model_executor.layers.linear import LinearBase, ReplicatedLinear

    class ResidualSite(ReplicatedLinear):
        """A linear layer from (h, 1) to h without weights: it returns zeros until an adapter is added."""

        def __init__(self, width: int, dtype: torch.dtype, device: torch.device, prefix: str) -> None:
            # Not ReplicatedLinear's own constructor, which would allocate a weight of width x width.
            LinearBase.__init__(self, width + PADDING, width, params_dtype=dtype, prefix=prefix)
            # Empty, but it tells the manager the device.
            self.weight = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
            self.register_parameter("bias", None)

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x.new_zeros(*x.shape[:-1], self.output_size), None

    return ResidualSite


def add_sites(
    model: nn.Module, dtype: torch.dtype, device: torch.device, target_modules: list[str] | None
) -> int:
    """Put a site behind every decoder layer of a known kind; returns how many.

    Call it before vLLM makes its adapter manager. `target_modules` is the deployment's own restriction of adapted
    modules (LoRAConfig.target_modules): where it leaves the sites out, none is made.
    """
    if target_modules is not None and SITE not in target_modules:
        return 0
    layers = [(name, layer) for name, layer in model.named_modules() if type(layer).__name__ in PAIR_LAYERS]
    for name, layer in layers:
        setattr(layer, SITE, site_class()(layer.hidden_size, dtype, device, f"{name}.{SITE}"))
        layer.register_forward_hook(_edit_output)
    return len(layers)


def _edit_output(layer: nn.Module, _: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Forward hook of a decoder layer: add the site's delta to `hidden`."""
    hidden_KD, residual_KD = output
    site = getattr(layer, SITE)
    if not _acts(site):
        return output
    ones_KP = hidden_KD.new_zeros(len(hidden_KD), PADDING)
    ones_KP[:, 0] = 1
    delta_KD, _ = site(torch.cat([hidden_KD + residual_KD, ones_KP], dim=1))
    return hidden_KD + delta_KD, residual_KD


def _acts(site: Any) -> bool:
    """Whether any token of this step is edited here. Only the eager CPU path can ask; a traced one always computes."""
    runs_using = getattr(site.punica_wrapper, "runs_using", None)
    return runs_using is None or bool(runs_using(site.lora_a_stacked[0], site.punica_wrapper.token_runs))
