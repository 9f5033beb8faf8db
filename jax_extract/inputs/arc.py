"""ARC tasks: from tasks to the prompts of a run.

In: tasks by id, as `read_tasks` finds them in files.
Out: `arc_samples` gives one `Sample` for each test input and, when more are wanted, augmented ones, lazily and in a
fixed order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax_extract.errors import UserError
from jax_extract.inputs.arc_augment import augmentation
from jax_extract.inputs.arc_encoders import DEFAULT_ENCODER, grid_encoder, prompt
from jax_extract.inputs.arc_files import read_tasks
from jax_extract.inputs.arc_task import ArcTask, ArcTasks, Grid
from jax_extract.inputs.samples import Sample

__all__ = ["ArcTask", "ArcTasks", "Grid", "arc_samples", "read_tasks"]


def arc_samples(
    tasks: Mapping[str, ArcTask],
    encoder: str = DEFAULT_ENCODER,
    n_tasks: int | None = None,
    n_samples: int | None = None,
    seed: int = 0,
) -> Iterator[Sample]:
    """One sample for each test input of the tasks, then augmentation 1 of each, then 2, as far as asked.

    Args:
      tasks: by task id, as `read_tasks` gives them.
      encoder: a name in `arc_encoders.ENCODERS`.
      n_tasks: take only the first `n_tasks` tasks; None for all.
      n_samples: stop after that many; None for each test input once, nothing augmented.
      seed: chooses the augmentations.

    Returns:
      A lazy iterator; the arguments are checked before it is returned. An id is "{task}_{test input}",
      followed by "#{number}" where the sample is augmented.

    Raises:
      UserError: an unknown encoder, more tasks than there are, or a number below 1.
    """
    grid_encoder(encoder)
    if n_tasks is not None and not 1 <= n_tasks <= len(tasks):
        raise UserError(f"n_tasks is {n_tasks} where 1 to {len(tasks)} are possible: lower it, or leave it out.")
    if n_samples is not None and n_samples < 1:
        raise UserError(f"n_samples is {n_samples}: give a number from 1 on, or leave it out.")
    asked = [
        (task_id, test_index)
        for task_id in itertools.islice(tasks, n_tasks)
        for test_index in range(_test_inputs(tasks, task_id))
    ]
    wanted = len(asked) if n_samples is None else n_samples
    return itertools.islice(_numbered_samples(tasks, asked, encoder, seed), wanted)


def _test_inputs(tasks: Mapping[str, ArcTask], task_id: str) -> int:
    return tasks.test_inputs(task_id) if isinstance(tasks, ArcTasks) else len(tasks[task_id].test)


def _numbered_samples(
    tasks: Mapping[str, ArcTask], asked: Sequence[tuple[str, int]], encoder: str, seed: int
) -> Iterator[Sample]:
    for number in itertools.count():
        for task_id, test_index in asked:
            task = tasks[task_id]
            sample_id = f"{task.task_id}_{test_index}"
            meta: dict[str, Any] = {"task_id": task.task_id, "test_index": test_index, "encoder": encoder}
            if number == 0:
                yield Sample(sample_id, prompt(task, test_index, encoder), meta)
                continue
            change = augmentation(task, seed, number)
            text = prompt(change.apply_task(task), test_index, encoder)
            yield Sample(f"{sample_id}#{number}", text, {**meta, "augmentation": change.as_json()})
