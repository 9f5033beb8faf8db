"""One thread that does work in order, behind a bound on what waits for it.

In: calls and how many bytes each holds. Out: the calls, done in order; a failure stops everything
behind it and reaches the caller at the next `submit` or at `close`, never silently.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class BackgroundWorker:
    """Runs calls in a thread; `submit` waits while more than `max_bytes` are held by waiting calls."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held = 0
        self._calls: deque[tuple[Callable[[], None], int]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="jax_extract-writer", daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], None], nbytes: int = 0) -> None:
        """Queues a call that holds `nbytes`; a single call may be larger than the bound."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not self._held or self._held + nbytes <= self._max_bytes)
            self._raise()
            self._calls.append((call, nbytes))
            self._held += nbytes
            self._changed.notify_all()

    def close(self) -> None:
        """Waits until all is done, and raises what failed."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._raise()

    def cancel(self) -> None:
        """Drops what waits and waits for what runs."""
        with self._changed:
            self._calls.clear()
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or self._closing)
                if not self._calls:
                    return
                call, nbytes = self._calls.popleft()
            try:
                call()
            except BaseException as failure:  # noqa: BLE001 (handed to the caller's thread)
                with self._changed:
                    self._failure = failure
                    self._calls.clear()
                    self._changed.notify_all()
                return
            del call  # it holds the arrays it wrote
            with self._changed:
                self._held -= nbytes
                self._changed.notify_all()
