"""Contrast and control sets: WildChat (what people ask in general), TalkTuner (attributes, not intents), GSM8K, seeds.

WildChat keeps the first user message of English conversations without toxic turns. TalkTuner's chats are synthetic,
each written for one value of one attribute of the user: a probe of intents should not read it. The goal-switch seeds
are ours: one topic opened once for validation and once for an impartial view.
"""

import re
from dataclasses import dataclass
from typing import Any

from assumptions.chats import text_key
from assumptions.corpora.item import Item, Skip, asked, require
from shared.tokens import Message

# Capitals mark a speaker anywhere (some files lack the line breaks), other spellings at the start of a line only.
_SPEAKER = re.compile(
    r"(?:\b(HUMAN|ASSISTANT)|^[#\s]*(Human|User|Assistant|AI|Chatbot))\s*:[ \t]*", re.MULTILINE
)
_NAMED = re.compile(r"conversation_(\w+?)_(age|gender|education|socioeco\w*)_(.+)\.txt")
_FINAL = re.compile(r"####\s*(-?[\d,]*\.?\d+)\s*$")


@dataclass(frozen=True)
class WildConversation:
    """A row of WildChat."""

    conversation: list[dict[str, Any]]
    conversation_hash: str | None = None
    language: str | None = None
    toxic: bool | None = None
    model: str | None = None

    def items(self, number: int) -> list[Item]:
        """One item: the opening message."""
        if (self.language or "English") != "English":
            raise Skip("not English")
        if self.toxic or any(turn.get("toxic") for turn in self.conversation):
            raise Skip("toxic")
        first = next((turn for turn in self.conversation if turn.get("role") == "user"), None)
        text = str(first.get("content") or "") if first else ""
        if not text.strip():
            raise Skip("no user message")
        name = self.conversation_hash or str(number)
        return [Item(name, asked(text), text_key(text), meta={"model": self.model})]


@dataclass(frozen=True)
class AttributeChat:
    """A text file of TalkTuner: its name holds the attribute and its value."""

    name: str
    text: str

    def __post_init__(self) -> None:
        if _NAMED.fullmatch(self.name) is None:
            raise ValueError("a file is named conversation_NUMBER_ATTRIBUTE_VALUE.txt")
        if not any(message["role"] == "user" for message in self._messages()):
            raise ValueError("no line begins with HUMAN:")

    def _messages(self) -> tuple[Message, ...]:
        marks = list(_SPEAKER.finditer(self.text))
        ends = [mark.start() for mark in marks[1:]] + [len(self.text)]
        spoken = [
            ((mark[1] or mark[2]).lower(), self.text[mark.end() : end].strip())
            for mark, end in zip(marks, ends)
        ]
        return tuple(
            Message(role="user" if who in ("human", "user") else "assistant", content=text)
            for who, text in spoken
            if text
        )

    def items(self, number: int) -> list[Item]:
        """One item: the whole conversation."""
        match = _NAMED.fullmatch(self.name)
        assert match is not None  # checked when the row was made
        meta = {"attribute": match[2], "value": match[3]}
        return [Item(self.name.removesuffix(".txt"), self._messages(), meta=meta)]


@dataclass(frozen=True)
class WordProblem:
    """A row of GSM8K: a question and a worked answer that ends with #### and the number."""

    question: str
    answer: str

    def __post_init__(self) -> None:
        require(self, "question")
        if _FINAL.search(self.answer) is None:
            raise ValueError("'answer' ends with #### and a number")

    def items(self, number: int) -> list[Item]:
        """One item; `answer` is the number as text, commas removed."""
        final = _FINAL.search(self.answer)
        assert final is not None  # checked when the row was made
        human = {"answer": final[1].replace(",", ""), "worked": self.answer}
        return [Item(str(number), asked(self.question), str(number), human=human)]


@dataclass(frozen=True)
class GoalSwitchPair:
    """A pair of our goal-switch seeds: one topic, opened for validation and opened for an impartial view."""

    pair_id: str
    topic: str
    stakes: str
    validation: str
    objectivity: str

    def __post_init__(self) -> None:
        require(self, "pair_id", "topic", "validation", "objectivity")
        if self.stakes not in ("low", "medium", "high"):
            raise ValueError(f"'stakes' is low, medium or high, got {self.stakes!r}")

    def items(self, number: int) -> list[Item]:
        """Two items of one group; `goal` says what the opening asks for."""
        return [
            Item(
                f"{self.pair_id}/{goal}",
                asked(text),
                self.pair_id,
                meta={"goal": goal, "topic": self.topic, "stakes": self.stakes},
            )
            for goal, text in (("validation", self.validation), ("objectivity", self.objectivity))
        ]
