"""From answers to ARC tasks to a submission and a score.

In: answers as text, with the samples' JSON values; the tasks, with solutions where they are known. Out: two attempts
for each test input, as the competition wants them, and how many are right.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_extract.errors import UserError
from jax_extract.inputs.arc_augment import Augmentation
from jax_extract.inputs.arc_encoders import grid_encoder
from jax_extract.inputs.arc_task import COMPETITION_SIDE, ArcTask, Grid, grid_from_rows

Asked = tuple[str, int]  # task id, test input
Solutions = Mapping[Asked, Grid]
_NO_GRID = [[0]]  # a submission has to hold one


def predicted_grid(
    text: str, ended: bool, meta: Mapping[str, Any], longest_side: int = COMPETITION_SIDE
) -> Grid | None:
    """The grid that an answer begins with, any augmentation of its task undone; None where it begins with none.

    One with a side beyond `longest_side` is no answer to its task. An answer that the model did not end may break off
    within a grid, which is then none.
    """
    grid = grid_encoder(meta["encoder"]).find(text, ended)
    if grid is None or max(grid.shape) > longest_side:
        return None
    if "augmentation" not in meta:
        return grid
    return Augmentation.from_json(meta["augmentation"]).invert_grid(grid)


def attempts(predictions: Iterable[tuple[Asked, Grid | None]]) -> dict[Asked, list[Grid]]:
    """At most two grids for each test input: those that most of its samples gave, the earlier ones before others."""
    votes: dict[Asked, dict[bytes, int]] = {}
    grids: dict[bytes, Grid] = {}
    for asked, grid in predictions:
        counted = votes.setdefault(asked, {})
        if grid is not None:
            key = json.dumps(grid.tolist()).encode()
            grids[key] = grid
            counted[key] = counted.get(key, 0) + 1
    return {
        asked: [grids[key] for key in sorted(counted, key=lambda key: -counted[key])[:2]]
        for asked, counted in votes.items()
    }


def submission(tried: Mapping[Asked, Sequence[Grid]], tasks: Mapping[str, ArcTask]) -> dict[str, list[dict[str, Any]]]:
    """`submission.json`: id of a task that was asked -> for each of its test inputs `attempt_1` and `attempt_2`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for task_id, _ in sorted(tried):
        inputs = len(tasks[task_id].test)
        rows = [[grid.tolist() for grid in tried.get((task_id, i), ())] or [_NO_GRID] for i in range(inputs)]
        found[task_id] = [{"attempt_1": grids[0], "attempt_2": grids[-1]} for grids in rows]
    return found


@dataclass(frozen=True)
class Score:
    """How many answers are right, where the solution is known.

    Attributes:
      inputs: test inputs with a known solution that were asked.
      right: of them, those whose solution is one of the two attempts.
      right_at_once: those whose solution is the first attempt.
      tasks, tasks_right: tasks of these test inputs, and those with every one right.
      without_grid: test inputs, of all that were asked, to which no answer began with a grid.
    """

    inputs: int
    right: int
    right_at_once: int
    tasks: int
    tasks_right: int
    without_grid: int


def score(tried: Mapping[Asked, Sequence[Grid]], solutions: Solutions) -> Score:
    """Compares attempts with what is known."""
    places = {
        asked: [np.array_equal(grid, solutions[asked]) for grid in grids]
        for asked, grids in tried.items()
        if asked in solutions
    }
    tasks = {task_id for task_id, _ in places}
    wrong = {asked[0] for asked, found in places.items() if not any(found)}
    return Score(
        inputs=len(places),
        right=sum(any(found) for found in places.values()),
        right_at_once=sum(found[:1] == [True] for found in places.values()),
        tasks=len(tasks),
        tasks_right=len(tasks - wrong),
        without_grid=sum(not grids for grids in tried.values()),
    )


def known_solutions(tasks: Mapping[str, ArcTask], solutions_file: Path | None) -> dict[Asked, Grid]:
    """The test outputs that the tasks have, and those of a file: {task id: [grid of each test input]}.

    Raises:
      UserError: the file cannot be read, or holds something else.
    """
    known = {
        (task_id, index): output
        for task_id, task in tasks.items()
        for index, (_, output) in enumerate(task.test)
        if output is not None
    }
    if solutions_file is None:
        return known
    try:
        content = json.loads(solutions_file.read_text(encoding="utf-8-sig"))
        for task_id, outputs in content.items():
            known |= {(task_id, index): grid_from_rows(rows) for index, rows in enumerate(outputs)}
    except OSError as error:
        raise UserError(f"--solutions_file {solutions_file} cannot be read: {error.strerror}") from None
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(
            f"--solutions_file {solutions_file} is no file of solutions ({error}); expected "
            '{"task id": [grid of the first test input, …], …}'
        ) from None
    return known
