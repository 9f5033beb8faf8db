"""The one door to the inputs: which reader a run uses, decided and checked before any weight is loaded.

In: what the user gave (`--tasks_file` or `--dataset`, and how to read it).
Out: a `Source`, whose `samples()` starts the stream anew at each call, always in the same order. Whatever
can be known without reading the whole input is checked here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jax_extract.errors import UserError, user_path
from jax_extract.inputs.arc import arc_samples, read_tasks
from jax_extract.inputs.arc_encoders import grid_encoder
from jax_extract.inputs.arc_files import all_files, holds_several, is_pair, is_task
from jax_extract.inputs.arc_task import ArcTask
from jax_extract.inputs.fields import TEXT_FIELDS, Fields, text_field
from jax_extract.inputs.files import COMPRESSIONS, kind_and_stem, local
from jax_extract.inputs.fingerprint import fingerprint
from jax_extract.inputs.hub import open_dataset
from jax_extract.inputs.rows import json_values
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.text import PARQUET, file_rows, row_samples, text_samples

Samples = Callable[[], Iterator[Sample]]

_LARGEST_STREAM = 1 << 34  # bytes of local files that are looked at before a stream begins

_ROW_KINDS: Mapping[str, Literal["jsonl", "csv", "parquet"]] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    PARQUET: "parquet",
}


@dataclass(frozen=True)
class Source:
    """An input that has been found and checked.

    Attributes:
      name: what the user called it, for a run's metadata.
      kind: the reader in use.
      finite: False for datasets, whose length is not known before they have been read: plan them window
        by window.
      samples: gives the samples, from the first one at each call.
      tasks: of an ARC source, by id.
      left_out: what held no usable task, by file, line or id.
      notes: what a user should know of how the input was found.
      text_column: which field of a row its text was found in; of the first row, where each may have another.
      fingerprint: of what the samples come from, made by reading bytes; gives None where that is not known.
    """

    name: str
    kind: Literal["arc", "jsonl", "csv", "parquet", "text", "dataset"]
    finite: bool
    samples: Samples
    tasks: Mapping[str, ArcTask] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    text_column: str | None = None
    fingerprint: Callable[[], str | None] = lambda: None


def open_source(
    tasks_file: str | None,
    dataset: str | None,
    *,
    n_tasks: int | None,
    n_samples: int | None,
    encoder: str,
    seed: int,
    split: str | None,
    dataset_config: str | None,
    text_column: str | None,
    id_column: str | None = None,
    skip_bad_tasks: bool = False,
) -> Source:
    """The source that the arguments name.

    Args:
      tasks_file: a folder, `.json` or `.jsonl` of ARC tasks, rows (`.jsonl`, `.csv`, `.tsv`, `.parquet`, `.json`), or
        a `.txt`, all but Parquet also compressed; or None.
      dataset: a Hugging Face dataset, by hub name or local path; or None. Just one of the two is given.
      n_tasks: ARC only: the first so many tasks.
      n_samples: so many samples: augmented ones for ARC where there are fewer test inputs, else the
        first ones, or all where there are fewer.
      encoder: how ARC grids are written; a name in `arc_encoders.ENCODERS`.
      seed: chooses the ARC augmentations.
      split: of a dataset, or of an ARC file with splits.
      dataset_config: the configuration of a dataset.
      text_column: which field of a row or column of a dataset holds the text, a conversation or token ids.
      id_column: which one holds the id.
      skip_bad_tasks: ARC only: leave out what is no usable task.

    Raises:
      UserError: an argument is wrong, does not go with the input, or the input is missing, empty or
        malformed at its start (ARC: anywhere).
    """
    if (tasks_file is None) == (dataset is None):
        given = "neither" if dataset is None else "both"
        raise UserError(f"Give either --tasks_file or --dataset: {given} of them was given.")
    if n_samples is not None and n_samples < 1:
        raise UserError(f"n_samples is {n_samples}: give a number from 1 on, or leave it out.")
    grid_encoder(encoder)
    of_arc = {"n_tasks": n_tasks, "skip_bad_tasks": skip_bad_tasks or None}
    of_rows = {"n_samples": n_samples, "text_column": text_column, "id_column": id_column, "split": split}
    fields = Fields(text_column, id_column, keeps_others=True)
    if dataset is not None:
        _refuse(dataset, **of_arc)
        rows = open_dataset(dataset, dataset_config, split, text_column, id_column=id_column, keeps_others=True)
        name = ":".join(part for part in (dataset, dataset_config, split) if part)
        # A local one goes on under the path that its run was begun with, wherever it lies now.
        options = {"kind": "dataset", "name": None if Path(dataset).expanduser().exists() else dataset, **of_rows}
        options["dataset_config"] = dataset_config
        known = partial(fingerprint, options, rows.origin, most=_LARGEST_STREAM)
        samples = _first(rows, n_samples)
        return Source(name, "dataset", False, samples, text_column=rows.text_column, fingerprint=known)

    assert tasks_file is not None
    _refuse(tasks_file, dataset_config=dataset_config)
    path = user_path(tasks_file, "--tasks_file")
    if not path.exists():
        raise UserError(
            f"There is no file or folder {path.absolute()}, given as --tasks_file: give a path that exists."
        )
    kind, _ = kind_and_stem(path)
    if kind == PARQUET and path.suffix.lower() != PARQUET:
        kind = path.suffix.lower()
    if path.is_dir() or (kind in _ROW_KINDS and _holds_tasks(path, kind, text_column, skip_bad_tasks)):
        _refuse(tasks_file, text_column=text_column)
        tasks = read_tasks(path, split, skip_bad_tasks, id_column)
        arc = partial(arc_samples, tasks, encoder, n_tasks, n_samples, seed)
        arc()  # checks the arguments; nothing is read before the first sample is taken
        options = {"kind": "arc", **of_arc, **of_rows, "encoder": encoder, "seed": seed}
        return Source(
            tasks_file,
            "arc",
            finite=True,
            samples=arc,
            tasks=tasks,
            left_out=tuple(tasks.left_out),
            notes=tuple(tasks.notes),
            fingerprint=lambda: (
                fingerprint(options, all_files(path), path) if path.is_dir() else fingerprint(options, [path])
            ),
        )
    known = partial(fingerprint, {"kind": "rows", **of_rows}, [path])
    if kind in _ROW_KINDS:
        _refuse(tasks_file, split=split, **of_arc)
        samples = _not_empty(tasks_file, partial(row_samples, path, fields))
        first = next(file_rows(path, lambda columns: fields.columns(columns, f"{path},")))
        found = text_field(first.values, text_column, f"{path},")
        samples = _first(samples, n_samples)
        return Source(tasks_file, _ROW_KINDS[kind], True, samples, text_column=found, fingerprint=known)
    if kind == ".txt":
        _refuse(tasks_file, split=split, text_column=text_column, id_column=id_column, **of_arc)
        lines = _not_empty(tasks_file, partial(text_samples, path))
        return Source(tasks_file, "text", finite=True, samples=_first(lines, n_samples), fingerprint=known)
    raise UserError(
        f"{tasks_file} ends in {path.suffix!r}: --tasks_file takes a folder of ARC tasks, or a .json, .jsonl, .csv, "
        f".tsv, .parquet or a .txt (all but Parquet also with {', '.join(COMPRESSIONS)}); give other data as --dataset."
    )


def _holds_tasks(path: Path, kind: str, text_column: str | None, skip_bad_tasks: bool) -> bool:
    """Whether a file is one of ARC tasks: its first object decides, and rows that have a text are texts."""
    if kind == ".json" and not holds_several(path):
        return True
    if text_column is not None or kind in (".csv", ".tsv"):
        return False
    if skip_bad_tasks and kind != PARQUET:  # the first object may be a bad one
        return True
    first: Any = None
    if kind == ".json":
        with local(path) as file:
            first = next(json_values(str(path), file), None)
        if not isinstance(first, dict):
            return True
    else:
        row = next(file_rows(path), None)
        first = None if row is None else row.values
    in_parts = is_task(first) or (kind == ".json" and is_pair(first))
    return in_parts and not any(isinstance(first.get(name), str) for name in TEXT_FIELDS)


def _refuse(name: str, **arguments: object) -> None:
    """An argument that this input has no use for is a misunderstanding, better told than ignored."""
    for argument, value in arguments.items():
        if value is not None:
            raise UserError(f"{argument} is {value!r}, which has no meaning for {name}: leave it out.")


def _not_empty(name: str, samples: Samples) -> Samples:
    if next(samples(), None) is None:
        raise UserError(f"{name} holds no sample: expected at least one.")
    return samples


def _first(samples: Samples, n_samples: int | None) -> Samples:
    return lambda: itertools.islice(samples(), n_samples)
