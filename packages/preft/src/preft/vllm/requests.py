"""Adapters by name, with strengths and sums: `calm`, `calm:0.5`, `alice+calm:0.5`.

    name     = term ("+" term)*       all terms act together (preft.composition)
    term     = known [":" strength]   strength multiplies all that the adapter does; 1 where it is left out
    known    = an adapter folder, or a folder of saved interventions, under the name it is known by

A name that is known as it stands means itself. A strength or a sum becomes a folder of its own (`preft.materialise`),
so that slots, eviction, prefix cache and reloading see one more adapter and nothing else.

In process, `adapter_request` gives vLLM's `LoRARequest`, and `adapter_folder` a folder for
`VLLMGenerator(adapters=...)`. A server asks `resolver` (registered by the plugin) for a model name it does not know,
if VLLM_ALLOW_RUNTIME_LORA_UPDATING is set: known are then the adapters that are loaded, and the folders in
VLLM_LORA_RESOLVER_CACHE_DIR.
"""

import math
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from preft.adapters import AdapterError
from preft.materialise import materialised
from preft.vllm.identity import CONFIG_FILE, holds_interventions

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

MOST_TERMS = 16
# Ids for folders that were given none: above what is counted from 1, and within 31 bits (Model Runner V2).
_ids = count(1 << 20)
_id_of: dict[tuple[str, Path], int] = {}


class Term(NamedTuple):
    """One adapter of a sum."""

    name: str
    strength: float


def parse(name: str, known: Mapping[str, str | Path]) -> list[Term]:
    """The terms of a name; AdapterError for an unknown adapter or a strength that is no number."""
    if name in known:
        return [Term(name, 1.0)]
    return [_term(text, name, known) for text in name.split("+")]


def _term(text: str, whole: str, known: Mapping[str, str | Path]) -> Term:
    if text in known:
        return Term(text, 1.0)
    adapter, colon, strength = text.rpartition(":")
    if not colon or adapter not in known:
        raise AdapterError(
            f"no adapter named {(adapter or text)!r}"
            + (f" (in {whole!r})" if text != whole else "")
            + f"; known: {', '.join(sorted(known)) or 'none'}"
        )
    try:
        value = float(strength)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise AdapterError(f"{strength!r} in {whole!r} is no strength; write a number, as in {adapter}:0.5")
    return Term(adapter, value)


def adapter_folder(name: str, folders: Mapping[str, str | Path], max_rank: int | None = None) -> Path:
    """The adapter folder that a name stands for, made if need be.

    UserError where it stands for none, or for one of more than `MOST_TERMS` terms or of a rank above `max_rank`.
    """
    terms = [(Path(folders[term.name]), term.strength) for term in parse(name, folders)]
    if len(terms) > MOST_TERMS:
        raise AdapterError(f"a sum has at most {MOST_TERMS} terms, not {len(terms)}")
    [(first, strength), *others] = terms
    if not others and strength == 1.0 and not holds_interventions(first):
        return first
    return materialised(terms, max_rank)


def adapter_request(name: str, folders: Mapping[str, str | Path]) -> "LoRARequest":
    """The request under which vLLM serves what a name stands for; the same one for the same name and folder."""
    from vllm.lora.request import LoRARequest

    key = (name, adapter_folder(name, folders).resolve())
    if key not in _id_of:
        _id_of[key] = next(_ids)
    return LoRARequest(name, _id_of[key], str(key[1]))


def folders_in(root: Path) -> dict[str, Path]:
    """The adapters and interventions that lie directly in a folder, by the name of theirs."""
    return {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and holds_adapter(path)}


def holds_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter or interventions, by its files."""
    return (folder / CONFIG_FILE).is_file() or holds_interventions(folder)
