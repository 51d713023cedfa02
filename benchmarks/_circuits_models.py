"""Models of the circuits benchmark: random weights in the shape of real ones, made here; nothing is fetched.

`small` is the shape that the speed targets name: 12 layers of width 256 with 1,024 neurons. `llama-3.1-8b` needs a GPU.
"""

from typing import Any

import torch

from shared.architecture import Architecture
from shared.loading import wrap
from shared.models import Model, ModelConfig
from shared.random_models import byte_tokenizer
from shared.tokens import TokenBatch, pad


def _llama(width: int, mlp: int, layers: int, heads: tuple[int, int], vocabulary: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "vocab_size": vocabulary}
    return sizes | {"max_position_embeddings": 8192, "tie_word_embeddings": False}


SHAPES = {
    "small": _llama(256, 1024, 12, (4, 2), 2048),
    "llama-3.1-8b": _llama(4096, 14336, 32, (32, 8), 128256),
}


def random_llama(shape: str, dtype: str = "float32", device: str = "cpu", seed: int = 0) -> Model:
    """A Llama of that shape with weights of its own initialisation, made on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama", **SHAPES[shape])
    with torch.device(device):
        hf = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    tokenizer = byte_tokenizer()
    named = ModelConfig(f"random {shape}", dtype=dtype, device=device)
    return Model(hf, wrap(hf, tokenizer), tokenizer, Architecture(hf), named)


def prompts(model: Model, count: int, length: int, seed: int = 0) -> TokenBatch:
    """Random prompts of one length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, model.architecture.vocab_size, (count, length), generator=generator)
    return pad(ids.tolist(), [length] * count, 0)
