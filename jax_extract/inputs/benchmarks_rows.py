"""The rows of a benchmark task: from the Hugging Face hub, or from a local `.jsonl` or `.csv` with the same columns.

In: a task, a split, and for a local one its file. Out: `Example`s, all of the split or the first ones, in its order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from jax_extract.errors import UserError, user_path
from jax_extract.inputs.benchmarks import Benchmark, Example, example_of
from jax_extract.inputs.files import kind_and_stem
from jax_extract.inputs.hub import open_rows
from jax_extract.inputs.text import file_rows

Row = tuple[str, dict[str, Any]]  # where it is, and what it holds


def read_examples(
    benchmark: Benchmark, split: str, file: str | None = None, limit: int | None = None, revision: str | None = None
) -> list[Example]:
    """The examples of a split.

    Args:
      file: a local `.jsonl` or `.csv` instead of the hub.
      limit: only so many, from the first.
      revision: branch, tag or commit on the hub.

    Raises:
      UserError: the hub or the file cannot be reached, has no row, lacks a column, or holds what the task has not.
    """
    rows = _hub_rows(benchmark, split, revision) if file is None else _file_rows(file, split)
    examples = _examples(benchmark, split, rows)
    if not (found := list(itertools.islice(examples, limit))):
        raise UserError(f"{file or benchmark.dataset} holds no row for the {split} split of {benchmark.name}")
    return found


def _examples(benchmark: Benchmark, split: str, rows: Iterable[Row]) -> Iterator[Example]:
    seen: set[str] = set()
    for number, (where, row) in enumerate(rows):
        example = example_of(benchmark, row, split, number, where)
        if example.sample_id in seen:
            raise UserError(f"{where} repeats the id {example.sample_id!r}; give each row its own, or none")
        seen.add(example.sample_id)
        yield example


def _hub_rows(benchmark: Benchmark, split: str, revision: str | None) -> Iterator[Row]:
    columns = benchmark.columns
    rows = open_rows(benchmark.dataset, benchmark.dataset_config, split, columns, ("id",), revision)
    for number, row in enumerate(rows()):
        yield f"Dataset {benchmark.dataset}, split {split}, row {number}", row


def _file_rows(file: str, split: str) -> Iterator[Row]:
    path = user_path(file, f"--{split}_file")
    if not path.is_file():
        raise UserError(f"there is no file {file!r}, given as --{split}_file; give a .jsonl or .csv that exists")
    kind, _ = kind_and_stem(path)
    if kind not in (".jsonl", ".csv"):
        raise UserError(f"--{split}_file {file!r} ends in {path.suffix!r}; give a .jsonl or a .csv")
    return ((where, row) for _, where, row in file_rows(path))
