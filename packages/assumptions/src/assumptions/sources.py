"""Where a study's messages come from: the embedded world, whose truth is known, or a file of chats."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from assumptions.chats import Chat, read_chats
from assumptions.corpora import CORPORA, load_corpus
from assumptions.dimensions import NAMES
from assumptions.outcomes import OUTCOMES


@dataclass(frozen=True)
class Messages:
    """Chats, and the truth about them where it is known: the posterior mean of every dimension given the message."""

    chats: list[Chat]
    posterior_BK: Float[np.ndarray, "B K"] | None


def load_messages(data: str, count: int, seed: int, columns: Mapping[str, str]) -> Messages:
    """`count` held-out messages of the embedded world ("tinyworld"), or the first `count` of a file or of a public set.

    A public set is written NAME:SOURCE or NAME/PART:SOURCE, for example `elephant_oeq:data/OEQ.csv` (`corpora`).
    """
    if data != "tinyworld":
        if (known := public_set(data)) is not None:
            return Messages(load_corpus(known.name, known.source, part=known.part, limit=count).chats(), None)
        return Messages(read_chats(data, columns or None)[:count], None)
    from shared.tinyworld import social

    turns = social.sample_turns(count, seed=seed, split="test")
    chats = [
        Chat(f"message{i:05}", turn.text, group=str(i), source="tinyworld") for i, turn in enumerate(turns)
    ]
    order = [social.DIMENSIONS.index(name) for name in NAMES]
    return Messages(chats, np.array([turn.posterior_9[order] for turn in turns], dtype=float))


class PublicSet(NamedTuple):
    """A public set as it is named on the command line: NAME[/PART]:SOURCE."""

    name: str
    part: str | None
    source: str


def public_set(data: str) -> PublicSet | None:
    """The set that `data` names; None where it does not begin with the name of one."""
    name, _, source = data.partition(":")
    name, _, part = name.partition("/")
    return PublicSet(name, part or None, source) if source and name in CORPORA else None


def moved_outcomes(data: str, dimension: str) -> Sequence[str]:
    """The outcomes a dimension should move: those with a weight in the embedded world's reply rule, else all three."""
    if data != "tinyworld":
        return OUTCOMES
    from shared.tinyworld import social

    column = social.DIMENSIONS.index(dimension)
    return [name for row, name in enumerate(social.OUTCOMES) if social.WEIGHTS[row, column] != 0]
