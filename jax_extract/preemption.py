"""SIGTERM, the signal that a machine is about to be taken away.

In: what is to be done in the seconds that are left. Out: that, and the end of the process. The signal is
noticed by a thread of its own, whatever the main thread is doing: a device or a compiler may hold that
for longer than there is time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from jax_extract import interruption

GRACE_SECONDS = 25.0  # platforms give 30 before they pull the plug
_LAST_WORDS_SECONDS = 1.0
EXIT_CODE = 128 + signal.SIGTERM


@contextlib.contextmanager
def on_preemption(wind_up: Callable[[float], str], linger: bool = False) -> Iterator[None]:
    """While inside, SIGTERM calls `wind_up(seconds left)`, prints what it returns, and ends the process.

    With `linger` not before the time is up: the end of the first process of several is the end of all.
    Ctrl-C is an exception here, so that files that are half written are taken away.

    Only the main thread can set this up; elsewhere, as in a notebook's server, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noticed, notice = os.pipe()
    os.set_blocking(notice, False)
    # The byte is written by the interpreter's own C handler, at once; the Python one has nothing left to do.
    before_fd = signal.set_wakeup_fd(notice, warn_on_full_buffer=False)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    watcher = threading.Thread(
        target=_watch, args=(noticed, before_fd, wind_up, linger), name="jax_extract-preemption", daemon=True
    )
    watcher.start()
    try:
        with interruption.unwinding():
            yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.set_wakeup_fd(before_fd)
        os.close(notice)
        watcher.join()
        os.close(noticed)


_speaking = threading.Lock()  # taken once and for good


def _watch(noticed: int, others: int, wind_up: Callable[[float], str], linger: bool) -> None:
    while byte := os.read(noticed, 1):
        if byte[0] != signal.SIGTERM:
            if others >= 0:  # who heard the signals before
                os.write(others, byte)
            continue
        interruption.ending.set()
        until = time.monotonic() + GRACE_SECONDS - _LAST_WORDS_SECONDS
        # Should the disk or the network hang, the process ends all the same, by a thread that waits for nothing.
        threading.Thread(target=_end_after, args=(GRACE_SECONDS,), daemon=True).start()
        try:
            said = wind_up(GRACE_SECONDS - _LAST_WORDS_SECONDS)
        except BaseException as error:  # noqa: BLE001 (the process ends; it is told why)
            said = f"{error}"
        if linger:
            time.sleep(max(0.0, until - time.monotonic()))
        _end(said)


def _end_after(seconds: float) -> None:
    time.sleep(seconds)
    _end(f"the {seconds:.0f} s that were left did not suffice to write everything; what is committed is safe")


def _end(said: str) -> None:
    """Says one sentence, once, and ends the process, whoever else may still want to speak."""
    try:
        if _speaking.acquire(timeout=_LAST_WORDS_SECONDS):
            print(f"\nstopped by SIGTERM: {said}; {interruption.again}", file=sys.stderr, flush=True)
    finally:
        os._exit(EXIT_CODE)
