"""Samples from files of rows and of lines: JSON, JSONL, CSV, TSV and Parquet with a text field, and plain text.

In: a file, compressed or not.
Out: one `Sample` for each row, or each line that is not blank, lazily, in the file's order; memory grows by eight
bytes an id (those that rows have must be unique). A wrong row is a UserError with the file and its place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_extract.errors import UserError
from jax_extract.inputs.fields import Fields, checked_id, checked_text
from jax_extract.inputs.files import kind_and_stem, lines, local
from jax_extract.inputs.rows import PlacedRow, rows_of
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.tokenizing.names import Names

PARQUET = ".parquet"

Needed = Callable[[Collection[str]], Sequence[str]]

_ROWS_AT_ONCE = 1_024  # of a Parquet file
_RECENT = 65_536  # ids


def jsonl_samples(path: Path, text_column: str | None = None) -> Iterator[Sample]:
    """One sample for each line of a JSONL file; blank lines are passed over.

    Args:
      path: each line one object with a text field and, if wanted, an "id" (a string or an integer;
        "{file stem}:{line number}" without). Other fields are ignored here.
      text_column: the field that holds the text; the first there is of the usual ones for None.

    Raises:
      UserError: on reaching a line that is not UTF-8, not a JSON object, has no text or no string for it,
        or repeats an id.
    """
    for sample in row_samples(path, Fields(text_column)):
        if sample.turns is not None or sample.token_ids is not None:
            raise UserError(
                f"{path}, line {sample.meta['line']}, holds a list where a string is expected: write it as one."
            )
        yield sample


def row_samples(path: Path, fields: Fields) -> Iterator[Sample]:
    """One sample for each row of a file of rows.

    Args:
      path: JSONL, CSV or TSV (an id is "{file stem}:{line number}" where a row has none), a JSON list of objects or
        Parquet ("{file stem}:{number of the row}", from 1).

    Raises:
      UserError: on reaching what is no such row, lacks a field, or repeats an id.
    """
    kind, stem = kind_and_stem(path)
    unit = "row" if kind in (PARQUET, ".json") else "line"
    recent: set[str] = set()  # told with its place; older ones by their ids alone
    older = Names()

    def check_recent() -> None:
        names = list(recent)
        if (repeated := older.first_repeated(names)) is not None:
            raise UserError(f"{path} repeats the id {names[repeated]!r}: give each {unit} its own, or none.")
        recent.clear()

    def needed(columns: Collection[str]) -> Sequence[str]:
        return fields.columns(columns, f"{path},")

    for number, where, row in file_rows(path, needed, fields.keeps_others):
        sample = fields.sample(row, where, f"{stem}:{number}", {unit: number})
        if sample.sample_id in recent:
            raise UserError(f"{where}, repeats the id {sample.sample_id!r}: give each {unit} its own, or none.")
        recent.add(sample.sample_id)
        if len(recent) == _RECENT:
            check_recent()
        yield sample
    check_recent()


def file_rows(path: Path, needed: Needed | None = None, and_others: bool = False) -> Iterator[PlacedRow]:
    """Each row of a local file, by the kind that its ending says.

    Args:
      needed: which of a Parquet file's columns are read; all for None.
      and_others: the others too, but for those that hold bytes, such as images.

    Raises:
      UserError: the file cannot be read, or on reaching what is no row.
    """
    kind, _ = kind_and_stem(path)
    if kind == PARQUET:
        yield from _parquet_rows(path, needed, and_others)
        return
    with local(path) as file:
        yield from rows_of(str(path), kind, file)


def text_samples(path: Path) -> Iterator[Sample]:
    """One sample for each line of a text file that is not blank, with the id "{file stem}:{line number}".

    Raises:
      UserError: on reaching a line that is not UTF-8.
    """
    _, stem = kind_and_stem(path)
    with local(path) as file:
        for number, line in lines(str(path), file):
            yield Sample(f"{stem}:{number}", line, {"line": number})


def named_texts(texts: Sequence[str] | Mapping[str, str]) -> Iterator[Sample]:
    """Texts of a caller's, with ids where they are a mapping; else the ids are "0", "1", ….

    Raises:
      UserError: it is a single string, or holds something else than texts.
    """
    if isinstance(texts, str):
        raise UserError("texts is a single string; give a list of strings, or a mapping of ids to strings")
    named = texts.items() if isinstance(texts, Mapping) else ((str(i), text) for i, text in enumerate(texts))
    return (Sample(checked_id(i, "a sample"), checked_text(text, f"text {i!r}")) for i, text in named)


def _parquet_rows(path: Path, needed: Needed | None, and_others: bool) -> Iterator[PlacedRow]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with local(path) as opened, parquet.ParquetFile(opened) as file:
            columns = None if needed is None else [*needed(file.schema_arrow.names)]
            if columns is not None and and_others:
                columns += [
                    each.name for each in file.schema_arrow if each.name not in columns and _is_plain(each.type)
                ]
            number = 0
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield PlacedRow(number, f"{path}, row {number}", row)
    except pa.ArrowException as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path} is no Parquet file that can be read ({reason}): fetch it again.") from error


def _is_plain(kind: Any) -> bool:
    """Whether an Arrow type holds no bytes, at any depth."""
    import pyarrow as pa

    if kind.num_fields:
        return all(_is_plain(kind.field(number).type) for number in range(kind.num_fields))
    return not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))
