"""What the engine does for adapters, counted where it happens and read in one call.

    worker      tokens computed, by phase (prompt or generated) and adapted or plain, and by adapter; adapters read from
                disk and how long that took, put into a slot, evicted from a slot or from memory
    scheduler   requests passed over because every slot was taken, and how long; prompt tokens found in the prefix cache

A step without adapters costs a few sums of small arrays. Nothing is sent between processes until somebody asks:
`engine_counts`, which the plugin makes a method of vLLM's EngineCore, gathers both sides, over the executor's own call
to its workers; `snapshot` (a `vllm.LLM`) or `preft.serve.prometheus` (the server) reads it. Counts are of the process:
they only grow, and engines that share a process share them. Under tensor parallelism every worker sees the same map,
and the first is read.
"""

import bisect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from preft.vllm.mapping import Kind

METHOD = "preft_counts"  # added by the plugin to vLLM's EngineCore and WorkerBase
PREFILL, DECODE = "prefill", "decode"
LOAD_BUCKETS = (
    0.001,
    0.003,
    0.01,
    0.03,
    0.1,
    0.3,
    1.0,
    3.0,
    10.0,
)  # seconds, upper bounds; above them all: one more
MAX_NAMED = 1000  # adapters that are counted by name; tokens of those met later are counted together
OTHERS = "_others"


@dataclass
class WorkerCounts:
    """Counts of the process that runs the model; `tokens` and `by_adapter` map a phase to a number of tokens."""

    adapted: dict[str, int] = field(default_factory=lambda: {PREFILL: 0, DECODE: 0})
    plain: dict[str, int] = field(default_factory=lambda: {PREFILL: 0, DECODE: 0})
    by_adapter: dict[str, dict[str, int]] = field(default_factory=dict)
    activations: int = 0
    slot_evictions: int = 0
    memory_evictions: int = 0
    load_buckets: list[int] = field(default_factory=lambda: [0] * (len(LOAD_BUCKETS) + 1))
    load_seconds: float = 0.0

    def count_plain(
        self, prompt_R: Int[ndarray, "R"], computed_R: Int[ndarray, "R"], scheduled_R: Int[ndarray, "R"]
    ) -> None:
        """Count a step in which no token has an adapter."""
        prefill = int(np.clip(prompt_R - computed_R, 0, scheduled_R).sum())
        self.plain[PREFILL] += prefill
        self.plain[DECODE] += int(scheduled_R.sum()) - prefill

    def count(
        self,
        names: Mapping[int, str],
        adapter_R: Int[ndarray, "R"],
        acts_RP: Bool[ndarray, "R P"],
        count_RP: Int[ndarray, "R P"],
    ) -> None:
        """Count a step: tokens of every request by kind of token (`mapping.Kind`), and where its adapter acts on them.

        `names[i]` is what adapter i is called.
        """
        for acting, tokens in ((self.adapted, count_RP * acts_RP), (self.plain, count_RP * ~acts_RP)):
            by_kind = tokens.sum(axis=0).tolist()
            acting[PREFILL] += sum(by_kind[: Kind.GENERATED])
            acting[DECODE] += by_kind[Kind.GENERATED]
        adapted_RP = count_RP * acts_RP
        for i in np.flatnonzero(adapted_RP.any(axis=1)).tolist():
            mine = self._of(names[int(adapter_R[i])])
            mine[PREFILL] += int(adapted_RP[i, : Kind.GENERATED].sum())
            mine[DECODE] += int(adapted_RP[i, Kind.GENERATED])

    def _of(self, name: str) -> dict[str, int]:
        if name not in self.by_adapter and len(self.by_adapter) >= MAX_NAMED:
            name = OTHERS
        return self.by_adapter.setdefault(name, {PREFILL: 0, DECODE: 0})

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Time one adapter's way into memory, from files or from pushed tensors; a failed one is not counted."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.load_seconds += seconds
        self.load_buckets[bisect.bisect_left(LOAD_BUCKETS, seconds)] += 1


