"""Threads that do their calls in order, side by side, and stop together.

In: calls, each for one lane. Out: the calls of a lane done one after the other, those of different lanes
at the same time. The first failure stops every lane and reaches whoever submits or waits next, never
silently.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

Call = Callable[[], None]


class Lanes:
    """`count` threads with a queue each; what may wait in them is bounded by whoever submits."""

    def __init__(self, count: int, on_failure: Callable[[BaseException], None] = lambda _: None) -> None:
        self._queues: list[deque[Call]] = [deque() for _ in range(count)]
        self._changed = threading.Condition()
        self._unfinished = 0
        self._closing = False
        self._failure: BaseException | None = None
        self._on_failure = on_failure
        self.busy_seconds = [0.0] * count
        self._threads = [
            threading.Thread(target=self._work, args=(lane,), name=f"jax_extract-lane-{lane}", daemon=True)
            for lane in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, lane: int, call: Call) -> None:
        """Queues a call; raises what failed before."""
        with self._changed:
            self.require_sound()
            self._queues[lane].append(call)
            self._unfinished += 1
            self._changed.notify_all()

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until every call is done; False where that took longer than `seconds`. Raises what failed."""
        with self._changed:
            done = self._changed.wait_for(lambda: self._failure or not self._unfinished, seconds)
            self.require_sound()
            return bool(done)

    def close(self) -> None:
        """Waits until all is done, ends the threads, and raises what failed."""
        try:
            self.wait()
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Drops what waits, waits for what runs, and ends the threads."""
        with self._changed:
            self._drop_waiting()
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def require_sound(self) -> None:
        """Raises what failed, if anything did."""
        if self._failure is not None:
            raise self._failure

    def _drop_waiting(self) -> None:
        for queue in self._queues:
            self._unfinished -= len(queue)
            queue.clear()

    def _work(self, lane: int) -> None:
        queue = self._queues[lane]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: queue or self._closing or self._failure)
                if not queue:
                    return
                call = queue.popleft()
            started = time.perf_counter()
            try:
                call()
            except BaseException as failure:  # noqa: BLE001 (handed to the thread that submits or waits)
                with self._changed:
                    self._failure = self._failure or failure
                    self._drop_waiting()
                    self._changed.notify_all()
                self._on_failure(failure)
            del call  # it holds the arrays it wrote
            with self._changed:
                self.busy_seconds[lane] += time.perf_counter() - started
                self._unfinished -= 1
                self._changed.notify_all()


class Countdown:
    """Calls `then` when it has been called `count` times, in the thread of the last call."""

    def __init__(self, count: int, then: Call) -> None:
        self._left = count
        self._then = then
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._then()
