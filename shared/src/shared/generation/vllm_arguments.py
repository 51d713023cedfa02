"""What vLLM is told: engine arguments of a model configuration, sampling parameters of a draw, and the way back."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import UserError
from shared.generation.json_grammar import json_grammar
from shared.generation.requests import Completion, Draw, Sampling
from shared.intervention_files import JSON_NAME, read, served_rank
from shared.loading import RANDOM, local_path
from shared.models import ModelConfig, load

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import RequestOutput

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the ranks vLLM has buffers for
CPU_KV_CACHE_BYTES = 2**30
GPU_ADAPTER_SLOTS = 16
GPU_SHARE, GPU_MARGIN = 0.9, 0.05  # of a GPU's memory; the margin is for vLLM's own context


def model_arguments(config: ModelConfig, scratch: Path) -> dict[str, Any]:
    """Engine arguments that name the model; random weights are first written into the folder `scratch`."""
    if config.remote:
        raise UserError(
            "vLLM runs here and cannot serve a remote model: set remote=False, or use HFGenerator"
        )
    if config.quantization is not None:
        raise UserError(
            "vLLM has its own quantisation: leave ModelConfig.quantization empty and pass quantization=..."
        )
    return {
        "model": model_folder(config, scratch),
        "dtype": config.dtype,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "seed": config.seed,
    }


def model_folder(config: ModelConfig, scratch: Path) -> str:
    """Folder or hub id that vLLM loads; random weights are written into the folder `scratch`."""
    if config.name.startswith(RANDOM):
        return str(load(config).save(scratch))
    return str(local_path(config) or config.name)


def platform_arguments(on_gpu: bool) -> dict[str, Any]:
    """Engine arguments that depend on the machine: on a CPU eager, in this process, with a bounded cache."""
    common: dict[str, Any] = {
        "use_tqdm_on_load": False,
        "structured_outputs_config": {"backend": "xgrammar"},
    }
    if on_gpu:
        return common | gpu_share()
    kv_cache = (
        {} if os.environ.get("VLLM_CPU_KVCACHE_SPACE") else {"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES}
    )
    return common | {"enforce_eager": True, "distributed_executor_backend": "uni"} | kv_cache


def gpu_share() -> dict[str, Any]:
    """The share of each GPU that vLLM may take, where this process holds a model there; else vLLM's own default.

    vLLM does not start unless its share is free, and its default is nearly all: beside the Hugging Face model that a
    study reads, it must ask for less. UserError where nothing is left.
    """
    import torch

    if not torch.cuda.is_initialized():
        return {}
    memory = [torch.cuda.mem_get_info(gpu) for gpu in range(torch.cuda.device_count())]
    left = min(free / total for free, total in memory) - GPU_MARGIN
    if left <= 0:
        raise UserError(
            "the model in this process leaves vLLM no GPU memory: load it in bfloat16, or on the CPU"
        )
    return {"gpu_memory_utilization": min(GPU_SHARE, left)}


def adapter_arguments(folders: Mapping[str, Path], on_gpu: bool) -> dict[str, Any]:
    """Engine arguments that make room for these adapters; UserError names a folder that holds none.

    On a CPU there is one slot more than adapters: the CPU operators of vLLM 0.32 apply the last slot to tokens
    without an adapter, which is right only as long as that slot stays empty.
    """
    if not folders:
        return {}
    rank = max(adapter_rank(name, folder) for name, folder in folders.items())
    return {
        "enable_lora": True,
        "max_lora_rank": lora_rank(rank),
        "max_loras": min(len(folders), GPU_ADAPTER_SLOTS) if on_gpu else len(folders) + 1,
        "max_cpu_loras": len(folders) + 1,
    }


def lora_rank(rank: int) -> int:
    """The smallest `max_lora_rank` of vLLM that holds a rank; UserError above the largest."""
    if rank > LORA_RANKS[-1]:
        raise UserError(f"rank {rank} is above {LORA_RANKS[-1]}, the highest that vLLM serves")
    return next(size for size in LORA_RANKS if size >= rank)


def adapter_rank(name: str, folder: Path) -> int:
    """Highest rank stated in a PEFT folder's adapter_config.json, or that saved interventions need; else UserError."""
    file = folder / "adapter_config.json"
    if not file.is_file() and (folder / JSON_NAME).is_file():
        return served_rank(read(folder))
    if not file.is_file():
        raise UserError(
            f"adapter {name!r}: no adapter_config.json in {folder}; give the folder the adapter was saved to, or one "
            "of saved interventions"
        )
    config = json.loads(file.read_text())
    return max([int(config["r"]), *(config.get("rank_pattern") or {}).values()])


def sampling_params(draw: Draw, sampling: Sampling) -> "SamplingParams":
    """vLLM's parameters for one draw; greedy draws carry no seed, they need none."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    schema = draw.request.json_schema
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=draw.seed if sampling.temperature > 0 else None,
        logprobs=sampling.logprobs,
        stop=list(sampling.stop),
        structured_outputs=None if schema is None else StructuredOutputsParams(grammar=json_grammar(schema)),
    )


def completion(output: "RequestOutput", top: int) -> Completion:
    """vLLM's answer to one draw with the `top` likeliest tokens a position; UserError when the engine failed."""
    answer = output.outputs[0]
    if answer.finish_reason not in ("stop", "length"):
        raise UserError(
            f"vLLM ended a request with {answer.finish_reason!r}; set VLLM_LOGGING_LEVEL=INFO to see why"
        )
    ids = list(answer.token_ids)
    steps: Any = answer.logprobs or []
    return Completion(
        text=answer.text,
        token_ids=ids,
        logprobs=[step[token].logprob for step, token in zip(steps, ids)],
        finish_reason=answer.finish_reason,
        top_logprobs=[_likeliest(step, top) for step in steps] if top else [],
    )


def _likeliest(step: Mapping[int, Any], top: int) -> dict[int, float]:
    ranked = sorted(step.items(), key=lambda item: -item[1].logprob)[:top]
    return {token: entry.logprob for token, entry in ranked}
