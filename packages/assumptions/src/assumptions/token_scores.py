"""Scores as expected values over the model's own token probabilities, which no rounding to 0.8 or 0.9 flattens.

A stated 0.85 is one draw from what the model holds possible. For every score of an answer:

1. Cut the answer after the colon in front of the number; prompt and cut answer are the root of a tree.
2. Ask the engine for the likeliest next tokens at every open node, and grow the tree by those that continue a number
   in [0, 1] in JSON's spelling. A number ends at the first token that brings a comma, a brace or white space. Digits
   may stand in one token or one by one, with or without the space before them: only the text counts.
3. Leaves give P(number); 0.8 and 0.80 are one number. Nodes less likely than `min_mass` are not opened.
4. E = sum p x / sum p. `mass` = sum p is the share of the probability that was found; below `least_mass` there is no
   score, because most of the model's belief lies elsewhere (not a number, or too deep).

The other scores are those that the answer states: E is conditional on what stands before the number. All open nodes of
a batch of answers go to the engine together; prefix caching makes a node cost about one token.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from assumptions.answer_file import AnswerFile
from assumptions.chats import Chat
from assumptions.elicitation import Elicitation
from assumptions.instruments import Instrument
from assumptions.records import Record
from assumptions.splits import row_hash
from shared.errors import UserError
from shared.generation import Generator, Request, Sampling
from shared.generation.prompts import prompt_ids
from shared.generation.text import TextStream
from shared.progress import progress

_OPEN = re.compile(r"\s{0,8}(?:0(?:\.\d*)?|1(?:\.0*)?)?")
_CLOSED = re.compile(r"\s*(0(?:\.\d+)?|1(?:\.0+)?)[\s,}]")


@dataclass(frozen=True)
class TreeSettings:
    """Tokens asked for at a node, least probability of an open node, least mass of a score, answers a batch."""

    top: int = 20
    min_mass: float = 1e-3
    least_mass: float = 0.5
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.top < 1 or self.batch_size < 1:
            raise UserError(f"top and batch_size must be at least 1, got {self.top} and {self.batch_size}")
        if not (0 <= self.min_mass < 1 and 0 <= self.least_mass <= 1):
            raise UserError(f"min_mass={self.min_mass} and least_mass={self.least_mass} are probabilities")


class Root(NamedTuple):
    """Where a number begins: all token ids before it, and the white space these already hold after the colon."""

    ids: list[int]
    text: str


class Node(NamedTuple):
    """An open node: its root, the tokens since, the text since the colon, and its probability."""

    root: int
    ids: tuple[int, ...]
    text: str
    probability: float


Numbers = dict[float, float]  # number: probability
SAME = 0.1  # nats between two computations of one log-probability, in any dtype
TextOf = Callable[[int, int], str]  # (token before, token) -> text that the token adds


def explore(
    generator: Generator, roots: Sequence[Root], text_of: TextOf, settings: TreeSettings
) -> list[Numbers]:
    """P(number) at every root, by growing all trees together; see the module's text."""
    found: list[Numbers] = [{} for _ in roots]
    frontier = [Node(i, (), root.text, 1.0) for i, root in enumerate(roots)]
    sampling = Sampling(max_tokens=1, logprobs=settings.top)
    while frontier:
        requests = [Request([*roots[node.root].ids, *node.ids]) for node in frontier]
        answers = generator.generate(requests, sampling)
        grown: list[Node] = []
        for node, [answer] in zip(frontier, answers, strict=True):
            for child in _children(node, roots[node.root], answer.top_logprobs[0], text_of):
                number = _CLOSED.match(child.text)
                if number is not None:
                    value = float(number[1])
                    found[node.root][value] = found[node.root].get(value, 0.0) + child.probability
                elif child.probability >= settings.min_mass:
                    grown.append(child)
        frontier = grown
    return found


def _children(node: Node, root: Root, likeliest: dict[int, float], text_of: TextOf) -> Iterable[Node]:
    """Nodes one token further whose text is a number or may become one; a token without text leads nowhere."""
    before = node.ids[-1] if node.ids else root.ids[-1]
    for token, logprob in likeliest.items():
        piece = text_of(before, token)
        text = node.text + piece
        if piece and (_OPEN.fullmatch(text) or _CLOSED.match(text)):
            yield Node(node.root, (*node.ids, token), text, node.probability * math.exp(logprob))


Key = tuple[str, int, str, str, str]


@dataclass(frozen=True)
class TokenScore:
    """The score of one dimension in one answer: as stated, as expected value with deviation, and the mass found."""

    id: str
    sample: int
    row: str
    answer: str  # hash of the answer's tokens
    dimension: str
    stated: float
    expected: float | None
    deviation: float | None
    mass: float
    numbers: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def key(self) -> Key:
        """What a later record of the same score replaces; another answer of the same draw has other scores."""
        return (self.id, self.sample, self.row, self.answer, self.dimension)


@dataclass(frozen=True)
class TokenScores:
    """Expected values of an elicitation's scores."""

    records: list[TokenScore]

    def scores(self, ids: Sequence[str], dimensions: Sequence[str]) -> Float[np.ndarray, "B K"]:
        """Mean expected value over the samples of each chat (B) by dimension (K); nan where there is none."""
        drawn: dict[tuple[str, str], list[float]] = {}
        for record in self.records:
            if record.expected is not None:
                drawn.setdefault((record.id, record.dimension), []).append(record.expected)
        return np.array(
            [[np.mean(drawn.get((i, name), [np.nan])) for name in dimensions] for i in ids], dtype=float
        )


