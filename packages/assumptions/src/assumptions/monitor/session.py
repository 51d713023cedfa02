"""Transcripts: one JSON file a session, whole or absent, and the same as Markdown.

A turn keeps everything that made it: the message, the settings, the sampling with its seed, both replies, the scores
read and stated, and which of the replies the conversation goes on with. A session belongs to one model, named by its
fingerprint: another model may show and export it, not continue it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from assumptions.monitor.subject import Setting, Stated
from shared.config import ConfigError, to_dataclass
from shared.errors import UserError
from shared.serialize import plain, read_json, remove, write_json
from shared.tokens import Message

Arm = Literal["plain", "steered"]
ARMS: tuple[Arm, ...] = ("plain", "steered")
_NAME = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")


@dataclass(frozen=True)
class Draw:
    """How replies are sampled; both arms of a turn draw the same random numbers."""

    max_tokens: int = 200
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """One reply: its text and why it ended ("stop", "length", or "stopped" by the person)."""

    text: str
    finish_reason: str


@dataclass(frozen=True)
class Turn:
    """A message and what came of it, by arm: replies, scores read from activations, scores stated."""

    text: str
    settings: list[Setting]
    draw: Draw
    replies: dict[Arm, Reply]
    kept: Arm
    scores: dict[Arm, dict[str, float]]
    stated: dict[Arm, Stated] = field(default_factory=dict)
    time: str = ""

    @property
    def messages(self) -> list[Message]:
        """The turn as the conversation goes on with it."""
        reply = self.replies[self.kept].text
        return [Message(role="user", content=self.text), Message(role="assistant", content=reply)]


@dataclass(frozen=True)
class Session:
    """A conversation with one model; `remember`: whether the model reads the turns before."""

    id: str
    title: str
    created: str
    model: str
    fingerprint: str
    remember: bool
    turns: list[Turn] = field(default_factory=list)
    format: Literal[1] = 1

    def messages(self, text: str, before: int | None = None) -> list[Message]:
        """The chat that the model reads when `text` is said after the first `before` turns (all of them)."""
        earlier = self.turns[:before] if self.remember else []
        history = [message for turn in earlier for message in turn.messages]
        return [*history, Message(role="user", content=text)]

    def with_turn(self, number: int, turn: Turn) -> "Session":
        """The session with turn `number` replaced, or added where it is the next."""
        return replace(self, turns=[*self.turns[:number], turn, *self.turns[number + 1 :]])


def new_session(model: str, fingerprint: str, remember: bool) -> Session:
    """An empty session with a name of its own."""
    now = datetime.now(UTC)
    name = f"{now:%Y%m%d-%H%M%S}-{uuid4().hex[:6]}"
    return Session(name, "New conversation", now.isoformat(timespec="seconds"), model, fingerprint, remember)


@dataclass(frozen=True)
class Store:
    """The sessions of a folder."""

    folder: Path

    def path(self, name: str) -> Path:
        """Where a session lies; UserError when the name is none."""
        if not _NAME.fullmatch(name):
            raise UserError(f"no session is called {name!r}")
        return self.folder / f"{name}.json"

    def save(self, session: Session) -> Session:
        """Write a session, atomically; returns it."""
        write_json(self.path(session.id), session)
        return session

    def load(self, name: str) -> Session:
        """Read a session; UserError when there is none, or the file is not one."""
        path = self.path(name)
        if not path.exists():
            raise UserError(f"session {name} is not in {self.folder}")
        return _session(path)

    def delete(self, name: str) -> None:
        """Remove a session's file."""
        remove(self.path(name))

    def names(self) -> list[str]:
        """The sessions' names, the newest first."""
        return sorted(path.stem for path in self.folder.glob("*.json") if _NAME.fullmatch(path.stem))[::-1]


def _session(path: Path) -> Session:
    try:
        return to_dataclass(Session, read_json(path))
    except (ConfigError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is no session of the monitor ({error}); move it away") from None


def as_json(session: Session) -> dict[str, Any]:
    """The session as JSON types."""
    content: dict[str, Any] = plain(session)
    return content


def as_markdown(session: Session) -> str:
    """The session as a text: every message, its replies, and a table of the scores."""
    lines = [f"# {session.title}", "", f"Model `{session.model}` ({session.fingerprint}), {session.created}"]
    if not session.remember:
        lines.append("\nEvery message was read by itself, without the turns before.")
    for number, turn in enumerate(session.turns, start=1):
        lines += ["", f"## Turn {number}", "", *_quoted(turn.text), ""]
        if turn.settings:
            lines += ["Steered: " + "; ".join(_setting(one) for one in turn.settings), ""]
        for arm, reply in turn.replies.items():
            note = ", kept" if arm == turn.kept and len(turn.replies) > 1 else ""
            lines += [
                f"**{arm.capitalize()} reply** ({reply.finish_reason}{note})",
                "",
                *_quoted(reply.text),
                "",
            ]
        lines += _table(turn)
    return "\n".join(lines).rstrip() + "\n"


def _quoted(text: str) -> list[str]:
    return [f"> {line}".rstrip() for line in text.splitlines() or [""]]


def _setting(one: Setting) -> str:
    return f"{one.dimension} " + (
        f"pushed by {one.value:+g} SD" if one.mode == "push" else f"held at {one.value:g}"
    )


def _table(turn: Turn) -> list[str]:
    columns: dict[str, Mapping[str, float]] = {f"read, {arm}": scores for arm, scores in turn.scores.items()}
    columns |= {f"stated, {arm}": stated.scores for arm, stated in turn.stated.items()}
    names: Sequence[str] = list(dict.fromkeys(name for scores in columns.values() for name in scores))
    lines = [f"| dimension | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name in names:
        cells = [f"{scores[name]:.2f}" if name in scores else "" for scores in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
