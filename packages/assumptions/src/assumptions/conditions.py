"""Conditions under which chats are answered, and the replies: an edit at a dose, another wording, or neither.

1. Every chat is answered under every condition with one seed per (chat, sample) whatever the condition: common random
   numbers, so that a difference shows the condition and not fresh sampling noise.
2. A condition may act on some chats only (a gate, `assumptions.gating`): the others are answered without its edits.
3. The engine that answers is one of `assumptions.engines`: Hugging Face, or vLLM with one adapter a condition.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from assumptions.chats import Chat
from assumptions.steering import Direction, Scope, Unit
from shared.generation import Completion, Request, Sampling
from shared.interventions import Intervention

UNEDITED = "none"
Progress: TypeAlias = "Callable[[Sequence[Condition]], Iterable[Condition]]"


@dataclass(frozen=True)
class Condition:
    """One way of answering; the name UNEDITED is the model as it is. `only`: ids of the chats that the edits act on."""

    name: str
    dose: float = 0.0
    edits: tuple[Intervention, ...] = ()
    reword: Callable[[Chat], Chat] | None = None
    only: frozenset[str] | None = None

    @property
    def key(self) -> str:
        """What tells it from other conditions of a study."""
        return f"{self.name}@{self.dose:g}"

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over the name, dose, gate and edits: replies made under a condition are known by it."""
        content = hashlib.sha256(repr((self.key, sorted(self.only) if self.only else self.only)).encode())
        for edit in self.edits:
            for field in fields(edit):
                value = getattr(edit, field.name)
                raw = (
                    value.double().cpu().numpy().tobytes()
                    if isinstance(value, Tensor)
                    else repr(value).encode()
                )
                content.update(field.name.encode() + raw)
        return content.hexdigest()[:16]

    def acts_on(self, chat: Chat) -> bool:
        """Whether the edits act on this chat."""
        return bool(self.edits) and (self.only is None or chat.id in self.only)


@dataclass(frozen=True)
class Reply:
    """One reply: to which chat, under which condition (direction and dose), and whether it ended by itself."""

    chat: str
    direction: str
    dose: float
    text: str
    finish_reason: str
    sample: int = 0


@runtime_checkable
class SteeredEngine(Protocol):
    """Anything that completes requests under a condition's edits."""

    def complete(
        self, condition: Condition, requests: Sequence[Request], acts: Sequence[bool], sampling: Sampling
    ) -> list[list[Completion]]:
        """Complete the requests in order, with the condition's edits on those where `acts` holds."""
        ...


def dosed(
    directions: Sequence[Direction], doses: Sequence[float], unit: Unit = "proj_sd", scope: Scope = "all"
) -> list[Condition]:
    """The unedited model once, and every direction at every dose but 0."""
    return [Condition(UNEDITED)] + [
        Condition(direction.name, dose, tuple(direction.interventions(dose, unit, scope)))
        for direction in directions
        for dose in doses
        if dose != 0
    ]


def answer(
    engine: SteeredEngine,
    chats: Sequence[Chat],
    conditions: Sequence[Condition],
    sampling: Sampling,
    *,
    seed: int = 0,
    progress: Progress = iter,
) -> list[Reply]:
    """Replies to all chats under every condition, in order of conditions, chats and samples."""
    replies = []
    for condition in progress(conditions):
        put = [condition.reword(chat) if condition.reword else chat for chat in chats]
        requests = [
            Request(one.messages, seed=chat_seed(seed, chat.id)) for chat, one in zip(chats, put, strict=True)
        ]
        acts = [condition.acts_on(chat) for chat in chats]
        for chat, completions in zip(
            chats, engine.complete(condition, requests, acts, sampling), strict=True
        ):
            for sample, one in enumerate(completions):
                replies.append(
                    Reply(chat.id, condition.name, condition.dose, one.text, one.finish_reason, sample)
                )
    return replies


def reworded(name: str, reword: Callable[[Chat], Chat]) -> Condition:
    """The unedited model, asked in other words."""
    return replace(Condition(name), reword=reword)


def chat_seed(seed: int, chat: str) -> int:
    """One seed a chat, whatever the condition."""
    digest = hashlib.blake2b(f"{seed}/{chat}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1
