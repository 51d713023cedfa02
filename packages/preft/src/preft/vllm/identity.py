"""What an adapter folder is to the engine: the phase it acts in, and a digest of its content.

vLLM's scheduler sees only a name, an integer id and a path. The prefix cache needs more: two adapters of one name must
not share blocks if their weights differ. So the folder is read once, when the first request for it arrives, and its
identity is kept by (id, path). If the files change after that, the worker may still hold the old weights; a request is
then refused, unless the adapter is reloaded (`load_inplace`), removed first, or given a new id.

A folder without the phase key is an ordinary adapter: it acts on all tokens.

An adapter of several parts (`preft.parts`) has other weights for other kinds of token (`preft.vllm.mapping.Kind`). Each
part is an adapter folder, and to the engine an adapter with an id of its own, which follows from the part's content:
scheduler and workers agree on it without a word, and requests that share a part share its slot.

An adapter pushed from memory (`preft.vllm.memory`) has no folder. Its path says what the files of a folder would:

    memory:policy@2?phase=prefill&method=lora&history=recompute&digest=0123456789abcdef
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, quote, urlencode

from preft.vllm.mapping import KINDS, Kind
from preft.vllm.residual import SITE
from preft.vllm.strict import STRICT_TYPE
from shared.errors import UserError
from shared.history import History
from shared.intervention_files import JSON_NAME, TENSORS_NAME
from shared.tokens import Phase

CONFIG_FILE = "adapter_config.json"
PHASE_SECTION = "preft"  # key of the section that this project adds to peft's adapter_config.json
COMPOSITION = "composition"  # method of what preft.parts writes
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
MEMORY = "memory:"

Choice = TypeVar("Choice", Phase, History)
Stamp = tuple[
    tuple[str, int, int], ...
]  # (file name, size, modification time in ns) of the files that matter


class Part(NamedTuple):
    """One set of weights of an adapter: content digest (16 hex) and folder."""

    digest: str
    folder: str


@dataclass(frozen=True)
class AdapterIdentity:
    """Phase, method and content digest (16 hex) of an adapter folder, as first read.

    `parts` (an adapter of several) are the weights by kind of token, None where nothing acts. `shape` (blocks, width)
    and `fingerprint` are those of the model it was made for, as far as it says.
    """

    phase: Phase
    method: str
    digest: str
    stamp: Stamp
    parts: tuple[Part | None, ...] | None = None
    shape: tuple[int, int] | None = None
    fingerprint: str | None = None
    history: History = History.RECOMPUTE

    @property
    def acts(self) -> tuple[bool, ...]:
        """Whether anything acts on the tokens of each kind."""
        return KINDS[self.phase] if self.parts is None else tuple(part is not None for part in self.parts)

    @property
    def mapped_by(self) -> tuple[Any, ...]:
        """What the token map of a request under this adapter follows from, for as long as it runs."""
        return self.acts if self.parts is None else self.parts

    def digests(self) -> tuple[str | None, ...]:
        """Digest of the weights that act on the tokens of each kind."""
        if self.parts is not None:
            return tuple(part.digest if part else None for part in self.parts)
        return tuple(self.digest if acts else None for acts in KINDS[self.phase])


def read_identity(folder: Path) -> AdapterIdentity:
    """Read an adapter folder; ValueError where there is no configuration, or one that is not served as it says."""
    if holds_interventions(folder):
        return _read_interventions(folder)
    config_path = folder / CONFIG_FILE
    if not config_path.is_file():
        raise ValueError(
            f"adapter folder {folder} has no {CONFIG_FILE}; save the adapter there or mend the path"
        )
    stamp = folder_stamp(folder)
    raw = json.loads(config_path.read_text(encoding="utf-8"))
    if raw.get("peft_type") == STRICT_TYPE and PHASE_SECTION not in raw:
        raise ValueError(f"{config_path} is of type {STRICT_TYPE} but has lost its section {PHASE_SECTION!r}")
    section = raw.get(PHASE_SECTION, {})
    phase, history = checked_role(section, config_path)
    parts = _read_parts(folder, section["parts"], config_path) if "parts" in section else None
    shape = section.get("base_model_shape")
    return AdapterIdentity(
        phase,
        _method(raw, section),
        content_digest(folder),
        stamp,
        parts,
        (shape["n_layers"], shape["width"]) if shape else None,
        section.get("base_model_fingerprint"),
        history,
    )


def holds_interventions(folder: Path) -> bool:
    """Whether a folder is one that `shared.interventions.save_interventions` wrote."""
    return (folder / JSON_NAME).is_file() and not (folder / CONFIG_FILE).is_file()


def _read_interventions(folder: Path) -> AdapterIdentity:
    """Interventions are served as the adapter that they are; ValueError says why there is none."""
    from preft.materialise import materialised  # which reads identities itself

    stamp = folder_stamp(folder)
    try:
        served = materialised([(folder, 1.0)])
    except UserError as error:
        raise ValueError(f"{folder}: {error}") from error
    inner = read_identity(served)
    own = tuple(Part(inner.digest, str(served)) if acts else None for acts in KINDS[inner.phase])
    return replace(inner, stamp=stamp, parts=inner.parts or own)


def checked_role(section: Mapping[str, Any], where: Path | str) -> tuple[Phase, History]:
    """Phase and history that a section of this project names; ValueError for an unknown one."""
    phase = _choice(Phase, section.get("phase", Phase.ALL), "phase", where)
    return phase, _choice(History, section.get("history") or History.RECOMPUTE, "history", where)


def _method(raw: Mapping[str, Any], section: Mapping[str, Any]) -> str:
    """The method as it is served: a composition that leaves the residual stream alone needs what a LoRA needs."""
    method = str(section.get("method", "lora"))
    return "lora" if method == COMPOSITION and SITE not in raw["target_modules"] else method


def _read_parts(folder: Path, entries: Sequence[Mapping[str, Any]], where: Path) -> tuple[Part | None, ...]:
    """The part for every kind of token; ValueError for one that is not there or that another one claims."""
    by_kind: list[Part | None] = [None] * len(Kind)
    for entry in entries:
        path = folder / entry["folder"]
        if path.parent != folder or not (path / CONFIG_FILE).is_file():
            raise ValueError(f"{where}: part {entry['folder']!r} is no adapter folder in {folder}")
        for name in entry["tokens"]:
            if name.upper() not in Kind.__members__ or by_kind[Kind[name.upper()]] is not None:
                raise ValueError(f"{where}: tokens {name!r} are unknown or have two parts")
            by_kind[Kind[name.upper()]] = Part(content_digest(path), str(path))
    return tuple(by_kind)


def memory_path(name: str, section: Mapping[str, Any], digest: str) -> str:
    """The path of an adapter that is no folder: all that `memory_identity` reads back from it."""
    kept = {key: section[key] for key in ("phase", "method", "history") if section.get(key)}
    return f"{MEMORY}{quote(name, safe='@')}?{urlencode(kept | {'digest': digest})}"


def is_memory_path(path: str) -> bool:
    """Whether a `LoRARequest`'s path names an adapter pushed from memory."""
    return path.startswith(MEMORY)


