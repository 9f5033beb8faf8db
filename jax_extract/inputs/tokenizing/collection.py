"""No garbage collection while many short-lived objects are made, none of which is in a circle.

In: nothing. Out: a context. Python looks for circles after every few hundred new objects, and now and then through all
that the process holds, the libraries' million among them.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_inside = 0  # threads
_was_on = False


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Off in the whole process until the last one that is inside leaves; then as it was before the first came."""
    global _inside, _was_on  # noqa: PLW0603 (so is the collector's own switch)
    with _lock:
        if not _inside:
            _was_on = gc.isenabled()
            gc.disable()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside and _was_on:
                gc.enable()
