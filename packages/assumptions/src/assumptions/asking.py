"""Put draws to an engine batch by batch, and tell a row that the engine refuses from an engine that does not work.

1. A batch that fails is asked again row by row, so that one bad row fails alone and is recorded as a failure. An
   engine that tells the rows apart (`PartFailedError`) is not asked again: no answer is paid for twice.
2. Before that, a draw that the engine has answered is asked again: if that fails too, the engine is at fault and its
   error is raised. The answer itself is not kept.
3. While no draw was ever answered, failures are kept back. They are recorded at the first answer; after `PATIENCE` of
   them, or at the end, the engine's error is raised instead.
An engine that cannot start (`EngineStartError`) is never asked twice.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar, runtime_checkable

from assumptions.answer_file import Answered, AnswerFile
from shared.errors import UserError
from shared.generation import Completion, Generator, PartFailedError, Request, Sampling
from shared.progress import progress

PATIENCE = 32
R = TypeVar("R", bound=Answered)
R_co = TypeVar("R_co", bound=Answered, covariant=True)


class EngineStartError(UserError):
    """The engine did not start: nothing can be asked."""


@runtime_checkable
class Draw(Protocol[R_co]):
    """One answer that is wanted: the request, and the record of what comes of it."""

    @property
    def key(self) -> Hashable:
        """The key of its record."""
        ...

    @property
    def request(self) -> Request:
        """What is asked."""
        ...

    def record(self, completions: Sequence[Completion]) -> R_co:
        """The record of an answer."""
        ...

    def failure(self, error: str) -> R_co:
        """The record of a refusal."""
        ...


class OnDemand:
    """A generator that starts its engine at the first request: a study resumed with all its answers starts none."""

    def __init__(self, start: Callable[[], Generator]) -> None:
        self.start = start
        self.engine: Generator | None = None

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Complete `requests`: one list a request, in order; EngineStartError when the engine does not start."""
        if self.engine is None:
            try:
                self.engine = self.start()
            except Exception as error:
                raise EngineStartError(f"the engine did not start: {_said(error)}") from error
        return self.engine.generate(requests, sampling)

    def close(self) -> None:
        """Free the engine, if one was started."""
        if self.engine is not None:
            self.engine.close()


def ask(
    generator: Generator,
    sampling: Sampling,
    draws: Sequence[Draw[R]],
    file: AnswerFile[R],
    batch_size: int,
    known: Sequence[Draw[R]] = (),
) -> None:
    """Ask the draws, `batch_size` at a time, and append a record of each to the file.

    `known` are draws of which some may be answered in the file already. Raises the engine's own error when the engine,
    not a row, is at fault.
    """
    working = {key for key, record in file.records.items() if record.error is None}
    answered = next((draw for draw in known if draw.key in working), None)
    asker = _Asker(generator, sampling, file, answered, trusted=bool(working))
    for start in progress(range(0, len(draws), batch_size), "answers, in batches"):
        asker.ask(draws[start : start + batch_size])
    asker.finish()


@dataclass
class _Asker(Generic[R]):
    generator: Generator
    sampling: Sampling
    file: AnswerFile[R]
    answered: Draw[R] | None  # a draw that this engine is known to answer
    trusted: bool  # the engine has answered something
    held: list[R] = field(default_factory=list)
    error: Exception | None = None

    def ask(self, draws: Sequence[Draw[R]]) -> None:
        """Complete one batch and append its records."""
        try:
            answers = self._generate(draws)
        except EngineStartError:
            raise
        except PartFailedError as error:
            self._take_part(draws, error)
        except Exception as error:
            self._check_engine(error)
            if len(draws) == 1:
                self._fail(draws[0], error)
            else:
                self._ask_singly(draws)
        else:
            self._accept(draws, answers)

    def finish(self) -> None:
        """Raise the engine's error if it never answered anything."""
        if self.error is not None and not self.trusted:
            raise self.error

    def _generate(self, draws: Sequence[Draw[R]]) -> list[list[Completion]]:
        return self.generator.generate([draw.request for draw in draws], self.sampling)

    def _accept(self, draws: Sequence[Draw[R]], answers: list[list[Completion]]) -> None:
        records = [draw.record(one) for draw, one in zip(draws, answers, strict=True)]
        self.file.append([*self.held, *records])
        self.answered, self.trusted = draws[-1], True
        self.held.clear()

    def _take_part(self, draws: Sequence[Draw[R]], error: PartFailedError) -> None:
        """Record every draw's own answer or failure: the engine has told them apart."""
        pairs = list(zip(draws, error.answers, strict=True))
        answered = [(draw, one) for draw, one in pairs if not isinstance(one, UserError)]
        if answered:
            self._accept([draw for draw, _ in answered], [one for _, one in answered])
        else:
            self._check_engine(error)
        for draw, one in pairs:
            if isinstance(one, UserError):
                self._fail(draw, one)

    def _ask_singly(self, draws: Sequence[Draw[R]]) -> None:
        for draw in draws:
            try:
                answers = self._generate([draw])
            except Exception as error:
                self._fail(draw, error)
            else:
                self._accept([draw], answers)

    def _check_engine(self, error: Exception) -> None:
        """Raise `error` when the engine no longer answers what it has answered before."""
        if self.answered is None:
            return
        try:
            self._generate([self.answered])
        except Exception as again:
            raise error from again

    def _fail(self, draw: Draw[R], error: Exception) -> None:
        self.error = error
        failure = draw.failure(_said(error))
        if self.trusted:
            self.file.append([failure])
            return
        self.held.append(failure)
        if len(self.held) >= PATIENCE:
            raise error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
