"""Ctrl-C, at any moment of a command: one sentence and exit code 130.

In: SIGINT. Out: the end of the process. Python's own way is an exception in the main thread, which comes late while
a compiler holds that thread, and which libraries swallow while they are imported. Here a thread of its own hears the
signal. Only while shards are written does the exception come first, so that what is half written goes; a second
Ctrl-C does not wait for that. Ending a command anywhere is safe: what is committed stays, the rest never was.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator

EXIT_CODE = 128 + signal.SIGINT
_UNWIND_SECONDS = 10.0

again: str | None = "run the same command again to go on"  # set by commands: what then; None where nothing was kept
listening = False  # whether this process is a command's own
ending = threading.Event()  # set by who is about to end this process with words of its own; others keep silent
_speaking = threading.Lock()  # taken once and for good
_unwinds = False  # whether the main thread is in a place that it should leave by itself
_told = False  # whether it was told to


def listen() -> None:
    """From here on Ctrl-C ends this process; for commands, whose process nobody else shares."""
    global listening  # noqa: PLW0603 (a process has one Ctrl-C)
    if threading.current_thread() is not threading.main_thread():
        return
    listening = True
    heard, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.signal(signal.SIGINT, _in_main_thread)
    # The byte is written by the interpreter's own C handler, at once, whatever the main thread is doing.
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(heard,), name="jax_extract-interruption", daemon=True).start()


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Inside, the first Ctrl-C is an exception as always, and the process ends when that has done its work."""
    global _unwinds  # noqa: PLW0603 (a signal has no other way to tell where it comes)
    _unwinds = True
    try:
        yield
    finally:
        _unwinds = False


def say() -> None:
    """The sentence, once in a process."""
    if _speaking.acquire(blocking=False):
        start = "\n" if sys.stderr.isatty() else ""  # after ^C and the bar
        then = f"; what is committed is safe: {again}" if again else ""
        print(f"{start}interrupted{then}", file=sys.stderr, flush=True)


def _in_main_thread(*_: object) -> None:
    global _told  # noqa: PLW0603 (as in `unwinding`)
    if _unwinds and not _told:
        _told = True
        raise KeyboardInterrupt


def _listen(heard: int) -> None:
    while byte := os.read(heard, 1):
        if byte[0] != signal.SIGINT:
            continue
        ending.set()
        if _unwinds:
            select.select([heard], [], [], _UNWIND_SECONDS)
        try:
            say()
        finally:
            os._exit(EXIT_CODE)