def memory_identity(path: str) -> AdapterIdentity:
    """Phase, method and digest as the path of a pushed adapter says them; ValueError where it cannot be served."""
    section = dict(parse_qsl(path.partition("?")[2]))
    if "digest" not in section:
        raise ValueError(f"{path} is no adapter in memory; push one with preft.vllm.memory.push")
    phase, history = checked_role(section, path)
    return AdapterIdentity(phase, section.get("method", "lora"), section["digest"], (), history=history)


def _choice(kind: type[Choice], value: Any, key: str, where: Path | str) -> Choice:
    known = [choice.value for choice in kind]
    if value not in known:
        raise ValueError(f"{where}: {key} {value!r} is not one of {', '.join(known)}")
    return kind(value)


def folder_stamp(folder: Path) -> Stamp:
    """Size and modification time of the files that make the adapter."""
    stats = [(name, (folder / name).stat()) for name in _files(folder)]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _files(folder: Path) -> list[str]:
    own = [
        name for name in (CONFIG_FILE, *WEIGHT_FILES, JSON_NAME, TENSORS_NAME) if (folder / name).is_file()
    ]
    parts = [path for path in sorted(folder.glob("part-*")) if path.is_dir()]
    return own + [f"{path.name}/{name}" for path in parts for name in _files(path)]


def content_digest(folder: Path) -> str:
    """16 hex digits that follow from the content of the files that make the adapter."""
    digest = hashlib.sha256()
    for name in _files(folder):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def part_id(digest: str) -> int:
    """The engine's id of a part: from 2**62 on, where no id given by a user or counted by a server lies."""
    return (1 << 62) | (int(digest, 16) >> 2)


