"""The other processes of a program, watched: where one is gone, this one says which, and ends.

In: the client of JAX's coordination service. Out: one sentence and exit code 1, which launch scripts take as a reason
to start again (2 would be a mistake, which no repetition mends).

The service itself notices a lost process by heartbeats of its own threads, and would abort this one with frames of
C++ on the terminal. The library calls a function before that, if it was given one, but cannot pass the status on to
Python and ends in `std::terminate` (jaxlib 0.10.2); so that is where this module listens. Which process it was is
known from beats that each one leaves in the service's table, beside last words, if it had any.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from jax._src import distributed

from jax_extract import interruption

EXIT_CODE = 1
_BEAT_SECONDS = 2.0
_STALE_SECONDS = 7.0  # without a beat; only asked where it is certain that somebody is gone
_BEATS, _LAST_WORDS = "jax_extract/beat/", "jax_extract/last_words/"
_AGAIN = "what is committed is safe: start the same command again on all hosts"


class Peers:
    """Keeps a beat, and hears those of the others, from a thread."""

    def __init__(self, client: Any, index: int, count: int) -> None:
        self._client = client
        self._index = index
        self._count = count
        self._over = threading.Event()
        self._heard = {peer: ("", time.monotonic()) for peer in range(count) if peer != index}
        self._answered = time.monotonic()  # when the service did, which the first process keeps
        self._thread = threading.Thread(target=self._watch, name="jax_extract-peers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Before the client goes."""
        self._over.set()
        self._thread.join(_STALE_SECONDS)

    def lost(self, seconds: float = 0.0) -> str | None:
        """What to say of a process that is gone; looks for one for so many seconds."""
        until = time.monotonic() + seconds
        while (peer := self._stalest()) is None:
            if time.monotonic() >= until:
                return None
            time.sleep(_BEAT_SECONDS / 10)
        return f"process {peer} of {self._count} is gone; {_AGAIN}"

    def tell(self, said: str) -> None:
        """Last words, for the others; the first process, without whom there is no table, waits until they have read."""
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_LAST_WORDS}{self._index}", said, allow_overwrite=True)
            if self._index == 0:
                time.sleep(2 * _BEAT_SECONDS)

    def _stalest(self) -> int | None:
        before = time.monotonic() - _STALE_SECONDS
        if self._index and self._answered < before:
            return 0
        peer, (_, at) = min(self._heard.items(), key=lambda heard: heard[1][1])
        return peer if at < before else None

    def _watch(self) -> None:
        number = 0
        while not self._over.is_set():
            number += 1
            try:
                self._client.key_value_set(f"{_BEATS}{self._index}", str(number), allow_overwrite=True)
                beats = self._client.key_value_dir_get(_BEATS)
                words = self._client.key_value_dir_get(_LAST_WORDS)
            except Exception:  # noqa: BLE001 (the service is gone: that is told by whoever notices it for certain)
                self._over.wait(_BEAT_SECONDS)
                continue
            self._answered = now = time.monotonic()
            for key, value in beats:
                peer = int(key.rpartition("/")[2])
                if peer in self._heard and self._heard[peer][0] != value:
                    self._heard[peer] = (value, now)
            for key, said in words:
                if (peer := int(key.rpartition("/")[2])) != self._index:
                    end(said if _AGAIN in said else f"process {peer} of {self._count} ended ({said}); {_AGAIN}")
            self._over.wait(_BEAT_SECONDS)


_peers: Peers | None = None
_keep: list[Any] = []  # what C++ still points to


def watched() -> Peers | None:
    return _peers


def watch(index: int, count: int) -> Peers:
    """Begins to watch; to be called when all have joined."""
    global _peers  # noqa: PLW0603 (the library calls back without a word of where)
    _peers = Peers(distributed.global_state.client, index, count)
    _peers.start()
    return _peers


def forget() -> None:
    """Leaves alone what could not join: at the end of the process it would wait for the others, and complain."""
    state: Any = distributed.global_state
    _keep.append((state.client, state.service))
    state.client = state.service = None


def end(said: str) -> NoReturn:
    """Ends this process because of another one, unless it is ending already with words of its own."""
    if interruption.ending.is_set():
        threading.Event().wait()
    interruption.ending.set()
    print(f"error: {said}", file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """What is initialised inside tells this module, and nobody else, when the coordination service reports a loss."""
    library: Any = distributed._jax  # pyright: ignore[reportPrivateImportUsage]
    make = library.get_distributed_runtime_client
    library.get_distributed_runtime_client = functools.partial(make, missed_heartbeat_callback=_reported)
    _listen_to_terminate()
    try:
        yield
    finally:
        library.get_distributed_runtime_client = make


def _reported(*_: object) -> None:
    """From a thread of the library: somebody is gone for certain."""
    if _peers is None:
        return  # while processes join it is an exception, too
    said = _peers.lost()
    if said is None:  # nobody else can have gone unnoticed and so soon
        said = f"process 0 of {_peers._count} is gone; {_AGAIN}" if _peers._index else f"a process is gone; {_AGAIN}"
    end(said)


def _listen_to_terminate() -> None:
    try:
        runtime = ctypes.CDLL("libstdc++.so.6")
        set_terminate, current = runtime._ZSt13set_terminatePFvvE, runtime.__cxa_current_exception_type
    except (OSError, AttributeError):  # another C++ runtime: what the library does by itself must do
        return
    handler = ctypes.CFUNCTYPE(None)
    set_terminate.restype = handler
    current.restype = ctypes.POINTER(ctypes.c_void_p)

    def terminated() -> None:
        kind = current()
        if kind and ctypes.string_at(kind[1] or 0) == b"St8bad_cast":  # a type_info: its table, then its name
            _reported()
        before()

    _keep.append(ours := handler(terminated))
    before = set_terminate(ours)
    _keep.append(before)
