"""Processes that encode chunks of texts beside this one; see `worker`.

In: a tokenizer as JSON, and texts. Out: token ids. A process that cannot start or is lost costs its own chunks alone,
which the caller then encodes itself. None outlives this process: each ends with its pipe, however this one ends.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import marshal
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import IO, Any

from jax_extract.inputs.tokenizing import worker
from jax_extract.inputs.tokenizing.worker import Tokens

_MOST_WORKERS = 16
_PIPE_BYTES = 1 << 20  # holds the tokens of a chunk, so that a process goes on before they are fetched
_EACH_HAS = 2  # chunks: one that it encodes, one that waits


class Failed(Exception):
    """What the tokenizer says of a text that it fails on."""


@dataclass(frozen=True)
class Setup:
    """What a process is told once.

    Attributes:
      backend: the tokenizer as JSON.
      splits_special: whether special tokens within a text are taken for plain text.
      special, opening, most: see `worker.encode`.
    """

    backend: str
    splits_special: bool
    special: bool
    opening: str
    most: int


class Workers:
    """Attributes:
    most: chunks that may be sent before the first of them is received.
    """

    def __init__(self, setup: Setup, count: int) -> None:
        self._all: list[Any] = []
        with contextlib.suppress(OSError):  # no more processes or memory: fewer will do
            for _ in range(count):
                self._all.append(_start())
        self._working = list(self._all)
        self._turn = 0
        self.most = _EACH_HAS * len(self._all)
        told = marshal.dumps((setup.backend, setup.splits_special, setup.special, setup.opening, setup.most))
        for process in self._all:
            self._write(process, told)

    def send(self, texts: list[str]) -> Any:
        """What `receive` wants to hear, in the order of sending; None where no process is left."""
        message = marshal.dumps(texts)
        while self._working:
            process = self._working[self._turn % len(self._working)]
            if self._write(process, message):
                self._turn += 1
                return process
        return None

    def receive(self, sent: Any) -> Tokens | None:
        """The tokens of the first chunk that a process has not given yet; None where the process is lost.

        Raises:
          Failed: the tokenizer does.
        """
        head = _exactly(sent.stdout, bytearray(worker.REPLY.size))
        if head is None:
            self._lose(sent)
            return None
        failed, first, tokens, opened = worker.REPLY.unpack(head)
        if failed:
            raise Failed(bytes(_exactly(sent.stdout, bytearray(first)) or b"").decode("utf-8", "replace"))
        lengths, token_ids = array.array("q", bytes(8 * first)), array.array("i", bytes(4 * tokens))
        if _exactly(sent.stdout, lengths) is None or _exactly(sent.stdout, token_ids) is None:
            self._lose(sent)
            return None
        return Tokens(token_ids, lengths, opened)

    def close(self) -> None:
        for process in self._all:
            process.kill()
        for process in self._all:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was not sent any more
                    pipe.close()

    def _write(self, process: Any, message: bytes) -> bool:
        try:
            process.stdin.write(worker.FRAME.pack(len(message)))
            process.stdin.write(message)
            process.stdin.flush()
        except OSError:
            self._lose(process)
            return False
        return True

    def _lose(self, process: Any) -> None:
        if process in self._working:
            self._working.remove(process)


def worth_starting() -> int:
    """How many processes this machine has cores for; 0 where one would gain nothing."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS) if cores > 1 and sys.executable else 0


def _start() -> subprocess.Popen[bytes]:
    # By its path, not as a module of multiprocessing: that would run the caller's own script again.
    process = subprocess.Popen(
        [sys.executable, "-P", worker.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    assert process.stdin is not None and process.stdout is not None
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError, AttributeError):  # a limit of the user's, or no Linux
            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return process


def _exactly(stream: IO[bytes], into: Any) -> Any:
    """`into`, filled; None where the stream ends before."""
    view = memoryview(into).cast("B") if len(into) else memoryview(b"")
    while len(view):
        if not (count := stream.readinto(view)):  # type: ignore[attr-defined] (a buffered reader has it)
            return None
        view = view[count:]
    return into
