"""A hard bound on the bytes that captured rows take on the host.

In: claims, before the bytes exist. Out: a wait until they fit. Nothing is ever granted beyond the limit.
"""

from __future__ import annotations

import os
import threading
import time

_MOST_BY_DEFAULT = 16_000_000_000


def default_limit() -> int:
    """A quarter of the machine's memory, at most 16 GB: the rest is for weights, inputs and libraries."""
    return min(machine_bytes() // 4, _MOST_BY_DEFAULT)


def machine_bytes() -> int:
    """All memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class ByteBudget:
    """Attributes:
    limit: bytes that may be held at once.
    peak: the most that was held.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.peak = 0
        self._held = 0
        self._changed = threading.Condition()
        self._failure: BaseException | None = None

    def acquire(self, nbytes: int) -> float:
        """Waits until `nbytes` fit; returns the seconds that took, and raises what was handed to `fail`."""
        if nbytes > self.limit:
            raise AssertionError(f"{nbytes} bytes never fit into a budget of {self.limit}")
        started = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._held + nbytes <= self.limit)
            if self._failure is not None:
                raise self._failure
            self._held += nbytes
            self.peak = max(self.peak, self._held)
        return time.perf_counter() - started

    def fits(self, nbytes: int) -> bool:
        """Whether `acquire` would return at once."""
        with self._changed:
            return self._held + nbytes <= self.limit

    def release(self, nbytes: int) -> None:
        with self._changed:
            self._held -= nbytes
            self._changed.notify_all()

    def fail(self, failure: BaseException) -> None:
        """Ends every wait, now and later: nothing will be released any more."""
        with self._changed:
            self._failure = failure
            self._changed.notify_all()
