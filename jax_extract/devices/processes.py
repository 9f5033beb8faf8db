"""The processes of one program over several hosts, and how they agree.

In: flags, or what the machine says of itself. Out: `Processes`: how many there are, which one this is, and
the three things they do together: hear the first one's word, hear of each other's mistakes, and meet.
With one process all of them cost nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed

from jax_extract import interruption
from jax_extract.devices import libtpu, peers
from jax_extract.errors import UserError

START_SECONDS = 1_800  # a cold restart of a pod brings its hosts up minutes apart
HEARTBEAT_SECONDS = 30  # without one a process is given up; they come from a thread that nothing holds
_TOLD_AFTER_SECONDS = 10.0
_FOUND_SECONDS = 12.0  # in which a process that is gone is found, where a collective has failed
_MESSAGE_BYTES = 2_048
_LEAST_GATHERED_BITS = 16


@dataclass(frozen=True)
class Processes:
    """Attributes:
    count: of the program; independent workers are programs of one process each.
    index: of this one, from 0.
    """

    count: int = 1
    index: int = 0

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def of_first(self, value: Callable[[], Any]) -> Any:
        """What `value` gives on the first process, as plain JSON, on all of them; its UserError too."""
        if self.count == 1:
            return value()
        data = b""
        with self.together():
            if self.is_first:
                data = json.dumps(value()).encode()
        from jax.experimental.multihost_utils import broadcast_one_to_all

        size = int(broadcast_one_to_all(np.int64(len(data)).astype(np.int32)))
        padded = np.zeros(max(1, size), np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        return json.loads(bytes(np.asarray(broadcast_one_to_all(padded), np.uint8))[:size])

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What one process refuses, all refuse, each with the same sentence; none is left waiting for it."""
        if self.count == 1:
            yield
            return
        mistake: UserError | None = None
        try:
            yield
        except UserError as error:
            mistake = error
        for index, told in enumerate(self._gather("" if mistake is None else str(mistake) or "refused")):
            if told:
                raise _Shared(str(mistake or f"process {index} says: {told}")) from None

    @contextlib.contextmanager
    def to_the_end(self) -> Iterator[None]:
        """What ends this process alone is told to the others, which would wait for it."""
        try:
            yield
        except _Shared:
            raise
        except BaseException as failure:
            if self.count > 1:
                leave(failure)
            raise

    def require_equal(self, what: str, value: str, mend: str) -> None:
        """UserError where the processes do not all hold the same."""
        if self.count > 1 and len(set(self._gather(value))) > 1:
            raise _Shared(f"the processes do not have the same {what}; {mend}")

    def any(self, value: bool) -> bool:
        """Whether it is so on any process."""
        return value if self.count == 1 else any(self._gather("x" if value else ""))

    def of_all(self, value: Any) -> list[Any]:
        """What each process says, a small plain JSON value, in their order."""
        return [value] if self.count == 1 else [json.loads(text) for text in self._gather(json.dumps(value))]

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """What each process gives, up to 1 GB, in their order."""
        if self.count == 1:
            return [data]
        from jax.experimental.multihost_utils import process_allgather

        sizes = np.asarray(process_allgather(np.array([len(data)], np.int32))).ravel().tolist()
        # A program is compiled for each size: powers of two are few.
        padded = np.zeros(1 << max(_LEAST_GATHERED_BITS, (max(sizes) - 1).bit_length()), np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        gathered = np.asarray(process_allgather(padded), np.uint8)
        return [row[:size].tobytes() for row, size in zip(gathered, sizes, strict=True)]

    def meet(self) -> None:
        """Waits for all processes."""
        if self.count > 1:
            self._gather("")

    def _gather(self, text: str) -> list[str]:
        from jax.experimental.multihost_utils import process_allgather

        message = np.zeros(_MESSAGE_BYTES, np.uint8)
        data = text.encode()[:_MESSAGE_BYTES]
        message[: len(data)] = np.frombuffer(data, np.uint8)
        gathered = np.asarray(process_allgather(message), np.uint8)
        return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in gathered]


class _Shared(UserError):
    """A mistake that every process was told of, and ends with."""


