"""The plugin that vLLM finds by its entry point (group `vllm.general_plugins`) and runs once in every process.

It replaces a score of methods of vLLM 0.32 by thin wrappers. Before it touches anything it compares the signature of
each with the one the wrapper was written for; a release that moved one is refused with the list of what moved, since
going on would serve prefill-only adapters as all-token ones. Engines without LoRA run none of the wrapped code but the
getter of `Request.lora_request`; ordinary adapters get the results they had.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from preft.vllm import memory_worker, metrics, renewal, runner, scheduling, strict, triton_wrapper
from preft.vllm.resolver import register_resolver

MARK = "_innerworks_original"
WRITTEN_FOR = "0.32"


class Called(NamedTuple):
    """One method to call: where it is and the parameters it must have."""

    module: str
    owner: str
    name: str
    parameters: tuple[str, ...]


class Patch(NamedTuple):
    """One method, or function (owner ""), to wrap: where it is, the parameters it must have, the wrapper's maker."""

    module: str
    owner: str
    name: str
    parameters: tuple[str, ...]
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]


PATCHES = (
    Patch(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch",
        "make_lora_inputs",
        ("self", "num_scheduled_tokens", "num_sampled_tokens"),
        runner.make_lora_inputs_v1,
    ),
    Patch(
        "vllm.v1.worker.gpu.lora_utils",
        "LoraState",
        "make_lora_inputs",
        ("self", "req_ids", "idx_mapping", "num_scheduled_tokens"),
        runner.make_lora_inputs_v2,
    ),
    Patch(
        "vllm.v1.worker.gpu.lora_utils",
        "LoraState",
        "get_activate_loras",
        ("self", "req_ids"),
        runner.get_activate_loras_v2,
    ),
    Patch(
        "vllm.v1.worker.gpu.lora_utils",
        "",
        "get_num_active_loras_for_dispatch",
        ("lora_config", "lora_state", "req_ids", "dummy_run"),
        runner.dispatch_count_v2,
    ),
    Patch(
        "vllm.v1.worker.lora_model_runner_mixin",
        "LoRAModelRunnerMixin",
        "load_lora_model",
        ("self", "model", "vllm_config", "device"),
        runner.load_lora_model,
    ),
    Patch(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        "_determine_batch_execution_and_padding",
        (
            "self",
            "num_tokens",
            "num_reqs",
            "num_scheduled_tokens_np",
            "max_num_scheduled_tokens",
            "use_cascade_attn",
            "allow_microbatching",
            "force_eager",
            "force_uniform_decode",
            "force_has_lora",
            "force_num_active_loras",
            "num_encoder_reqs",
        ),
        runner.determine_batch_execution,
    ),
    Patch(
        "vllm.v1.core.sched.scheduler",
        "Scheduler",
        "_reserve_prefill_lookahead",
        ("self", "request", "num_computed_tokens", "num_new_tokens"),
        scheduling.within_slots,
    ),
    Patch(
        "vllm.v1.core.sched.output",
        "NewRequestData",
        "from_request",
        ("request", "block_ids", "prefill_token_ids", "uses_mrope"),
        scheduling.with_whole_adapter,
    ),
    Patch(
        "vllm.v1.worker.lora_model_runner_mixin",
        "LoRAModelRunnerMixin",
        "add_lora",
        ("self", "lora_request"),
        runner.adding_parts,
    ),
    Patch(
        "vllm.v1.worker.lora_model_runner_mixin",
        "LoRAModelRunnerMixin",
        "set_active_loras",
        ("self", "input_batch", "num_scheduled_tokens", "num_sampled_tokens", "mapping_type"),
        runner.with_cached_requests,
    ),
    Patch(
        "vllm.v1.worker.lora_model_runner_mixin",
        "LoRAModelRunnerMixin",
        "remove_lora",
        ("self", "lora_id"),
        runner.for_parts,
    ),
    Patch(
        "vllm.v1.worker.lora_model_runner_mixin",
        "LoRAModelRunnerMixin",
        "pin_lora",
        ("self", "lora_id"),
        runner.for_parts,
    ),
    Patch(
        "vllm.lora.worker_manager",
        "WorkerLoRAManager",
        "_load_adapter",
        ("self", "lora_request"),
        runner.load_adapter,
    ),
    Patch(
        "vllm.lora.model_manager",
        "LoRAModelManager",
        "activate_adapter",
        ("self", "lora_id"),
        runner.activate_adapter,
    ),
    Patch(
        "vllm.lora.lora_model",
        "",
        "parse_fine_tuned_lora_name",
        ("name", "weights_mapper"),
        strict.parse_lora_name,
    ),
    Patch(
        "vllm.lora.worker_manager",
        "LRUCacheWorkerLoRAManager",
        "add_adapter",
        ("self", "lora_request"),
        metrics.counting_adapters,
    ),
    Patch(
        "vllm.v1.core.sched.scheduler",
        "Scheduler",
        "schedule",
        ("self", "throttle_prefills"),
        metrics.counting_schedule,
    ),
    Patch("vllm.v1.engine.core", "EngineCore", "add_lora", ("self", "lora_request"), renewal.reloading),
    Patch("vllm.v1.engine.core", "EngineCore", "remove_lora", ("self", "lora_id"), scheduling.forgetting),
    Patch(
        "vllm.v1.engine.llm_engine", "LLMEngine", "add_lora", ("self", "lora_request"), scheduling.refreshing
    ),
    Patch(
        "vllm.v1.engine.llm_engine", "LLMEngine", "remove_lora", ("self", "lora_id"), scheduling.forgetting
    ),
    Patch(
        "vllm.v1.engine.async_llm",
        "AsyncLLM",
        "add_lora",
        ("self", "lora_request"),
        scheduling.refreshing_async,
    ),
    Patch("vllm.v1.engine.async_llm", "AsyncLLM", "remove_lora", ("self", "lora_id"), scheduling.forgetting),
    Patch(
        "vllm.v1.engine.input_processor",
        "InputProcessor",
        "_validate_lora",
        ("self", "lora_request"),
        scheduling.validating,
    ),
    Patch(
        "vllm.v1.engine.input_processor",
        "InputProcessor",
        "process_inputs",
        (
            "self",
            "request_id",
            "prompt",
            "params",
            "supported_tasks",
            "arrival_time",
            "lora_request",
            "tokenization_kwargs",
            "trace_headers",
            "priority",
            "data_parallel_rank",
            "resumable",
            "session_id",
            "kv_hints",
        ),
        scheduling.checking_spans,
    ),
    Patch(
        "vllm.v1.core.kv_cache_utils",
        "",
        "generate_block_hash_extra_keys",
        ("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
        scheduling.with_block_keys,
    ),
    Patch(
        "vllm.v1.core.sched.scheduler",
        "Scheduler",
        "_update_request_as_session",
        ("self", "session", "update"),
        renewal.rereading_sessions,
    ),
    Patch(
        "vllm.v1.core.sched.scheduler",
        "Scheduler",
        "_preempt_request",
        ("self", "request", "timestamp", "drop_stale_output"),
        renewal.rekeying_preempted,
    ),
)
# Called, not wrapped: pushing adapters from memory goes through these.
CALLED = (
    Called(
        "vllm.lora.lora_model",
        "LoRAModel",
        "from_lora_tensors",
        (
            "lora_model_id",
            "tensors",
            "peft_helper",
            "device",
            "dtype",
            "model_vocab_size",
            "weights_mapper",
            "skip_prefixes",
        ),
    ),
    Called("vllm.lora.peft_helper", "PEFTHelper", "from_dict", ("config_dict",)),
    Called("vllm.lora.peft_helper", "PEFTHelper", "validate_legal", ("self", "lora_config")),
    Called("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager", "add_adapter", ("self", "lora_request")),
)
CPU_OPERATORS = "preft.vllm.kernels.SegmentedPunicaWrapper"


def register() -> None:
    """Install the patches; a second call does nothing. RuntimeError where vLLM is not as they expect it."""
    from vllm.v1.request import Request

    if isinstance(inspect.getattr_static(Request, "lora_request", None), property):
        return
    if moved := moved_ground():
        raise RuntimeError(
            f"preft's vLLM plugin was written for vLLM {WRITTEN_FOR}; in this release these have moved: "
            f"{'; '.join(moved)}. Install vllm=={WRITTEN_FOR}.*, or start vLLM without the plugin (VLLM_PLUGINS='')."
        )
    for patch in PATCHES:
        _replace(patch)
    _use_own_operators()
    _add_methods()
    register_resolver()
    by_need = property(scheduling.get_lora_request, scheduling.set_lora_request)
    setattr(Request, "lora_request", by_need)  # noqa: B010 - mypy sees a plain attribute


def moved_ground() -> list[str]:
    """The functions used here whose signature is not the expected one, each with what was found."""
    moved = []
    for patch in (*PATCHES, *CALLED):
        function = getattr(_owner(patch), patch.name, None) or _missing
        original = inspect.unwrap(getattr(function, MARK, function))
        found = tuple(inspect.signature(original).parameters)
        if found != patch.parameters:
            moved.append(
                f"{patch.module}.{patch.owner or ''}.{patch.name}({', '.join(found)})".replace("..", ".")
            )
    return moved


def _missing() -> None:
    """Stands for a function that is gone."""


def _owner(patch: Patch | Called) -> Any:
    module = importlib.import_module(patch.module)
    return getattr(module, patch.owner) if patch.owner else module


def _replace(patch: Patch) -> None:
    """Put the wrapper in the original's place: in its class, or in every module that has imported the function."""
    original = getattr(_owner(patch), patch.name)
    replacement: Any = _wrapped(patch, original)
    if patch.owner:
        # A class method comes bound to its class, and its wrapper takes what the bound one takes.
        bound = inspect.ismethod(original)
        setattr(_owner(patch), patch.name, staticmethod(replacement) if bound else replacement)
        return
    for module in list(sys.modules.values()):
        if module is not None and module.__dict__.get(patch.name) is original:
            setattr(module, patch.name, replacement)


def _wrapped(patch: Patch, original: Callable[..., Any]) -> Callable[..., Any]:
    # vLLM decodes the arguments of calls between processes by the annotations, so the wrapper must show the original's.
    replacement = functools.update_wrapper(patch.wrap(original), original)
    setattr(replacement, MARK, original)
    return replacement


def _add_methods() -> None:
    """Methods under names of their own, which vLLM's calls between processes reach by name."""
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, memory_worker.HOLD, memory_worker.hold_adapter)
    setattr(WorkerBase, memory_worker.DROP, memory_worker.drop_adapter)
    setattr(WorkerBase, metrics.METHOD, metrics.worker_report)
    setattr(EngineCore, metrics.METHOD, metrics.engine_counts)


def _use_own_operators() -> None:
    """Always on a CPU, where stock ones are wrong; on a GPU only where the environment asks for it."""
    from vllm.platforms import current_platform

    on_gpu = current_platform.is_cuda_alike() and triton_wrapper.switched_on()
    if on_gpu or current_platform.is_cpu():
        operators = triton_wrapper.QUALIFIED_NAME if on_gpu else CPU_OPERATORS
        named = classmethod(lambda cls: operators)
        setattr(type(current_platform), "get_punica_wrapper", named)  # noqa: B010 - as above
