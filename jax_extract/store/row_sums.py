"""Sums over the rows of one part at one site, from which means and scales of a whole run are made.

In: rows, as they come. Out: `RowSums`: float64, and a pure function of the rows and their order, however they were
handed over. They add up over parts; in the order of the parts the result is the same to the last bit, whoever computed
which part and when.

Rows are gathered into blocks of 131,072 // width. A block is summed by itself: of float32 rows in float64, of 16-bit
rows in float32, in which their squares are exact too and which is far finer than they are. The sums of the blocks are
added in float64, in order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

FEWEST_ROWS = 256  # a part with fewer keeps no sums: its rows are read as soon, and its sums would be as large
_BLOCK_VALUES = 1 << 17  # fewer take longer to call than to sum, more leave the cache; the numbers depend on it
_HALF_BYTES = 2
SUMMING_BYTES = 8 * _BLOCK_VALUES  # that one `SummedRows` holds, about


@dataclass(frozen=True, eq=False)
class RowSums:
    """Attributes:
    rows: how many went into the sums: those whose values are all finite.
    values, squares: float64 [width], the sum of each dimension, and of its square.
    norms: the sum of the rows' Euclidean norms.
    least_norm, largest_norm: of a row; infinity and its negative where there is none.
    """

    rows: int
    values: np.ndarray
    squares: np.ndarray
    norms: float
    least_norm: float
    largest_norm: float

    @classmethod
    def none(cls, width: int) -> RowSums:
        return cls(0, np.zeros(width), np.zeros(width), 0.0, math.inf, -math.inf)

    def __add__(self, other: RowSums) -> RowSums:
        return RowSums(
            self.rows + other.rows,
            self.values + other.values,
            self.squares + other.squares,
            self.norms + other.norms,
            min(self.least_norm, other.least_norm),
            max(self.largest_norm, other.largest_norm),
        )


class SummedRows:
    """Sums rows [n, width] that arrive in order, in pieces of any length.

    Attributes:
      not_finite: rows that were left out, because a value of theirs is infinite or no number.
    """

    def __init__(self, width: int, value_bytes: int) -> None:
        """`value_bytes`: 4 of float32 rows, 2 of float16 and bfloat16."""
        self.not_finite = 0
        self._rows, self._norms, self._least, self._largest = 0, 0.0, math.inf, -math.inf
        self._of_values, self._of_squares = np.zeros(width), np.zeros(width)
        summed_in = np.float32 if value_bytes == _HALF_BYTES else np.float64
        self._block = np.empty((max(1, _BLOCK_VALUES // width), width), summed_in)
        self._filled = 0

    def add(self, rows: np.ndarray) -> None:
        at = 0
        while at < len(rows):
            some = rows[at : at + len(self._block) - self._filled]
            with np.errstate(invalid="ignore"):  # of signalling NaNs
                self._block[self._filled : self._filled + len(some)] = some
            self._filled += len(some)
            at += len(some)
            if self._filled == len(self._block):
                self._close()

    def sums(self) -> RowSums:
        """At the end of the rows."""
        if self._filled:
            self._close()
        return RowSums(self._rows, self._of_values, self._of_squares, self._norms, self._least, self._largest)

    def _close(self) -> None:
        block = self._block[: self._filled]
        self._filled = 0
        with np.errstate(over="ignore", invalid="ignore"):
            of_rows = _products("ij,ij->i", block)
            if not math.isfinite(np.add.reduce(of_rows)):
                block = block.astype(np.float64)  # in which no square of a finite value is infinite
                of_rows = _products("ij,ij->i", block)
        finite = np.isfinite(of_rows)
        if not finite.all():
            self.not_finite += int((~finite).sum())
            block[~finite] = 0.0
            of_rows = of_rows[finite]
        if not len(of_rows):
            return
        norms = np.sqrt(of_rows, dtype=np.float64)
        self._rows += len(norms)
        self._of_values += np.add.reduce(block, axis=0)
        self._of_squares += _products("ij,ij->j", block)
        self._norms += float(np.add.reduce(norms))
        self._least, self._largest = min(self._least, float(norms.min())), max(self._largest, float(norms.max()))


def _products(what: str, block: np.ndarray) -> np.ndarray:
    """Sums of squares, without an array of them: a block and its squares leave the processor's cache."""
    return np.einsum(what, block, block)


@dataclass(frozen=True, eq=False, repr=False)
class RowStatistics:
    """What `Run.statistics` gives: of all rows of a site, as they are stored, those that are not finite left out.

    Attributes:
      rows: how many.
      not_finite: how many more hold an infinite or undefined value.
      mean: float64 [width].
      variance: float64 [width], of each dimension over the rows (divided by `rows`).
      mean_norm: the mean Euclidean norm of a row.
      mean_squared_norm: the mean of its square.
      least_norm, largest_norm: of a row.
    """

    rows: int
    not_finite: int
    mean: np.ndarray
    variance: np.ndarray
    mean_norm: float
    mean_squared_norm: float
    least_norm: float
    largest_norm: float

    @classmethod
    def of(cls, parts: Iterable[RowSums], total: int, width: int) -> RowStatistics:
        """From the sums of all parts in their order, which have `total` rows; undefined (NaN) where none is finite."""
        sums = sum(parts, RowSums.none(width))
        with np.errstate(invalid="ignore"):
            mean, squares = sums.values / np.float64(sums.rows), sums.squares / np.float64(sums.rows)
            norms = np.array([sums.norms, sums.squares.sum()]) / np.float64(sums.rows)
        least, largest = (sums.least_norm, sums.largest_norm) if sums.rows else (math.nan, math.nan)
        variance = np.maximum(squares - mean * mean, 0.0)
        mean_norm, mean_squared_norm = norms.tolist()
        return cls(sums.rows, total - sums.rows, mean, variance, mean_norm, mean_squared_norm, least, largest)

    def __repr__(self) -> str:
        left_out = f", {self.not_finite} more not finite" if self.not_finite else ""
        return (
            f"RowStatistics({self.rows} rows of {len(self.mean)}{left_out}, mean norm {self.mean_norm:.4g}, "
            f"from {self.least_norm:.4g} to {self.largest_norm:.4g})"
        )

    @property
    def std(self) -> np.ndarray:
        """float64 [width], the standard deviation of each dimension."""
        return np.sqrt(self.variance)

    @property
    def total_variance(self) -> float:
        """The mean squared distance of a row from the mean, which explained variance is a share of."""
        return float(self.variance.sum())
