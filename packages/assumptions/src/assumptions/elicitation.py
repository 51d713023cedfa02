"""Ask a model what it assumes: batches over any engine, one status a row, resumable (paper section on elicitation).

1. Lay out one draw per (chat, sample), each with its own seed and, if asked, its own order of dimensions.
2. Skip the draws whose record in the file is no failure; the others get a new attempt, with a new seed. A record counts
   for the very text it was asked about, not for another text with the same id.
3. Complete them batch by batch; where the engine has a grammar, the instrument's JSON schema guides the decoding
   (guided answers follow another distribution than free ones, so the header says which it was).
4. Parse every completion and append a record; a failure is stored as a failure, never as scores.

A row that the engine refuses fails alone; an engine that does not work raises its error (`asking`).
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from assumptions.asking import ask
from assumptions.chats import Chat
from assumptions.instruments import Instrument
from assumptions.parsing import Status
from assumptions.records import Key, Record, RecordFile, final
from assumptions.splits import row_hash
from shared.errors import UserError
from shared.generation import Completion, Generator, Request, Sampling

RETRIED = frozenset({Status.FAILED, Status.TEMPLATE_ECHO})


@dataclass(frozen=True)
class ElicitationSettings:
    """How to ask: sampling of one draw, draws per chat, guided decoding, order of dimensions, batch size, seed.

    `order`: the dimensions in this order for every draw (none: the instrument's own); `shuffle_order` draws one a draw.
    `keep_tokens`: records keep the answer's token ids, which `token_scores` needs.
    """

    max_tokens: int = 512  # ends a loop where no grammar bounds digits and strings
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    guided: bool = True
    order: tuple[str, ...] = ()
    shuffle_order: bool = False
    keep_tokens: bool = False
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Elicitation:
    """The counting records of an elicitation, ordered by (id, sample)."""

    records: list[Record]

    def health(self) -> dict[str, int]:
        """Number of answers by status, every status named."""
        return {status.value: sum(r.status is status for r in self.records) for status in Status}

    def health_by(self, strata: Mapping[str, str]) -> dict[str, dict[str, int]]:
        """`health` by stratum; `strata` names that of every chat id (its data set, say, or its group)."""
        names = sorted({strata[record.id] for record in self.records})
        return {
            name: Elicitation([r for r in self.records if strata[r.id] == name]).health() for name in names
        }

    def cut_share(self) -> float:
        """Share of the answers that ran into the token limit: too long, or looping."""
        return sum(record.finish_reason == "length" for record in self.records) / max(len(self.records), 1)

    def valid_share(self) -> float:
        """Share of the answers from which every score was read."""
        return sum(record.status.complete for record in self.records) / max(len(self.records), 1)

    def scores(self, ids: Sequence[str], dimensions: Sequence[str]) -> Float[np.ndarray, "B K"]:
        """Mean score over the samples of each chat (B) by dimension (K); nan where no sample gave one."""
        drawn: dict[tuple[str, str], list[float]] = {}
        for record in self.records:
            for name, score in record.scores.items():
                drawn.setdefault((record.id, name), []).append(score)
        return np.array(
            [[np.mean(drawn.get((i, name), [np.nan])) for name in dimensions] for i in ids], dtype=float
        )


@dataclass(frozen=True)
class _Draw:
    """One (chat, sample) at its present attempt."""

    instrument: Instrument
    chat: Chat
    sample: int
    attempt: int
    order: tuple[str, ...]
    request: Request
    keep_tokens: bool = False

    @property
    def key(self) -> Key:
        return (self.chat.id, self.sample, row_hash(self.chat))

    def record(self, completions: Sequence[Completion]) -> Record:
        """The record of an answer, read with the instrument's parser."""
        [completion] = completions
        elicited = self.instrument.parse(completion.text)
        return Record(
            *self.key[:2],
            status=elicited.answer.status,
            scores=elicited.scores,
            text=completion.text,
            row=self.key[2],
            finish_reason=completion.finish_reason,
            order=self.order,
            sections=elicited.sections,
            repairs=elicited.answer.repairs,
            missing=elicited.answer.missing,
            attempt=self.attempt,
            token_ids=tuple(completion.token_ids) if self.keep_tokens else (),
        )

    def failure(self, error: str) -> Record:
        """The record of a row that the engine refused."""
        name, sample, row = self.key
        return Record(
            name, sample, Status.FAILED, {}, "", row, order=self.order, error=error, attempt=self.attempt
        )


def elicit(
    generator: Generator,
    instrument: Instrument,
    chats: Sequence[Chat],
    path: Path,
    settings: ElicitationSettings | None = None,
    *,
    model: str,
) -> Elicitation:
    """Ask for the assumptions behind every chat, resuming the file at `path`.

    `model` identifies who answers: `model.fingerprint` of the loaded model, or the name a server gives it. Raises
    UserError before any generation when the instrument cannot be guided, two chats share an id, or the file belongs to
    another question; the engine's own error when the engine does not work.
    """
    settings = settings or ElicitationSettings()
    check(instrument, settings)
    _check_asked(chats, model)
    sampling = Sampling(settings.max_tokens, settings.temperature, settings.top_p, n=1, logprobs=None)
    with RecordFile(path, header(instrument, settings, model)) as file:
        draws = _draws(instrument, chats, settings, file)
        settled = {key for key, record in file.records.items() if record.status not in RETRIED}
        pending = [draw for draw in draws if draw.key not in settled]
        ask(generator, sampling, pending, file, settings.batch_size, known=draws)
        return Elicitation(final(file.records[draw.key] for draw in draws))


def check(instrument: Instrument, settings: ElicitationSettings) -> None:
    """Refuse settings that the instrument cannot follow."""
    if instrument.shape_of is None:
        raise UserError(f"instrument {instrument.id} asks for no assumptions; it is a baseline for replies")
    if settings.guided and instrument.sections:
        raise UserError(
            f"instrument {instrument.id} continues after its JSON ({', '.join(instrument.sections)}), which guided "
            "decoding would cut off: set guided=false or take its scores-only form"
        )
    if settings.order and settings.shuffle_order:
        raise UserError("order fixes the order of dimensions, shuffle_order draws one: choose either")
    if settings.order:
        instrument.messages("x", order=settings.order)  # refuses what is no permutation
    if settings.samples > 1 and settings.temperature == 0:
        raise UserError("samples > 1 at temperature 0 are all alike: set a temperature")


def header(instrument: Instrument, settings: ElicitationSettings, model: str) -> dict[str, Any]:
    """What identifies the question an elicitation file answers; answers that keep their tokens lie apart."""
    kept = {"keep_tokens": True} if settings.keep_tokens else {}
    return kept | {
        "instrument": instrument.id,
        "prompt_hash": instrument.prompt_hash,
        "model": model,
        "guided": settings.guided,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "order": settings.order,
        "shuffle_order": settings.shuffle_order,
        "seed": settings.seed,
    }


def _check_asked(chats: Sequence[Chat], model: str) -> None:
    if not model:
        raise UserError("an elicitation file names who answered: give model=model.fingerprint")
    twice = [name for name, count in Counter(chat.id for chat in chats).items() if count > 1]
    if twice:
        raise UserError(f"id {twice[0]!r} stands on more than one chat; ids must be unique")


def _draws(
    instrument: Instrument, chats: Sequence[Chat], settings: ElicitationSettings, file: RecordFile
) -> list[_Draw]:
    """Every draw that is wanted, at the attempt after the one in the file."""
    draws = []
    for chat in chats:
        for sample in range(settings.samples):
            former = file.records.get((chat.id, sample, row_hash(chat)))
            attempt = former.attempt + 1 if former else 0
            draws.append(_draw(instrument, chat, sample, attempt, settings))
    return draws


def _draw(
    instrument: Instrument, chat: Chat, sample: int, attempt: int, settings: ElicitationSettings
) -> _Draw:
    seed = seed_of(settings.seed, chat.id, sample, attempt)
    order = settings.order or instrument.dimensions
    if settings.shuffle_order:
        order = tuple(np.random.default_rng(seed).permutation(order).tolist())
    schema = instrument.json_schema(order) if settings.guided else None
    request = Request(instrument.messages(chat.turn, chat.history, order), json_schema=schema, seed=seed)
    return _Draw(instrument, chat, sample, attempt, order, request, settings.keep_tokens)


def seed_of(*parts: object) -> int:
    """A seed in [0, 2**31) that depends on every part and on nothing else: not on batch, order or resume."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1
