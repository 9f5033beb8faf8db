"""The one line that moves: what is done now, how much of it, how fast, how long still.

In: tokens or bytes as they are done, and, where parts of the work differ, what each costs. Out: a bar on standard error
that leaves nothing behind; where that is a file or a pipe, a line now and then instead.
"""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Mapping, MutableMapping
from typing import Any

from tqdm import tqdm

WIDEST = 100  # columns of anything that is told
LOADING, COMPILING, COMPUTING = "loading", "compiling", "computing"
_LOG_SECONDS = 30.0  # from one line to the next, in a log
_TICK_SECONDS = 1.0  # from one look of a line that waits to the next, on a terminal
_SMOOTHING = 0.1  # of speeds: how much the last step says
_COUNT = "{desc}: {n_fmt} [{elapsed}, {rate_fmt}]"
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}, {rate_fmt}]"


class Progress(tqdm):
    """A bar over tokens or bytes, with their speed.

    What is left is told by cost, where that is known: samples are computed longest first, and a token of a long one
    costs more, so that the speed of the beginning would foretell too late an end.
    """

    _moves = True  # it is written over

    def __init__(self, total: float | None, word: str, unit: str, cost: float | None = None, **options: Any) -> None:
        """`cost` is that of everything, in any unit; `total` None where it is not known."""
        self._cost, self._cost_done, self._seconds = cost, 0.0, 0.0
        self._recent_cost, self._recent_seconds = 0.0, 0.0
        options.setdefault("bar_format", _COUNT if total is None else _BAR)
        super().__init__(
            total=total,
            desc=word,
            unit=unit,
            unit_scale=True,
            file=sys.stderr,
            dynamic_ncols=True,
            smoothing=_SMOOTHING,
            leave=False,
            **options,
        )

    def spend(self, count: float, cost: float, seconds: float) -> None:
        """So many tokens more are done, which cost so much, after so many seconds of computing in all."""
        self._cost_done += cost
        self._recent_cost += _SMOOTHING * (cost - self._recent_cost)
        self._recent_seconds += _SMOOTHING * (seconds - self._seconds - self._recent_seconds)
        self._seconds = seconds
        self.update(count)

    def say(self, word: str) -> None:
        """What is done from now on, such as `COMPILING`."""
        if not self.disable and self.desc != word:
            self.set_description_str(word, refresh=self._moves)

    @property
    def format_dict(self) -> MutableMapping[str, Any]:
        facts = super().format_dict
        if self.disable:
            return facts
        if facts["total"] is not None:
            facts["total"] = max(facts["total"], facts["n"])  # beyond it there would be no percentage
        facts["ncols"] = min(facts["ncols"] or WIDEST, WIDEST)
        facts["left"] = "?" if (left := self._seconds_left(facts)) is None else tqdm.format_interval(left)
        return facts

    def _seconds_left(self, facts: Mapping[str, Any]) -> float | None:
        """None where nothing is known yet."""
        if self._cost is not None:
            left, done, seconds = self._cost - self._cost_done, self._recent_cost, self._recent_seconds
        else:
            left, done, seconds = (facts["total"] or 0) - facts["n"], facts["n"] - facts["initial"], facts["elapsed"]
            if facts["rate"]:
                done, seconds = facts["rate"], 1.0
        return max(0.0, left) * seconds / done if done else None


class ProgressInLog(Progress):
    """Progress as lines, one every `_LOG_SECONDS` at most and one at the end."""

    _moves = False

    def __init__(self, total: float | None, word: str, unit: str, cost: float | None = None, **options: Any) -> None:
        counts = "{n_fmt}" if total is None else "{percentage:.0f}% {n_fmt}/{total_fmt}"
        left = "" if total is None else "<{left}"
        options.setdefault("bar_format", f"{{desc}}: {counts} [{{elapsed}}{left}, {{rate_fmt}}]")
        super().__init__(
            total,
            word,
            unit,
            cost,
            mininterval=_LOG_SECONDS,
            miniters=1,  # every update looks at the clock, so that no line is late
            delay=1e-9,  # nothing at 0 %
            **options,
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if msg is None:
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
        super().close()


class Waiting:
    """A line that says what is waited for, and how long already; gone when that is over. In a log only long waits."""

    def __init__(self, word: str, silent: bool) -> None:
        self._over = threading.Event()
        self._in_log = in_log()
        self._bar = Progress(None, word, "", disable=silent or self._in_log, bar_format="{desc}: [{elapsed}]")
        self._word, self._silent = word, silent
        self._thread = threading.Thread(target=self._tick, name="jax_extract-waiting", daemon=True)

    def say(self, word: str) -> None:
        self._word = word
        self._bar.set_description_str(word)

    def clear(self) -> None:
        self._bar.clear()

    def __enter__(self) -> Waiting:
        if not self._silent:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._bar.close()

    def _tick(self) -> None:
        seconds = 0.0
        while not self._over.wait(every := _LOG_SECONDS if self._in_log else _TICK_SECONDS):
            seconds += every
            if not self._in_log:
                self._bar.refresh()
                continue
            try:
                print(f"{self._word}: [{tqdm.format_interval(seconds)}]", file=sys.stderr, flush=True)
            except OSError:  # the reader has gone
                return


def in_log() -> bool:
    """Whether standard error is a file or a pipe; a notebook's stream is no terminal either, but shows a bar."""
    return isinstance(sys.stderr, io.TextIOWrapper) and not sys.stderr.isatty()


def progress(total: float | None, word: str, unit: str, cost: float | None, silent: bool) -> Progress:
    kind = ProgressInLog if in_log() else Progress
    return kind(total, word, unit, cost, disable=silent)
