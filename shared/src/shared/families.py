"""The model families: one row each, which names where a Hugging Face family keeps its modules.

`shared.architecture` binds a row to a loaded model. A family with the structure of another is one more row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """Module paths of one model family; block paths are relative to one block."""

    model_type: str
    layers: str = "model.layers"
    embed: str = "model.embed_tokens"
    position: str | None = None
    final_norm: str = "model.norm"
    unembed: str = "lm_head"
    attn: str = "self_attn"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    q_norm: str | None = None
    k_norm: str | None = None
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attn_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    attn_post_norm: str | None = None
    mlp_post_norm: str | None = None
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    fused: Literal["none", "stacked", "per_head"] = "none"
    fused_gate_up: bool = False
    act: str = "mlp.act_fn"
    experts: str | None = None

    @property
    def sparse_mlp(self) -> str | None:
        """Path of the mixture-of-experts MLP, in the blocks that have one; gate, up, down and act are the others'."""
        return self.experts.rpartition(".")[0] if self.experts else None


_LLAMA = Family("llama")
_SANDWICH: dict[str, Any] = {
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
    "norm": "rms_plus_one",
}
_QK_NORM: dict[str, Any] = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_EXPERTS: dict[str, Any] = {"experts": "mlp.experts"}

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, model_type="mistral"),
    "qwen2": replace(_LLAMA, model_type="qwen2"),
    "qwen3": replace(_LLAMA, model_type="qwen3", **_QK_NORM),
    "gemma2": replace(_LLAMA, model_type="gemma2", **_SANDWICH),
    "gemma3": replace(_LLAMA, model_type="gemma3_text", **_SANDWICH, **_QK_NORM),
    "olmo2": replace(
        _LLAMA,
        model_type="olmo2",
        attn_norm=None,
        mlp_norm=None,
        attn_post_norm="post_attention_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
        **_QK_NORM,
    ),
    "phi3": replace(
        _LLAMA,
        model_type="phi3",
        q="self_attn.qkv_proj",
        k="self_attn.qkv_proj",
        v="self_attn.qkv_proj",
        fused="stacked",
        gate="mlp.gate_up_proj",
        up="mlp.gate_up_proj",
        fused_gate_up=True,
        act="mlp.activation_fn",
    ),
    "gpt_neox": Family(
        model_type="gpt_neox",
        layers="gpt_neox.layers",
        embed="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        attn="attention",
        q="attention.query_key_value",
        k="attention.query_key_value",
        v="attention.query_key_value",
        o="attention.dense",
        gate=None,
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        norm="layer",
        fused="per_head",
        act="mlp.act",
    ),
    "gpt2": Family(
        model_type="gpt2",
        layers="transformer.h",
        embed="transformer.wte",
        position="transformer.wpe",
        final_norm="transformer.ln_f",
        attn="attn",
        q="attn.c_attn",
        k="attn.c_attn",
        v="attn.c_attn",
        o="attn.c_proj",
        gate=None,
        up="mlp.c_fc",
        down="mlp.c_proj",
        attn_norm="ln_1",
        mlp_norm="ln_2",
        norm="layer",
        fused="stacked",
        act="mlp.act",
    ),
    "mixtral": replace(_LLAMA, model_type="mixtral", **_EXPERTS),
    "olmoe": replace(_LLAMA, model_type="olmoe", **_QK_NORM, **_EXPERTS),
    "qwen2_moe": replace(_LLAMA, model_type="qwen2_moe", **_EXPERTS),
    "qwen3_moe": replace(_LLAMA, model_type="qwen3_moe", **_QK_NORM, **_EXPERTS),
}
