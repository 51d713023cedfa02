"""The counts of `preft.vllm.metrics` on the server's /metrics page, named preft_*.

A collector of the registry that vLLM serves: it asks the engine when the page is read, and keeps what it was told for
a moment, so that neither two readers nor the list of adapters make the engine work. One label per adapter: by name,
not by version, and at most `MAX_NAMED` of them (what comes later is counted together as `_others`).
"""

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

from preft.serve.catalog import Catalog
from preft.serve.gate import Drain
from preft.vllm.metrics import LOAD_BUCKETS, METHOD, SchedulerCounts, Slots, Snapshot, WorkerCounts

KEPT = 0.5  # seconds
PATIENCE = 3.0  # seconds for the engine's answer: less than Prometheus waits for the page

log = logging.getLogger(__name__)


class EngineCollector:
    """A Prometheus collector over one server's engine."""

    def __init__(self, catalog: Catalog, drain: Drain) -> None:
        self.catalog, self.drain = catalog, drain
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self._known, self._read_at = Snapshot(WorkerCounts(), SchedulerCounts(), Slots()), float("-inf")

    def register(self) -> None:
        """Join the registry that vLLM's page shows."""
        from prometheus_client import REGISTRY

        REGISTRY.register(self)

    async def fresh(self) -> Snapshot:
        """The counts, at most `KEPT` seconds old; the last ones where the engine does not answer within `PATIENCE`."""
        engine = self.catalog.engine
        if time.monotonic() - self._read_at > KEPT and not (self.drain.begun or engine.errored):
            try:
                answer = engine.engine_core.call_utility_async(METHOD)
                self._known = Snapshot.read(await asyncio.wait_for(answer, PATIENCE))
            except Exception as error:
                # Of a busy or a dying engine only the counts are missing, not the page on which vLLM's own stand.
                log.warning("the engine's counts are old, it did not give new ones: %r", error)
            self._read_at = time.monotonic()
        return self._known

    def describe(self) -> list[Any]:
        """Nothing: the registry would otherwise collect at once, before the engine can answer."""
        return []

    def collect(self) -> Iterator[Any]:
        """The page's rows; vLLM reads /metrics on a thread of its own, but /metrics/ on the event loop, which must not
        wait for itself and shows what is known."""
        counts = self._known
        if threading.get_ident() != self._thread:
            asked = asyncio.run_coroutine_threadsafe(self.fresh(), self._loop)
            try:
                counts = asked.result(PATIENCE + KEPT)
            except TimeoutError:  # the event loop itself is busy
                asked.cancel()
        yield from _tokens(counts)
        yield from _slots(counts, self.catalog)
        yield from _loads(counts.worker)
        yield from _waits(counts.scheduler)


def _tokens(counts: Snapshot) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily as Counter

    worker, scheduler = counts.worker, counts.scheduler
    tokens = Counter(
        "preft_tokens",
        "Tokens computed, by phase of the request, under an adapter or plain",
        labels=["phase", "adapted"],
    )
    for adapted, by_phase in (("true", worker.adapted), ("false", worker.plain)):
        for phase, number in by_phase.items():
            tokens.add_metric([phase, adapted], number)
    yield tokens
    named = Counter(
        "preft_adapter_tokens", "Tokens computed under an adapter, by its name", labels=["adapter", "phase"]
    )
    for name, by_phase in worker.by_adapter.items():
        for phase, number in by_phase.items():
            named.add_metric([name, phase], number)
    yield named
    cached = Counter(
        "preft_prompt_tokens_cached",
        "Prompt tokens taken from the prefix cache, of requests with and without an adapter",
        labels=["adapter"],
    )
    cached.add_metric(["true"], scheduler.cached_adapted)
    cached.add_metric(["false"], scheduler.cached_plain)
    yield cached


def _slots(counts: Snapshot, catalog: Catalog) -> Iterator[Any]:
    from prometheus_client.core import GaugeMetricFamily as Gauge

    adapters = Gauge("preft_adapters", "Adapters, by where they are", labels=["state"])
    adapters.add_metric(["registered"], len(catalog.models.lora_requests))
    adapters.add_metric(["in_memory"], len(counts.slots.in_memory))
    adapters.add_metric(["in_slot"], len(counts.slots.in_slot))
    adapters.add_metric(["retiring"], len(catalog.retiring))
    yield adapters
    yield Gauge("preft_slots", "Adapter slots of the engine", value=counts.slots.total)


def _loads(worker: WorkerCounts) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily as Counter
    from prometheus_client.core import HistogramMetricFamily as Histogram

    bounds, total, cumulated = [*map(str, LOAD_BUCKETS), "+Inf"], 0, []
    for number in worker.load_buckets:
        total += number
        cumulated.append(total)
    yield Histogram(
        "preft_adapter_load_seconds",
        "Adapters read into memory, and how long each took",
        buckets=list(zip(bounds, cumulated)),
        sum_value=worker.load_seconds,
    )
    yield Counter("preft_slot_activations", "Adapters put into a slot", value=worker.activations)
    evictions = Counter("preft_adapter_evictions", "Adapters that made room for another", labels=["place"])
    evictions.add_metric(["slot"], worker.slot_evictions)
    evictions.add_metric(["memory"], worker.memory_evictions)
    yield evictions


def _waits(scheduler: SchedulerCounts) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily as Counter
    from prometheus_client.core import GaugeMetricFamily as Gauge

    yield Gauge(
        "preft_requests_waiting_for_slot",
        "Requests passed over for want of a slot",
        value=len(scheduler.waiting),
    )
    yield Counter("preft_slot_waits", "Requests that have waited for a slot", value=scheduler.waits)
    yield Counter("preft_slot_wait_seconds", "Time they waited, in all", value=scheduler.wait_seconds)
