"""Tiny random models of every supported family, and a byte-level tokenizer with a chat template, built in code.

For tests and for trying things without a download. Every parameter is drawn from one seeded generator in the order of
names: matrices with standard deviation 1/sqrt(fan in) so that activations keep their size, norm gains around one, and
biases away from zero, so that no term of a formula vanishes by chance. Heads are 64 wide, so vLLM can serve them.
"""

from __future__ import annotations

from typing import Any

import torch

from shared.errors import UserError
from shared.families import FAMILIES

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<|start|>", "<|end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
_HEADS, _KV_HEADS, _HEAD_DIM, _LAYERS, _NEURONS, _WINDOW = 4, 2, 64, 3, 96, 16
# Two of four experts are chosen. The Qwens also have dense blocks, of fewer and of more neurons than the sparse ones.
_ROUTED = {"num_experts": 4, "num_experts_per_tok": 2}
_EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {**_ROUTED, "intermediate_size": 24},
    "olmoe": {**_ROUTED, "intermediate_size": 24},
    "qwen2_moe": {
        **_ROUTED,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 8,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        **_ROUTED,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
    },
}


def random_model(family: str, seed: int = 0) -> tuple[Any, Any]:
    """A tiny float32 model with random weights, and its tokenizer; `UserError` for an unknown family."""
    from transformers import AutoModelForCausalLM

    if family not in FAMILIES:
        raise UserError(f"Unknown family {family!r}: random:<family> takes one of {', '.join(FAMILIES)}.")
    tokenizer = byte_tokenizer()
    hf = AutoModelForCausalLM.from_config(tiny_config(family, tokenizer))
    randomise(hf, seed, norm_centre=0.0 if FAMILIES[family].norm == "rms_plus_one" else 1.0)
    hf.tie_weights()
    return hf, tokenizer


def tiny_config(family: str, tokenizer: Any) -> Any:
    """The Hugging Face config of a tiny model: 3 blocks, 96 neurons, 4 query heads of 64 over 2 key/value heads."""
    from transformers import AutoConfig

    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": _NEURONS,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "max_position_embeddings": 512,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|end|>"),
        "tie_word_embeddings": False,
    }
    # Families whose heads always fill the width.
    if family in ("gpt_neox", "gpt2", "olmo2", "olmoe", "phi3", "qwen2", "qwen2_moe"):
        sizes["hidden_size"] = _HEADS * _HEAD_DIM
        del sizes["head_dim"]
    if family in ("gpt_neox", "gpt2"):
        del sizes["num_key_value_heads"]
    if family == "gpt2":
        sizes["n_inner"] = sizes.pop("intermediate_size")
        sizes |= {"n_positions": sizes.pop("max_position_embeddings"), "tie_word_embeddings": True}
    if family in ("mistral", "mixtral", "phi3", "gemma2", "gemma3"):
        sizes["sliding_window"] = _WINDOW
    if family in ("gemma2", "gemma3"):
        layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
        sizes |= {"query_pre_attn_scalar": 48, "layer_types": layer_types, "tie_word_embeddings": True}
    return AutoConfig.for_model(FAMILIES[family].model_type, **sizes | _EXPERTS.get(family, {}))


def randomise(hf: Any, seed: int, norm_centre: float = 1.0) -> None:
    """Draw every parameter anew, in the order of names, from one generator on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(hf.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                conv1d = ".c_" in name  # GPT-2 keeps [in, out]
                fan_in = parameter.shape[0] if conv1d else parameter.shape[-1]
                parameter.copy_(noise * fan_in**-0.5)
            else:
                centre = norm_centre if name.endswith("weight") else 0.0
                parameter.copy_(centre + 0.1 * noise)


def byte_tokenizer() -> Any:
    """A fast tokenizer of 256 bytes and five special tokens: BOS in front of texts, ChatML-like chats."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    core = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL_TOKENS))
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<|end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|start|>", "<eos>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