@dataclass
class SchedulerCounts:
    """Counts of the process that schedules: ended waits for a slot, and prompt tokens from the prefix cache."""

    waits: int = 0
    wait_seconds: float = 0.0
    cached_adapted: int = 0
    cached_plain: int = 0
    waiting: dict[str, float] = field(default_factory=dict)  # request id -> when it was first passed over

    def after_schedule(self, scheduler: Any, output: Any) -> None:
        """Count one step of vLLM's scheduler."""
        for new in output.scheduled_new_reqs:
            if new.lora_request is None:
                self.cached_plain += new.num_computed_tokens
            else:
                self.cached_adapted += new.num_computed_tokens
        if scheduler.deferred_waiting or self.waiting:
            self._follow({r.request_id for r in scheduler.deferred_waiting if _wants_slot(scheduler, r)})

    def _follow(self, waiting: set[str]) -> None:
        now = time.monotonic()
        for request_id in self.waiting.keys() - waiting:
            self.wait_seconds += now - self.waiting.pop(request_id)
            self.waits += 1
        for request_id in waiting - self.waiting.keys():
            self.waiting[request_id] = now


def _wants_slot(scheduler: Any, request: Any) -> bool:
    """Whether a deferred request of vLLM's scheduler waits for an adapter slot, and not for something else."""
    return (
        request.lora_request is not None
        and not scheduler._is_blocked_waiting_status(request.status)
        and not request.num_stale_output_tokens
    )


worker_counts = WorkerCounts()
scheduler_counts = SchedulerCounts()


@dataclass(frozen=True)
class Slots:
    """Where adapters are: slots there are, ids in a slot, ids in memory (those in a slot included)."""

    total: int = 0
    in_slot: list[int] = field(default_factory=list)
    in_memory: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Snapshot:
    """All counts of one engine at one moment."""

    worker: WorkerCounts
    scheduler: SchedulerCounts
    slots: Slots

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> "Snapshot":
        """From what `engine_counts` returned, here or in another process."""
        return cls(WorkerCounts(**raw["worker"]), SchedulerCounts(**raw["scheduler"]), Slots(**raw["slots"]))


def snapshot(llm: Any) -> Snapshot:
    """The counts of a `vllm.LLM`, wherever its engine runs."""
    client = llm.llm_engine.engine_core
    core = getattr(client, "engine_core", None)  # an engine in this process
    return Snapshot.read(engine_counts(core) if core is not None else client.call_utility(METHOD))


def engine_counts(core: Any) -> dict[str, Any]:
    """What the plugin adds to `EngineCore`: plain values, ready to cross a process boundary."""
    return {"scheduler": asdict(scheduler_counts), **core.collective_rpc(METHOD)[0]}


def worker_report(worker: Any) -> dict[str, Any]:
    """What the plugin adds to `WorkerBase`."""
    lora = getattr(worker.model_runner, "lora_manager", None)
    slots = Slots() if lora is None else _slots(lora._adapter_manager)
    return {"worker": asdict(worker_counts), "slots": asdict(slots)}


def _slots(manager: Any) -> Slots:
    in_slot = [i for i in manager.lora_index_to_id if i is not None]
    return Slots(manager.lora_slots, in_slot, sorted(manager.list_adapters()))


def counting_schedule(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Scheduler.schedule` that counts what it decided."""

    def schedule(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(scheduler, *args, **kwargs)
        if scheduler.lora_config:
            scheduler_counts.after_schedule(scheduler, output)
        return output

    return schedule


def counting_adapters(original: Callable[..., bool]) -> Callable[..., bool]:
    """`LRUCacheWorkerLoRAManager.add_adapter` that counts adapters put into slots and those that made room."""

    def add_adapter(manager: Any, lora_request: Any) -> bool:
        if manager._cached_dummy_lora is not False:  # the warm-up's adapters
            return original(manager, lora_request)
        inner, number = manager._adapter_manager, lora_request.lora_int_id
        in_slot, in_memory = number in inner._active_adapters, number in inner._registered_adapters
        slots_full, memory_full = (
            len(inner._active_adapters) >= inner.lora_slots,
            len(inner) >= inner.capacity,
        )
        added = original(manager, lora_request)
        worker_counts.activations += not in_slot or lora_request.load_inplace
        worker_counts.slot_evictions += not in_slot and slots_full
        worker_counts.memory_evictions += not in_memory and memory_full
        return added

    return add_adapter
