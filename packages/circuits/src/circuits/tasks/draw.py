"""Draw a task's examples for one model: held out by what they are about, fitted to its tokenizer, of one length.

1. Candidates of a part are those all of whose groups hash to that part, each pair once.
2. A candidate fits in the first form whose answers are single tokens in their context (the ids of prompt and answer
   together are the prompt's and one more) and whose two prompts have equally many tokens.
3. Examples have one length (the training part's most frequent that the test part has too), because references are
   means for each position.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from circuits.tasks.items import Example, Item, Task, TaskError
from shared.data import part_of
from shared.tinyworld.tasks import Pair

if TYPE_CHECKING:
    from shared.models import Model

FRACTIONS = {"train": 0.7, "test": 0.3}
Style = Literal["plain", "chat"]


@dataclass
class Tally:
    """What became of a part's candidates."""

    seen: int = 0
    elsewhere: int = 0  # of another part, or of both
    repeated: int = 0
    unfit: int = 0  # answers of several tokens, or prompts of unequal length
    other_length: int = 0


@dataclass(frozen=True)
class Drawn:
    """The examples of every part, their length in tokens, and what became of the candidates."""

    parts: Mapping[str, list[Example]]
    length: int
    tally: Mapping[str, Tally]


def answer_token(tokenizer: Any, answer: str) -> int:
    """Return the id of an answer that is one token (with its leading space); TaskError otherwise."""
    ids = tokenizer.encode(answer, add_special_tokens=False)
    if len(ids) != 1:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        raise TaskError(
            f"the answer {answer!r} is {len(ids)} tokens ({pieces}), it must be one; choose another answer"
        )
    return int(ids[0])


def draw(
    model: "Model", task: Task, sizes: Mapping[str, int], seed: int = 0, style: Style = "plain"
) -> Drawn:
    """Return up to `sizes[part]` examples a part, no group in two parts; TaskError where a part has none.

    With the style "chat" prompts are put as a user's message under the tokenizer's chat template.
    """
    tally = {part: Tally() for part in sizes}
    found: dict[str, dict[int, list[Example]]] = {}
    wanted: int | None = None
    for part, n in sizes.items():
        found[part] = _fitting(model, task, part, n, seed, style, tally[part], wanted)
        if not found[part]:
            raise TaskError(_nothing(task.name, part, tally[part]))
        wanted = _common_length(task.name, found)
    length = _common_length(task.name, found)
    for part, by_length in found.items():
        tally[part].other_length = sum(len(rows) for n, rows in by_length.items() if n != length)
    return Drawn({part: found[part][length][: sizes[part]] for part in sizes}, length, tally)


def _fitting(
    model: "Model", task: Task, part: str, n: int, seed: int, style: Style, tally: Tally, wanted: int | None
) -> dict[int, list[Example]]:
    """Return examples of a part by length, until n of the wanted (or of any one) length are found."""
    rng = random.Random(f"{task.name}-{part}-{seed}")
    found: dict[int, list[Example]] = {}
    seen: set[tuple[Pair, ...]] = set()
    for item in islice(task.candidates(part, rng), 2000 + 200 * n):
        tally.seen += 1
        if any(part_of(group, FRACTIONS, seed) != part for group in item.groups):
            tally.elsewhere += 1
        elif item.forms in seen:
            tally.repeated += 1
        else:
            seen.add(item.forms)
            fitted = _fit(model.tokenizer, item, style)
            if fitted is None:
                tally.unfit += 1
                continue
            pair, length = fitted
            found.setdefault(length, []).append(Example(pair, item.groups, item.labels))
            if wanted in (None, length) and len(found[length]) >= n:
                return found
    return found


def _fit(tokenizer: Any, item: Item, style: Style) -> tuple[Pair, int] | None:
    """Return the first form that fits the tokenizer, and its length in tokens."""
    for form in item.forms:
        pair = _as_chat(tokenizer, form, item.lead) if style == "chat" else form
        if pair is None:
            continue
        lengths = {
            fitted_length(tokenizer, prompt, answer)
            for prompt, answer in ((pair.clean, pair.answer), (pair.clean, pair.wrong), (pair.corrupt, ""))
        }
        if len(lengths) == 1 and None not in lengths:
            return pair, int(lengths.pop() or 0)
    return None


def fitted_length(tokenizer: Any, prompt: str, answer: str) -> int | None:
    """Return the prompt's length in tokens, None where the answer adds not exactly one token to it."""
    ids = tokenizer.encode(prompt)
    if not answer:
        return len(ids)
    alone = tokenizer.encode(answer, add_special_tokens=False)
    both = tokenizer.encode(prompt + answer)
    return len(ids) if len(alone) == 1 and _starts(both, [*ids, *alone]) else None


def _starts(ids: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether ids begin as expected (some tokenizers close every text with a special token)."""
    return list(ids[: len(expected)]) == list(expected)


def _as_chat(tokenizer: Any, pair: Pair, lead: str) -> Pair | None:
    """Return the pair with both prompts as a user's message, the assistant's answer begun with `lead`.

    None where the prompt does not end with the lead, as in forms that go on with a sentence.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TaskError("the tokenizer has no chat template: use the style plain")
    if not pair.clean.endswith(lead):
        return None
    bos = tokenizer.bos_token or ""

    def rendered(prompt: str) -> str:
        message = {"role": "user", "content": prompt.removesuffix(lead).rstrip()}
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        return str(text).removeprefix(bos) + lead  # the tokenizer adds the start of text itself

    return pair._replace(clean=rendered(pair.clean), corrupt=rendered(pair.corrupt))


def _common_length(name: str, found: Mapping[str, Mapping[int, list[Example]]]) -> int:
    counts = [Counter({n: len(rows) for n, rows in by_length.items()}) for by_length in found.values()]
    return common_length(name, *counts)


def common_length(name: str, *counts: Mapping[int, int]) -> int:
    """Return the length that is most frequent in the first counts among those in all (ties: the shorter)."""
    shared = set.intersection(*(set(count) for count in counts))
    if not shared:
        raise TaskError(
            f"{name}: no pairs of one length in training and test data; a mean for each position needs them: give more "
            "pairs, or pairs whose words have equally many tokens"
        )
    return min(shared, key=lambda n: (-counts[0][n], n))


def _nothing(name: str, part: str, tally: Tally) -> str:
    return (
        f"{name}: no usable pair for the {part} part: of {tally.seen} candidates {tally.unfit} have answers that are "
        f"not single tokens of this tokenizer, or prompts of unequal length; {tally.elsewhere} are about things of "
        "another part. Use a model whose tokenizer has these words, or give a file of pairs"
    )
