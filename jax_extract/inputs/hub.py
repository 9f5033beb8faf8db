"""Samples from Hugging Face datasets: by name on the hub, or from a local file or folder.

In: a dataset's name or path, its configuration, split and text column.
Out: one `Sample` for each row, lazily, in the dataset's order. Opening finds out all that can be known
before the first row is wanted (that the hub answers, the split, the column, that there is a row), so that
a wrong name fails within seconds. Rows are streamed, never downloaded whole; dataset scripts and pickles
are not run. Typed formats (Parquet, Arrow) are read by `datasets`; of CSV and JSON it finds the files, and their
cells are read here, as they are written.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from jax_extract.errors import UserError
from jax_extract.inputs.fields import TEXT_FIELDS, Fields, text_field
from jax_extract.inputs.files import COMPRESSIONS, Opened, kind_and_stem, open_bytes
from jax_extract.inputs.rows import KINDS, rows_of
from jax_extract.inputs.samples import Sample

HUB_ANSWERS_WITHIN = 5.0  # seconds; the library itself retries an unreachable hub for 23

FILE_BUILDERS: Mapping[str, str] = {
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".tsv": "csv",
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


@dataclass(frozen=True)
class DatasetSamples:
    """Called, it reads the rows of a split, from the first one at each call.

    Attributes:
      origin: paths and URLs of the files in which they are, in their order; None where that is not known.
      text_column: which column holds the texts.
    """

    read: Callable[[], Iterator[Sample]]
    origin: tuple[str, ...] | None
    text_column: str

    def __call__(self) -> Iterator[Sample]:
        return self.read()


def open_dataset(
    name: str,
    config_name: str | None,
    split: str | None,
    text_column: str | None,
    revision: str | None = None,
    id_column: str | None = None,
    keeps_others: bool = False,
) -> DatasetSamples:
    """A function that reads the rows of a split, from the first one at each call.

    Args:
      name: a local folder (saved to disk by `datasets`, or of data files) or file (Parquet, JSON, JSONL,
        CSV, TSV, Arrow; all but Parquet and Arrow also compressed), else a name on the hub.
      config_name: the dataset's configuration ("mrpc" of GLUE); None where there is one only.
      split: None for the only split, or for "train" where there are several.
      text_column: None for the first column there is of "text", "prompt", "question", then of those of conversations
        and of token ids.
      revision: a branch, tag or commit on the hub.
      id_column: None for the column "id" where there is one.
      keeps_others: see `Fields`.

    Returns:
      A function without arguments. A sample's id is the value of its column (strings or integers,
      which the dataset must keep unique: a stream cannot be checked), or "{name}:{split}:{row}" without
      one, rows counted from 0.

    Raises:
      UserError: the hub or the path cannot be reached, there is no such dataset, configuration, split or
        column, or the split is empty. While reading: a text or an id of the wrong type, a damaged file.
    """
    # No progress bar, no library warning: what the user should know is in the UserError.
    fields = Fields(text_column, id_column, keeps_others)
    with _quiet():
        splits = _load(name, config_name, revision)
        chosen = _chosen_split(name, splits, split)
        table = splits[chosen]
        there = table.columns()
        if text_column is None and {"train", "test"} <= set(there) and not set(TEXT_FIELDS) & set(there):
            raise UserError(f"Dataset {name} holds ARC tasks and no texts: give its file or folder as --tasks_file.")
        where = f"Dataset {name}, split {chosen},"
        columns = list(fields.columns(there, where))
        if keeps_others:
            columns += [column for column in table.plain_columns() if column not in columns]
        table.require_row(columns)
    samples = partial(_samples, table, columns, name, config_name, chosen, fields)
    return DatasetSamples(samples, table.origin, text_field(there, text_column, where))


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
        splits = _load(name, config_name, revision)
        table = splits[_chosen_split(name, splits, split)]
        there = table.columns()
        if lacking := [column for column in columns if column not in there]:
            raise UserError(
                f"Dataset {name}, split {split}, has no column {lacking[0]!r} but {', '.join(there)}: "
                f"choose one that has {', '.join(columns)}."
            )
        wanted = [*columns, *(column for column in optional if column in there)]
        table.require_row(wanted)
    return lambda: ({column: row[column] for column in wanted if column in row} for _, row in table.read(wanted))


def _samples(
    table: _Table, columns: Sequence[str], name: str, config_name: str | None, split: str, fields: Fields
) -> Iterator[Sample]:
    meta = {"dataset": name, "config": config_name, "split": split}
    for number, (where, row) in enumerate(table.read(columns)):
        yield fields.sample(row, where, f"{name}:{split}:{number}", {**meta, "row": number})


# ------------------------------------------------------------------------------------------ tables


@dataclass(frozen=True)
class _Table(ABC):
    """The rows of a split; `name` begins the errors, `origin` is where they come from."""

    name: str
    origin: tuple[str, ...] | None = field(default=None, kw_only=True)

    def columns(self) -> list[str]:
        return list(self._first())

    def plain_columns(self) -> list[str]:
        """Columns whose cells cost nothing to read: images and audio are decoded, and want further libraries."""
        return self.columns()

    @abstractmethod
    def read(self, columns: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each row with its place; at least these columns of it, or all for None."""

    def require_row(self, columns: Sequence[str]) -> None:
        self._first(columns)

    def _first(self, columns: Sequence[str] | None = None) -> dict[str, Any]:
        _, row = next(self.read(columns), (None, None))
        if row is None:
            raise UserError(f"{self.name}, is empty: choose one that has rows.")
        return row


