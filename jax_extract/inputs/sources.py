"""The one door to the inputs: which reader a run uses, decided and checked before any weight is loaded.

In: what the user gave (`--tasks_file` or `--dataset`, and how to read it).
Out: a `Source`, whose `samples()` starts the stream anew at each call, always in the same order. Whatever
can be known without reading the whole input is checked here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from jax_extract.errors import UserError, user_path
from jax_extract.inputs.arc import arc_samples, read_tasks
from jax_extract.inputs.arc_encoders import grid_encoder
from jax_extract.inputs.hub import open_dataset
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.text import jsonl_samples, text_samples

Samples = Callable[[], Iterator[Sample]]


@dataclass(frozen=True)
class Source:
    """An input that has been found and checked.

    Attributes:
      name: what the user called it, for a run's metadata.
      kind: the reader in use.
      finite: False for datasets, whose length is not known before they have been read: plan them window
        by window.
      samples: gives the samples, from the first one at each call.
    """

    name: str
    kind: Literal["arc", "jsonl", "text", "dataset"]
    finite: bool
    samples: Samples


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
) -> Source:
    """The source that the arguments name.

    Args:
      tasks_file: a folder or `.json` of ARC tasks, a `.jsonl` or a `.txt`; or None.
      dataset: a Hugging Face dataset, by hub name or local path; or None. Just one of the two is given.
      n_tasks: ARC only: the first so many tasks.
      n_samples: so many samples: augmented ones for ARC where there are fewer test inputs, else the
        first ones, or all where there are fewer.
      encoder: how ARC grids are written; a name in `arc_encoders.ENCODERS`.
      seed: chooses the ARC augmentations.
      split: of a dataset, or of an ARC file with splits.
      dataset_config: the configuration of a dataset.
      text_column: which field of a `.jsonl` or column of a dataset holds the text.

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
    if dataset is not None:
        _refuse(dataset, n_tasks=n_tasks)
        rows = _first(open_dataset(dataset, dataset_config, split, text_column), n_samples)
        name = ":".join(part for part in (dataset, dataset_config, split) if part)
        return Source(name, "dataset", finite=False, samples=rows)

    assert tasks_file is not None
    _refuse(tasks_file, dataset_config=dataset_config)
    path = user_path(tasks_file, "--tasks_file")
    if not path.exists():
        raise UserError(
            f"There is no file or folder {path.absolute()}, given as --tasks_file: give a path that exists."
        )
    suffix = ".json" if path.is_dir() else path.suffix.lower()
    if suffix == ".json":
        _refuse(tasks_file, text_column=text_column)
        arc = partial(arc_samples, read_tasks(path, split), encoder, n_tasks, n_samples, seed)
        arc()  # checks the arguments; nothing is read before the first sample is taken
        return Source(tasks_file, "arc", finite=True, samples=arc)
    if suffix == ".jsonl":
        _refuse(tasks_file, n_tasks=n_tasks, split=split)
        lines = _not_empty(tasks_file, partial(jsonl_samples, path, text_column))
        return Source(tasks_file, "jsonl", finite=True, samples=_first(lines, n_samples))
    if suffix == ".txt":
        _refuse(tasks_file, n_tasks=n_tasks, split=split, text_column=text_column)
        lines = _not_empty(tasks_file, partial(text_samples, path))
        return Source(tasks_file, "text", finite=True, samples=_first(lines, n_samples))
    raise UserError(
        f"{tasks_file} ends in {path.suffix!r}: --tasks_file takes a folder or .json of ARC tasks, a .jsonl "
        "or a .txt; give other data as --dataset."
    )


def _refuse(name: str, **arguments: object) -> None:
    """An argument that this input has no use for is a misunderstanding, better told than ignored."""
    for argument, value in arguments.items():
        if value is not None:
            raise UserError(f"{argument} is {value!r}, which has no meaning for {name}: leave it out.")


def _not_empty(name: str, samples: Samples) -> Samples:
    if next(samples(), None) is None:
        raise UserError(f"{name} holds no sample: every line is blank.")
    return samples


def _first(samples: Samples, n_samples: int | None) -> Samples:
    return lambda: itertools.islice(samples(), n_samples)
