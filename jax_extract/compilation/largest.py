"""The largest batch that fits a chip, found by compiling a few programs.

In: a `Report` with one program. Out: the program with the most rows that fits, with the margin.
"""

from __future__ import annotations

from collections.abc import Callable

from jax_extract.compilation.programs import Compiled
from jax_extract.compilation.report import Report
from jax_extract.devices.planner import STEPS_HELD
from jax_extract.inputs.planning.slabs import SlabShape

TRIES = 4  # programs that are compiled, besides the first
_MOST_ROWS = 4_096


def largest_that_fits(report: Report, compile_shape: Callable[[SlabShape], Compiled | None]) -> Compiled | None:
    """The most rows that were compiled and fit: memory grows evenly with rows, so two programs foretell the third."""
    known = {report.shape.rows: report.compiled}
    for _ in range(TRIES):
        if (rows := _foretold(known, report)) in known:
            break
        known[rows] = compile_shape(report.shape._replace(rows=rows))
    fitting = [found for found in known.values() if found and found.memory(STEPS_HELD) <= report.room]
    return max(fitting, key=lambda found: found.shape.rows, default=None)


def _foretold(known: dict[int, Compiled | None], report: Report) -> int:
    """The rows to try next."""
    measured = sorted((rows, found.memory(STEPS_HELD)) for rows, found in known.items() if found)
    too_many = min((rows for rows, found in known.items() if not found), default=_MOST_ROWS + 1)
    if not measured:
        return max(1, too_many // 2)
    (rows, memory), fixed = measured[-1], report.cost.stored
    slope = (memory - fixed) / rows
    if len(measured) > 1:
        (fewer, less) = measured[0]
        slope = (memory - less) / (rows - fewer)
        fixed = memory - slope * rows
    foretold = int((report.room - fixed) / slope)
    # What the compiler has refused says that the line bends before it.
    return max(1, foretold if foretold < too_many else (rows + too_many) // 2)
