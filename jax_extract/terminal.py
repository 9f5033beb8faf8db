"""What a person sees: labelled lines, one line that moves, one summary.

In: facts. Out: text; lines on standard output, no wider than the terminal and never wider than `WIDEST`; what moves on
standard error (`progress`).
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence

from jax_extract.progress import COMPUTING, WIDEST, Progress, Waiting, progress

_LABEL = 9
_NARROWEST = 60  # columns; a narrower terminal breaks lines by itself
_TOGETHER = re.compile(r"jax-extract [a-z-]+( [^\s;,]+)?( --\w+)*|(?<=\d) (?=[A-Za-z])")
_HELD = "\0"  # a space that no line ends at
_PRECISE = 10  # of a unit of time; below it, one digit more is told
_SHORTEST = 0.1  # seconds
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class Terminal:
    """Prints, or stays silent for a notebook."""

    def __init__(self, silent: bool = False) -> None:
        self._silent = silent
        self._told: dict[str, str] = {}
        self._moving: Progress | Waiting | None = None

    def line(self, label: str, text: str) -> None:
        """Nothing where it was the last that was told under this label: one command may come by twice.

        Without a label it is a row of a table, whose columns stay where they are on a narrow terminal too.
        """
        if self._silent or self._told.get(label) == text:
            return
        self._told[label] = text
        if self._moving is not None:
            self._moving.clear()
        try:
            print(folded(f"{label:<{_LABEL - 1}} ", text, None if label else WIDEST), flush=True)
        except BrokenPipeError:  # the reader has gone, as in `… | head -1`: the work goes on without words
            self._silent = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def progress(
        self, total: float | None, word: str = COMPUTING, unit: str = " tokens", cost: float | None = None
    ) -> Progress:
        """A bar, over real tokens or bytes, with speed and time left; `total` None where it is not known.

        Args:
          word: what is done.
          cost: of everything, where it differs; see `Progress.spend`.
        """
        self._moving = bar = progress(total, word, unit, cost, self._silent)
        return bar

    def waiting(self, word: str) -> Waiting:
        """Inside, a line says what is waited for, such as `loading`."""
        self._moving = waiting = Waiting(word, self._silent)
        return waiting


class PartOfBar(Terminal):
    """Says nothing, and moves a bar that goes over the work of several commands."""

    def __init__(self, bar: Progress) -> None:
        super().__init__(silent=True)
        self._bar = bar

    def progress(
        self, total: float | None, word: str = COMPUTING, unit: str = " tokens", cost: float | None = None
    ) -> Progress:
        return _Forwarded(self._bar)


class _Forwarded(Progress):
    """Shows nothing itself."""

    def __init__(self, bar: Progress) -> None:
        super().__init__(None, "", "", disable=True)
        self.n = 0
        self._bar = bar

    def update(self, n: float | None = 1) -> bool | None:
        self.n += n or 0
        return self._bar.update(n)


def folded(start: str, text: str, width: int | None = None) -> str:
    """`start` and a text, over several lines where it is wide; they are broken between words and begin below it.

    What belongs together stays on one line, however wide: a path, a command of ours, a number and its unit.

    Args:
      width: by default that of the terminal, `WIDEST` at most.
    """
    lines = textwrap.wrap(
        _TOGETHER.sub(lambda found: found[0].replace(" ", _HELD), text),
        width or max(_NARROWEST, min(WIDEST, shutil.get_terminal_size((WIDEST, 0)).columns)),
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )
    return "\n".join(lines).replace(_HELD, " ") or start


def bytes_text(count: float) -> str:
    """`25.8 MB`; powers of ten, as disks and buckets are sold."""
    for size, unit in _UNITS:
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def ranges_text(numbers: Sequence[int]) -> str:
    """`10-23` or `0, 5, 7-9`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def plural(count: int, noun: str) -> str:
    """`1 sample`, `5 samples`, `2 batches`."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun}{'es' if noun.endswith('ch') else 's'}"


def share_text(share: float | None) -> str:
    return "not measured" if share is None else f"{share:.1%}"


def milliseconds_text(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"


def duration_text(seconds: float) -> str:
    """`45 s`, `12 min`, `5.2 h` or `3.1 days`."""
    if seconds < _SHORTEST:
        return f"less than {_SHORTEST} s"
    for size, unit, least in ((86_400, "days", 2), (3_600, "h", 1), (60, "min", 2)):
        if seconds >= size * least:
            return f"{seconds / size:.2g} {unit}" if seconds < _PRECISE * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < _PRECISE else f"{seconds:.0f} s"