def expected_scores(
    generator: Generator,
    tokenizer: Any,
    instrument: Instrument,
    chats: Sequence[Chat],
    elicitation: Elicitation,
    path: Path,
    settings: TreeSettings | None = None,
    *,
    model: str,
) -> TokenScores:
    """Expected value of every score of an elicitation, resuming the file at `path`.

    The elicitation was made with `keep_tokens=True` by the same model, whose `tokenizer` this is; the engine tells
    `top_logprobs` (vLLM in process, Hugging Face, or a vLLM server). UserError otherwise.
    """
    settings = settings or TreeSettings()
    by_row = {(chat.id, row_hash(chat)): chat for chat in chats}
    records = [r for r in elicitation.records if r.scores and (r.id, r.row) in by_row]
    if any(not record.token_ids for record in records):
        raise UserError(
            "the answers hold no token ids: elicit with keep_tokens=True, on an engine that tells them"
        )
    header = {"format": 2, "instrument": instrument.id, "prompt_hash": instrument.prompt_hash, "model": model}
    header |= {"top": settings.top, "min_mass": settings.min_mass, "least_mass": settings.least_mass}
    with AnswerFile(path, header, lambda row: TokenScore(**row)) as file:
        pending = [r for r in records if any(key not in file.records for key in _keys(r))]
        for start in progress(range(0, len(pending), settings.batch_size), "expected scores, in batches"):
            batch = [(by_row[r.id, r.row], r) for r in pending[start : start + settings.batch_size]]
            file.append(_scored(generator, tokenizer, instrument, batch, settings))
        return TokenScores([file.records[key] for key in sorted({key for r in records for key in _keys(r)})])


def check_engine(generator: Generator, tokenizer: Any, instrument: Instrument, chat: Chat) -> None:
    """UserError where expected values cannot be had: the engine tells no tokens, or renders prompts in another way.

    One token is asked for twice, after the messages and after their ids: the likeliest tokens must be the same.
    """
    messages = instrument.messages(chat.turn, chat.history)
    asked = [Request(messages), Request(prompt_ids(tokenizer, messages))]
    told = [one for [one] in generator.generate(asked, Sampling(max_tokens=1, logprobs=1))]
    if not all(one.token_ids and one.top_logprobs for one in told):
        raise UserError(
            "expected scores need an engine that tells token ids and log-probabilities, which this one does not: take "
            "stated scores or the mean of samples, or another engine"
        )
    [(token, logprob)], [(other, again)] = (list(one.top_logprobs[0].items()) for one in told)
    if token != other or abs(logprob - again) > SAME:
        raise UserError(
            "the engine continues the messages otherwise than their token ids: the tokenizer or its chat template "
            "is not the one that the engine uses"
        )


def _keys(record: Record) -> list[Key]:
    """The keys of an answer's scores."""
    answer = hashlib.sha256(repr(record.token_ids).encode()).hexdigest()[:16]
    return [(record.id, record.sample, record.row, answer, name) for name in record.scores]


def _scored(
    generator: Generator,
    tokenizer: Any,
    instrument: Instrument,
    batch: Sequence[tuple[Chat, Record]],
    settings: TreeSettings,
) -> list[TokenScore]:
    """The scores of a batch of answers: all their trees grow together."""
    roots: list[Root] = []
    places: list[tuple[Key, float, int | None]] = []
    for chat, record in batch:
        prompt = prompt_ids(tokenizer, instrument.messages(chat.turn, chat.history, record.order or None))
        starts = number_starts(record, _texts(tokenizer, prompt, record.token_ids))
        for key, (name, stated) in zip(_keys(record), record.scores.items(), strict=True):
            places.append((key, stated, len(roots) if name in starts else None))
            if name in starts:
                n_tokens, text = starts[name]
                roots.append(Root([*prompt, *record.token_ids[:n_tokens]], text))
    found = explore(generator, roots, _texts_of(tokenizer), settings)
    return [
        _score(key, stated, None if i is None else found[i], settings.least_mass) for key, stated, i in places
    ]


def number_starts(record: Record, texts: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Where the number of each dimension begins: how many answer tokens stand before it, and the text after the colon.

    `texts` are the texts of the answer's tokens. A dimension is left out when its key does not stand in the answer
    exactly once, or when one token holds the colon and a part of the number.
    """
    answer, ends = "".join(texts), list(accumulate(map(len, texts)))
    starts = {}
    for name in record.scores:
        keys = list(re.finditer(rf'"{re.escape(name)}"\s*:(?:\s*{{\s*"score"\s*:)?', answer))
        if len(keys) != 1:
            continue
        n_tokens = next(n for n, end in enumerate(ends, start=1) if end >= keys[0].end())
        carried = answer[keys[0].end() : ends[n_tokens - 1]]
        if not carried.strip():
            starts[name] = (n_tokens, carried)
    return starts


def _texts_of(tokenizer: Any) -> TextOf:
    @lru_cache(maxsize=65536)
    def text_of(before: int, token: int) -> str:
        return TextStream(tokenizer, [before]).add(token)

    return text_of


def _texts(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> list[str]:
    """What each token of an answer adds to its text."""
    stream = TextStream(tokenizer, prompt)
    return [stream.add(token) for token in tokens]


def _score(key: Key, stated: float, numbers: Numbers | None, least_mass: float) -> TokenScore:
    mass = sum(numbers.values()) if numbers else 0.0
    place = (*key, stated)
    if numbers is None:
        return TokenScore(*place, None, None, 0.0, error="the number's place in the answer is not certain")
    told = {f"{value:g}": p for value, p in sorted(numbers.items())}
    if mass < least_mass or mass == 0:
        return TokenScore(*place, None, None, mass, told, f"numbers hold only {mass:.2f} of the probability")
    expected = sum(value * p for value, p in numbers.items()) / mass
    variance = sum((value - expected) ** 2 * p for value, p in numbers.items()) / mass
    return TokenScore(*place, expected, math.sqrt(variance), mass, told)
