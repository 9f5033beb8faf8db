"""Fills rows with samples, knowing only how many there are of each length.

In: samples counted by length. Out: rows, the same ones counted together. A row takes the longest sample that is left,
then again and again the longest that still fits: few samples are long, and the many short ones close the gaps that
long ones leave. Nothing here looks at a sample, so what 65,536 samples cost depends on how many lengths they have.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """`number` rows that each hold, in this order, `pieces`: (samples, tokens of each)."""

    number: int
    pieces: tuple[tuple[int, int], ...]

    @property
    def samples(self) -> int:
        """Of one row."""
        return sum(count for count, _ in self.pieces)


class Supply:
    """Samples that are in no row yet, by length."""

    def __init__(self, lengths: np.ndarray) -> None:
        """`lengths`: int64 [samples], tokens; at least 1 each."""
        values, counts = np.unique(lengths, return_counts=True)
        self._sizes = [0, *values.tolist()]  # ascending; place 0 stands for "none"
        self._all = [1, *counts.tolist()]
        # Of each number of tokens, the last place whose samples are not longer.
        self._fitting = (np.searchsorted(values, np.arange(int(values[-1]) + 1), side="right")).tolist()
        self.all_tokens = int(lengths.sum())
        self.restore()

    def restore(self) -> None:
        """Takes all samples out of their rows."""
        self._left = self._all.copy()
        # Of each place, itself while it has samples, else one before it that may have: a path that is cut short
        # whenever it is walked.
        self._before = list(range(len(self._sizes)))
        self.tokens = self.all_tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest sample that is left; 0 where there is none."""
        return self._sizes[self._last(len(self._sizes) - 1)]

    def _last(self, place: int) -> int:
        """The last place up to this one that has samples."""
        before = self._before
        while before[place] != place:
            before[place] = before[before[place]]
            place = before[place]
        return place

    def fill(self, tokens: int, samples: int, rows: int, above: int = 0) -> list[Rows]:
        """Fills up to so many rows, while a sample is left that is longer than `above`.

        Args:
          tokens: most tokens of a row; a longer sample has a row to itself.
          samples: most samples of a row.
        """
        sizes, left, before, fitting = self._sizes, self._left, self._before, self._fitting
        filled: list[Rows] = []
        place = len(sizes) - 1
        while rows > 0 and sizes[place := self._last(place)] > above:
            gap, room, number, at = tokens, samples, rows, place
            pieces: list[tuple[int, int]] = []
            places: list[int] = []
            while at:
                size, there = sizes[at], left[at]
                count = gap // size or 1  # 0 for a first sample that is longer than a row
                count = there if count > there else count  # `min` is slower, and a plan spends its time here
                count = room if count > room else count
                pieces.append((count, size))
                places.append(at)
                number = there // count if there // count < number else number
                gap -= count * size
                room -= count
                if gap <= 0 or room == 0:
                    break
                at -= 1
                if gap < sizes[at]:
                    at = fitting[gap]
                while before[at] != at:
                    before[at] = before[before[at]]
                    at = before[at]
            for (count, size), at in zip(pieces, places, strict=True):
                left[at] -= count * number
                if not left[at]:
                    before[at] = at - 1
                self.tokens -= count * number * size
            rows -= number
            filled.append(Rows(number, tuple(pieces)))
        return filled
