"""The one thread in which the model works: jobs wait in line, and each tells what it does as a stream of events.

A job is a function of a stop flag that yields events. It runs in the worker thread from beginning to end, one job
after another; whoever asked for it reads the events in the server's loop. A reader that goes away, or `stop`, sets the
flag, and the job ends at its next token.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
Job = Callable[[threading.Event], Iterator[T]]
_END = object()


class Desk:
    """One worker and its line."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._flags: dict[str, threading.Event] = {}
        self._jobs = 0

    @property
    def waiting(self) -> int:
        """Jobs that run or wait."""
        return self._jobs

    async def stream(self, key: str, job: Job[T]) -> AsyncIterator[T]:
        """Run a job when its turn comes; its events, then its error if it has one. `key` names it for `stop`."""
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[Any]()
        flag = self._flags[key] = threading.Event()

        def tell(item: Any) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(inbox.put_nowait, item)

        def work() -> None:
            try:
                if not flag.is_set():
                    for event in job(flag):
                        tell(event)
                tell(_END)
            except Exception as error:  # raised where the events are read
                tell(error)

        self._jobs += 1
        try:
            self._worker.submit(work)
            while (item := await inbox.get()) is not _END:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            flag.set()
            self._jobs -= 1
            if self._flags.get(key) is flag:
                del self._flags[key]

    async def call(self, work: Callable[[], T]) -> T:
        """Run one function in the line and return what it returns."""
        self._jobs += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, work)
        finally:
            self._jobs -= 1

    def stop(self, key: str) -> bool:
        """End a job at its next token, or before it has begun; False when no job has the key."""
        flag = self._flags.get(key)
        if flag is not None:
            flag.set()
        return flag is not None

    def close(self) -> None:
        """Stop what runs, drop what waits, and end the thread."""
        for flag in self._flags.values():
            flag.set()
        self._worker.shutdown(wait=True, cancel_futures=True)
