"""Processes that each open something expensive once (a model on a device) and then work on one task at a time.

A task that raises is reported and the process goes on with the next; a process that dies is reported with its task and
replaced. A process ends when its parent does, however that ended, so that a second run never meets the first one's
children. What cannot be opened ends everything at once: the next process would fail in the same way.
"""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from shared.errors import UserError

# Opens the expensive thing in its process and returns the function from a task to its result; both must be picklable.
Opener = Callable[[], Callable[[Any], Any]]


class Outcome(NamedTuple):
    """What became of a task: its result, or the error's text."""

    name: str
    result: Any
    error: str | None


class Place(NamedTuple):
    """Where one process runs: environment variables, and threads of torch."""

    environment: dict[str, str]
    threads: int


def run_tasks(tasks: Mapping[str, Any], opener: Opener, places: Sequence[Place]) -> Iterator[Outcome]:
    """Outcomes of all tasks as they come, one process a place; UserError where a process cannot open its model."""
    waiting = deque(tasks)
    workers: dict[Any, _Worker] = {}  # by their connections
    try:
        for place in places[: len(tasks)]:
            worker = _Worker(opener, place)
            workers[worker.connection] = worker
        while workers:
            for connection in wait(list(workers)):
                worker = workers.pop(connection)
                outcome = worker.receive()
                if outcome:
                    yield outcome
                if not waiting:
                    worker.close()
                    continue
                if worker.dead:
                    worker = _Worker(opener, worker.place)
                else:
                    name = waiting.popleft()
                    worker.send(name, tasks[name])
                workers[worker.connection] = worker
    finally:
        for worker in workers.values():
            worker.process.terminate()


class _Worker:
    """One process and the task it is on."""

    def __init__(self, opener: Opener, place: Place) -> None:
        context = multiprocessing.get_context("spawn")
        self.place, self.task = place, ""
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, opener, place))
        self.process.start()
        theirs.close()  # so that the pipe ends when the process does
        self.dead = False

    def send(self, name: str, task: Any) -> None:
        self.task = name
        self._put(task)

    def _put(self, message: Any) -> None:
        with suppress(BrokenPipeError):  # the process has died: `receive` reports it, with its task
            self.connection.send(message)

    def receive(self) -> Outcome | None:
        """The outcome of the task; None for the word that the model is open."""
        try:
            kind, value = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.dead = True
            self.process.join()
            what = f"the process ended with code {self.process.exitcode}"
            if not self.task:
                raise UserError(f"{what} while it loaded the model") from None
            return Outcome(self.task, None, what)
        if kind == "closed":
            raise UserError(value)
        if kind == "open":
            return None
        return Outcome(self.task, value, None) if kind == "done" else Outcome(self.task, None, value)

    def close(self) -> None:
        if not self.dead:
            self._put(None)
            self.process.join()


def _serve(connection: Connection, opener: Opener, place: Place) -> None:
    """The process: open, then answer tasks until None comes."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(place.environment)
    import torch

    torch.set_num_threads(place.threads)
    try:
        work = opener()
    except UserError as error:
        connection.send(("closed", str(error)))
        return
    connection.send(("open", None))
    while (task := connection.recv()) is not None:
        try:
            connection.send(("done", work(task)))
        except Exception as error:  # the task's failure, whatever it is, must not stop the others
            connection.send(("failed", f"{type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
