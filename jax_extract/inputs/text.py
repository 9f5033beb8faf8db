"""Samples from files of lines: JSONL with a text field, and plain text.

In: a UTF-8 file.
Out: one `Sample` for each line that is not blank, lazily, in the file's order; memory grows by the ids
alone (JSONL ids must be unique). A wrong line is a UserError with the file and the line's number.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_extract.errors import UserError
from jax_extract.inputs.samples import Sample

TEXT_FIELDS = ("text", "prompt", "question")


def jsonl_samples(path: Path, text_column: str | None = None) -> Iterator[Sample]:
    """One sample for each line of a JSONL file; blank lines are passed over.

    Args:
      path: each line one object with a text field and, if wanted, an "id" (a string or an integer;
        "{file stem}:{line number}" without). Other fields are ignored.
      text_column: the field that holds the text; the first there is of `TEXT_FIELDS` for None.

    Raises:
      UserError: on reaching a line that is not UTF-8, not a JSON object, has no text or no string for it,
        or repeats an id.
    """
    seen: set[str] = set()
    for number, where, row in _rows(path):
        field = text_field(row, text_column, f"{where},")
        text = checked_text(row[field], f"{where}, field {field!r},")
        sample_id = checked_id(row["id"], where) if "id" in row else f"{path.stem}:{number}"
        if sample_id in seen:
            raise UserError(f"{where}, repeats the id {sample_id!r}: give each line its own, or none.")
        seen.add(sample_id)
        yield Sample(sample_id, text, {"line": number})


def jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of a JSONL file, with the place that an error about it begins with.

    Raises:
      UserError: on reaching a line that is not UTF-8 or not a JSON object.
    """
    return ((where, row) for _, where, row in _rows(path))


def text_samples(path: Path) -> Iterator[Sample]:
    """One sample for each line of a text file that is not blank, with the id "{file stem}:{line number}".

    Raises:
      UserError: on reaching a line that is not UTF-8.
    """
    for number, line in _lines(path):
        yield Sample(f"{path.stem}:{number}", line, {"line": number})


def named_texts(texts: Sequence[str] | Mapping[str, str]) -> Iterator[Sample]:
    """Texts of a caller's, with ids where they are a mapping; else the ids are "0", "1", ….

    Raises:
      UserError: it is a single string, or holds something else than texts.
    """
    if isinstance(texts, str):
        raise UserError("texts is a single string; give a list of strings, or a mapping of ids to strings")
    named = texts.items() if isinstance(texts, Mapping) else ((str(i), text) for i, text in enumerate(texts))
    return (Sample(checked_id(i, "a sample"), checked_text(text, f"text {i!r}")) for i, text in named)


def text_field(names: Collection[str], text_column: str | None, where: str) -> str:
    """The one of `names` that holds the text: `text_column`, or for None the first there is of `TEXT_FIELDS`.

    Raises:
      UserError: it is not among them; the sentence begins with `where` and lists those that are.
    """
    wanted = TEXT_FIELDS if text_column is None else (text_column,)
    for name in wanted:
        if name in names:
            return name
    raise UserError(
        f"{where} has no {' or '.join(wanted)} but {', '.join(names) or 'nothing at all'}: name what holds the text "
        "with --text_column."
    )


def checked_text(value: object, where: str) -> str:
    """`value` if it is a text that a tokeniser can take; else a UserError that begins with `where`."""
    if not isinstance(value, str):
        raise UserError(f"{where} holds {value!r:.40} ({type(value).__name__}) where a string is expected.")
    # JSON can spell half a surrogate pair, which is no character: tokenisers and writers fail on it late.
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{where} holds half a surrogate pair (\\ud800 to \\udfff): write whole characters.")
    return value


def checked_id(value: object, where: str) -> str:
    """`value`, a string or an integer, as a sample id; else a UserError that begins with `where`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value == "":
        raise UserError(f"{where}, has an empty id: give it one, or leave the field out.")
    sample_id = checked_text(value, f"{where}, field 'id',")
    if "\0" in sample_id:  # NumPy drops zeros at the end of a string, so two ids could become one
        raise UserError(f"{where}, has the id {sample_id[:40]!r}: an id cannot hold a zero byte.")
    return sample_id


def _rows(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        yield number, where, _row(line, where)


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, column {error.colno}, is not JSON: {error.msg}; mend the line.") from error
    except (ValueError, RecursionError) as error:
        # An integer of thousands of digits, or brackets thousands deep.
        raise UserError(f"{where}, cannot be read as JSON: {error}.") from error
    if not isinstance(row, dict):
        raise UserError(f'{where}, is a JSON {type(row).__name__} where an object {{"text": …}} is expected.')
    return row


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1, without their line ends."""
    # Read as bytes: only so does a decoding error keep its line, and only "\n" ends one (JSON strings may
    # hold U+2028, which `str.splitlines` would cut at).
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path}, line {number}, byte {error.start}, is not UTF-8: save the file as UTF-8."
                    ) from error
                if line.strip():
                    yield number, line.removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
