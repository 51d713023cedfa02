"""The elicitation instruments (paper section on eliciting assumptions), in our own wording, versioned.

An instrument asks for assumptions first and the reply only afterwards. Two properties define it and enter its name:
the framing ("third person": the assistant is told about a person called User A and sees the conversation quoted;
"chat": the conversation has its real roles and the task speaks of "the user") and whether a reply follows ("scores"
forms ask for none). Results of different instruments are never pooled: every record carries `Instrument.id`.

One shape (`shapes`) generates the form in the prompt, the JSON schema for guided decoding, and the parser.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from assumptions import wording
from assumptions.dimensions import BELIEFS, NAMES, SUPPORTS
from assumptions.parsing import Answer, parse
from assumptions.shapes import Items, Number, Record, Shape, Text, json_schema
from shared.errors import UserError
from shared.tokens import Message

Framing = Literal["third_person", "chat", "bare"]
Order = Sequence[str] | None


@dataclass(frozen=True)
class Elicited:
    """What one answer gave: the parsed assumptions, the scores by dimension, and the free texts that follow."""

    answer: Answer
    scores: dict[str, float]
    sections: dict[str, str]


@dataclass(frozen=True)
class Instrument:
    """One way to ask: name and version, framing, the dimensions scored, the free sections after the JSON."""

    name: str
    version: int
    framing: Framing
    dimensions: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    shape_of: Callable[[Sequence[str]], Shape] | None = field(default=None, repr=False)
    ask: Callable[[str, Sequence[Message], Shape | None, Sequence[str]], list[Message]] = wording.bare

    @property
    def id(self) -> str:
        """The name with version that records and files carry."""
        return f"{self.name}-v{self.version}"

    @cached_property
    def prompt_hash(self) -> str:
        """16 hexadecimal digits over a rendered prompt and schema: any change of wording changes it."""
        history = [Message(role="user", content="EARLIER")] if self.framing != "bare" else []
        rendered = repr((self.messages("TURN", history), self.json_schema()))
        return hashlib.sha256(rendered.encode()).hexdigest()[:16]

    def shape(self, order: Order = None) -> Shape | None:
        """Return the answer's shape with the dimensions in the given order; None for the baselines without JSON."""
        return self.shape_of(self._ordered(order)) if self.shape_of else None

    def messages(self, turn: str, history: Sequence[Message] = (), order: Order = None) -> list[Message]:
        """Return the chat that asks for the assumptions behind `turn`, after the messages in `history`."""
        if not turn.strip():
            raise UserError("the user's message is empty; an instrument needs text to ask about")
        return self.ask(turn, history, self.shape(order), self._ordered(order))

    def json_schema(self, order: Order = None) -> dict[str, Any] | None:
        """Return the JSON schema for guided decoding; None for the baselines without JSON."""
        shape = self.shape(order)
        return json_schema(shape) if shape is not None else None

    def parse(self, text: str) -> Elicited:
        """Read an answer; scores holds the dimensions whose number is there, sections the texts after the JSON."""
        shape = self.shape()
        if shape is None:
            raise UserError(f"instrument {self.id} asks for no JSON; there is nothing to parse")
        marker = _marker(self.sections[0]) if self.sections else None
        answer = parse(text, shape, marker)
        sections = _split_sections(text[answer.end :], self.sections) if answer.numbers else {}
        return Elicited(answer, _scores(answer, self.dimensions), sections)

    def _ordered(self, order: Order) -> tuple[str, ...]:
        if order is None:
            return self.dimensions
        if sorted(order) != sorted(self.dimensions):
            raise UserError(f"order {list(order)} is not a permutation of {list(self.dimensions)}")
        return tuple(order)


def _marker(section: str) -> re.Pattern[str]:
    return re.compile(rf"^[ \t*#]*{section}[ \t*]*:[ \t*]*", re.MULTILINE | re.IGNORECASE)


def _split_sections(tail: str, names: Sequence[str]) -> dict[str, str]:
    """Cut the text after the JSON at its section markers, in order; an absent section is absent in the result."""
    found: list[tuple[str, re.Match[str]]] = []
    for name in names:
        match = _marker(name).search(tail, found[-1][1].end() if found else 0)
        if match is not None:
            found.append((name, match))
    ends = [match.start() for _, match in found[1:]] + [len(tail)]
    return {name: tail[match.end() : end].strip() for (name, match), end in zip(found, ends, strict=False)}


