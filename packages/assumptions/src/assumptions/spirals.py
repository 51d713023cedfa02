"""Transcripts turn by turn: do the assumptions rise along a conversation that spirals (delusion transcripts, drift)?

Every user message of a transcript, with all that came before it, is one question to an instrument: its id is
CONVERSATION#TURN, turns from 1, its group the conversation, so that no split and no bootstrap takes turns apart. The
elicited scores then give, by conversation, the slope of every score on the turn and that of the balance

    S = mean of the S+ scores - mean of the S- scores
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from assumptions.chats import Chat
from assumptions.corpora.item import Item
from assumptions.dimensions import SIGNS
from assumptions.elicitation import Elicitation
from assumptions.goals import drift, drifts
from shared.errors import UserError
from shared.stats import Interval

BALANCE = "S+ less S-"


def turn_chats(transcripts: Sequence[Item]) -> list[Chat]:
    """One chat a user message of every transcript, in order; UserError for an empty message or equal ids."""
    chats = []
    for item in transcripts:
        users = [i for i, message in enumerate(item.messages) if message["role"] == "user"]
        for turn, at in enumerate(users, start=1):
            text = item.messages[at]["content"]
            if not text.strip():
                raise UserError(
                    f"turn {turn} of {item.id!r} is empty: end the transcript before it, or drop it"
                )
            chats.append(
                Chat(f"{item.id}#{turn}", text, tuple(item.messages[:at]), item.group or item.id, item.source)
            )
    ids = [chat.id for chat in chats]
    if len(set(ids)) < len(ids):
        raise UserError("two transcripts have one id; ids must be unique")
    return chats


@dataclass(frozen=True)
class Spiral:
    """Scores of one conversation by dimension, one a turn, and their slopes on the turn; BALANCE stands beside them."""

    conversation: str
    scores: dict[str, list[float]]
    slopes: dict[str, float]


def spirals(elicitation: Elicitation, chats: Sequence[Chat], dimensions: Sequence[str]) -> list[Spiral]:
    """The scores of every conversation turn by turn, from the elicitation of `turn_chats`."""
    scores_BK = elicitation.scores([chat.id for chat in chats], dimensions)
    rows: dict[str, list[int]] = {}
    for i, chat in enumerate(chats):
        rows.setdefault(chat.id.rpartition("#")[0], []).append(i)
    return [_spiral(name, scores_BK[of], dimensions) for name, of in rows.items()]


def _spiral(name: str, scores_TK: Float[ndarray, "T K"], dimensions: Sequence[str]) -> Spiral:
    series = {dimension: scores_TK[:, k] for k, dimension in enumerate(dimensions)}
    signs = {sign: [d for d in dimensions if SIGNS[d] == sign] for sign in (1, -1)}
    if signs[1] and signs[-1]:
        plus, minus = (np.mean([series[d] for d in signs[sign]], axis=0) for sign in (1, -1))
        series[BALANCE] = plus - minus
    return Spiral(
        name,
        {key: values.tolist() for key, values in series.items()},
        {key: drift(values) for key, values in series.items()},
    )


def slopes(found: Sequence[Spiral], seed: int = 0) -> dict[str, Interval]:
    """Mean slope of every score on the turn, bootstrap over conversations."""
    by_score: Mapping[str, dict[str, Float[ndarray, " T"]]] = {
        name: {one.conversation: np.array(one.scores[name]) for one in found} for name in found[0].scores
    }
    return {name: drifts(series, seed) for name, series in by_score.items()}


def first_to_last(found: Sequence[Spiral], name: str = BALANCE) -> dict[str, float]:
    """Last known score less the first, by conversation; nan with fewer than two known turns."""
    changes = {}
    for one in found:
        known = [score for score in one.scores[name] if math.isfinite(score)]
        changes[one.conversation] = known[-1] - known[0] if len(known) > 1 else math.nan
    return changes