class AdapterRegistry:
    """Identities of the adapters one process has met; `lora_request` is vLLM's `LoRARequest`."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], AdapterIdentity] = {}
        self._removed: dict[tuple[int, str], AdapterIdentity] = {}
        self._ids: dict[tuple[int, str], tuple[int, ...]] = {}
        self._parts: dict[str, Any] = {}  # digest -> LoRARequest of that part

    def resolve(self, lora_request: Any) -> AdapterIdentity:
        """The identity under which this request runs; ValueError if the files changed since they were first read."""
        known = self._known.get(_key(lora_request))
        if known is None or lora_request.load_inplace:
            self.check_return(lora_request)
            return self.refresh(lora_request)
        if known.stamp and folder_stamp(_folder(lora_request)) != known.stamp:
            raise ValueError(
                f"the files of adapter {lora_request.lora_name!r} in {lora_request.lora_path} changed after they were "
                f"loaded as id {lora_request.lora_int_id}; load it anew (load_inplace=True) or use another id"
            )
        return known

    def known(self, lora_request: Any) -> AdapterIdentity:
        """The identity as last read; no look at the disk after the first."""
        return self._known.get(_key(lora_request)) or self.refresh(lora_request)

    def by_kind(self, lora_request: Any) -> tuple[Any, ...]:
        """What acts on the tokens of each kind, as last read: the request itself, the request of a part, or None."""
        identity = self.known(lora_request)
        if identity.parts is None:
            return tuple(lora_request if acts else None for acts in KINDS[identity.phase])
        return tuple(part and self._part(part) for part in identity.parts)

    def ids(self, lora_request: Any) -> tuple[int, ...]:
        """The ids of `by_kind`, 0 for None."""
        found = self._ids.get(_key(lora_request))
        if found is None:
            row = self.by_kind(lora_request)
            found = self._ids[_key(lora_request)] = tuple(part.lora_int_id if part else 0 for part in row)
        return found

    def _part(self, part: Part) -> Any:
        if part.digest not in self._parts:
            from vllm.lora.request import LoRARequest

            # vLLM compares requests by name: one name for one content.
            self._parts[part.digest] = LoRARequest(f"part-{part.digest}", part_id(part.digest), part.folder)
        return self._parts[part.digest]

    def refresh(self, lora_request: Any) -> AdapterIdentity:
        """Read the folder, or the path of an adapter in memory, again."""
        return self.learn(lora_request, _read(lora_request))

    def learn(self, lora_request: Any, identity: AdapterIdentity) -> AdapterIdentity:
        """Take an identity that was read elsewhere, in a thread for example."""
        self._known[_key(lora_request)] = identity
        self._ids.pop(_key(lora_request), None)
        self._removed.pop(_key(lora_request), None)
        return identity

    def part_ids(self, lora_int_id: int) -> set[int]:
        """Ids of the weights that the adapter of this id consists of: its own, unless it has parts."""
        known = [identity for (number, _), identity in self._known.items() if number == lora_int_id]
        parts = {part for identity in known if identity.parts is not None for part in identity.parts}
        return {part_id(part.digest) for part in parts if part} if parts else {lora_int_id}

    def current(self, lora_request: Any) -> AdapterIdentity | None:
        """The identity as last read; None for an adapter that is not known here."""
        return self._known.get(_key(lora_request))

    def check_reload(self, lora_request: Any) -> None:
        """ValueError if the files now hold an adapter for other tokens: requests are under way with the old one."""
        known, new = self._last(lora_request), _read(lora_request)
        if known is not None and new.acts != known.acts:
            raise ValueError(
                f"adapter {lora_request.lora_name!r} was loaded with phase {known.phase.value!r}, and "
                f"{lora_request.lora_path} now holds one of phase {new.phase.value!r}, which acts on other tokens; "
                "load it under another id"
            )

    def check_return(self, lora_request: Any) -> None:
        """ValueError if an id comes back to other tokens or other parts than the workers map its requests by."""
        last = self._last(lora_request)
        if last is not None and last.mapped_by != (new := _read(lora_request)).mapped_by:
            raise ValueError(
                f"adapter {lora_request.lora_name!r} was known as id {lora_request.lora_int_id} with phase "
                f"{last.phase.value!r}, and {lora_request.lora_path} now holds one of phase {new.phase.value!r}, with "
                "other tokens or parts, while requests may still run under the first; load it under another id"
            )

    def _last(self, lora_request: Any) -> AdapterIdentity | None:
        key = _key(lora_request)
        return self._known.get(key) or self._removed.get(key)

    def forget(self, lora_int_id: int) -> None:
        """Read an id anew, under every path, when it is next met; `check_return` remembers what it was."""
        for key in [key for key in self._known if key[0] == lora_int_id]:
            identity = self._known.pop(key)
            self._ids.pop(key, None)
            if not is_memory_path(key[1]):  # such a path names its content
                self._removed[key] = identity


worker_adapters = AdapterRegistry()  # of the process that runs the model


def _read(lora_request: Any) -> AdapterIdentity:
    path = lora_request.lora_path
    return memory_identity(path) if is_memory_path(path) else read_identity(_folder(lora_request))


def _key(lora_request: Any) -> tuple[int, str]:
    return lora_request.lora_int_id, lora_request.lora_path


def _folder(lora_request: Any) -> Path:
    if Path(lora_request.lora_path).is_dir():
        return Path(lora_request.lora_path)
    # A hub name: vLLM's own resolver finds (and, online, downloads) the snapshot.
    from vllm.lora.utils import get_adapter_absolute_path

    return Path(get_adapter_absolute_path(lora_request.lora_path))
