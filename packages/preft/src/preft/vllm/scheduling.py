"""Two facts about a request that the scheduler must know: when it needs its adapter, and what its cached blocks are.

**Slots.** A prefill-only adapter is needed only while prompt tokens remain to be computed. `Request.lora_request`
becomes a property that says so: it is None as soon as `num_computed_tokens >= num_prompt_tokens`. The scheduler's
budget (max_loras) then counts prefilling requests only, and since the answer follows from the two counters, preemption
and failed KV loads, which lower the first, restore the adapter without further code.

**Block identity.** vLLM keys every block of an adapted request by the adapter's name and path. With a phase that is
wrong twice: blocks computed by the base model would pass for adapted ones in the next turn, and a block that holds the
boundary depends on where in it the boundary lies. Here block [start, end) of a request is keyed by

    nothing                          if no position in it is adapted (the parent's hash says what came before)
    name, content digest             if all positions are adapted
    name, content digest, [low, high)  if some are: which ones, relative to the block's start

The key is taken from the request's own adapter, not from the property, so it does not depend on when a block fills.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from preft.vllm.identity import AdapterIdentity, AdapterRegistry
from preft.vllm.mapping import phase_interval
from shared.tokens import Phase

# One a process: the front one refuses bad requests with it, the scheduler keys blocks by it.
adapter_registry = AdapterRegistry()

HashKeys = tuple[Any, ...] | None


def get_lora_request(request: Any) -> Any:
    """The request's adapter while it still has tokens to adapt, else None (getter of `Request.lora_request`)."""
    own = request.__dict__.get("_own_lora_request")
    if own is None or request._adapter.phase is not Phase.PREFILL:
        return own
    return own if request.num_computed_tokens < request.num_prompt_tokens else None


def set_lora_request(request: Any, lora_request: Any) -> None:
    """Setter of `Request.lora_request`: reads the adapter's identity; ValueError if the folder is unusable."""
    request._adapter = adapter_registry.resolve(lora_request) if lora_request is not None else None
    request._own_lora_request = lora_request


def block_keys(
    name: str, adapter: AdapterIdentity, prompt_length: int, start: int, end: int
) -> tuple[Any, ...]:
    """What the hash of block [start, end) must say about the adapter of its request; empty where it does not act."""
    interval = phase_interval(adapter.phase, prompt_length)
    low, high = max(interval.low, start), min(interval.high, end)
    if low >= high:
        return ()
    key = ("lora", name, adapter.digest)
    return (key,) if (low, high) == (start, end) else ((*key, low - start, high - start),)


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
        ours = block_keys(
            own.lora_name, request._adapter, request.num_prompt_tokens, start_token_idx, end_token_idx
        )
        return (ours + others) or None, next_mm_idx

    return generate_block_hash_extra_keys


def validating(original: Callable[..., None]) -> Callable[..., None]:
    """`InputProcessor._validate_lora` that refuses an unusable adapter before the engine has taken the request in."""

    def _validate_lora(processor: Any, lora_request: Any) -> None:
        original(processor, lora_request)
        if lora_request is not None:
            adapter_registry.resolve(lora_request)

    return _validate_lora


def refreshing(original: Callable[..., bool]) -> Callable[..., bool]:
    """`add_lora` of an engine that reads the adapter's identity again once it is loaded anew."""

    def add_lora(engine: Any, lora_request: Any) -> bool:
        added = original(engine, lora_request)
        if lora_request.load_inplace:
            adapter_registry.refresh(lora_request)
        return added

    return add_lora


def refreshing_async(original: Callable[..., Awaitable[bool]]) -> Callable[..., Awaitable[bool]]:
    """`refreshing` for the asynchronous engine."""

    async def add_lora(engine: Any, lora_request: Any) -> bool:
        added = await original(engine, lora_request)
        if lora_request.load_inplace:
            adapter_registry.refresh(lora_request)
        return added

    return add_lora


def forgetting(original: Callable[..., Any]) -> Callable[..., Any]:
    """`remove_lora` of an engine, asynchronous or not, that forgets the adapter's identity."""

    def remove_lora(engine: Any, lora_id: int) -> Any:
        adapter_registry.forget(lora_id)
        return original(engine, lora_id)

    return remove_lora
