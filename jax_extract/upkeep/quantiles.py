"""Quantiles of a stream of numbers, in bounded memory.

In: numbers from 0 up, in blocks. Out: quantiles, exact of up to four million numbers; of more within 0.05 %, from a
histogram over their leading bits, whose bins are as fine for small numbers as for large ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

EXACT = 1 << 22  # numbers that are kept as they are: 32 MB
_BITS = 42  # of a float64 that a bin passes over: sign, exponent and ten bits of the fraction name it; 16 MB of counts


class Quantiles:
    """Of what has been added."""

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []
        self._number = 0  # of those that are kept
        self._counts: np.ndarray | None = None

    def add(self, numbers: np.ndarray) -> None:
        """float64 [n], none negative."""
        self._kept.append(np.array(numbers, np.float64))
        self._number += len(numbers)
        if self._number > EXACT:
            self._count()

    def at(self, shares: Sequence[float]) -> list[float]:
        """The number below which each share of all numbers lies; 0 where there are none."""
        if self._counts is None:
            kept = np.concatenate([*self._kept, np.zeros(0)])
            return [float(q) for q in np.quantile(kept, shares)] if len(kept) else [0.0] * len(shares)
        self._count()
        below = np.cumsum(self._counts)
        bins = np.searchsorted(below, [share * (below[-1] - 1) for share in shares], side="right")
        middle = (bins.astype(np.uint64) << np.uint64(_BITS)) | np.uint64(1 << (_BITS - 1))
        return [float(number) for number in np.where(bins, middle.view(np.float64), 0.0)]

    def _count(self) -> None:
        """Puts what is kept into bins."""
        bits = np.concatenate(self._kept).view(np.uint64) if self._kept else np.zeros(0, np.uint64)
        counts = np.bincount((bits >> np.uint64(_BITS)).astype(np.int64), minlength=1 << (63 - _BITS))
        self._counts = counts if self._counts is None else self._counts + counts
        self._kept, self._number = [], 0
