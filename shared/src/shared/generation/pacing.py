"""A limit on how many requests begin in a minute, kept by all threads of one generator together."""

import threading
import time
from collections.abc import Callable

from shared.errors import UserError


class Pace:
    """Lets at most `per_minute` calls of `wait` return in a minute, evenly spaced; None lets all pass at once."""

    def __init__(
        self,
        per_minute: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        if per_minute is not None and not per_minute > 0:
            raise UserError(f"requests_per_minute must be positive, got {per_minute}")
        self._interval = 0.0 if per_minute is None else 60.0 / per_minute
        self._clock, self._sleep = clock, sleep
        self._next = float("-inf")
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Return when the next request may begin."""
        with self._lock:
            now = self._clock()
            start = max(now, self._next)
            self._next = start + self._interval
        if start > now:
            self._sleep(start - now)
