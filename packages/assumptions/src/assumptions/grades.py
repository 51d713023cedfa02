"""A judge's grades in an append-only file: one line for every (exchange, outcome), with a status; failures are retried.

An exchange is known by the hash of message and reply, so equal ones are judged once and an edited one is another.
A resumed run asks again where no grade could be read or the server refused the question, and nowhere else.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from assumptions.answer_file import AnswerFile
from assumptions.asking import ask
from assumptions.outcomes import OUTCOMES, Exchange, Judgement, ModelJudge, mean_grade, question
from shared.generation import Completion, Request
from shared.generation.requests import sample_seed

FORMAT = 1


class GradeStatus(StrEnum):
    """Whether a grade could be read."""

    READ = "read"
    FAILED = "failed"


@dataclass(frozen=True)
class Grade:
    """What a judge wrote about one outcome of one exchange, and the grade (mean over repeats) where one was read."""

    exchange: str
    outcome: str
    status: GradeStatus
    score: float | None
    written: tuple[str, ...] = ()
    error: str | None = None
    attempt: int = 0

    @property
    def key(self) -> tuple[str, str]:
        """What a later grade of the same question replaces."""
        return (self.exchange, self.outcome)


@dataclass(frozen=True)
class _Question:
    exchange: str
    outcome: str
    attempt: int
    request: Request

    @property
    def key(self) -> tuple[str, str]:
        return (self.exchange, self.outcome)

    def record(self, completions: Sequence[Completion]) -> Grade:
        """The grade read from the judge's answers, or the failure to read one."""
        written = tuple(completion.text for completion in completions)
        score = mean_grade(written)
        status = GradeStatus.FAILED if score is None else GradeStatus.READ
        return Grade(self.exchange, self.outcome, status, score, written, attempt=self.attempt)

    def failure(self, error: str) -> Grade:
        """The record of a question that the judge's engine refused."""
        return Grade(self.exchange, self.outcome, GradeStatus.FAILED, None, error=error, attempt=self.attempt)


def grade(
    judge: ModelJudge, exchanges: Sequence[Exchange], path: Path, batch_size: int = 256
) -> list[Judgement]:
    """Judge every exchange, in order, resuming the file at `path`; the engine's own error when it does not work."""
    hashes = [exchange_hash(exchange) for exchange in exchanges]
    known = dict(zip(hashes, exchanges, strict=True))
    with AnswerFile(path, {"format": FORMAT, **header(judge)}, _grade) as file:
        asked = [_question(judge, known[name], name, outcome, file) for name in known for outcome in OUTCOMES]
        read = {key for key, one in file.records.items() if one.status is GradeStatus.READ}
        pending = [one for one in asked if one.key not in read]
        ask(judge.generator, judge.sampling, pending, file, batch_size, known=asked)
        found = file.records
    return [
        Judgement(
            {outcome: found[name, outcome].score for outcome in OUTCOMES},
            {outcome: found[name, outcome].written for outcome in OUTCOMES},
        )
        for name in hashes
    ]


def header(judge: ModelJudge) -> dict[str, Any]:
    """What identifies the judge whose grades a file holds: its name, wording and sampling."""
    wording = repr([question(Exchange("MESSAGE", "REPLY"), outcome) for outcome in OUTCOMES])
    return {
        "judge": judge.name,
        "prompt_hash": hashlib.sha256(wording.encode()).hexdigest()[:16],
        "repeats": judge.repeats,
        "temperature": judge.sampling.temperature,
        "seed": judge.seed,
    }


def exchange_hash(exchange: Exchange) -> str:
    """16 hexadecimal digits of message and reply."""
    return hashlib.sha256(repr((exchange.turn, exchange.reply)).encode()).hexdigest()[:16]


def _question(
    judge: ModelJudge, exchange: Exchange, name: str, outcome: str, file: AnswerFile[Grade]
) -> _Question:
    """The question at the attempt after the one in the file; every attempt has its own seed."""
    former = file.records.get((name, outcome))
    attempt = former.attempt + 1 if former else 0
    request = Request(question(exchange, outcome), seed=sample_seed(judge.seed, attempt))
    return _Question(name, outcome, attempt, request)


def _grade(row: dict[str, Any]) -> Grade:
    return Grade(**{**row, "status": GradeStatus(row["status"]), "written": tuple(row["written"])})
