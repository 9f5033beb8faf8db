"""Samples from Hugging Face datasets: by name on the hub, or from a local file or folder.

In: a dataset's name or path, its configuration, split and text column.
Out: one `Sample` for each row, lazily, in the dataset's order. Opening finds out all that can be known
before the first row is wanted (that the hub answers, the split, the column, that there is a row), so that
a wrong name fails within seconds. Rows are streamed, never downloaded whole; dataset scripts and pickles
are not run.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jax_extract.errors import UserError
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.text import checked_id, checked_text, text_field

HUB_ANSWERS_WITHIN = 5.0  # seconds; the library itself retries an unreachable hub for 23

FILE_BUILDERS: Mapping[str, str] = {
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}


def dataset_samples(
    name: str,
    config_name: str | None,
    split: str | None,
    text_column: str | None,
    revision: str | None = None,
) -> Iterator[Sample]:
    """One sample for each row of a split; what `open_dataset` gives, read once."""
    return open_dataset(name, config_name, split, text_column, revision)()


def open_dataset(
    name: str,
    config_name: str | None,
    split: str | None,
    text_column: str | None,
    revision: str | None = None,
) -> Callable[[], Iterator[Sample]]:
    """A function that reads the rows of a split, from the first one at each call.

    Args:
      name: a local folder (saved to disk by `datasets`, or of data files) or file (Parquet, JSON, JSONL,
        CSV, Arrow), else a name on the hub.
      config_name: the dataset's configuration ("mrpc" of GLUE); None where there is one only.
      split: None for the only split, or for "train" where there are several.
      text_column: None for the first column there is of "text", "prompt" and "question".
      revision: a branch, tag or commit on the hub.

    Returns:
      A function without arguments. A sample's id is the value of the column "id" (strings or integers,
      which the dataset must keep unique: a stream cannot be checked), or "{name}:{split}:{row}" without
      one, rows counted from 0.

    Raises:
      UserError: the hub or the path cannot be reached, there is no such dataset, configuration, split or
        column, or the split is empty. While reading: a text or an id of the wrong type, a damaged file.
    """
    # No progress bar, no library warning: what the user should know is in the UserError.
    with _quiet():
        splits = {str(key): rows for key, rows in _load(name, config_name, revision).items()}
        chosen = _chosen_split(name, splits, split)
        rows = splits[chosen]
        field, columns = _needed_columns(rows, name, chosen, text_column)
        # Other columns may hold images or audio, whose decoding costs time and further libraries.
        rows = rows.select_columns(columns)
        _first_row(rows, name, chosen)
    return partial(_samples, rows, name, config_name, chosen, field)


def open_rows(
    name: str,
    config_name: str | None,
    split: str,
    columns: Collection[str],
    optional: Collection[str] = (),
    revision: str | None = None,
) -> Callable[[], Iterator[dict[str, Any]]]:
    """A function that reads these columns of a split, and those of `optional` that it has, as `open_dataset` does.

    Raises:
      UserError: as of `open_dataset`.
    """
    with _quiet():
        splits = {str(key): rows for key, rows in _load(name, config_name, revision).items()}
        rows = splits[_chosen_split(name, splits, split)]
        there = rows.column_names or list(_first_row(rows, name, split))
        if lacking := [column for column in columns if column not in there]:
            raise UserError(
                f"Dataset {name}, split {split}, has no column {lacking[0]!r} but {', '.join(there)}: "
                f"choose one that has {', '.join(columns)}."
            )
        rows = rows.select_columns([*columns, *(column for column in optional if column in there)])
        _first_row(rows, name, split)
    return lambda: _guarded(rows, name)


def _samples(rows: Any, name: str, config_name: str | None, split: str, field: str) -> Iterator[Sample]:
    meta = {"dataset": name, "config": config_name, "split": split}
    for number, row in enumerate(_guarded(rows, name)):
        where = f"Dataset {name}, split {split}, row {number}"
        sample_id = checked_id(row["id"], where) if "id" in row else f"{name}:{split}:{number}"
        text = checked_text(row[field], f"{where}, column {field!r},")
        yield Sample(sample_id, text, {**meta, "row": number})


def _load(name: str, config_name: str | None, revision: str | None) -> Mapping[Any, Any]:
    """The splits of a dataset by name."""
    import datasets  # here, because it takes most of a second and most runs read no dataset

    path = Path(name).expanduser()
    if not path.exists():
        # A name on the hub is "name" or "owner/name".
        if name.startswith((".", "~", "/")) or name.count("/") > 1 or path.suffix in FILE_BUILDERS:
            raise UserError(f"There is no file or folder {path.absolute()}: give a path that exists.")
        return _load_from_hub(name, config_name, revision)
    saved = path.is_dir() and any((path / file).exists() for file in ("dataset_dict.json", "state.json"))
    if (saved or path.is_file()) and config_name is not None:
        raise UserError(f"{path} has no configurations to choose {config_name!r} from: leave it out.")
    if revision is not None:
        raise UserError(f"{path} is local and has no revision {revision!r}: leave it out.")
    if path.is_file() and path.suffix not in FILE_BUILDERS:
        raise UserError(f"{path} ends in {path.suffix!r}: a dataset file ends in {', '.join(FILE_BUILDERS)}.")
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{path} is empty: give a file that has rows.")
    with _told_in_one_sentence(f"Dataset {path} cannot be opened"):
        if saved:
            loaded = datasets.load_from_disk(str(path))
            return loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
        if path.is_file():
            return datasets.load_dataset(FILE_BUILDERS[path.suffix], data_files=str(path), streaming=True)
        return datasets.load_dataset(str(path), config_name, streaming=True)


def _load_from_hub(name: str, config_name: str | None, revision: str | None) -> Mapping[Any, Any]:
    import datasets.config

    if datasets.config.HF_HUB_OFFLINE:
        problem = f"Dataset {name} cannot be opened from the local cache (HF_HUB_OFFLINE is set)"
    elif _hub_answers():
        problem = f"Dataset {name} cannot be opened from the Hugging Face hub"
    else:
        raise UserError(
            f"The Hugging Face hub could not be reached for dataset {name}, and nothing here has that name: "
            "give a local path, or download the dataset where there is a network and set HF_HUB_OFFLINE=1."
        )
    with _told_in_one_sentence(problem):
        return datasets.load_dataset(name, config_name, revision=revision, streaming=True)


def _hub_answers() -> bool:
    """Whether the hub gives any answer, through the proxy and endpoint that the library uses itself."""
    from huggingface_hub import constants, get_session

    answers: list[object] = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            answers.append(get_session().head(constants.ENDPOINT, timeout=HUB_ANSWERS_WITHIN))

    # In a thread of its own because no timeout of the client covers name resolution, nor all addresses
    # of a host together.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_ANSWERS_WITHIN)
    return bool(answers)


def _chosen_split(name: str, splits: Collection[str], split: str | None) -> str:
    wanted = next(iter(splits)) if split is None and len(splits) == 1 else split or "train"
    if wanted not in splits:
        raise UserError(f"Dataset {name} has no split {wanted!r}: take one of {', '.join(splits)}.")
    return wanted


def _needed_columns(rows: Any, name: str, split: str, text_column: str | None) -> tuple[str, list[str]]:
    """The text column, and the columns to read."""
    # JSON and CSV streams know their columns only from their first row.
    columns = rows.column_names or list(_first_row(rows, name, split))
    field = text_field(columns, text_column, f"Dataset {name}, split {split},")
    return field, [field, "id"] if "id" in columns and field != "id" else [field]


def _first_row(rows: Any, name: str, split: str) -> dict[str, Any]:
    row = next(_guarded(rows, name), None)
    if row is None:
        raise UserError(f"Dataset {name}, split {split}, is empty: choose one that has rows.")
    return row


def _guarded(rows: Iterable[dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """The rows; what the library raises over a damaged file becomes a UserError."""
    import datasets.exceptions
    import pyarrow as pa

    # Faults of the network are no mistake of the user's and pass through.
    try:
        yield from rows
    except (datasets.exceptions.DatasetsError, pa.ArrowException, FileNotFoundError, ValueError) as error:
        raise UserError(f"Dataset {name} cannot be read on: {_first_line(error)}") from error


@contextlib.contextmanager
def _told_in_one_sentence(problem: str) -> Iterator[None]:
    # The library raises a dozen unrelated classes here, its own, the client's and Python's.
    try:
        yield
    except Exception as error:
        raise UserError(f"{problem}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the libraries, and leaves their settings as they were."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub", "fsspec")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets

        levels = [logger.level for logger in loggers]
        bars_shown = not datasets.are_progress_bars_disabled()
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars_shown:
                datasets.enable_progress_bars()
