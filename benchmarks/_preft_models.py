"""Models and adapters of the serving benchmark, made on this machine: nothing is fetched.

`25m` has random weights and Llama-3.1-8B's proportions at an eighth of its width (4 query heads for each key/value
head, SwiGLU of 3.5 times the width). The others are the shapes of real models for a GPU: the engine fills them with
random weights (`load_format=dummy`). Adapters are distinct random ones in this project's format; the all-token twin of
a prefill-only adapter links to the same weights.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from preft.adapters import Adapter, AdapterConfig, Delta, LoRADelta, ReFTDelta, target_paths
from preft.formats import WEIGHTS_FILE, save_adapter
from preft.vllm.identity import CONFIG_FILE, PHASE_SECTION
from shared.architecture import features
from shared.serialize import read_json, write_json
from shared.tokens import Phase

LLAMA: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
LLAMA |= {"rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": 1}
QWEN: dict[str, Any] = LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


class Shape(NamedTuple):
    """A model's config.json, and whether it needs a GPU (then its weights are made by the engine)."""

    config: dict[str, Any]
    needs_gpu: bool = True


def _shape(family: dict[str, Any], width: int, mlp: int, layers: int, heads: tuple[int, int], vocabulary: int,
           **more: Any) -> dict[str, Any]:  # fmt: skip
    sizes = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "vocab_size": vocabulary}
    return family | sizes | {"rope_theta": 500000.0} | more


SHAPES = {
    "25m": Shape(_shape(LLAMA, 512, 1792, 6, (8, 2), 8192, tie_word_embeddings=True), needs_gpu=False),
    "qwen2.5-0.5b": Shape(_shape(QWEN, 896, 4864, 24, (14, 2), 151936, tie_word_embeddings=True)),
    "llama-3.1-8b": Shape(_shape(LLAMA, 4096, 14336, 32, (32, 8), 128256)),
    "llama-3.1-70b-slice": Shape(_shape(LLAMA, 8192, 28672, 8, (64, 8), 128256)),  # 8 of its 80 layers
}
DISTINCT_BYTES = 2**30
METHODS = {"lora": "lora", "reft": "direft"}


def model_folder(name: str, root: Path) -> Path:
    """Folder with the model's config.json and, unless the engine makes them, its weights; written once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = root / name
    if not (folder / "config.json").is_file():
        write_json(folder / "config.json", SHAPES[name].config | {"torch_dtype": "float32"})
        if not SHAPES[name].needs_gpu:
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def adapter_folders(model: Path, kind: str, rank: int, count: int, phase: Phase) -> list[Path]:
    """Folders of `count` adapters, `kind` lora (every linear layer) or reft (every block); written once.

    Their weights are distinct up to `DISTINCT_BYTES` of files, after which they repeat: each has its own name, slot and
    place in memory all the same.
    """
    root = model / "adapters" / f"{kind}_r{rank}"
    folders = [root / phase / str(i) for i in range(count)]
    missing = [i for i, folder in enumerate(folders) if not (folder / CONFIG_FILE).is_file()]
    hf = skeleton(model) if missing else None
    for i in missing:
        first = root / Phase.PREFILL / "0" / WEIGHTS_FILE
        distinct = max(1, DISTINCT_BYTES // first.stat().st_size) if i else 1
        original = root / Phase.PREFILL / str(i % distinct)
        if not (original / CONFIG_FILE).is_file():
            # Not strict: stock vLLM must be able to read the twin that acts on all tokens.
            save_adapter(_random_adapter(hf, kind, rank, seed=i % distinct), original, strict=False)
        if folders[i] != original:
            _twin(original, folders[i], phase)
    return folders


@cache
def skeleton(model: Path) -> Any:
    """The Hugging Face model without weights: names and shapes only."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))


def _random_adapter(hf: Any, kind: str, rank: int, seed: int) -> Adapter:
    """An adapter none of whose factors is zero: an operator must not be able to skip it."""
    config = AdapterConfig(METHODS[kind], rank=rank)
    generator = torch.Generator().manual_seed(seed)
    deltas: dict[str, Delta] = {}
    for path in target_paths(hf, config):
        deltas[path] = _delta(hf, path, config, generator)
        with torch.no_grad():
            for parameter in deltas[path].parameters():
                noise = torch.empty_like(parameter).uniform_(-1, 1, generator=generator)
                parameter += noise / parameter.shape[-1] ** 0.5
    return Adapter(config, deltas)


def _delta(hf: Any, path: str, config: AdapterConfig, generator: torch.Generator) -> Delta:
    if config.is_lora:
        return LoRADelta(*features(hf.get_submodule(path)), config.rank, config.scale, generator)
    return ReFTDelta(hf.config.hidden_size, config.rank, config.method, generator)


def _twin(folder: Path, twin: Path, phase: Phase) -> None:
    """The same adapter with another phase: a configuration of its own, the weights linked."""
    twin.mkdir(parents=True, exist_ok=True)
    if not (twin / WEIGHTS_FILE).exists():
        os.link(folder / WEIGHTS_FILE, twin / WEIGHTS_FILE)
    raw = read_json(folder / CONFIG_FILE)
    write_json(twin / CONFIG_FILE, raw | {PHASE_SECTION: raw[PHASE_SECTION] | {"phase": phase}})
