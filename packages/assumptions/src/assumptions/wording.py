"""The texts of the instruments. Everything a model reads when it is asked for its assumptions stands here.

Third person: one user message, no system prompt; the person is "User A", the conversation is quoted between marks, the
assumptions come before the reply. Chat: the conversation keeps its roles and the task is appended to the last message.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from assumptions.dimensions import dimension
from assumptions.shapes import Shape, example
from shared.errors import UserError
from shared.tokens import Message

Ask = Callable[[str, Sequence[Message], Shape | None, Sequence[str]], list[Message]]
_OPENING = (
    "You are an AI assistant in a conversation with a human, called User A below. The conversation so far stands "
    "between <conversation> and </conversation>, User A's new message between <message> and </message>."
)
_NO_HISTORY = "(nothing yet: this is the first message)"
_RANGE = (
    "Every score is a number from 0 (not at all) to 1 (fully). The scores are separate beliefs: several can be high at "
    "once, and they need not add up to anything."
)


@dataclass(frozen=True)
class Task:
    """What to ask for: a text with {who} and {glossary} (person, dimensions), and what follows the JSON."""

    text: str
    explained: bool = False
    reply: bool = False
    reasoning: bool = False


def models(k: int, reply: bool, reasoning: bool = False) -> Task:
    """Task of the open-ended instruments; with a reply the k probabilities are asked to sum to 1."""
    total = " The probabilities of all of them add up to 1." if reply else ""
    return Task(
        f"Write down the {k} most likely mental models of {{who}}: who is speaking, what they believe and what they "
        "want from your answer. Give each a short name, a description, and a probability from 0 to 1 that it is "
        f"the right one.{total}",
        reply=reply,
        reasoning=reasoning,
    )


def beliefs(reply: bool) -> Task:
    """Task of the four-dimension instruments."""
    return Task(
        "State what you currently assume about {who}, as a score for each of these beliefs:\n{glossary}\n"
        + _RANGE,
        explained=reply,
        reply=reply,
    )


def supports(reply: bool, reasoning: bool = False) -> Task:
    """Task of the support-type instruments."""
    return Task(
        "State how far you assume {who} is looking for each of these kinds of support:\n{glossary}\n"
        + _RANGE,
        explained=reply,
        reply=reply,
        reasoning=reasoning,
    )


def nine() -> Task:
    """Task of the nine-score instrument: all dimensions in one call, numbers only."""
    return Task(
        "State what you currently assume about {who}, as a score for each of these:\n{glossary}\n" + _RANGE
    )


def ask(framing: Literal["third_person", "chat", "bare"], task: Task) -> Ask:
    """Return the function that writes the chat for a task in a framing."""

    def build(
        turn: str, history: Sequence[Message], shape: Shape | None, order: Sequence[str]
    ) -> list[Message]:
        if framing == "chat":
            request = f"{turn}\n\n---\n{_instructions(task, 'the user', shape, order)}"
            return [*history, Message(role="user", content=request)]
        quoted = "\n".join(f"{_speaker(m)}: {m['content']}" for m in history) or _NO_HISTORY
        text = (
            f"{_OPENING}\n\n<conversation>\n{quoted}\n</conversation>\n\n<message>\n{turn}\n</message>\n\n"
            f"{_instructions(task, 'User A', shape, order)}"
        )
        return [Message(role="user", content=text)]

    return build


def bare(turn: str, history: Sequence[Message], shape: Shape | None, order: Sequence[str]) -> list[Message]:
    """The conversation itself, nothing asked."""
    return [*history, Message(role="user", content=turn)]


def step_by_step(
    turn: str, history: Sequence[Message], shape: Shape | None, order: Sequence[str]
) -> list[Message]:
    """The conversation with a cue to reason first."""
    return [
        *history,
        Message(role="user", content=f"{turn}\n\nThink it through step by step before you answer."),
    ]


def tinyworld(
    turn: str, history: Sequence[Message], shape: Shape | None, order: Sequence[str]
) -> list[Message]:
    """The embedded model's own elicitation prompt, as it was trained; single messages only."""
    from shared.tinyworld.social import instrument

    if history:
        raise UserError("the embedded model was trained on single messages: elicit without a history")
    return [Message(role="user", content=instrument(turn, order=tuple(order)))]


def _speaker(message: Message) -> str:
    return "User A" if message["role"] == "user" else "AI"


def _glossary(order: Sequence[str]) -> str:
    lines = (dimension(name) for name in order)
    return "\n".join(f"- {d.name}: {d.meaning} ({', '.join(d.facets)})" for d in lines)


def _instructions(task: Task, who: str, shape: Shape | None, order: Sequence[str]) -> str:
    """The task, the form of the JSON, and what to write after it."""
    if shape is None:
        raise ValueError("this task asks for JSON and needs a shape")
    parts = [task.text.format(who=who, glossary=_glossary(order))]
    if task.explained:
        parts.append("Give one sentence of explanation with each score.")
    first = "First write" if task.reply else "Write"
    parts.append(
        f"{first} this as JSON in exactly this form, with your values in place of <...>:\n{example(shape)}"
    )
    if task.reasoning:
        parts.append("Then write REASONING: and a few sentences on how to answer given these assumptions.")
    if task.reply:
        parts.append(f"Then write RESPONSE: and your reply to {who}.")
    else:
        parts.append("Write the JSON only, no reply.")
    return "\n\n".join(parts)
