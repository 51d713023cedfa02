"""Adapters pushed into a running vLLM from memory, in versions (digest, 1.3 and T15: hot swap without a drain).

    request = push(llm, "policy", adapter)          # version 1
    llm.generate(prompts, params, lora_request=request)
    request = push(llm, "policy", adapter)          # trained on: version 2, while requests may still run under 1

Nothing touches the disk. One worker call carries the configuration and the tensors to every worker
(`preft.vllm.memory_worker`), where they stay in host memory; from there vLLM's own manager fills slots and may evict.

1. A version is a name (`policy@2`), an id and a digest of its own, so no cached block and no slot of another version is
   ever taken for it.
2. Identity needs no file: the path of the `LoRARequest` (`memory:policy@2?phase=prefill&...`) says phase, method,
   history and digest, so front, scheduler and worker processes read it alike (`preft.vllm.identity`).
3. A request keeps the version it was submitted with, to its end: no drain. Its prompt's keys and values are fixed, but
   the adapter is needed again if the request is preempted and computed anew. So a push (or `remove`) retires the
   versions before it: no new request may name them. A version retired earlier is dropped once no unfinished request
   names it; not at once, for a request may be between its validation and its registration.
"""

import hashlib
import itertools
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from preft.adapters import Adapter, AdapterError
from preft.formats import adapter_tensors, peft_config
from preft.vllm.identity import PHASE_SECTION, is_memory_path, memory_identity, memory_path
from preft.vllm.memory_worker import DROP, HOLD

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

# Adapters of files are numbered from 1 by vLLM's front ends; ids are 32-bit in Model Runner V2.
FIRST_ID = 1 << 30
_ids = itertools.count(FIRST_ID)


@dataclass(frozen=True)
class Package:
    """An adapter as it travels: the text of its adapter_config.json and its tensors in safetensors' format."""

    config: str
    tensors: bytes

    @classmethod
    def of(cls, adapter: Adapter) -> "Package":
        """The package of an adapter as it is now."""
        from safetensors.torch import save

        return cls(json.dumps(peft_config(adapter, "", None)), save(adapter_tensors(adapter)))

    @property
    def digest(self) -> str:
        """16 hex digits over configuration and tensors."""
        content = hashlib.sha256(self.config.encode())
        content.update(self.tensors)
        return content.hexdigest()[:16]


@dataclass
class Ledger:
    """What one front end has pushed: the newest version by name, and the retired ones that are still held."""

    current: "dict[str, LoRARequest]" = field(default_factory=dict)
    retired: "list[LoRARequest]" = field(default_factory=list)
    numbers: Counter[str] = field(default_factory=Counter)  # the last version's, by name

    def droppable(self, in_use: set[int]) -> "list[LoRARequest]":
        """Take out the retired versions that no unfinished request names."""
        idle = [old for old in self.retired if old.lora_int_id not in in_use]
        self.retired = [old for old in self.retired if old.lora_int_id in in_use]
        return idle

    def retire(self, name: str) -> None:
        """From now on no new request may name the current version, if there is one."""
        if name in self.current:
            self.retired.append(self.current.pop(name))


def push(engine: Any, name: str, adapter: Adapter | Package, *, pin: bool = False) -> "LoRARequest":
    """Load an adapter into a running `vllm.LLM` (or `LLMEngine`) as the next version of `name`.

    Requests that carry the returned `LoRARequest` run under it. With `pin` the workers keep it in vLLM's cache of
    adapters until the next version is pushed. AdapterError where the engine cannot serve it; the engine lives on.
    """
    engine = getattr(engine, "llm_engine", engine)
    version = _next_version(engine, name, adapter, pin)
    _accept(name, engine.collective_rpc(HOLD, args=version.arguments))
    for old in _enter(engine, name, version.request):
        engine.remove_lora(old.lora_int_id)
        engine.collective_rpc(DROP, args=(old.lora_int_id, old.lora_path))
    return version.request


async def push_async(
    engine: Any, name: str, adapter: Adapter | Package, *, pin: bool = False
) -> "LoRARequest":
    """`push` for a running `AsyncLLM`."""
    version = _next_version(engine, name, adapter, pin)
    _accept(name, await engine.collective_rpc(HOLD, args=version.arguments))
    for old in _enter(engine, name, version.request):
        await engine.remove_lora(old.lora_int_id)
        await engine.collective_rpc(DROP, args=(old.lora_int_id, old.lora_path))
    return version.request


