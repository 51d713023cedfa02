"""What changes under a request while it lives: the weights of its adapter, and the length of its prompt.

**Reload** (`add_lora` with `load_inplace`). A request that has read its whole prompt under a prefill-only adapter needs
the weights no more and goes on. One that still needs them is computed anew, so none is served by two versions; its
blocks are keyed by the version that computes them, also when that happens later, after a preemption.

**Streaming input** lengthens the prompt of a running request and moves the boundary: what was generated becomes prompt
(history policy recompute). What was computed under the old boundary is dropped and read anew, so a turn of a session
is answered like one request with the whole text.
"""

import time
from collections.abc import Callable
from typing import Any

from preft.vllm.scheduling import adapter_registry


def reloading(original: Callable[..., bool]) -> Callable[..., bool]:
    """`EngineCore.add_lora` that lets no request mix two versions.

    ValueError if the new one has another phase, or lies elsewhere while requests name the old folder.
    """

    def add_lora(core: Any, lora_request: Any) -> bool:
        if not lora_request.load_inplace:
            adapter_registry.check_return(lora_request)
            return original(core, lora_request)
        _check_path(core.scheduler, lora_request)
        adapter_registry.check_reload(lora_request)
        added = original(core, lora_request)
        adapter_registry.refresh(lora_request)
        renew(core.scheduler, lora_request.lora_int_id)
        return added

    return add_lora


def _check_path(scheduler: Any, lora_request: Any) -> None:
    """A slot is told by the id, but the identity of a request, and the files it is computed anew from, by the path."""
    owners = [request.__dict__.get("_own_lora_request") for request in scheduler.requests.values()]
    for own in owners:
        if own is None or own.lora_int_id != lora_request.lora_int_id:
            continue
        if own.lora_path != lora_request.lora_path:
            raise ValueError(
                f"requests run under id {own.lora_int_id} from {own.lora_path}: load {lora_request.lora_path} under "
                "another id"
            )


def renew(scheduler: Any, lora_int_id: int) -> None:
    """Let every request that still needs this adapter begin anew with the weights it has now."""
    # As in reset_prefix_cache: the last first, so that they resume in their order, which may be before their output in
    # flight is back.
    for request in [request for request in scheduler.running[::-1] if _needs(request, lora_int_id)]:
        scheduler.running.remove(request)
        scheduler._preempt_request(request, time.monotonic(), drop_stale_output=True)
        scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
    for request in scheduler.requests.values():
        if request.num_computed_tokens == 0:
            rekey(request)


def _needs(request: Any, lora_int_id: int) -> bool:
    return request.lora_request is not None and request._own_lora_request.lora_int_id == lora_int_id


def rekey(request: Any) -> None:
    """Key the blocks of a request, none of which is computed, by the weights its adapter has now."""
    own = request.__dict__.get("_own_lora_request")
    identity = adapter_registry.current(own) if own is not None else None
    if identity is not None and identity.digest != request._adapter.digest:
        request._adapter, request._by_kind = identity, adapter_registry.by_kind(own)
        request.block_hashes.clear()
        request.update_block_hashes()


def rekeying_preempted(original: Callable[..., None]) -> Callable[..., None]:
    """`Scheduler._preempt_request`: what is computed again is computed with the weights of today."""

    def _preempt_request(scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        original(scheduler, request, *args, **kwargs)
        rekey(request)

    return _preempt_request


def rereading_sessions(original: Callable[..., None]) -> Callable[..., None]:
    """`Scheduler._update_request_as_session` that drops what was computed under another boundary."""

    def _update_request_as_session(scheduler: Any, session: Any, update: Any) -> None:
        original(scheduler, session, update)
        if session.__dict__.get("_own_lora_request") is not None:
            scheduler._free_request_blocks(session)
            session.num_computed_tokens = 0
            # The blocks of the new text were keyed before the prompt was lengthened.
            session.block_hashes.clear()
            session.update_block_hashes()

    return _update_request_as_session
