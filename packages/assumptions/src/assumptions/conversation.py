"""Conversations of several turns: a person speaks, the model is elicited and replies, turn by turn (section on goals).

One turn model: a turn is a user message, numbered from 1 in every path; a conversation ends where its user says nothing
more, and an empty message in between is an error, never a turn that is passed over.

1. Every user speaks, given the conversation so far: from a script, or a language model that plays them.
2. The conversation's history and the new message are elicited; a failure has no scores and stays a failure.
3. The model replies. With an instrument that asks for a reply (RESPONSE:), that section is the reply; otherwise the
   model answers the plain conversation, under a condition's edits if one is given.
4. What the next turn sees of this one is `reply_only`: the reply alone, or `full`: all that was written, JSON included.
   They are two instruments and stand in the records. Nothing that failed enters a history: such a conversation ends.
   So does one of which the engine refuses a row; the others go on.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from assumptions.chats import Chat
from assumptions.conditions import UNEDITED, Condition, SteeredEngine, chat_seed
from assumptions.instruments import Elicited, Instrument
from assumptions.parsing import Status
from shared.errors import UserError
from shared.generation import Completion, Generator, PartFailedError, Request, Sampling
from shared.tokens import Message

History = Literal["reply_only", "full"]


@runtime_checkable
class User(Protocol):
    """The person in a conversation."""

    def request(self, turn: int, history: Sequence[Message]) -> str | Request | None:
        """What they say at a turn (from 1): the text, a request whose answer is the text, or None to end."""
        ...


@dataclass(frozen=True)
class ScriptedUser:
    """Says prepared messages, one a turn; UserError where one is empty."""

    messages: Sequence[str]

    def __post_init__(self) -> None:
        empty = next((i for i, text in enumerate(self.messages, start=1) if not text.strip()), None)
        if empty is not None:
            raise UserError(f"message {empty} of a script is empty; drop it, or end the script before it")

    def request(self, turn: int, history: Sequence[Message]) -> str | None:
        """The message of this turn; None after the last."""
        return self.messages[turn - 1] if turn <= len(self.messages) else None


@dataclass(frozen=True)
class ModelUser:
    """A language model plays a person: a persona, a goal stated at every turn, which may change after `switch_after`.

    The opening message is given; later ones are asked for. `switch_after` None: the goal never changes.
    """

    opening: str
    persona: str
    goal: str
    turns: int
    later_goal: str = ""
    switch_after: int | None = None
    seed: int = 0

    def goal_at(self, turn: int) -> str:
        """The goal in force at a turn."""
        return self.later_goal if self.switch_after is not None and turn > self.switch_after else self.goal

    def request(self, turn: int, history: Sequence[Message]) -> str | Request | None:
        """The opening, then a request for the next message; None after the last turn."""
        if turn > self.turns:
            return None
        if turn == 1:
            return self.opening
        told = "\n\n".join(
            f"{'You' if m['role'] == 'user' else 'Assistant'}: {m['content']}" for m in history
        )
        content = (
            f"You play a person who talks to an assistant. {self.persona} {self.goal_at(turn)}\n\nThe conversation so "
            f"far:\n\n{told}\n\nWrite this person's next message and nothing else, in one to three sentences."
        )
        return Request(
            [Message(role="user", content=content)], seed=chat_seed(self.seed, f"{self.opening}/{turn}")
        )


@dataclass(frozen=True)
class Turn:
    """One turn: what was said, how it was read, what was replied; `scores` is empty where nothing could be read."""

    conversation: str
    turn: int
    user: str
    reply: str
    scores: dict[str, float]
    status: str
    condition: str = UNEDITED
    history: str = "reply_only"


@dataclass
class _Open:
    """A conversation that goes on."""

    name: str
    user: User
    history: list[Message] = field(default_factory=list)


def converse(
    users: dict[str, User],
    instrument: Instrument,
    elicitor: Generator,
    replier: SteeredEngine,
    *,
    speaker: Generator | None = None,
    condition: Condition | None = None,
    history: History = "reply_only",
    turns: int = 10,
    guided: bool = False,
    elicit_with: Sampling | None = None,
    reply_with: Sampling | None = None,
    seed: int = 0,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[Turn]:
    """Hold one conversation with every user, side by side, for at most `turns` turns; in order of turn and name.

    `speaker` completes the requests of users that a model plays (UserError where one is needed and not given); `guided`
    answers follow the instrument's grammar, where the engine has one.
    """
    condition = condition or Condition(UNEDITED)
    elicit_with = elicit_with or Sampling(max_tokens=1024, logprobs=None)
    reply_with = reply_with or Sampling(max_tokens=400, temperature=0.7, top_p=0.9, logprobs=None)
    going = [_Open(name, users[name]) for name in sorted(users)]
    found: list[Turn] = []
    for turn in progress(range(1, turns + 1)):
        going, said = _speak(going, turn, speaker)
        if not going:
            break
        chats = [Chat(one.name, text, tuple(one.history)) for one, text in zip(going, said, strict=True)]
        asked = [
            Request(
                instrument.messages(c.turn, c.history),
                json_schema=instrument.json_schema(instrument.dimensions) if guided else None,
                seed=chat_seed(seed, f"{c.id}/{turn}"),
            )
            for c in chats
        ]
        written = _texts(elicitor.generate, asked, elicit_with)
        read = [instrument.parse(text) for text in written]
        replies = _replies(instrument, read, chats, replier, condition, reply_with, seed, turn)
        kept = []
        for one, chat, answer, elicited, reply in zip(going, chats, written, read, replies, strict=True):
            status = elicited.answer.status.value
            found.append(
                Turn(one.name, turn, chat.turn, reply, elicited.scores, status, condition.name, history)
            )
            seen = answer if history == "full" else reply
            # Where nothing was replied, or what failed would be read again, the conversation ends.
            if not reply.strip() or (history == "full" and elicited.answer.status is Status.FAILED):
                continue
            one.history += [Message(role="user", content=chat.turn), Message(role="assistant", content=seen)]
            kept.append(one)
        going = kept
    return found


def _speak(going: Sequence[_Open], turn: int, speaker: Generator | None) -> tuple[list[_Open], list[str]]:
    """Who says something at this turn, and what."""
    wanted = [(one, one.user.request(turn, tuple(one.history))) for one in going]
    played = [request for _, request in wanted if isinstance(request, Request)]
    if played and speaker is None:
        raise UserError("a user is played by a model: give `speaker`, the engine that plays it")
    sampling = Sampling(max_tokens=256, temperature=0.7, top_p=0.9, logprobs=None)
    answers = iter(_texts(speaker.generate, played, sampling) if speaker is not None and played else [])
    texts = [
        (one, next(answers).strip() if isinstance(request, Request) else request) for one, request in wanted
    ]
    speaking = [(one, text) for one, text in texts if text]
    return [one for one, _ in speaking], [text for _, text in speaking]


def _replies(
    instrument: Instrument,
    read: Sequence[Elicited],
    chats: Sequence[Chat],
    replier: SteeredEngine,
    condition: Condition,
    sampling: Sampling,
    seed: int,
    turn: int,
) -> list[str]:
    """The replies: the instrument's own section where it asks for one and nothing is edited, else the model's."""
    if "RESPONSE" in instrument.sections and not condition.edits:
        return [one.sections.get("RESPONSE", "") for one in read]
    requests = [Request(chat.messages, seed=chat_seed(seed, f"{chat.id}/{turn}/reply")) for chat in chats]
    acts = [condition.acts_on(chat) for chat in chats]
    return _texts(replier.complete, condition, requests, acts, sampling)


def _texts(complete: Callable[..., list[list[Completion]]], *asked: Any) -> list[str]:
    """The first text of every request, "" of one that the engine refused; its error where it refused all of several."""
    try:
        return [one[0].text for one in complete(*asked)]
    except PartFailedError as error:
        if len(error.answers) > 1 and all(isinstance(one, UserError) for one in error.answers):
            raise
        return ["" if isinstance(one, UserError) else one[0].text for one in error.answers]
