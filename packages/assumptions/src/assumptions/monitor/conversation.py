"""One turn of the conversation, as the events that the page is told while it happens.

1. Read: the scores of the message in its context, without the settings and (where there are any) under them.
2. Reply: the steered and the plain reply grow side by side, a token of one and a token of the other, from the same
   random numbers, so that they differ by the steering alone. Without settings there is only the plain one.
3. Keep: the turn is written to the session's file, also when the person stopped it half way.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

from assumptions.monitor.session import Arm, Draw, Reply, Session, Store, Turn
from assumptions.monitor.subject import Setting, Stated, Subject
from shared.errors import UserError
from shared.generation import Piece, Request, Sampling, stream
from shared.interventions import Intervention
from shared.tokens import Message

TITLE = 60  # characters of a conversation's title


class Event(NamedTuple):
    """Something the page is told: what kind, and its content in JSON types."""

    name: str
    content: Any


@dataclass(frozen=True)
class Said:
    """What a person sends: the message, the settings, whether to compare with the unsteered reply, the sampling.

    `ticket` is a name of the sender's for this turn, by which it alone is stopped.
    """

    text: str
    settings: list[Setting]
    compare: bool
    draw: Draw
    ticket: str = ""


def take_turn(
    subject: Subject, store: Store, name: str, said: Said, stop: threading.Event
) -> Iterator[Event]:
    """Events of one turn of the session: `scores`, `piece` (many), then `turn` with the turn as it was kept."""
    session = open_session(subject, store, name)
    messages = session.messages(said.text)
    edits = subject.edits(said.settings)
    arms = _arms(edits, said.compare)
    scores = {arm: subject.read(messages, own) for arm, own in _readings(edits).items()}
    yield Event("scores", scores)
    texts: dict[Arm, list[str]] = {arm: [] for arm in arms}
    ended: dict[Arm, str] = dict.fromkeys(arms, "stopped")
    for arm, piece in _pieces(subject, messages, arms, said.draw):
        texts[arm].append(piece.text)
        ended[arm] = piece.finish_reason or "stopped"
        yield Event("piece", {"arm": arm, "text": piece.text})
        if stop.is_set():
            break
    replies = {arm: Reply("".join(texts[arm]), ended[arm]) for arm in arms}
    kept = next(iter(arms))
    settings = [one for one in said.settings if subject.edits([one])]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    turn = Turn(said.text, settings, said.draw, replies, kept, scores, time=now)
    title = said.text[:TITLE].strip() if not session.turns else session.title
    store.save(replace(session.with_turn(len(session.turns), turn), title=title))
    yield Event("turn", turn)


def state_scores(subject: Subject, store: Store, name: str, number: int) -> dict[Arm, Stated]:
    """What the model states about the message of a turn, plain and under the turn's settings; kept in the session."""
    session = open_session(subject, store, name)
    turn = turn_of(session, number)
    messages = session.messages(turn.text, before=number)
    edits = subject.edits(turn.settings)
    stated = {arm: subject.ask(messages, own) for arm, own in _readings(edits).items()}
    store.save(session.with_turn(number, replace(turn, stated=stated)))
    return stated


def keep_reply(store: Store, name: str, number: int, arm: Arm) -> Session:
    """Let the conversation go on with the reply of this arm; only the last turn can still choose."""
    session = store.load(name)
    turn = turn_of(session, number)
    if number != len(session.turns) - 1 or arm not in turn.replies:
        raise UserError(f"turn {number + 1} has no {arm} reply that the conversation could still go on with")
    return store.save(session.with_turn(number, replace(turn, kept=arm)))


def open_session(subject: Subject, store: Store, name: str) -> Session:
    """A session that this model may continue; UserError when it was held with another."""
    session = store.load(name)
    if session.fingerprint != subject.model.fingerprint:
        raise UserError(
            f"this conversation was held with {session.model} ({session.fingerprint}), not with the model that is "
            "loaded: read or export it, and start a new one to talk"
        )
    return session


def turn_of(session: Session, number: int) -> Turn:
    """Turn `number`, counted from 0."""
    if not 0 <= number < len(session.turns):
        raise UserError(f"the conversation has {len(session.turns)} turns; there is no turn {number + 1}")
    return session.turns[number]


def _readings(edits: list[Intervention]) -> dict[Arm, list[Intervention]]:
    return {"plain": [], "steered": edits} if edits else {"plain": []}


def _arms(edits: Sequence[Intervention], compare: bool) -> dict[Arm, Sequence[Intervention]]:
    """The replies to write, the one that the conversation goes on with first."""
    arms: dict[Arm, Sequence[Intervention]] = {"steered": edits} if edits else {}
    return arms | {"plain": []} if compare or not edits else arms


def _pieces(
    subject: Subject, messages: list[Message], arms: dict[Arm, Sequence[Intervention]], draw: Draw
) -> Iterator[tuple[Arm, Piece]]:
    """The pieces of all replies in turn, one of each, until all have ended."""
    sampling = Sampling(draw.max_tokens, draw.temperature, draw.top_p, logprobs=None)
    request = Request(messages, seed=draw.seed)
    streams = {arm: stream(subject.model, request, sampling, edits) for arm, edits in arms.items()}
    while streams:
        for arm in list(streams):
            piece = next(streams[arm], None)
            if piece is None:
                del streams[arm]
            else:
                yield arm, piece