@dataclass(frozen=True)
class _TypedTable(_Table):
    """Rows of a format that says what type a cell has, as the library reads them."""

    rows: Any

    def columns(self) -> list[str]:
        return self.rows.column_names or super().columns()

    def plain_columns(self) -> list[str]:
        return [name for name, feature in (self.rows.features or {}).items() if _is_plain(feature)]

    def read(self, columns: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        rows = self.rows if columns is None else self.rows.select_columns(list(columns))
        for number, row in enumerate(_guarded(rows, self.name)):
            yield f"{self.name}, row {number}", row


@dataclass(frozen=True)
class _DataFile:
    """Attributes:
    name: path or URL.
    opened: opens it for reading.
    """

    name: str
    opened: Opened


@dataclass(frozen=True)
class _WrittenTable(_Table):
    """Rows of CSV or JSON files, as they are written: the library would guess numbers, dates and missing values.

    Attributes:
      kind: ".csv" or ".json", where a file's name says nothing more exact.
    """

    files: Sequence[_DataFile]
    kind: str
    delimiter: str | None = None

    def read(self, columns: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        try:
            for data in self.files:
                kind, _ = kind_and_stem(PurePath(data.name.partition("::")[0]))
                with open_bytes(data.name, data.opened) as file:
                    for _, where, row in rows_of(data.name, kind if kind in KINDS else self.kind, file, self.delimiter):
                        yield where, row
        except FileNotFoundError as error:
            raise UserError(f"{self.name} cannot be read on: {_first_line(error)}") from error


def _is_plain(feature: Any) -> bool:
    """Whether a column's cells are texts, numbers and dates, or lists and mappings of such."""
    if isinstance(feature, Mapping):
        return all(map(_is_plain, feature.values()))
    if isinstance(feature, list | tuple):
        return all(map(_is_plain, feature))
    if (inner := getattr(feature, "feature", None)) is not None:
        return _is_plain(inner)
    return "binary" not in str(getattr(feature, "dtype", "binary")) and type(feature).__name__ in (
        "Value",
        "ClassLabel",
    )


def _load(name: str, config_name: str | None, revision: str | None) -> Mapping[str, _Table]:
    """The splits of a dataset by name."""
    path = Path(name).expanduser()
    kind, _ = kind_and_stem(path)
    if not path.exists():
        # A name on the hub is "name" or "owner/name".
        if name.startswith((".", "~", "/")) or name.count("/") > 1 or kind in FILE_BUILDERS:
            raise UserError(f"There is no file or folder {path.absolute()}: give a path that exists.")
        return _load_from_hub(name, config_name, revision)
    saved = path.is_dir() and any((path / file).exists() for file in ("dataset_dict.json", "state.json"))
    if (saved or path.is_file()) and config_name is not None:
        raise UserError(f"{path} has no configurations to choose {config_name!r} from: leave it out.")
    if revision is not None:
        raise UserError(f"{path} is local and has no revision {revision!r}: leave it out.")
    if path.is_file():
        return {"train": _file_table(name, path, kind)}
    import datasets  # here, because it takes most of a second and most runs read no dataset

    with _told_in_one_sentence(f"Dataset {path} cannot be opened"):
        if saved:
            loaded = datasets.load_from_disk(str(path))
            # A folder remembers that its rows were asked for as tensors, and of which columns.
            loaded = loaded.with_format(None)
            splits: Any = loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
            files = tuple(str(file) for file in sorted(path.rglob("*")) if file.is_file())
            return _typed_tables(name, splits, dict.fromkeys(splits, files))
        # Absolute, because a relative "csv" or "json" would be the library's reader of that name.
        return _tables(name, datasets.load_dataset_builder(str(path.absolute()), config_name))


def _file_table(name: str, path: Path, kind: str) -> _Table:
    typed = kind in (".parquet", ".arrow")
    if kind not in FILE_BUILDERS or (typed and path.suffix.lower() != kind):
        raise UserError(
            f"{path} ends in {path.suffix!r}: a dataset file ends in {', '.join(FILE_BUILDERS)}, all but Parquet and "
            f"Arrow also with {', '.join(COMPRESSIONS)}."
        )
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: give a file that has rows.")
    table = f"Dataset {name}, split train"
    if not typed:
        return _WrittenTable(table, (_DataFile(str(path), partial(path.open, "rb")),), kind, origin=(str(path),))
    import datasets

    with _told_in_one_sentence(f"Dataset {path} cannot be opened"):
        loaded = datasets.load_dataset(FILE_BUILDERS[kind], data_files=str(path), streaming=True)
    return _TypedTable(table, loaded["train"], origin=(str(path),))


def _typed_tables(
    name: str, splits: Mapping[Any, Any], origins: Mapping[Any, tuple[str, ...] | None]
) -> dict[str, _Table]:
    return {
        str(split): _TypedTable(f"Dataset {name}, split {split}", rows, origin=origins.get(split))
        for split, rows in splits.items()
    }


def _origins(builder: Any) -> dict[Any, tuple[str, ...] | None]:
    """The data files of each split, and the folder's page, which may say how they are read."""
    page = Path(str(builder.base_path or "")) / "README.md"
    pages = (str(page),) if page.is_file() else ()
    return {split: (*map(str, files), *pages) for split, files in (builder.config.data_files or {}).items()}


def _tables(name: str, builder: Any) -> dict[str, _Table]:
    """The splits of data files that the library has found."""
    from datasets.packaged_modules.csv.csv import Csv, CsvConfig
    from datasets.packaged_modules.json.json import Json, JsonConfig

    config = builder.config
    if isinstance(builder, Csv) and _differs_only(config, CsvConfig, "sep", "delimiter", "features"):
        return _written_tables(name, builder, ".csv", config.sep)
    if isinstance(builder, Json) and _differs_only(config, JsonConfig, "features"):
        return _written_tables(name, builder, ".json")
    if isinstance(builder, Csv):
        _read_as_strings(builder)
    splits: Any = builder.as_streaming_dataset()
    return _typed_tables(name, splits, _origins(builder))


def _differs_only(config: Any, of: type, *names: str) -> bool:
    """Whether a dataset's own configuration changes nothing else about how its files are read."""
    usual = of()
    return all(getattr(config, name) == getattr(usual, name) for name in of.__annotations__ if name not in names)


def _written_tables(name: str, builder: Any, kind: str, delimiter: str | None = None) -> dict[str, _Table]:
    from datasets import DownloadConfig
    from datasets.download import StreamingDownloadManager
    from datasets.utils.file_utils import xopen

    opener: Any = xopen
    access = DownloadConfig(token=builder.token, storage_options=builder.storage_options)
    manager = StreamingDownloadManager(
        dataset_name=builder.dataset_name, base_path=builder.base_path, download_config=access
    )

    def data_files(url: str) -> Iterator[_DataFile]:
        suffix = PurePath(url).suffix.lower()
        # Archives of several files are the library's to look into; what is only compressed is read here.
        plain = suffix in (*KINDS, *COMPRESSIONS)
        for file in [manager.download(url)] if plain else manager.iter_files(manager.download_and_extract(url)):
            yield _DataFile(file, partial(opener, file, "rb", download_config=access))

    origins = _origins(builder)
    return {
        str(split): _WrittenTable(
            f"Dataset {name}, split {split}",
            tuple(itertools.chain.from_iterable(map(data_files, files))),
            kind,
            delimiter,
            origin=origins.get(split),
        )
        for split, files in builder.config.data_files.items()
    }


def _read_as_strings(builder: Any) -> None:
    """CSV that its dataset says to read in a way of its own: by the library, every cell as text."""
    import datasets

    builder.config.keep_default_na = builder.config.na_filter = False
    builder.config.features = builder.info.features = None
    for rows in builder.as_streaming_dataset().values():
        columns = rows.column_names or list(next(iter(rows), {}))
        builder.config.features = datasets.Features({column: datasets.Value("string") for column in columns})
        return


def _load_from_hub(name: str, config_name: str | None, revision: str | None) -> Mapping[str, _Table]:
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
        return _tables(name, datasets.load_dataset_builder(name, config_name, revision=revision))


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


def _guarded(rows: Iterable[dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """The rows; what the library raises over a damaged file becomes a UserError."""
    import datasets.exceptions
    import pyarrow as pa

    # Faults of the network are no mistake of the user's and pass through.
    try:
        yield from rows
    except (datasets.exceptions.DatasetsError, pa.ArrowException, FileNotFoundError, ValueError) as error:
        raise UserError(f"{name} cannot be read on: {_first_line(error)}") from error


@contextlib.contextmanager
def _told_in_one_sentence(problem: str) -> Iterator[None]:
    # The library raises a dozen unrelated classes here, its own, the client's and Python's.
    try:
        yield
    except UserError:
        raise
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
