"""The next things are made in a thread while this one works with those before.

In: an iterator. Out: the same, with its errors in their place.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

T = TypeVar("T")
_Queue = queue.SimpleQueue[tuple[str, Any]]  # "item", "failure" or "end", and what

_CLOSES_SECONDS = 5.0  # a reader may be waiting for a network


def ahead(items: Iterable[T], most: int = 1) -> Generator[T, None, None]:
    """The items; while one is in use, up to `most` of the next are made.

    The iterator lives in the thread alone, which ends, and closes it, when it is exhausted, fails, or the caller closes
    this one or lets it go. What is made must not take part in what several processes do together: two threads would
    come to it in another order on each of them.
    """
    made: _Queue = queue.SimpleQueue()
    may_make = threading.Semaphore(most)
    closed = threading.Event()
    thread = threading.Thread(target=_make, args=(items, made, may_make, closed), name="jax_extract-ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = made.get()
            if kind == "end":
                return
            if kind == "failure":
                raise value
            may_make.release()
            yield value
    finally:
        closed.set()
        may_make.release()
        if not sys.is_finalizing():  # then no other thread runs any more
            thread.join(_CLOSES_SECONDS)


def _make(items: Iterable[Any], made: _Queue, may_make: threading.Semaphore, closed: threading.Event) -> None:
    iterator = iter(items)
    try:
        while True:
            may_make.acquire()
            if closed.is_set():
                return
            try:
                item = next(iterator)
            except StopIteration:
                break
            made.put(("item", item))
            del item  # the caller's alone, who may be done with it before the next is made
        made.put(("end", None))
    except BaseException as failure:  # noqa: BLE001 (whatever it is, it is the caller's)
        made.put(("failure", failure))
    finally:
        if isinstance(iterator, Generator):
            iterator.close()
