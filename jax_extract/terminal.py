"""What a person sees: labelled lines, one progress bar, one summary.

In: facts. Out: text, lines on standard output and the bar on standard error; where that is a file or a pipe, a line now
and then instead of the bar.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

_LABEL = 9
_LOG_SECONDS = 30.0  # from one line of progress to the next, in a log
_PRECISE = 10  # of a unit of time; below it, one digit more is told
_SHORTEST = 0.1  # seconds
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class Terminal:
    """Prints, or stays silent for a notebook."""

    def __init__(self, silent: bool = False) -> None:
        self._silent = silent
        self._told: dict[str, str] = {}

    def line(self, label: str, text: str) -> None:
        """Nothing where it was the last that was told under this label: one command may come by twice."""
        if self._silent or self._told.get(label) == text:
            return
        self._told[label] = text
        try:
            print(f"{label:<{_LABEL}}{text}", flush=True)
        except BrokenPipeError:  # the reader has gone, as in `… | head -1`: the work goes on without words
            self._silent = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def progress(self, total: int | None, label: str = "extract", unit: str = "tok") -> tqdm:
        """A bar, over real tokens or bytes, with speed and time left; `total` None where it is not known."""
        # A notebook's stream is no terminal either, but shows a bar.
        in_log = isinstance(sys.stderr, io.TextIOWrapper) and not sys.stderr.isatty()
        kind = _ProgressInLog if in_log else tqdm
        return kind(
            total=total,
            unit=unit,
            unit_scale=True,
            desc=label,
            disable=self._silent,
            file=sys.stderr,
            dynamic_ncols=True,
            smoothing=0.1,
        )


class PartOfBar(Terminal):
    """Says nothing, and moves a bar that goes over the work of several commands."""

    def __init__(self, bar: tqdm) -> None:
        super().__init__(silent=True)
        self._bar = bar

    def progress(self, total: int | None, label: str = "extract", unit: str = "tok") -> tqdm:
        return _Forwarded(self._bar)


class _Forwarded(tqdm):
    """Shows nothing itself."""

    def __init__(self, bar: tqdm) -> None:
        super().__init__(disable=True)
        self.n = 0
        self._bar = bar

    def update(self, n: float | None = 1) -> bool | None:
        self.n += n or 0
        return self._bar.update(n)


class _ProgressInLog(tqdm):
    """Progress as lines, one every `_LOG_SECONDS` at most and one at the end."""

    def __init__(self, **options: Any) -> None:
        counts = "{n_fmt}" if options["total"] is None else "{percentage:.0f}% {n_fmt}/{total_fmt}"
        left = "" if options["total"] is None else "<{remaining}"
        super().__init__(
            **options,
            bar_format=f"{{desc}}: {counts} [{{elapsed}}{left}, {{rate_fmt}}]",
            mininterval=_LOG_SECONDS,
            miniters=1,  # every update looks at the clock, so that no line is late
            delay=1e-9,  # nothing at 0 %
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if msg is None:
            if self.total is not None:
                self.total = max(self.total, self.n)  # beyond it there would be no percentage
            try:
                self.fp.write(f"{self}\n")
                self.fp.flush()
            except OSError:  # the reader has gone: the work goes on without words
                self.disable = True
        return False

    def clear(self, nolock: bool = False) -> None:
        """Lines stay."""

    def close(self) -> None:
        if not self.disable:
            self._ema_dt = lambda: None  # the last line says the speed of the whole
            self.display()
            self.leave = False
        super().close()


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
