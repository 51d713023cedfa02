"""The adapters of a running server: register, replace, remove; unload a version once nothing needs it.

vLLM's own table (`OpenAIServingModels.lora_requests`, name -> LoRARequest) says what a name means to the next request.
Replacing an adapter puts a LoRARequest with a new id and a new folder there, in one assignment: requests before it run
to their end under the old version, requests after it under the new one, and no request sees both. The old version is
then *retired*:

    unload    once no request computes a prompt under it; an adapter that also acts on generated tokens: once no request
              runs under it at all. A decoding request of a prefill-only adapter holds nothing.
    discard   its files, if they are the server's own, once no request runs under it (a preempted one computes its
              prompt anew, and needs them), and after `GRACE` seconds more, for requests that had looked the name up but
              had not reached the engine yet

A sum of adapters (`preft.serve.sums`) means what its terms mean: it leaves the table with any of them.

All of it happens in the front process, on its event loop; the lock of a name is the one vLLM's own routes take.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from preft.adapters import AdapterError
from preft.serve.check import AdapterCheck, Checked
from preft.serve.store import Store
from preft.vllm.identity import AdapterIdentity, read_identity
from preft.vllm.mapping import Kind
from preft.vllm.scheduling import adapter_registry

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
GRACE = 30.0
POLL = 0.1
MOST_SUMS = 64  # listed; the one made first goes
FAILED_CALL = "Call to add_lora method failed: "  # how vLLM's engine begins the reason


class Refusal(AdapterError):
    """A request to the catalog that is refused; `status` is its HTTP status."""

    def __init__(self, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Version:
    """What the catalog knows of an adapter besides vLLM's LoRARequest.

    `stored`: a restart serves it again; `owned`: its files are the server's own; `made_of`: the terms of a sum.
    """

    number: int
    rank: int | None
    created: str | None
    stored: bool
    owned: bool = False
    made_of: frozenset[str] = frozenset()


@dataclass(frozen=True)
class InFlight:
    """Unfinished requests by adapter id: all of them, and those whose prompt is not yet computed."""

    all: Counter[int]
    prefilling: Counter[int]


class Catalog:
    """The adapters of one server; `models` is vLLM's OpenAIServingModels, `engine` its AsyncLLM."""

    def __init__(self, models: Any, engine: Any, check: AdapterCheck, store: Store) -> None:
        self.models, self.engine, self.check, self.store = models, engine, check, store
        self.retiring: dict[int, str] = {}  # id -> name
        self.files = asyncio.Lock()  # of the sums' folders: none is removed while one is made
        self._versions: dict[str, Version] = {}
        self._needed: Counter[str] = Counter()  # versions that need a folder of the server's own
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, given: dict[str, Checked]) -> None:
        """Take in the adapters that vLLM loaded at its start, as they were checked."""
        for name, checked in given.items():
            request, stored = self.models.lora_requests[name], self.store.current.get(name)
            adapter_registry.learn(request, checked.identity)
            if stored is not None and str(stored.folder) == request.lora_path:
                self._versions[name] = Version(stored.version, checked.rank, stored.created, True, owned=True)
                self._needed[request.lora_path] += 1
            else:
                self._versions[name] = Version(1, checked.rank, None, False)

    async def put(self, name: str, staged: Path, replace: bool) -> None:
        """Register staged files under a name; Refusal with the reason, and nothing is changed then."""
        folder = self.store.number(staged)
        try:
            self.check_name(name)
            checked = await asyncio.to_thread(self.check, folder, uploaded=True)
            async with self.models.lora_resolver_lock[name]:
                await self._register(name, folder, checked, replace)
        except BaseException:
            self.store.discard(folder)
            raise

    async def _register(self, name: str, folder: Path, checked: Checked, replace: bool) -> None:
        if name in self.models.lora_requests and not replace:
            raise Refusal(f"there is an adapter {name!r} already; PUT replaces it", HTTPStatus.CONFLICT)
        new = await self.load(name, folder, checked.identity)
        stored = self.store.set_current(name, folder, self._next_number(name))
        self.enter(new, Version(stored.version, checked.rank, stored.created, True, owned=True))

    async def adopt(self, name: str, folder: Path, checked: Checked, replace: bool) -> None:
        """Serve a folder where it lies, until the server ends; Refusal with the reason, and nothing is changed then."""
        async with self.models.lora_resolver_lock[name]:
            if name in self.models.lora_requests and not replace:
                raise Refusal(
                    f"there is an adapter {name!r} already; load_inplace replaces it", HTTPStatus.CONFLICT
                )
            new = await self.load(name, folder, checked.identity)
            self.enter(new, Version(self._next_number(name), checked.rank, None, False))

    async def load(self, name: str, folder: Path, identity: AdapterIdentity | None = None) -> Any:
        """Load a folder into the engine under an id of its own; returns vLLM's LoRARequest, or Refusal.

        Its identity is known from then on, so that no request reads files on the event loop.
        """
        from vllm.lora.request import LoRARequest

        new = LoRARequest(name, self.models.lora_id_counter.inc(1), str(folder))
        try:
            await self.engine.add_lora(new)
        except Exception as error:
            # Whatever the engine objects to is a verdict on the adapter; a dead engine is told by /health.
            raise Refusal(f"the engine refused it: {str(error).removeprefix(FAILED_CALL)}") from error
        if identity is None:
            identity = await asyncio.to_thread(read_identity, folder)
        adapter_registry.learn(new, identity)
        return new

    def _next_number(self, name: str) -> int:
        return self._versions[name].number + 1 if name in self._versions else 1

    def enter(self, new: Any, version: Version) -> None:
        """From now on a name means this LoRARequest; what it meant is retired, and so are the sums of it."""
        name = new.lora_name
        if name in self.models.lora_requests:
            self._leave(name)
        self._drop_sums(name)
        self.models.lora_requests[name], self._versions[name] = new, version
        self._needed[new.lora_path] += version.owned
        sums = [whole for whole, known in self._versions.items() if known.made_of]
        for oldest in sums[:-MOST_SUMS]:
            self._leave(oldest)

    def _leave(self, name: str) -> None:
        old, version = self.models.lora_requests.pop(name), self._versions.pop(name, None)
        self._retire(old, version is not None and version.owned)

    def _drop_sums(self, name: str) -> None:
        for whole in [whole for whole, known in self._versions.items() if name in known.made_of]:
            self._leave(whole)

    async def remove(self, name: str) -> None:
        """Serve a name no longer; Refusal where there is none. Requests that run under it are not disturbed."""
        async with self.models.lora_resolver_lock[name]:
            if name not in self.models.lora_requests:
                raise Refusal(f"there is no adapter {name!r}", HTTPStatus.NOT_FOUND)
            self.store.forget(name)
            self._leave(name)
            self._drop_sums(name)

    def folders(self) -> dict[str, Path]:
        """The folders of what is listed, sums left out."""
        sums = {name for name, known in self._versions.items() if known.made_of}
        return {name: Path(r.lora_path) for name, r in self.models.lora_requests.items() if name not in sums}

    def ids(self, names: Iterable[str]) -> list[int | None]:
        """What names mean now, None where they are not listed."""
        listed = self.models.lora_requests
        return [listed[name].lora_int_id if name in listed else None for name in names]

    def check_name(self, name: str) -> None:
        """Refusal unless a client may give an adapter this name."""
        if not NAME.fullmatch(name):
            raise Refusal(
                f"{name!r} is no name for an adapter: letters, digits, '.', '_' and '-', at most 96, the first a "
                "letter or a digit"
            )
        if self.models.is_base_model(name):
            raise Refusal(f"{name!r} is the base model's name", HTTPStatus.CONFLICT)

    def _retire(self, old: Any, owned: bool) -> None:
        self.retiring[old.lora_int_id] = old.lora_name
        identity = adapter_registry.current(old)
        decodes = identity is None or identity.acts[Kind.GENERATED]
        task = asyncio.create_task(self._unload(old, decodes, owned))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _unload(self, old: Any, decodes: bool, owned: bool) -> None:
        number = old.lora_int_id
        while (self.in_flight().all if decodes else self.in_flight().prefilling)[number]:
            await asyncio.sleep(POLL)
        await self.engine.remove_lora(number)
        while self.in_flight().all[number]:
            await asyncio.sleep(POLL)
        await asyncio.sleep(GRACE)
        while self.in_flight().all[number]:
            await asyncio.sleep(POLL)
        await self.engine.remove_lora(number)  # a preempted or a late request may have loaded it again
        async with self.files:
            self._needed[old.lora_path] -= owned
            await self.discard(Path(old.lora_path), owned)
        del self.retiring[number]

    async def discard(self, folder: Path, owned: bool) -> None:
        """Remove a folder of the server's own that no version needs; hold `files`."""
        if owned and not self._needed[str(folder)]:
            del self._needed[str(folder)]
            await asyncio.to_thread(self.store.discard, folder)

    def in_flight(self) -> InFlight:
        """Unfinished requests of the server by adapter id."""
        states = [
            s for s in self.engine.output_processor.request_states.values() if s.lora_request is not None
        ]
        return InFlight(
            Counter(s.lora_request.lora_int_id for s in states),
            Counter(s.lora_request.lora_int_id for s in states if s.is_prefilling),
        )

    def rows(self) -> Iterator[tuple[Any, Version]]:
        """vLLM's LoRARequest and the version of every adapter; of those vLLM's own routes brought, what is known."""
        for name, request in self.models.lora_requests.items():
            yield request, self._versions.get(name, Version(1, None, None, False))
