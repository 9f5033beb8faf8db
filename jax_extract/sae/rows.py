"""The rows that SAEs are trained on: in batches of one size, without those of a norm far above the others.

In: a source of rows. Out: batches [b, layers, width] in random order, each row once an epoch, with a state from which
another process goes on at the very next one; rows of samples that are held out; and what scales are made of. What is
left of a batch when rows of large norm are out of it waits for the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jax_extract.errors import UserError
from jax_extract.sae.sources import Known, Source

MEASURED_ROWS = 1 << 16  # rows that scales are made of
HELD_OUT_ROWS = 1 << 15  # at most: more say the same and take longer


@dataclass(frozen=True)
class Scales:
    """What is known of rows before training, by layer.

    Attributes:
      factor: float32 [layers], by which rows are multiplied, so that their mean norm is the square root of their width
        (Anthropic, April 2024; SAELens' `expected_average_only_in`).
      mean: float32 [layers, width], of rows as they are.
      largest: float32 [layers], the norm above which a row is left out; infinity keeps all.
    """

    factor: np.ndarray
    mean: np.ndarray
    largest: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, times_median: float) -> Scales:
        """From rows [n, layers, width]; UserError where they are all zeros, or none is finite."""
        x = rows[is_finite(rows)].astype(np.float64)
        if not len(x):
            raise UserError("no row is finite: each holds an infinite or undefined value; extract them again")
        norms = np.linalg.norm(x, axis=2)
        largest = np.median(norms, axis=0) * times_median if times_median else np.full(x.shape[1], np.inf)
        kept = (norms <= largest).all(axis=1)
        if not kept.any() or not norms[kept].any(axis=0).all():
            raise UserError("all rows of a layer are zeros, of which nothing can be learned; give another layer")
        factor = np.sqrt(x.shape[2]) / norms[kept].mean(axis=0)
        mean = x[kept].mean(axis=0)
        return cls(factor.astype(np.float32), mean.astype(np.float32), largest.astype(np.float32))

    def keeps(self, rows: np.ndarray) -> np.ndarray:
        """bool [n]: rows [n, layers, width] that are finite, and not larger than that."""
        squares = _squares(rows)
        return np.all(np.isfinite(squares) & (squares <= np.square(self.largest)[None]), axis=1)


def is_finite(rows: np.ndarray) -> np.ndarray:
    """bool [n]: rows [n, layers, width] whose norms are finite numbers."""
    return np.all(np.isfinite(_squares(rows)), axis=1)


def _squares(rows: np.ndarray) -> np.ndarray:
    """float32 [n, layers], squared norms."""
    x = rows.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.einsum("nlw,nlw->nl", x, x)


@dataclass
class _Piece:
    """What one read gave: the reader's state before it, the rows that are kept, and how many of them are used."""

    state: dict[str, Any]
    rows: np.ndarray
    used: int = 0

    def take(self, most: int) -> np.ndarray:
        found = self.rows[self.used : self.used + most]
        self.used += len(found)
        return found

    @property
    def left(self) -> int:
        return len(self.rows) - self.used


class RowsOfTraining(Protocol):
    """What SAEs are trained on, as `Rows` has it."""

    left_out: int
    not_finite: int

    @property
    def state(self) -> dict[str, Any]: ...
    @state.setter
    def state(self, state: dict[str, Any], /) -> None: ...
    @property
    def source(self) -> Known: ...
    @property
    def notes(self) -> list[str]: ...
    def measured(self) -> np.ndarray: ...
    def held_out(self) -> tuple[np.ndarray, np.ndarray]: ...
    def batches(self, scales: Scales, /) -> Iterator[Any]: ...


class Rows:
    """Attributes:
    source: where they come from.
    state: in JSON, behind the last batch that came out.
    read, left_out, not_finite: rows that were read in this session, and how many of them had too large a norm, or held
      an infinite or undefined value.
    """

    def __init__(self, source: Source, batch: int) -> None:
        self.source, self._batch = source, batch
        self._reader = source.reader()
        self.state: dict[str, Any] = {"reader": self._reader.get_state(), "used": 0}
        self.read = self.left_out = self.not_finite = 0
        self.notes: list[str] = []

    def measured(self) -> np.ndarray:
        """[n, layers, width], some rows that are trained on, the same ones for the same seed."""
        return self.source.some(False, MEASURED_ROWS)[0]

    def held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """[n, layers, width] of rows that are not trained on, and int64 [n], their samples."""
        return self.source.some(True, HELD_OUT_ROWS)

    def batches(self, scales: Scales) -> Iterator[np.ndarray]:
        """[b, layers, width], without end, from `state` on."""
        reader = self._reader
        reader.set_state(self.state["reader"])
        waiting = deque([_Piece(self.state["reader"], self._read(scales), int(self.state["used"]))])
        try:
            while True:
                while sum(piece.left for piece in waiting) < self._batch:
                    waiting.append(_Piece(reader.get_state(), self._read(scales)))
                rows, wanted = [], self._batch
                while wanted:
                    rows.append(waiting[0].take(wanted))
                    wanted -= len(rows[-1])
                    if not waiting[0].left:
                        waiting.popleft()
                behind = waiting[0] if waiting else _Piece(reader.get_state(), np.empty(0))
                self.state = {"reader": behind.state, "used": behind.used}
                yield rows[0] if len(rows) == 1 else np.concatenate(rows)
        finally:
            reader.close()

    def _read(self, scales: Scales) -> np.ndarray:
        rows = self._reader.read()
        kept = scales.keeps(rows)
        self.read += len(rows)
        if kept.all():
            return rows
        infinite = int((~is_finite(rows)).sum())
        self.not_finite += infinite
        self.left_out += len(rows) - int(kept.sum()) - infinite
        return rows[kept]
