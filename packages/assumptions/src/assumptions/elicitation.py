"""Ask a model what it assumes: batches over any engine, one status a row, resumable (paper section on elicitation).

1. Lay out one draw per (chat, sample), each with its own seed and, if asked, its own order of dimensions.
2. Skip the draws whose record in the file is no failure; the others get a new attempt, with a new seed.
3. Complete them batch by batch; where the engine has a grammar, the instrument's JSON schema guides the decoding
   (guided answers follow another distribution than free ones, so the header says which it was).
4. Parse every completion and append a record; a failure is stored as a failure, never as scores.

A batch that the engine refuses is asked again row by row, so that one bad row fails alone. If no row of it succeeds
the engine itself is at fault, and its error is raised.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from assumptions.chats import Chat
from assumptions.instruments import Instrument
from assumptions.parsing import Status
from assumptions.records import Record, RecordFile, final
from shared.errors import UserError
from shared.generation import Completion, Generator, Request, Sampling

RETRIED = frozenset({Status.FAILED, Status.TEMPLATE_ECHO})


@dataclass(frozen=True)
class ElicitationSettings:
    """How to ask: sampling of one draw, draws per chat, guided decoding, order of dimensions, batch size, seed."""

    max_tokens: int = 512  # a grammar leaves digits open: this ends a loop
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    guided: bool = True
    shuffle_order: bool = False
    batch_size: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Elicitation:
    """The counting records of an elicitation, ordered by (id, sample)."""

    records: list[Record]

    def health(self) -> dict[str, int]:
        """Number of answers by status, every status named."""
        return {status.value: sum(r.status is status for r in self.records) for status in Status}

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
    chat: Chat
    sample: int
    attempt: int
    order: tuple[str, ...]
    request: Request


def elicit(
    generator: Generator,
    instrument: Instrument,
    chats: Sequence[Chat],
    path: Path,
    settings: ElicitationSettings | None = None,
    model: str = "",
) -> Elicitation:
    """Ask for the assumptions behind every chat, resuming the file at `path`; `model` identifies who answers.

    Raises UserError before any generation when the instrument cannot be guided or the file belongs to another question.
    """
    settings = settings or ElicitationSettings()
    check(instrument, settings)
    sampling = Sampling(settings.max_tokens, settings.temperature, settings.top_p, n=1, logprobs=None)
    with RecordFile(path, header(instrument, settings, model)) as file:
        for batch in _batches(_pending(instrument, chats, settings, file), settings.batch_size):
            _complete(generator, instrument, batch, sampling, file)
        wanted = {(chat.id, sample) for chat in chats for sample in range(settings.samples)}
        return Elicitation(final(r for r in file.records.values() if r.key in wanted))


def check(instrument: Instrument, settings: ElicitationSettings) -> None:
    """Refuse settings that the instrument cannot follow."""
    if instrument.shape_of is None:
        raise UserError(f"instrument {instrument.id} asks for no assumptions; it is a baseline for replies")
    if settings.guided and instrument.sections:
        raise UserError(
            f"instrument {instrument.id} continues after its JSON ({', '.join(instrument.sections)}), which guided "
            "decoding would cut off: set guided=false or take its scores-only form"
        )
    if settings.samples > 1 and settings.temperature == 0:
        raise UserError("samples > 1 at temperature 0 are all alike: set a temperature")


def header(instrument: Instrument, settings: ElicitationSettings, model: str) -> dict[str, Any]:
    """What identifies the question an elicitation file answers."""
    return {
        "instrument": instrument.id,
        "prompt_hash": instrument.prompt_hash,
        "model": model,
        "guided": settings.guided,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "shuffle_order": settings.shuffle_order,
        "seed": settings.seed,
    }


def _pending(
    instrument: Instrument, chats: Sequence[Chat], settings: ElicitationSettings, file: RecordFile
) -> list[_Draw]:
    draws = []
    for chat in chats:
        for sample in range(settings.samples):
            former = file.records.get((chat.id, sample))
            if former is None or former.status in RETRIED:
                attempt = former.attempt + 1 if former else 0
                draws.append(_draw(instrument, chat, sample, attempt, settings))
    return draws


def _draw(
    instrument: Instrument, chat: Chat, sample: int, attempt: int, settings: ElicitationSettings
) -> _Draw:
    seed = _seed(settings.seed, chat.id, sample, attempt)
    order = instrument.dimensions
    if settings.shuffle_order:
        order = tuple(np.random.default_rng(seed).permutation(order).tolist())
    schema = instrument.json_schema(order) if settings.guided else None
    request = Request(instrument.messages(chat.turn, chat.history, order), json_schema=schema, seed=seed)
    return _Draw(chat, sample, attempt, order, request)


def _seed(*parts: object) -> int:
    """A seed in [0, 2**31) that depends on every part and on nothing else: not on batch, order or resume."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def _batches(draws: list[_Draw], size: int) -> list[list[_Draw]]:
    return [draws[start : start + size] for start in range(0, len(draws), size)]


def _complete(
    generator: Generator, instrument: Instrument, batch: list[_Draw], sampling: Sampling, file: RecordFile
) -> None:
    """Complete one batch and append its records."""
    try:
        completions = generator.generate([draw.request for draw in batch], sampling)
    except Exception as error:
        _complete_singly(generator, instrument, batch, sampling, file, error)
        return
    file.append(_record(instrument, draw, drawn[0]) for draw, drawn in zip(batch, completions, strict=True))


def _complete_singly(
    generator: Generator,
    instrument: Instrument,
    batch: list[_Draw],
    sampling: Sampling,
    file: RecordFile,
    error: Exception,
) -> None:
    """Ask a refused batch row by row; rows that fail alone are recorded as failed, unless all of them do."""
    records = []
    for draw in batch if len(batch) > 1 else ():
        try:
            records.append(_record(instrument, draw, generator.generate([draw.request], sampling)[0][0]))
        except Exception as row_error:
            records.append(_failure(draw, f"{type(row_error).__name__}: {row_error}"))
    if all(record.error for record in records):
        raise error
    file.append(records)


def _record(instrument: Instrument, draw: _Draw, completion: Completion) -> Record:
    elicited = instrument.parse(completion.text)
    return Record(
        id=draw.chat.id,
        sample=draw.sample,
        status=elicited.answer.status,
        scores=elicited.scores,
        text=completion.text,
        finish_reason=completion.finish_reason,
        order=draw.order,
        sections=elicited.sections,
        repairs=elicited.answer.repairs,
        missing=elicited.answer.missing,
        attempt=draw.attempt,
    )


def _failure(draw: _Draw, error: str) -> Record:
    return Record(
        draw.chat.id, draw.sample, Status.FAILED, {}, "", order=draw.order, error=error, attempt=draw.attempt
    )