def remove(engine: Any, name: str) -> None:
    """Refuse new requests under `name`; running ones go on, and the memory is freed by the next push or removal.

    AdapterError where nothing of that name is held.
    """
    engine = getattr(engine, "llm_engine", engine)
    for old in _leave(engine, name):
        engine.remove_lora(old.lora_int_id)
        engine.collective_rpc(DROP, args=(old.lora_int_id, old.lora_path))


async def remove_async(engine: Any, name: str) -> None:
    """`remove` for a running `AsyncLLM`."""
    for old in _leave(engine, name):
        await engine.remove_lora(old.lora_int_id)
        await engine.collective_rpc(DROP, args=(old.lora_int_id, old.lora_path))


class Version(NamedTuple):
    """A version about to be pushed: what requests will carry, and what the workers are called with."""

    request: "LoRARequest"
    arguments: tuple[Any, ...]


def _next_version(engine: Any, name: str, adapter: Adapter | Package, pin: bool) -> Version:
    """Name, number and path of the next version; AdapterError where no engine could serve it."""
    from vllm.lora.request import LoRARequest

    if engine.input_processor.lora_config is None:
        raise AdapterError(
            "this engine serves no adapters: start it with enable_lora=True (vllm serve: --enable-lora)"
        )
    package = adapter if isinstance(adapter, Package) else Package.of(adapter)
    section = json.loads(package.config).get(PHASE_SECTION, {})
    if "parts" in section:
        raise AdapterError(f"adapter {name!r} has several parts, which are served from a folder only")
    numbers = ledger_of(engine.input_processor).numbers
    numbers[name] += 1  # at once: vLLM tells requests apart by name, and pushes may overlap
    version = f"{name}@{numbers[name]}"
    path = memory_path(version, section, package.digest)
    try:
        memory_identity(path)
    except ValueError as error:
        raise AdapterError(str(error)) from error
    request = LoRARequest(version, next(_ids), path)
    arguments = (version, request.lora_int_id, path, package.config, package.tensors, name if pin else "")
    return Version(request, arguments)


def _accept(name: str, verdicts: list[str | None]) -> None:
    """AdapterError with what the workers say against an adapter."""
    if refused := next((verdict for verdict in verdicts if verdict), None):
        raise AdapterError(f"the engine refuses adapter {name!r}: {refused}")


def _enter(engine: Any, name: str, request: "LoRARequest") -> "list[LoRARequest]":
    """Make the new version the current one; returns the retired ones to drop."""
    ledger = ledger_of(engine.input_processor)
    idle = ledger.droppable(_in_use(engine))
    ledger.retire(name)
    ledger.current[name] = request
    return idle


def _leave(engine: Any, name: str) -> "list[LoRARequest]":
    """Retire the current version without a new one; returns those retired earlier to drop."""
    ledger = ledger_of(engine.input_processor)
    if name not in ledger.current:
        raise AdapterError(
            f"no adapter {name!r} in memory (there: {', '.join(ledger.current) or 'none'}); push it first"
        )
    idle = ledger.droppable(_in_use(engine))
    ledger.retire(name)
    return idle


def _in_use(engine: Any) -> set[int]:
    """Ids of the adapters that unfinished requests name."""
    states = engine.output_processor.request_states.values()
    return {state.lora_request.lora_int_id for state in states if state.lora_request is not None}


def ledger_of(input_processor: Any) -> Ledger:
    """The ledger of one engine's front end, kept on its `InputProcessor`."""
    return input_processor.__dict__.setdefault("_pushed_adapters", Ledger())


def check_pushed(input_processor: Any, lora_request: Any) -> None:
    """ValueError for a request under an adapter in memory that is not the current version of its name."""
    current = ledger_of(input_processor).current.values()
    if is_memory_path(lora_request.lora_path) and lora_request.lora_path not in {
        request.lora_path for request in current
    }:
        raise ValueError(
            f"adapter {lora_request.lora_name!r} is not held by this engine: it was replaced by a newer version, "
            "removed, or pushed to another engine. Use the LoRARequest of the latest push"
        )
