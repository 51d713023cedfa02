"""ReFT served as a LoRA: a zero linear layer at the output of every decoder block (digest, section 4d).

A linear ReFT edit is h' = h + B (W h + b), with B = R^T (DiReFT: W free; LoReFT: W minus R). The affine map W h + b is
a linear map of (h, 1), so with A = [W | b] the edit is the LoRA of scale 1

    h' = h + B A (h, 1)

on a layer that takes (h, 1) and returns nothing of its own. vLLM's manager wraps that layer like any other linear one,
and loads, slots, evicts and batches its adapters; the stream is replicated, so tensor parallelism needs nothing more.

What a decoder layer returns depends on who wrote it:

    vLLM              (hidden, residual); the residual stream is their *sum*, formed in the next norm. The edit reads
                      the sum and adds its delta to `hidden`. GPT-2's blocks return the stream itself.
    transformers      the stream, 1 x K x D (OLMo 2, GPT-NeoX, and any family under model_impl=transformers)

Layers that are not listed are unknown ground: they get no site, and a ReFT adapter is then refused.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

SITE = "residual_edit"  # module name of the site inside its decoder layer; part of the adapter's file format
# The constant 1 is followed by zeros, so that rows stay 16-byte aligned in half precision.
PADDING = 8

# Decoder layers known to return (hidden, residual) with hidden + residual = output of the block ...
PAIR_LAYERS = frozenset(
    {
        "Gemma2DecoderLayer",
        "Gemma3DecoderLayer",
        "LlamaDecoderLayer",  # Phi-3 too
        "MistralDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen3DecoderLayer",
    }
)
# ... and known to return the output itself: in vLLM, and in transformers.
STREAM_LAYERS = frozenset({"GPT2Block"})
TRANSFORMERS_LAYERS = PAIR_LAYERS | {"GPT2Block", "GPTNeoXLayer", "Olmo2DecoderLayer", "Phi3DecoderLayer"}


@cache
def site_class() -> type:
    """The class `ResidualSite`, built on first use because its base imports vLLM."""
    from vllm.model_executor.layers.linear import LinearBase, ReplicatedLinear

    class ResidualSite(ReplicatedLinear):
        """A linear layer from (h, 1) to h without weights: it returns zeros until an adapter is added."""

        def __init__(self, width: int, dtype: torch.dtype, device: torch.device, prefix: str) -> None:
            # Not ReplicatedLinear's own constructor, which would allocate a weight of width x width.
            LinearBase.__init__(self, width + PADDING, width, params_dtype=dtype, prefix=prefix)
            self.adapter_inputs = width + 1  # of an adapter's A: zeros need no weights
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
    config: Any = model.config
    width = config.get_text_config().hidden_size
    hooks = {name: _hook_of(layer) for name, layer in model.named_modules()}
    sites = {name: hook for name, hook in hooks.items() if hook is not None}
    for name, hook in sites.items():
        layer = model.get_submodule(name)
        setattr(layer, SITE, site_class()(width, dtype, device, f"{name}.{SITE}"))
        layer.register_forward_hook(hook)
    return len(sites)


def _hook_of(layer: nn.Module) -> Callable[..., Any] | None:
    """The hook that edits a decoder layer's output, None for other modules."""
    kind = type(layer).__name__
    if type(layer).__module__.startswith("transformers."):
        return _edit_stream if kind in TRANSFORMERS_LAYERS else None
    if kind in PAIR_LAYERS:
        return _edit_pair
    return _edit_stream if kind in STREAM_LAYERS else None


def _edit_pair(layer: nn.Module, _: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    hidden_KD, residual_KD = output
    if not _acts(getattr(layer, SITE)):
        return output
    return hidden_KD + _delta(layer, hidden_KD + residual_KD), residual_KD


def _edit_stream(layer: nn.Module, _: Any, stream: Tensor) -> Tensor:
    return stream + _delta(layer, stream) if _acts(getattr(layer, SITE)) else stream


def _delta(layer: nn.Module, stream: Tensor) -> Tensor:
    """What the step's adapters add to the stream (K x D, or 1 x K x D)."""
    stream_KD = stream.reshape(-1, stream.shape[-1])
    ones_KP = stream_KD.new_zeros(len(stream_KD), PADDING)
    ones_KP[:, 0] = 1
    delta_KD, _ = getattr(layer, SITE)(torch.cat([stream_KD, ones_KP], dim=1))
    return delta_KD.view_as(stream)


def _acts(site: Any) -> bool:
    """Whether any token of this step is edited here. Only the eager CPU path can ask; a traced one always computes."""
    runs_using = getattr(site.punica_wrapper, "runs_using", None)
    return runs_using is None or bool(runs_using(site.lora_a_stacked[0], site.punica_wrapper.token_runs))


def support_lora(model: nn.Module) -> None:
    """Declare LoRA for a model whose linear layers are all vLLM's own, but whose class in vLLM 0.32 does not say so.

    Fused projections are fused in its checkpoints too, so each is one module of an adapter.
    """
    if type(model).__name__ == "GPT2LMHeadModel":
        declared = {
            "supports_lora": True,
            "packed_modules_mapping": {"c_attn": ["c_attn"]},
            "embedding_modules": {},
            "lora_skip_prefixes": [],
            "lora_manager": None,
            "is_3d_moe_weight": False,
            "is_non_gated_moe": False,
        }
        for name, value in declared.items():
            setattr(model, name, value)
