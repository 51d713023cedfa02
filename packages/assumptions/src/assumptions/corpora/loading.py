"""Load a set of the registry from a file, a folder or the Hugging Face hub, and say exactly what was read.

1. Find the files of the wanted part: the given file, or all in the given folder that match the part's name.
2. Read them row by row into the part's row type; a row that does not fit is an error with file, line and column.
3. Rows that the set itself marks as unusable are skipped and counted by reason; so are repeated ids.
4. The card holds files, SHA-256, counts, licence and notes. Nothing is downloaded unless the source begins with "hf".
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from assumptions.chats import Chat
from assumptions.corpora.files import Raw
from assumptions.corpora.item import Item, Skip
from assumptions.corpora.registry import SHIPPED, Corpus, Part, corpus
from shared.data import iter_typed_rows
from shared.errors import UserError

HUB = "hf"


@dataclass(frozen=True)
class LoadedCorpus:
    """Items in the order of their rows, and the card: name, part, files with SHA-256, counts, licence, notes."""

    items: list[Item]
    card: dict[str, Any]

    def chats(self) -> list[Chat]:
        """The last user message of every item with its history, ready to be asked about."""
        return [item.chat() for item in self.items]


def load_corpus(
    name: str,
    source: Path | str | None = None,
    *,
    part: str | None = None,
    limit: int | None = None,
    use: Literal["evaluation", "training"] = "evaluation",
) -> LoadedCorpus:
    """Load a set; `source` is a file, a folder, "hf" (the set's own place on the hub) or "hf:ID".

    `part` names one of several files of a set, `limit` ends after so many items. UserError when the set is not there
    (with its licence, address, files and columns), when a row is malformed, or when a set for evaluation only is asked
    for to train on.
    """
    chosen = corpus(name)
    if use == "training" and chosen.eval_only:
        raise UserError(f"{chosen.title} is for evaluation only: its authors ask to keep it out of training")
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    part = _part_name(chosen, part)
    counts: Counter[str] = Counter()
    raw, origin = _open(chosen, part, SHIPPED.get(name) if source is None else source)
    items = list(itertools.islice(_items(chosen, part, raw, counts), limit))
    if not items:
        raise UserError(f"{origin['source']} gave no item of {chosen.title}: {dict(counts)}")
    return LoadedCorpus(items, origin | _card(chosen, part, items, counts, limit))


def _part_name(chosen: Corpus, part: str | None) -> str:
    if part is None and len(chosen.parts) == 1:
        return next(iter(chosen.parts))
    if part not in chosen.parts:
        raise UserError(f"{chosen.title} has the parts {', '.join(chosen.parts)}: choose one, got {part!r}")
    return part


def _open(chosen: Corpus, name: str, source: Path | str | None) -> tuple[Raw, dict[str, Any]]:
    """The rows of a part, and where they come from."""
    part = chosen.parts[name]
    if source is None:
        raise UserError(chosen.how_to_get())
    if str(source) == HUB or str(source).startswith(f"{HUB}:"):
        return _from_hub(chosen, part, str(source).removeprefix(HUB).removeprefix(":") or chosen.hub)
    path = Path(source)
    found = sorted(path.glob(part.file)) if path.is_dir() and not _is_dataset(path) else [path]
    if not found or not all(file.exists() for file in found):
        raise UserError(f"{path} holds no {part.file}: {chosen.how_to_get()}")
    sums = {file.name: _sha256(file) for file in found if file.is_file()}
    rows = itertools.chain.from_iterable(part.read(file, part.row) for file in found)
    return rows, {"source": str(source), "files": sums}


def _is_dataset(path: Path) -> bool:
    return any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))


def _from_hub(chosen: Corpus, part: Part, name: str | None) -> tuple[Raw, dict[str, Any]]:
    if name is None:
        raise UserError(f"{chosen.title} is not on the hub under a known name: {chosen.how_to_get()}")
    import datasets

    several = len(chosen.parts) > 1 and chosen.config is None
    where: dict[str, Any] = {"data_files": part.file, "split": "train"} if several else {"split": part.split}
    try:
        rows = datasets.load_dataset(name, chosen.config, streaming=True, **where)
    except (OSError, ValueError) as error:
        raise UserError(f"the hub gave no {name} ({error}); {chosen.how_to_get()}") from error
    places = ((f"{name}, row {number}", dict(values)) for number, values in enumerate(rows, start=1))
    return places, {"source": f"{HUB}:{name}", "files": {}}


def _items(chosen: Corpus, name: str, raw: Raw, counts: Counter[str]) -> Iterator[Item]:
    """Items under ids that are unique over all sets; counts gets the rows read and what was skipped, by reason."""
    seen: set[str] = set()
    prefix = "/".join(part for part in (chosen.name, name) if part)
    rows = iter_typed_rows(raw, chosen.parts[name].row, drop_extra=True)
    for number, row in enumerate(rows, start=1):
        counts["rows"] += 1
        try:
            items = row.items(number)
        except Skip as reason:
            counts[f"skipped: {reason}"] += 1
            continue
        for item in items:
            full = f"{prefix}/{item.id}"
            if full in seen:
                counts["skipped: another row of the same id"] += 1
                continue
            seen.add(full)
            group = f"{chosen.groups or prefix}/{item.group or item.id}"
            yield replace(item, id=full, group=group, source=chosen.name)


def _card(
    chosen: Corpus, name: str, items: list[Item], counts: Counter[str], limit: int | None
) -> dict[str, Any]:
    published = chosen.parts[name].rows
    notes = list(chosen.notes)
    if published is not None and limit is None and counts["rows"] != published:
        notes.append(f"{counts['rows']} rows were read, {published} are published")
    return {
        "name": chosen.name,
        "part": name,
        "title": chosen.title,
        "licence": chosen.licence,
        "url": chosen.url,
        "eval_only": chosen.eval_only,
        "items": len(items),
        "counts": dict(counts),
        "notes": notes,
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
