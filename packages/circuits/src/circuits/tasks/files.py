"""Pairs from files in the format of the SVA data sets, held out by noun.

JSON lines with the columns clean_prefix, patch_prefix, clean_answer, patch_answer, case. The public files repeat rows
between their halves, and half of what is left shares a noun across them: give both halves (a pattern such as
`sva/nounpp_*.json`), which are read as one, deduplicated and split by noun. What a pair is about are the words in which
clean and counterfactual differ (dog, dogs); a pair that also mentions a noun which other pairs are about belongs to
both, so that no noun of the training part occurs in the test part at all.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from circuits.tasks.items import Item, Task
from shared.config import ConfigError, to_dataclass
from shared.data import DataError
from shared.tinyworld.tasks import Pair


@dataclass(frozen=True)
class SvaRow:
    """One line of a user file, named as in the public SVA files."""

    clean_prefix: str
    patch_prefix: str
    clean_answer: str
    patch_answer: str
    case: str = ""


def file_name(path: str) -> str:
    """Return the task's name of a file or a pattern of files: `nounpp` for `sva/nounpp_*.json`."""
    return Path(path).stem.replace("*", "").strip("_-. ") or "pairs"


def file_task(path: str) -> Task:
    """Return the pairs of a file, or of all files that a pattern with * matches, as a task."""
    items = pair_items(read_all(path))

    def candidates(part: str, rng: random.Random) -> Iterator[Item]:
        yield from rng.sample(items, len(items))

    return Task(file_name(path), candidates)


def read_all(path: str) -> list[Pair]:
    """Return the distinct pairs of a file or of the files that a pattern matches, in order."""
    paths = sorted(glob(path)) if "*" in path else [path]
    if not paths:
        raise DataError(f"no file matches {path!r}")
    return deduplicate(pair for one in paths for pair in read_pairs(one))


def read_pairs(path: Path | str) -> list[Pair]:
    """Return the pairs of a JSON-lines file of SvaRow; DataError names file, line and column."""
    import json

    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; expected JSON lines with the columns {', '.join(SvaRow.__annotations__)}"
        )
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = to_dataclass(SvaRow, json.loads(line))
        except (ValueError, ConfigError) as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        pairs.append(Pair(row.clean_prefix, row.patch_prefix, row.clean_answer, row.patch_answer, row.case))
    return pairs


def deduplicate(pairs: Iterable[Pair]) -> list[Pair]:
    """Return each distinct pair once, in order."""
    return list(dict.fromkeys(pairs))


def subject(pair: Pair) -> tuple[str, ...]:
    """Return the words in which clean and counterfactual differ, in order of the alphabet (dog and dogs alike)."""
    clean, corrupt = pair.clean.split(), pair.corrupt.split()
    differing = [words for words in zip(clean, corrupt) if words[0] != words[1]]
    return tuple(sorted({word for words in differing for word in words}))


def pair_items(pairs: Iterable[Pair]) -> list[Item]:
    """Return pairs as items whose groups are their subject, and the subjects of other pairs that they mention."""
    pairs = list(pairs)
    subject_of = {word: " ".join(subject(pair)) for pair in pairs for word in subject(pair)}

    def groups(pair: Pair) -> tuple[str, ...]:
        mentioned = (subject_of[word] for word in pair.clean.split() if word in subject_of)
        return tuple(dict.fromkeys([" ".join(subject(pair)), *mentioned]))

    return [Item((pair,), groups(pair), {"case": pair.kind}) for pair in pairs]
