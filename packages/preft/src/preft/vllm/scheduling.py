"""Three facts about a request that the scheduler must know: the adapter it needs, whether there is a slot, its blocks.

**Need.** An adapter is needed only where tokens of its phase remain to be computed. `Request.lora_request` becomes a
property that says which one the next token needs, if any: for a prefill-only adapter it is None as soon as
`num_computed_tokens >= num_prompt_tokens`, for a composition it passes from part to part. The scheduler's budget
(max_loras) then counts what acts, and since the answer follows from the two counters, preemption and failed KV loads,
which lower the first, restore the adapter without further code. The worker is told the whole adapter.

**Slots.** vLLM checks its budget when a request is admitted, which is enough for an adapter that is needed from the
first token on. One that is needed later (decode only, the second part of a composition) must find a slot then. So each
step keeps the set of adapters it uses, and a request's chunk ends before the first token whose adapter would be one too
many; a request that could compute nothing waits for the next step. Requests are asked in the order in which they run,
so the eldest always gets what it needs.

**Block identity.** vLLM keys every block of an adapted request by the adapter's name and path. With a phase that is
wrong twice: blocks computed by the base model would pass for adapted ones in the next turn, and a block that holds the
boundary depends on where in it the boundary lies. Here block [start, end) of a request is keyed by

    nothing                            if no position in it is adapted (the parent's hash says what came before)
    name, content digest               if all positions are adapted by the same weights
    name, content digest, [low, high)  for each stretch that is, otherwise: which ones, relative to the block's start

The key is taken from the request's own adapter, not from the property, so it does not depend on when a block fills.
"""

from collections.abc import Awaitable, Callable, Iterator
from functools import cache
from typing import Any

from preft.vllm.fit import check_served
from preft.vllm.identity import AdapterIdentity, AdapterRegistry
from preft.vllm.mapping import ENDLESS, Kind, Stretch, stretches
from preft.vllm.memory import check_pushed
from preft.vllm.resolver import loaded
from preft.vllm.sticky import Spans, placed, read_spans
from shared.history import History

# One a process: the front one refuses bad requests with it, the scheduler keys blocks by it.
adapter_registry = AdapterRegistry()

HashKeys = tuple[Any, ...] | None


def get_lora_request(request: Any) -> Any:
    """The adapter that the request's next token needs, or None (getter of `Request.lora_request`)."""
    by_kind = request.__dict__.get("_by_kind")
    if by_kind is None:
        return None
    last = request.num_prompt_tokens - 1
    position = request.num_computed_tokens
    if request._generated and position <= last:
        return by_kind[next(_pieces(request, position, position + 1))[2]]
    return by_kind[Kind.GENERATED if position > last else Kind.PROMPT if position < last else Kind.BOUNDARY]


def set_lora_request(request: Any, lora_request: Any) -> None:
    """Setter of `Request.lora_request`: reads the adapter's identity; ValueError if the folder is unusable."""
    request._own_lora_request = lora_request
    request._adapter = request._by_kind = None
    request._generated = ()
    if lora_request is not None:
        request._adapter = adapter_registry.resolve(lora_request)
        request._by_kind = adapter_registry.by_kind(lora_request)
        if request._adapter.history is History.STICKY and request.sampling_params is not None:
            request._generated = read_spans(request.sampling_params.extra_args)


def with_whole_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """`NewRequestData.from_request`: the worker maps tokens itself and needs the whole adapter, not a part."""

    def from_request(request: Any, *args: Any, **kwargs: Any) -> Any:
        data = original(request, *args, **kwargs)
        data.lora_request = placed(request._own_lora_request, request._generated)
        return data

    return from_request


