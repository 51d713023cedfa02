"""Do the scores come back? Test-retest, other orders of the dimensions, other wordings of the message on any engine.

1. A facet is a list of conditions: the same chats under other seeds, orders, or paraphrases (same ids, other texts).
2. Every condition is elicited into a file of its own, resumable like any elicitation.
3. Per dimension the scores make a table of chats by conditions; chats that lack a score under one condition are left
   out and counted. Its intraclass correlations say how much of the spread is between chats (`intraclass`).

A high correlation says that scores repeat, not that they are right; one without spread is not defined.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from assumptions.chats import Chat
from assumptions.elicitation import ElicitationSettings, elicit, seed_of
from assumptions.instruments import Instrument
from assumptions.intraclass import Reliability, intraclass
from shared.errors import UserError
from shared.generation import Generator, Request, Sampling
from shared.tokens import Message

_REWRITE = (
    "Say the message between <message> and </message> again in other words. Keep who speaks, what happened, what is "
    "asked and the tone; add nothing and leave nothing out. Write the new message only.\n\n"
    "<message>\n{text}\n</message>"
)


@dataclass(frozen=True)
class Measurement:
    """One way to measure the same chats again."""

    name: str
    chats: Sequence[Chat]
    settings: ElicitationSettings


@dataclass(frozen=True)
class FacetReliability:
    """Reliability by dimension over one facet, the mean of the absolute differences, and the chats left out."""

    facet: str
    instrument: str
    conditions: tuple[str, ...]
    by_dimension: dict[str, Reliability]
    difference: dict[str, float]
    dropped: dict[str, int]

    def rows(self) -> list[dict[str, Any]]:
        """A table, one row a dimension, for `shared.report`."""
        return [
            {
                "facet": self.facet,
                "dimension": name,
                "ICC(2,1)": value.agreement.estimate,
                "ICC(2,1) from": value.agreement.low,
                "ICC(2,1) to": value.agreement.high,
                "ICC(3,1)": value.consistency.estimate,
                "ICC(3,1) from": value.consistency.low,
                "ICC(3,1) to": value.consistency.high,
                "mean difference": self.difference[name],
                "chats": value.subjects,
                "chats left out": self.dropped[name],
                "conditions": value.conditions,
            }
            for name, value in self.by_dimension.items()
        ]


def retests(chats: Sequence[Chat], settings: ElicitationSettings, times: int = 2) -> list[Measurement]:
    """The same question under `times` seeds; UserError at temperature 0, where every answer is the same."""
    if settings.temperature == 0:
        raise UserError("a retest at temperature 0 repeats one answer: set a temperature")
    return [
        Measurement(f"seed {settings.seed + i}", chats, replace(settings, seed=settings.seed + i))
        for i in range(times)
    ]


def orders(
    chats: Sequence[Chat], instrument: Instrument, settings: ElicitationSettings, times: int = 2
) -> list[Measurement]:
    """The same question with its dimensions in `times` different orders, the instrument's own first."""
    drawn = [tuple(instrument.dimensions)]
    for attempt in range(100 * times):
        if len(drawn) == times:
            break
        rng = np.random.default_rng(seed_of(settings.seed, "order", attempt))
        order = tuple(rng.permutation(instrument.dimensions).tolist())
        if order not in drawn:
            drawn.append(order)
    if len(drawn) < times:
        raise UserError(
            f"{instrument.id} has no {times} orders of its {len(instrument.dimensions)} dimensions"
        )
    fixed = replace(settings, shuffle_order=False)
    return [
        Measurement(f"order {i}", chats, replace(fixed, order=order))
        for i, order in enumerate(drawn, start=1)
    ]


def paraphrases(versions: Mapping[str, Sequence[Chat]], settings: ElicitationSettings) -> list[Measurement]:
    """The same question about other wordings of the messages: versions by name, equal ids in every one."""
    ids = [{chat.id for chat in chats} for chats in versions.values()]
    if len(ids) < 2 or any(one != ids[0] for one in ids):
        raise UserError(
            "paraphrases are at least two versions of the same chats: the ids of all must be equal"
        )
    return [Measurement(name, chats, settings) for name, chats in versions.items()]


def paraphrased(
    generator: Generator, chats: Sequence[Chat], seed: int = 0, max_tokens: int = 1024
) -> list[Chat]:
    """The chats with their last message said in other words by a language model; UserError names one it left empty."""
    requests = [
        Request(
            [Message(role="user", content=_REWRITE.format(text=chat.turn))],
            seed=seed_of(seed, "paraphrase", chat.id),
        )
        for chat in chats
    ]
    answers = generator.generate(requests, Sampling(max_tokens=max_tokens, temperature=0.7, logprobs=None))
    texts = [answer.text.strip() for [answer] in answers]
    empty = next((chat.id for chat, text in zip(chats, texts) if not text), None)
    if empty is not None:
        raise UserError(
            f"the model wrote no other wording of {empty}: take another model or give the wordings"
        )
    return [replace(chat, turn=text, group=chat.group or chat.id) for chat, text in zip(chats, texts)]


def reliability(
    generator: Generator,
    instrument: Instrument,
    facet: str,
    conditions: Sequence[Measurement],
    folder: Path,
    *,
    model: str,
) -> FacetReliability:
    """Elicit every condition (files in `folder`, resumable) and correlate the scores over them, by dimension."""
    if len(conditions) < 2:
        raise UserError("reliability compares at least two conditions")
    ids = [chat.id for chat in conditions[0].chats]
    tables = []
    for number, condition in enumerate(conditions, start=1):
        path = folder / f"{facet}-{instrument.id}-{number}.jsonl"
        answers = elicit(generator, instrument, condition.chats, path, condition.settings, model=model)
        tables.append(answers.scores(ids, instrument.dimensions))
    return compare(facet, instrument, [c.name for c in conditions], np.stack(tables, axis=-1))


def compare(
    facet: str, instrument: Instrument, conditions: Sequence[str], scores_BKC: np.ndarray
) -> FacetReliability:
    """Reliability of scores that lie as chats (B) by dimensions (K) by conditions (C); nan where one is missing."""
    by_dimension, difference, dropped = {}, {}, {}
    for column, name in enumerate(instrument.dimensions):
        table = scores_BKC[:, column]
        whole = table[np.isfinite(table).all(axis=1)]
        by_dimension[name] = intraclass(whole)
        pairs = np.triu_indices(whole.shape[1], k=1)
        difference[name] = float(np.abs(whole[:, pairs[0]] - whole[:, pairs[1]]).mean())
        dropped[name] = len(table) - len(whole)
    return FacetReliability(facet, instrument.id, tuple(conditions), by_dimension, difference, dropped)
