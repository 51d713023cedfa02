"""What a task yields: contrast pairs with the things they are about, and labels to score hypotheses against.

An item may be written in several forms, because tokenizers differ: " 95" is one token for one and two for another.
`circuits.tasks.draw` takes the first form that fits the model's tokenizer. `groups` are the things that must not be on
both sides of a split (the noun, the city, the pair of numbers): an item belongs to a part when all of them do.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from shared.errors import UserError
from shared.tinyworld.tasks import Pair


class TaskError(UserError):
    """Pairs that cannot be traced with this tokenizer; the message says which and why."""


@dataclass(frozen=True)
class Example:
    """One pair, what it is about, and its classes (`labels["language"] == "fr"`)."""

    pair: Pair
    groups: tuple[str, ...]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """One candidate: the same pair in one or more forms, the preferred first.

    `lead` is the end of both prompts that an assistant has already said ("Answer:") when the prompt is put as a chat.
    """

    forms: tuple[Pair, ...]
    groups: tuple[str, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    lead: str = ""


@dataclass(frozen=True)
class Task:
    """A stream of candidates: `candidates(part, rng)` may be endless, and may repeat itself.

    The part ("train" or "test") matters only where the embedded model was trained on some of the world's sentences:
    candidates of the test part were never trained on.
    """

    name: str
    candidates: Callable[[str, random.Random], Iterator[Item]]
