"""What a person sees: labelled lines, one progress bar, one summary.

In: facts. Out: text, lines on standard output and the bar on standard error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from tqdm import tqdm

_LABEL = 9
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class Terminal:
    """Prints, or stays silent for a notebook."""

    def __init__(self, silent: bool = False) -> None:
        self._silent = silent

    def line(self, label: str, text: str) -> None:
        if self._silent:
            return
        try:
            print(f"{label:<{_LABEL}}{text}", flush=True)
        except BrokenPipeError:  # the reader has gone, as in `… | head -1`: the work goes on without words
            self._silent = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def progress(self, total: int | None, label: str = "extract", unit: str = "tok") -> tqdm:
        """A bar, over real tokens or bytes, with speed and time left; `total` None where it is not known."""
        return tqdm(
            total=total,
            unit=unit,
            unit_scale=True,
            desc=label,
            disable=self._silent,
            file=sys.stderr,
            dynamic_ncols=True,
            smoothing=0.1,
        )


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
