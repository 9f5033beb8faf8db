"""The ARC task as a value, shared by the reader, the grid encoders and the augmentations.

In: rows of cell values as JSON or an answer gives them.
Out: `Grid`, an int8 array [rows, columns] of colours 0 to 9, `ArcTask`, its pairs of grids, and `ArcTasks`, very many
of them in little memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

COLOURS = 10
COMPETITION_SIDE = 30  # what ARC itself allows
LONGEST_SIDE = 1_000  # of any grid: variants of ARC have longer ones, and a prompt is text

Grid = npt.NDArray[np.int8]

_CELLS = frozenset(range(COLOURS))


@dataclass(frozen=True, eq=False)
class ArcTask:
    """One ARC task.

    Attributes:
      task_id: the name in the task file, or the file's stem.
      train: the demonstrations, (input, output) each.
      test: the inputs to solve, with the output where the file gives it (Kaggle's challenge files do not).
    """

    task_id: str
    train: tuple[tuple[Grid, Grid], ...]
    test: tuple[tuple[Grid, Grid | None], ...]

    @property
    def longest_side(self) -> int:
        """Of an answer: ARC's own limit, unless a grid of this task is beyond it."""
        grids = [grid for pair in (*self.train, *self.test) for grid in pair if grid is not None]
        within = max(max(grid.shape) for grid in grids) <= COMPETITION_SIDE
        return COMPETITION_SIDE if within else LONGEST_SIDE


class ArcTasks(Mapping[str, ArcTask]):
    """Tasks by id, in the order in which they were added; each is kept as its bytes and made anew when asked for.

    A task of arrays takes five times the memory, which corpora of hundreds of thousands do not have.

    Attributes:
      left_out: what held no usable task, by file, line or id; empty where that was an error.
      notes: what a user should know of how they were found.
    """

    def __init__(self) -> None:
        self.left_out: list[str] = []
        self.notes: list[str] = []
        self._packed: dict[str, tuple[bytes, bytes]] = {}

    def add(self, task: ArcTask) -> None:
        pairs = (*task.train, *task.test)
        grids = [grid for pair in pairs for grid in pair]
        sides = [len(task.train), *(side for grid in grids for side in ((0, 0) if grid is None else grid.shape))]
        cells = b"".join(grid.tobytes() for grid in grids if grid is not None)
        self._packed[task.task_id] = (np.array(sides, np.int32).tobytes(), cells)

    def __getitem__(self, task_id: str) -> ArcTask:
        packed, cells = self._packed[task_id]
        train, *sides = np.frombuffer(packed, np.int32).tolist()
        grids: list[Grid | None] = []
        at = 0
        for rows, columns in zip(sides[::2], sides[1::2], strict=True):
            grids.append(np.frombuffer(cells, np.int8, rows * columns, at).reshape(rows, columns) if rows else None)
            at += rows * columns
        pairs: list[Any] = list(zip(grids[::2], grids[1::2], strict=True))
        return ArcTask(task_id, tuple(pairs[:train]), tuple(pairs[train:]))

    def __contains__(self, task_id: object) -> bool:
        return task_id in self._packed

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def test_inputs(self, task_id: str) -> int:
        """How many a task has, without its grids."""
        packed, _ = self._packed[task_id]
        return (len(packed) // 4 - 1) // 4 - int(np.frombuffer(packed, np.int32, 1)[0])


def grid_from_rows(rows: object) -> Grid:
    """The read-only grid [rows, columns] that a list of lists of cell values stands for.

    Raises:
      ValueError: the rows are no rectangle of 1 to 1,000 a side, or a cell is not an integer 0 to 9. The
        message is the end of a sentence that begins with the name of the grid.
    """
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise ValueError("is no list of rows")
    if not 1 <= len(rows) <= LONGEST_SIDE:
        raise ValueError(f"has {len(rows)} rows where 1 to {LONGEST_SIDE:,} are allowed")
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        raise ValueError(f"has rows of {min(widths)} and {max(widths)} cells where all must be as long")
    if not 1 <= min(widths) <= LONGEST_SIDE:
        raise ValueError(f"has rows of {min(widths)} cells where 1 to {LONGEST_SIDE:,} are allowed")
    for row in rows:
        # `type` and not `isinstance`: JSON's true would pass for 1. A row at a time, for corpora of millions of grids.
        if set(map(type, row)) != {int} or not _CELLS.issuperset(row):
            wrong = next(cell for cell in row if type(cell) is not int or cell not in _CELLS)
            raise ValueError(f"has the cell {wrong!r:.40} where 0 to {COLOURS - 1} is expected")
    grid = np.array(rows, dtype=np.int8)
    grid.setflags(write=False)
    return grid
