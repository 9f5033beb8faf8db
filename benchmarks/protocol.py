"""A side of a comparison in a process of its own, asked in turn over its standard input and output.

In: a command line for the side. Out: its answers, one JSON object each. A side only computes while it is asked, so all
of them can be loaded at once and take turns. Needs the standard library alone, as sides live in two environments.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import Watch

Commands = Mapping[str, Callable[[], dict[str, Any]]]


class SideFailed(Exception):
    """A side has ended; the message is the last thing that it said."""


class Side:
    """The asking end."""

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        """Starts it; what it says besides its answers goes into `log`."""
        self._log = log
        with log.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, **(env or {})},
            )

    def ask(self, word: str) -> dict[str, Any]:
        """Raises SideFailed where it does not answer."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise SideFailed(self._last_words()) from None
        if not (answer := self._process.stdout.readline()):
            raise SideFailed(self._last_words())
        return json.loads(answer)

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _last_words(self) -> str:
        self._process.wait()
        lines = [line for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"it ended with exit code {self._process.returncode}"


def in_turn(sides: Mapping[str, Side], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """The answers of every side, which all are asked once a round, forwards and backwards; they are closed then.

    A machine that grows slower meanwhile does so for all of them.
    """
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in sorted(sides, reverse=bool(number % 2)):
            try:
                told[name].append(sides[name].ask("run"))
            except SideFailed as failure:
                raise SystemExit(f"{name} failed: {failure}") from None
    for side in sides.values():
        side.close()
    return told


def serve(prepare: Callable[[], Commands]) -> int:
    """The answering end. Libraries may print what they like: it goes to standard error.

    Every answer also says the process's peak memory so far, in bytes, and the share of the machine's processors
    that other programs had meanwhile.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    commands: Commands | None = None
    for line in sys.stdin:
        commands = commands or prepare()
        watch = Watch()
        answer = commands[line.strip()]()
        answer["others"] = watch.share_of_others()
        answer["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0
