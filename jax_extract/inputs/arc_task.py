"""The ARC task as a value, shared by the reader, the grid encoders and the augmentations.

In: rows of cell values as JSON or an answer gives them.
Out: `Grid`, an int8 array [rows, columns] of colours 0 to 9, and `ArcTask`, its pairs of grids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

COLOURS = 10
LONGEST_SIDE = 30

Grid = npt.NDArray[np.int8]


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


def grid_from_rows(rows: object) -> Grid:
    """The read-only grid [rows, columns] that a list of lists of cell values stands for.

    Raises:
      ValueError: the rows are no rectangle of 1 to 30 a side, or a cell is not an integer 0 to 9. The
        message is the end of a sentence that begins with the name of the grid.
    """
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise ValueError("is no list of rows")
    if not 1 <= len(rows) <= LONGEST_SIDE:
        raise ValueError(f"has {len(rows)} rows where 1 to {LONGEST_SIDE} are allowed")
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        raise ValueError(f"has rows of {min(widths)} and {max(widths)} cells where all must be as long")
    if not 1 <= min(widths) <= LONGEST_SIDE:
        raise ValueError(f"has rows of {min(widths)} cells where 1 to {LONGEST_SIDE} are allowed")
    for row in rows:
        for cell in row:
            # `type` and not `isinstance`: JSON's true would pass for 1.
            if type(cell) is not int or not 0 <= cell < COLOURS:
                raise ValueError(f"has the cell {cell!r:.40} where 0 to {COLOURS - 1} is expected")
    grid = np.array(rows, dtype=np.int8)
    grid.setflags(write=False)
    return grid
