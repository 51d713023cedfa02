"""Contrast pairs as batches: the embedded model's tasks, and user files in the format of the SVA data sets.

A pair is a clean prompt, its counterfactual, and the answer right for each. `collate` turns pairs into batches after
explicit checks: both answers are single tokens in this context, clean and counterfactual have equal lengths, and one
batch holds one length (the most frequent; ties go to the shorter), because references are means for each position.

User files are JSON lines with the columns clean_prefix, patch_prefix, clean_answer, patch_answer, case. Public SVA
files repeat rows between train and test: `deduplicate`, and `split_by_subject` keeps all forms of a noun on one side.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.config import ConfigError, to_dataclass
from shared.data import DataError, split_rows
from shared.errors import UserError
from shared.tinyworld.tasks import AGREEMENT, Pair, agreement_pairs, capital_pairs

if TYPE_CHECKING:
    from shared.models import Model
    from shared.tokens import TokenBatch

TASKS = (*AGREEMENT, "capitals")


class TaskError(UserError):
    """Pairs that cannot be traced with this tokenizer; the message says which and why."""


@dataclass(frozen=True)
class SvaRow:
    """One line of a user file, named as in the public SVA files."""

    clean_prefix: str
    patch_prefix: str
    clean_answer: str
    patch_answer: str
    case: str = ""


@dataclass(frozen=True)
class PairBatch:
    """Pairs of one length, encoded: clean and counterfactual prompts, and the token of each answer."""

    pairs: tuple[Pair, ...]
    clean: "TokenBatch"
    corrupt: "TokenBatch"
    answers: tuple[int, ...]
    wrongs: tuple[int, ...]
    dropped: int

    def __len__(self) -> int:
        return len(self.pairs)


def task_pairs(task: str, split: str, n: int, seed: int = 0) -> list[Pair]:
    """Return n pairs of one of the embedded model's tasks (TASKS)."""
    if task == "capitals":
        return capital_pairs(split, n, seed)
    if task not in AGREEMENT:
        raise TaskError(f"unknown task {task!r}; there are: {', '.join(TASKS)}, or a file of pairs")
    return agreement_pairs(task, split, n, seed)


def task_names(tasks: Sequence[str]) -> dict[str, str]:
    """Return the name of every task or file of pairs (the file's stem); TaskError where two have the same name."""
    names = {task: task if task in TASKS else Path(task).stem for task in tasks}
    for name, count in Counter(names[task] for task in tasks).items():
        if count > 1:
            same = ", ".join(task for task in tasks if names[task] == name)
            raise TaskError(
                f"tasks of one name, {name!r}: {same}; list each once and rename files of one name"
            )
    return names


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


def split_by_subject(
    pairs: Sequence[Pair], fractions: Mapping[str, float], seed: int = 0
) -> dict[str, list[Pair]]:
    """Return the pairs by part so that no subject occurs in two parts."""
    groups = {pair: subject(pair) for pair in pairs}
    return split_rows(list(pairs), dict(fractions), group=lambda pair: groups[pair], seed=seed)


def answer_token(tokenizer: Any, answer: str) -> int:
    """Return the id of an answer that is one token (with its leading space); TaskError otherwise."""
    ids = tokenizer.encode(answer, add_special_tokens=False)
    if len(ids) != 1:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        raise TaskError(
            f"the answer {answer!r} is {len(ids)} tokens ({pieces}), it must be one; choose another answer"
        )
    return int(ids[0])


def equal_lengths(model: "Model", pairs: Sequence[Pair]) -> list[int | None]:
    """Return each pair's length in tokens, None where clean and counterfactual differ in length."""
    both = (model.encode([pair.clean, pair.corrupt]).lengths_B.tolist() for pair in pairs)
    return [clean if clean == corrupt else None for clean, corrupt in both]


def common_length(*halves: Sequence[int | None]) -> int:
    """Return the length that is most frequent in the first list among those that occur in all (ties: the shorter)."""
    shared = set.intersection(*({n for n in half if n is not None} for half in halves))
    if not shared:
        raise TaskError(
            "no pairs with prompts of equal length, or none of one length in training and test data; a mean for each "
            "position needs them: give more pairs, or pairs whose words have equally many tokens"
        )
    counts = Counter(halves[0])
    return min(shared, key=lambda n: (-counts[n], n))


def collate(model: "Model", pairs: Sequence[Pair], length: int | None = None) -> PairBatch:
    """Return the pairs of one length (in tokens; by default the most frequent) as batches, and how many were dropped.

    Pairs whose two prompts differ in length are dropped too; an answer that is not one token is an error.
    """
    for answer in sorted({text for pair in pairs for text in (pair.answer, pair.wrong)}):
        answer_token(model.tokenizer, answer)
    lengths = equal_lengths(model, pairs)
    length = common_length(lengths) if length is None else length
    chosen = [pair for pair, n in zip(pairs, lengths, strict=True) if n == length]
    if not chosen:
        raise TaskError(f"no pair has {length} tokens; there are lengths {sorted({n for n in lengths if n})}")
    return PairBatch(
        pairs=tuple(chosen),
        clean=model.encode([pair.clean for pair in chosen]),
        corrupt=model.encode([pair.corrupt for pair in chosen]),
        answers=tuple(answer_token(model.tokenizer, pair.answer) for pair in chosen),
        wrongs=tuple(answer_token(model.tokenizer, pair.wrong) for pair in chosen),
        dropped=len(pairs) - len(chosen),
    )
