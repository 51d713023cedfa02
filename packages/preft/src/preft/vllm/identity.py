"""What an adapter folder is to the engine: the phase it acts in, and a digest of its content.

vLLM's scheduler sees only a name, an integer id and a path. The prefix cache needs more: two adapters of one name must
not share blocks if their weights differ. So the folder is read once, when the first request for it arrives, and its
identity is kept by (id, path). If the files change after that, the worker may still hold the old weights; a request is
then refused, unless the adapter is reloaded (`load_inplace`), removed first, or given a new id.

A folder without the phase key is an ordinary adapter: it acts on all tokens.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from shared.history import History
from shared.tokens import Phase

CONFIG_FILE = "adapter_config.json"
PHASE_SECTION = "preft"  # key of the section that this project adds to peft's adapter_config.json
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")

Choice = TypeVar("Choice", Phase, History)
Stamp = tuple[
    tuple[str, int, int], ...
]  # (file name, size, modification time in ns) of the files that matter


@dataclass(frozen=True)
class AdapterIdentity:
    """Phase, method and content digest (16 hex) of an adapter folder, as first read."""

    phase: Phase
    method: str
    digest: str
    stamp: Stamp


def read_identity(folder: Path) -> AdapterIdentity:
    """Read an adapter folder; ValueError where there is no configuration, or one that is not served as it says."""
    config_path = folder / CONFIG_FILE
    if not config_path.is_file():
        raise ValueError(
            f"adapter folder {folder} has no {CONFIG_FILE}; save the adapter there or mend the path"
        )
    stamp = folder_stamp(folder)
    section = json.loads(config_path.read_text(encoding="utf-8")).get(PHASE_SECTION, {})
    phase = _choice(Phase, section.get("phase", Phase.ALL), "phase", config_path)
    history = _choice(History, section.get("history", History.RECOMPUTE), "history", config_path)
    check_history(history, phase, config_path)
    return AdapterIdentity(phase, section.get("method", "lora"), _digest(folder), stamp)


def check_history(history: History, phase: Phase, where: Path | str) -> None:
    """ValueError where serving would count earlier answers as something else than training did.

    An adapter of phase all acts on every token under either policy.
    """
    if history is History.STICKY and phase is not Phase.ALL:
        raise ValueError(
            f"{where}: the adapter was trained with history 'sticky', under which earlier answers in a chat stay "
            "generated text. The server is not told where the turns of a prompt begin and would take all of it for "
            "prompt. Train the adapter with history 'recompute' to serve it"
        )


def _choice(kind: type[Choice], value: Any, key: str, where: Path) -> Choice:
    known = [choice.value for choice in kind]
    if value not in known:
        raise ValueError(f"{where}: {key} {value!r} is not one of {', '.join(known)}")
    return kind(value)


def folder_stamp(folder: Path) -> Stamp:
    """Size and modification time of the files that make the adapter."""
    stats = [(name, (folder / name).stat()) for name in _files(folder)]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _files(folder: Path) -> list[str]:
    return [name for name in (CONFIG_FILE, *WEIGHT_FILES) if (folder / name).is_file()]


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in _files(folder):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


class AdapterRegistry:
    """Identities of the adapters one process has met; `lora_request` is vLLM's `LoRARequest`."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], AdapterIdentity] = {}

    def resolve(self, lora_request: Any) -> AdapterIdentity:
        """The identity under which this request runs; ValueError if the files changed since they were first read."""
        known = self._known.get(_key(lora_request))
        if known is None or lora_request.load_inplace:
            return self.refresh(lora_request)
        if folder_stamp(_folder(lora_request)) != known.stamp:
            raise ValueError(
                f"the files of adapter {lora_request.lora_name!r} in {lora_request.lora_path} changed after they were "
                f"loaded as id {lora_request.lora_int_id}; load it anew (load_inplace=True) or use another id"
            )
        return known

    def phase(self, lora_request: Any) -> Phase:
        """The phase as last read; no look at the disk after the first."""
        known = self._known.get(_key(lora_request))
        return (known or self.refresh(lora_request)).phase

    def refresh(self, lora_request: Any) -> AdapterIdentity:
        """Read the folder again."""
        identity = read_identity(_folder(lora_request))
        self._known[_key(lora_request)] = identity
        return identity

    def forget(self, lora_int_id: int) -> None:
        """Drop what is known of an id, under every path."""
        self._known = {key: value for key, value in self._known.items() if key[0] != lora_int_id}


def _key(lora_request: Any) -> tuple[int, str]:
    return lora_request.lora_int_id, lora_request.lora_path


def _folder(lora_request: Any) -> Path:
    if Path(lora_request.lora_path).is_dir():
        return Path(lora_request.lora_path)
    # A hub name: vLLM's own resolver finds (and, online, downloads) the snapshot.
    from vllm.lora.utils import get_adapter_absolute_path

    return Path(get_adapter_absolute_path(lora_request.lora_path))
