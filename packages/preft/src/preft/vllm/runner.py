"""What the model runners must know: the token map of each step, which adapters it needs, and the graph it may replay.

Each function here wraps one method of vLLM 0.32; `plugin.py` says which. All answers come from `mapping.map_step`.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from preft.vllm.cpu_layers import prepare_layers
from preft.vllm.identity import is_memory_path, worker_adapters
from preft.vllm.mapping import NO_ADAPTER, Kind, StepMap, layout, map_step
from preft.vllm.memory_worker import load_held
from preft.vllm.metrics import worker_counts
from preft.vllm.precision import check_precision
from preft.vllm.residual import SITE, add_sites, support_lora
from preft.vllm.sticky import Spans

# By sampled row, by token, the adapters to hold. A list of these: vLLM's LoRARequests are equal by name, so a set would
# drop one of two versions that are served under one name while the first is being replaced.
LoraInputs = tuple[tuple[Any, ...], tuple[Any, ...], list[Any]]


class Step(NamedTuple):
    """The map of a step and the adapters that it needs in slots."""

    map: StepMap
    active: list[Any]


def step_of(
    adapter_R: Int[ndarray, "R"],
    requests: Collection[Any],
    generated: Mapping[int, Spans],
    prompt_R: Int[ndarray, "R"],
    computed_R: Int[ndarray, "R"],
    scheduled_R: Int[ndarray, "R"],
    sampled_R: Int[ndarray, "R"],
) -> Step:
    """`map_step` for the adapters named by `requests` (vLLM's `LoRARequest`s of the batch); counts its tokens.

    `generated` are the earlier answers in the prompts of sticky requests, by row.
    """
    ids = {request.lora_int_id: worker_adapters.ids(request) for request in requests}
    plain = (NO_ADAPTER,) * len(Kind)
    adapter_RK = np.array([ids.get(number, plain) for number in adapter_R.tolist()], dtype=np.int64)
    step = map_step(layout(adapter_RK, prompt_R, generated), computed_R, scheduled_R, sampled_R)
    names = {request.lora_int_id: request.lora_name for request in requests}
    worker_counts.count(names, adapter_R, adapter_RK != NO_ADAPTER, step.count_RK)
    if not step.active:
        return Step(step, [])
    acting = {
        part.lora_int_id: part for request in requests for part in worker_adapters.by_kind(request) if part
    }
    return Step(step, [acting[number] for number in step.active])


def sticky_spans(requests: Iterable[Any]) -> dict[int, Spans]:
    """The earlier answers in the prompts of a batch, by row; `requests` are the rows' adapters or None."""
    found = {row: getattr(request, "generated", ()) for row, request in enumerate(requests)}
    return {row: spans for row, spans in found.items() if spans}


def with_cached_requests(original: Callable[..., None]) -> Callable[..., None]:
    """`LoRAModelRunnerMixin.set_active_loras`: V1's batch keeps one adapter an id, the spans are each request's."""

    def set_active_loras(runner: Any, input_batch: Any, *args: Any, **kwargs: Any) -> None:
        input_batch.cached_requests = runner.requests
        original(runner, input_batch, *args, **kwargs)

    return set_active_loras


def is_plain(requests: Collection[Any], prompt_R: Int[ndarray, "R"], computed_R: Int[ndarray, "R"]) -> bool:
    """Whether a step certainly has no adapted token, told without mapping it: what most steps of decoding are."""
    if not requests:
        return True
    if (computed_R < prompt_R).any():
        return False
    return all(worker_adapters.ids(request)[Kind.GENERATED] == NO_ADAPTER for request in requests)


def make_lora_inputs_v1(_: Callable[..., LoraInputs]) -> Callable[..., LoraInputs]:
    """`InputBatch.make_lora_inputs` of the V1 runner, by token instead of by request."""

    def make_lora_inputs(
        batch: Any, num_scheduled_tokens: Int[ndarray, "R"], num_sampled_tokens: Int[ndarray, "R"]
    ) -> LoraInputs:
        count = batch.num_reqs
        requests = batch.lora_id_to_lora_request.values()
        prompt_R, computed_R = batch.num_prompt_tokens[:count], batch.num_computed_tokens_cpu[:count]
        if is_plain(requests, prompt_R, computed_R):
            batch.num_active_adapters = 0
            worker_counts.count_plain(prompt_R, computed_R, num_scheduled_tokens)
            sampled, tokens = int(num_sampled_tokens.sum()), int(num_scheduled_tokens.sum())
            return (NO_ADAPTER,) * sampled, (NO_ADAPTER,) * tokens, []
        adapter_R = batch.request_lora_mapping[:count]
        step, active = step_of(
            adapter_R,
            requests,
            sticky_spans(batch.cached_requests[i].lora_request for i in batch.req_ids[:count]),
            prompt_R,
            computed_R,
            num_scheduled_tokens,
            num_sampled_tokens,
        )
        batch.num_active_adapters = dispatch_count(len(active), step)
        return tuple(step.sampled_S.tolist()), tuple(step.token_K.tolist()), active

    return make_lora_inputs


def dispatch_count(num_active: int, step: StepMap) -> int:
    """What vLLM's graph dispatch must count: the step's adapters, and "no adapter" as one more where both occur.

    The kernels sort it among the ids, so a graph captured for exactly `num_active` ids would miss the last slot.
    """
    return num_active + 1 if num_active and not step.token_K.all() else num_active


def determine_batch_execution(original: Callable[..., Any]) -> Callable[..., Any]:
    """`GPUModelRunner._determine_batch_execution_and_padding`: a step without adapted tokens replays the base graph."""

    def _determine_batch_execution_and_padding(runner: Any, *args: Any, **kwargs: Any) -> Any:
        # Dummy and capture runs force their own count. vLLM calls this right after make_lora_inputs of the same step.
        if runner.lora_config and kwargs.get("force_num_active_loras") is None:
            count = min(runner.input_batch.num_active_adapters, runner.lora_config.max_loras + 1)
            kwargs |= {"force_num_active_loras": count, "force_has_lora": count > 0}
        return original(runner, *args, **kwargs)

    return _determine_batch_execution_and_padding


def make_lora_inputs_v2(_: Callable[..., LoraInputs]) -> Callable[..., LoraInputs]:
    """`LoraState.make_lora_inputs` of Model Runner V2; prompt lengths and positions come from its `RequestState`."""

    def make_lora_inputs(
        state: Any,
        req_ids: list[str],
        idx_mapping: Int[ndarray, "R"],
        num_scheduled_tokens: Int[ndarray, "R"],
    ) -> LoraInputs:
        requests = [state.lora_requests[i] for i in req_ids if i in state.lora_requests]
        adapter_R = state.lora_ids[idx_mapping]
        # prompt_len, not prefill_len: after preemption the latter counts generated tokens too.
        prompt_R = state.request_states.prompt_len.np[idx_mapping]
        computed_R = state.request_states.num_computed_tokens_np[idx_mapping]
        if is_plain(requests, prompt_R, computed_R):
            worker_counts.count_plain(prompt_R, computed_R, num_scheduled_tokens)
            return (NO_ADAPTER,) * len(req_ids), (NO_ADAPTER,) * int(num_scheduled_tokens.sum()), []
        ones_R = np.ones_like(num_scheduled_tokens)
        spans = sticky_spans(state.lora_requests.get(i) for i in req_ids)
        step, active = step_of(adapter_R, requests, spans, prompt_R, computed_R, num_scheduled_tokens, ones_R)
        return tuple(step.sampled_S.tolist()), tuple(step.token_K.tolist()), active

    return make_lora_inputs


def get_activate_loras_v2(_: Callable[..., set[Any]]) -> Callable[..., list[Any]]:
    """`LoraState.get_activate_loras`, asked before the step's token counts are known: adapters with a token to adapt.

    A scheduled request computes at least the token at position `num_computed_tokens`. For weights that act later in
    the same chunk the answer errs towards "active", which costs a graph without the saving but is never wrong.
    """

    def get_activate_loras(state: Any, req_ids: list[str]) -> list[Any]:
        active: dict[int, Any] = {}
        for request_id in req_ids:
            request = state.lora_requests.get(request_id)
            if request is None:
                continue
            index = state.request_states.req_id_to_index[request_id]
            prompt_length = int(state.request_states.prompt_len.np[index])
            computed = int(state.request_states.num_computed_tokens_np[index])
            decoding = computed >= prompt_length
            by_kind = worker_adapters.by_kind(request)[Kind.GENERATED if decoding else Kind.PROMPT :]
            active |= {part.lora_int_id: part for part in by_kind if part is not None}
        return list(active.values())

    return get_activate_loras


def dispatch_count_v2(original: Callable[..., int]) -> Callable[..., int]:
    """V2's `get_num_active_loras_for_dispatch`: beside the step's adapters "no adapter" counts as one more.

    Whether a plain token is among them is not known yet, and a graph for one id too many is slower but never wrong.
    Dummy and capture runs count max_loras + 1 already.
    """

    def get_num_active_loras_for_dispatch(
        lora_config: Any, lora_state: Any, req_ids: list[str], dummy_run: bool
    ) -> int:
        count = original(lora_config, lora_state, req_ids, dummy_run)
        return count + 1 if count and not dummy_run else count

    return get_num_active_loras_for_dispatch


def load_lora_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """`LoRAModelRunnerMixin.load_lora_model`: add the residual sites first, then give V2's LoraState its positions.

    On a CPU the wrapped layers are prepared for its operators.

    AdapterError where the device's operators cannot work in the engine's types.
    """

    def load_with_sites(runner: Any, model: Any, vllm_config: Any, device: Any) -> Any:
        lora_config = vllm_config.lora_config
        check_precision(vllm_config.model_config.dtype, lora_config.lora_dtype, device.type)
        support_lora(model)
        add_sites(model, lora_config.lora_dtype, device, lora_config.target_modules)
        if hasattr(runner, "lora_state"):
            runner.lora_state.request_states = runner.req_states
        model = original(runner, model, vllm_config, device)
        if device.type == "cpu":
            prepare_layers(model)
        return model

    return load_with_sites


def load_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """`WorkerLoRAManager._load_adapter`: read the phase with the weights, from the disk or from memory.

    ValueError for an edit the model has no site for.
    """

    def _load_adapter(manager: Any, lora_request: Any) -> Any:
        identity = worker_adapters.refresh(lora_request)
        if identity.method != "lora" and SITE not in manager._adapter_manager.supported_lora_modules:
            raise ValueError(
                f"adapter {lora_request.lora_name!r} edits the residual stream ({identity.method}), which is not "
                f"served for {type(manager._adapter_manager.model).__name__}: its decoder layers are of an unknown "
                f"kind, or lora_target_modules leaves out {SITE!r}"
            )
        with worker_counts.loading():
            load = load_held if is_memory_path(lora_request.lora_path) else original
            return load(manager, lora_request)

    return _load_adapter


def adding_parts(original: Callable[..., bool]) -> Callable[..., bool]:
    """`LoRAModelRunnerMixin.add_lora` that loads every part of an adapter."""

    def add_lora(runner: Any, lora_request: Any) -> bool:
        if lora_request.load_inplace:
            worker_adapters.refresh(lora_request)
        by_kind = worker_adapters.by_kind(lora_request)
        parts = {part.lora_int_id: part for part in by_kind if part is not None}
        added = [original(runner, part) for part in parts.values()]
        return all(added)

    return add_lora


def for_parts(original: Callable[..., bool]) -> Callable[..., bool]:
    """`remove_lora` or `pin_lora` of a runner, done to every part of the adapter of an id."""

    def with_parts(runner: Any, lora_id: int) -> bool:
        done = [original(runner, number) for number in worker_adapters.part_ids(lora_id)]
        return all(done)

    return with_parts


def activate_adapter(original: Callable[..., bool]) -> Callable[..., bool]:
    """`LoRAModelManager.activate_adapter`: tell this project's operators what the slot now holds."""

    def activate(manager: Any, lora_id: int) -> bool:
        changed = original(manager, lora_id)
        ours = [w for w in manager.punica_wrapper_mapping.values() if hasattr(w, "slot_filled")]
        if changed and ours:
            slot, ranks = manager.lora_index_to_id.index(lora_id), adapter_ranks(manager, lora_id)
            for wrapper in ours:
                wrapper.slot_filled(slot, ranks)
        return changed

    return activate


def adapter_ranks(manager: Any, lora_id: int) -> dict[int, int]:
    """Rank of an adapter in every slot tensor it uses, by the tensor's address; `manager` is vLLM's adapter manager."""
    adapter = manager.get_adapter(lora_id)
    ranks: dict[int, int] = {}
    for name, module in manager.modules.items():
        weights = manager._get_lora_layer_weights(adapter, name)
        if weights is None or not hasattr(module, "lora_a_stacked"):  # experts keep vLLM's operators
            continue
        stacks = [s if isinstance(s, tuple) else (s,) for s in (module.lora_a_stacked, module.lora_b_stacked)]
        given = weights.lora_a if isinstance(weights.lora_a, list) else [weights.lora_a]
        rank_of = [0 if a is None else a.shape[0] for a in given]
        if len(rank_of) != len(stacks[0]):  # one pair for several slices
            rank_of = [max(rank_of)] * len(stacks[0])
        ranks |= {
            stacked.data_ptr(): rank for tensors in stacks for stacked, rank in zip(tensors, rank_of) if rank
        }
    return ranks