def within_slots(original: Callable[..., int]) -> Callable[..., int]:
    """`Scheduler._reserve_prefill_lookahead`, which has the last word on a request's chunk: end it where slots end."""

    def _reserve_prefill_lookahead(
        scheduler: Any, request: Any, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        by_kind = request.__dict__.get("_by_kind")
        decoding = num_computed_tokens >= request.num_prompt_tokens
        end = num_computed_tokens + num_new_tokens
        if by_kind is not None and not (decoding and by_kind[Kind.GENERATED] is None):
            used = _used_in_step(scheduler)
            fitting = fit_slots(
                request, num_computed_tokens, num_new_tokens, used, scheduler.lora_config.max_loras
            )
            num_new_tokens = fitting if fitting == num_new_tokens or may_shrink(request, end) else 0
        return original(scheduler, request, num_computed_tokens, num_new_tokens)

    return _reserve_prefill_lookahead


def may_shrink(request: Any, end: int) -> bool:
    """Whether a chunk up to position `end` may be cut: not where vLLM padded it with drafts to admit a request."""
    return end <= request.num_tokens or request.status.name == "RUNNING"


def fit_slots(request: Any, computed: int, count: int, used: set[int], slots: int) -> int:
    """How many of the next `count` tokens find their adapter among at most `slots` in use; adds theirs to `used`."""
    for start, _, kind in _pieces(request, computed, computed + count):
        needed = request._by_kind[kind]
        if needed is None or needed.lora_int_id in used:
            continue
        if len(used) >= slots:
            return start - computed
        used.add(needed.lora_int_id)
    return count


def _used_in_step(scheduler: Any) -> set[int]:
    """Ids of the adapters that the scheduler's present step uses so far."""
    step, used = getattr(scheduler, "_adapters_in_step", (None, set()))
    if step != scheduler.current_step:
        used = set()
        scheduler._adapters_in_step = (scheduler.current_step, used)
    return used


def _pieces(request: Any, start: int, end: int) -> Iterator[tuple[int, int, Kind]]:
    """Positions [start, end) of a request cut where the kind of token changes."""
    return _cut(stretches(request.num_prompt_tokens, request._generated), start, end)


def _cut(all_of: list[Stretch], start: int, end: int) -> Iterator[tuple[int, int, Kind]]:
    for (low, kind), high in zip(all_of, [*(stretch.start for stretch in all_of[1:]), ENDLESS]):
        if max(low, start) < min(high, end):
            yield max(low, start), min(high, end), kind


def block_keys(
    name: str, adapter: AdapterIdentity, prompt_length: int, start: int, end: int, generated: Spans = ()
) -> tuple[Any, ...]:
    """What the hash of block [start, end) must say about the adapter of its request; empty where it does not act."""
    runs: list[tuple[str, int, int]] = []
    digests = adapter.digests()
    for low, high, kind in _cut(stretches(prompt_length, generated), start, end):
        digest = digests[kind]
        if digest is None:
            continue
        if runs and runs[-1][0] == digest and runs[-1][2] == low:
            low = runs.pop()[1]
        runs.append((digest, low, high))
    if [(low, high) for _, low, high in runs] == [(start, end)]:
        return (("lora", name, runs[0][0]),)
    return tuple(("lora", name, digest, low - start, high - start) for digest, low, high in runs)


def with_block_keys(original: Callable[..., tuple[HashKeys, int]]) -> Callable[..., tuple[HashKeys, int]]:
    """vLLM's `generate_block_hash_extra_keys` with its adapter key replaced by `block_keys`."""

    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[HashKeys, int]:
        keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        own = request.__dict__.get("_own_lora_request")
        if own is None:
            return keys, next_mm_idx
        others = tuple(key for key in keys or () if key[0] != "lora")
        length, generated = request.num_prompt_tokens, request._generated
        ours = block_keys(own.lora_name, request._adapter, length, start_token_idx, end_token_idx, generated)
        return (ours + others) or None, next_mm_idx

    return generate_block_hash_extra_keys


@cache
def refusal() -> type[ValueError]:
    """The error of a request for an unusable adapter, built on first use because one of its bases imports vLLM.

    As one of vLLM's errors of clients it passes through the asynchronous engine with its reason, which no other does.
    """
    from vllm.exceptions import VLLMValidationError

    class AdapterRefused(VLLMValidationError, ValueError):
        """The adapter of a request is missing, damaged or changed."""

    return AdapterRefused


def validating(original: Callable[..., None]) -> Callable[..., None]:
    """`InputProcessor._validate_lora` that refuses an unusable adapter before the engine has taken the request in."""

    def _validate_lora(processor: Any, lora_request: Any) -> None:
        original(processor, lora_request)
        try:
            if lora_request is not None:
                check_pushed(processor, lora_request)
                identity = adapter_registry.resolve(lora_request)
                check_served(lora_request.lora_name, identity, processor.vllm_config)
        except ValueError as error:
            raise refusal()(str(error)) from error

    return _validate_lora


def is_sticky(lora_request: Any) -> bool:
    """Whether requests under this adapter (None: of the base model) say where their earlier answers are."""
    return lora_request is not None and adapter_registry.known(lora_request).history is History.STICKY


def checking_spans(original: Callable[..., Any]) -> Callable[..., Any]:
    """`InputProcessor.process_inputs` that refuses impossible positions of earlier answers where they are read."""

    def process_inputs(processor: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(processor, *args, **kwargs)
        if is_sticky(request.lora_request) and request.sampling_params is not None:
            try:
                read_spans(request.sampling_params.extra_args, len(request.prompt_token_ids or ()))
            except ValueError as error:
                raise refusal()(str(error)) from error
        return request

    return process_inputs


def refreshing(original: Callable[..., bool]) -> Callable[..., bool]:
    """`add_lora` of an engine that reads the adapter's identity again once it is loaded anew."""

    def add_lora(engine: Any, lora_request: Any) -> bool:
        added = original(engine, lora_request)
        _note_loaded(lora_request)
        return added

    return add_lora


def refreshing_async(original: Callable[..., Awaitable[bool]]) -> Callable[..., Awaitable[bool]]:
    """`refreshing` for the asynchronous engine."""

    async def add_lora(engine: Any, lora_request: Any) -> bool:
        added = await original(engine, lora_request)
        _note_loaded(lora_request)
        return added

    return add_lora


def _note_loaded(lora_request: Any) -> None:
    loaded[lora_request.lora_int_id] = (lora_request.lora_name, lora_request.lora_path)
    if lora_request.load_inplace:
        adapter_registry.refresh(lora_request)


def forgetting(original: Callable[..., Any]) -> Callable[..., Any]:
    """`remove_lora` of an engine, asynchronous or not, that forgets the adapter's identity."""

    def remove_lora(engine: Any, lora_id: int) -> Any:
        adapter_registry.forget(lora_id)
        loaded.pop(lora_id, None)
        return original(engine, lora_id)

    return remove_lora