def _scores(answer: Answer, dimensions: Sequence[str]) -> dict[str, float]:
    named = {part: number for path, number in answer.numbers.items() for part in path if part in dimensions}
    return {name: named[name] for name in dimensions if name in named}


def _explained(outer: str, inner: str) -> Callable[[Sequence[str]], Shape]:
    """Shape {outer: {inner: {dimension: {score, explanation}}}}."""

    def build(order: Sequence[str]) -> Shape:
        belief = Record(
            (("score", Number()), ("explanation", Text("one sentence saying why"))), value_key="score"
        )
        return Record(((outer, Record(((inner, Record(tuple((name, belief) for name in order))),))),))

    return build


def _flat(order: Sequence[str]) -> Shape:
    """Shape {dimension: number}."""
    return Record(tuple((name, Number()) for name in order))


def _models(k: int) -> Callable[[Sequence[str]], Shape]:
    """Shape {mental_models: [{model_name, description, probability}] * k}."""

    def build(order: Sequence[str]) -> Shape:
        model = Record(
            (
                ("model_name", Text("a short name", 80)),
                ("description", Text("what this person thinks, wants and expects")),
                ("probability", Number()),
            )
        )
        return Record((("mental_models", Items(model, k)),))

    return build


def openended(k: int = 3, framing: Framing = "third_person", name: str | None = None) -> Instrument:
    """Return the open-ended instrument with the k likeliest mental models of the person, summing to 1, then a reply."""
    base = name or ("openended" if k == 3 else f"openended{k}")
    return Instrument(
        _framed(base, framing),
        1,
        framing,
        (),
        ("RESPONSE",),
        _models(k),
        wording.ask(framing, wording.models(k, True)),
    )


def _framed(name: str, framing: Framing) -> str:
    return name if framing == "third_person" else f"{name}_{framing}"


def _family(framing: Framing) -> list[Instrument]:
    """The instruments of one framing."""
    scored = {
        "4dims": (BELIEFS, _explained("mental_model", "beliefs"), wording.beliefs),
        "supporttypes": (SUPPORTS, _explained("mental_model", "support_seeking"), wording.supports),
    }
    family = [openended(3, framing)]

    def add(
        name: str, dims: tuple[str, ...], sections: tuple[str, ...], shape_of: Any, task: wording.Task
    ) -> None:
        asked = wording.ask(framing, task)
        family.append(Instrument(_framed(name, framing), 1, framing, dims, sections, shape_of, asked))

    add("ten", (), (), _models(10), wording.models(10, False))
    add("twostep", (), ("REASONING", "RESPONSE"), _models(3), wording.models(3, True, reasoning=True))
    for name, (dims, shape_of, task) in scored.items():
        add(name, dims, ("RESPONSE",), shape_of, task(reply=True))
        add(f"{name}_scores", dims, (), _flat, task(reply=False))
    two_step = wording.supports(reply=True, reasoning=True)
    add("supporttypestwostep", SUPPORTS, ("REASONING", "RESPONSE"), scored["supporttypes"][1], two_step)
    add("nine_scores", NAMES, (), _flat, wording.nine())
    return family


def tinyworld() -> Instrument:
    """Return the nine-score instrument that the embedded model was trained to answer; its text is TinyWorld's own."""
    return Instrument("tinyworld_nine", 1, "bare", NAMES, (), _flat, wording.tinyworld)


BASELINES = (
    Instrument("base", 1, "bare"),
    Instrument("cot", 1, "bare", ask=wording.step_by_step),
)
INSTRUMENTS: dict[str, Instrument] = {
    instrument.name: instrument
    for instrument in (*_family("third_person"), *_family("chat"), *BASELINES, tinyworld())
}


_OPENENDED = re.compile(r"openended([1-9]\d?)(_chat)?")


def instrument(name: str) -> Instrument:
    """Return the instrument called `name`, `openendedK` for any K up to 99; UserError lists the names otherwise."""
    if name in INSTRUMENTS:
        return INSTRUMENTS[name]
    if match := _OPENENDED.fullmatch(name):
        return openended(int(match[1]), "chat" if match[2] else "third_person")
    raise UserError(f"no instrument {name!r}; there are openendedK and {', '.join(sorted(INSTRUMENTS))}")