def leave(failure: BaseException) -> NoReturn:
    """Says what failed on this process alone, and ends it without waiting for the others, who wait for it."""
    watched = peers.watched()
    if isinstance(failure, KeyboardInterrupt):
        _tell(watched, "interrupted")
        interruption.say()
        os._exit(interruption.EXIT_CODE)
    # A collective that fails says neither in its type nor in its words whose fault it is.
    if watched and not isinstance(failure, UserError) and (lost := watched.lost(_FOUND_SECONDS)):
        _tell(watched, lost)
        peers.end(lost)
    said = str(failure) or type(failure).__name__
    print(f"error: process {jax.process_index()}: {said}; the other processes end too", file=sys.stderr, flush=True)
    sys.stdout.flush()
    _tell(watched, said)
    os._exit(2 if isinstance(failure, UserError) else 1)


def _tell(watched: peers.Peers | None, said: str) -> None:
    if watched:
        watched.tell(said[:_MESSAGE_BYTES])


def start_processes(mode: str, coordinator: str | None, count: int | None, index: int | None) -> Processes:
    """Joins this process to its program; to be called before any device is used.

    Args:
      mode: `on`: join what the cluster says of itself; `off`: stay alone; `auto`: join on a TPU VM.
      coordinator, count, index: explicit, where the machine cannot tell.

    Raises:
      UserError: the others did not come.
    """
    explicit = coordinator is not None
    if not jax.distributed.is_initialized() and mode != "off" and (explicit or mode == "on" or _is_tpu_vm()):
        # Its handler of SIGTERM would take the place of ours, which commits what is complete.
        jax.config.update("jax_enable_preemption_service", False)
        try:
            with peers.heard(), _waiting_is_told():
                jax.distributed.initialize(
                    coordinator,
                    count,
                    index,
                    initialization_timeout=START_SECONDS,
                    heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                    shutdown_timeout_seconds=START_SECONDS,  # the first one may write long after the others are done
                )
        except (RuntimeError, ValueError) as error:
            peers.forget()
            reason = str(error).strip().partition("\n")[0]
            if "bad_cast" in reason:  # all that is left of it in Python
                reason = f"not all of them came to {_address()} within {START_SECONDS:,} s"
            raise UserError(
                f"this process could not join the others ({reason}); start the same command on every host, with "
                "--coordinator_address HOST:PORT --num_processes N --process_id I where the machine is no TPU pod, "
                "or work alone with --distributed off"
            ) from None
        if (state := distributed.global_state).num_processes > 1:
            _keep_output_ours()
            atexit.register(peers.watch(state.process_id, state.num_processes).stop)
    return Processes(jax.process_count(), jax.process_index())


def _keep_output_ours() -> None:
    """Standard output is Python's alone: Gloo writes a line to it whenever processes connect, from C++."""
    if not isinstance(sys.stdout, io.TextIOWrapper) or sys.stdout.fileno() != 1:
        return
    sys.stdout.flush()
    before, ours = sys.stdout, os.dup(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    buffering = 1 if before.line_buffering else -1
    sys.stdout = os.fdopen(ours, "w", buffering, encoding=before.encoding, errors=before.errors)


@contextlib.contextmanager
def _waiting_is_told() -> Iterator[None]:
    """One line on standard error where the others take long to come."""

    def tell() -> None:
        state = distributed.global_state
        here, count = _connected(_address()), state.num_processes
        if state.process_id:
            line = f"waiting for process 0 and the others of the program at {_address()}"
        else:
            line = f"waiting for {max(1, count - here)} of {count} processes at {_address()}"
        print(line, file=sys.stderr, flush=True)

    timer = threading.Timer(_TOLD_AFTER_SECONDS, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _address() -> str:
    return str(distributed.global_state.coordinator_address)


def _connected(address: str) -> int:
    """How many processes have a connection to this one's service, of which the library says nothing."""
    port, established = int(address.rpartition(":")[2]), "01"
    lines = [line.split() for table in ("tcp", "tcp6") for line in _lines(Path("/proc/net") / table)[1:]]
    return sum(int(words[1].rpartition(":")[2], 16) == port and words[3] == established for words in lines)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _is_tpu_vm() -> bool:
    """Whether this machine has TPU chips that JAX is going to use."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return (not platforms or "tpu" in platforms) and libtpu.has_chips() and libtpu.is_installed()
