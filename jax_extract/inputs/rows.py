"""Rows of CSV and JSON files exactly as they are written: no cell is guessed to be a number, a date or missing.

In: an open file of lines of JSON, of a JSON list, or of CSV. Out: each row with its place, lazily. A CSV cell is
its text; a JSON value is what JSON says it is.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, cast

from jax_extract.errors import UserError
from jax_extract.inputs.files import LONGEST_LINE, byte_lines, decoded, lines

_LARGEST_CELL = 1 << 24  # characters; Python's own limit is below some texts
_PEEKED = 64  # bytes
_PIECE = 1 << 20  # bytes of a JSON list that are read at once

_CALLED = {",": "commas", ";": "semicolons", "\t": "tabs"}
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")


class PlacedRow(NamedTuple):
    """Attributes:
    number: of its line (its first one), or of the object in a JSON list; from 1.
    where: what an error about it begins with.
    values: by field.
    """

    number: int
    where: str
    values: dict[str, Any]


def rows_of(name: str, kind: str, file: IO[bytes], delimiter: str | None = None) -> Iterator[PlacedRow]:
    """The rows of a file of one of `KINDS`.

    Args:
      name: begins the errors.
      file: as `files.open_bytes` gives it.
      delimiter: of CSV, where it is not the kind's own.

    Raises:
      UserError: on reaching what is no such row.
    """
    if kind in (".csv", ".tsv"):
        return csv_rows(name, file, delimiter or ("\t" if kind == ".tsv" else ","))
    # Some files that are called .jsonl are a list after all.
    return _json_rows(name, file) if kind == ".json" or begins_a_list(file) else jsonl_rows(name, file)


def begins_a_list(file: IO[bytes]) -> bool:
    """Whether a list follows; nothing is read on."""
    return cast(io.BufferedReader, file).peek(_PEEKED).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def jsonl_rows(name: str, file: IO[bytes]) -> Iterator[PlacedRow]:
    """One object a line; blank lines are passed over."""
    for number, line in lines(name, file):
        where = f"{name}, line {number}"
        yield PlacedRow(number, where, _object(json_of(line, where), where))


def csv_rows(name: str, file: IO[bytes], delimiter: str = ",") -> Iterator[PlacedRow]:
    """Rows under the names of the first line; cells that a short row lacks are not there, blank lines passed over."""
    csv.field_size_limit(_LARGEST_CELL)
    last = ""

    def text() -> Iterator[str]:
        nonlocal last
        for number, raw in byte_lines(name, file):
            last = decoded(name, number, raw)
            yield last

    reader = csv.reader(text(), delimiter=delimiter, strict=True)
    names: list[str] = []
    line = 1
    try:
        for cells in reader:
            number, line = line, reader.line_num + 1
            if len(cells) <= 1 and number == reader.line_num and not last.strip():
                continue
            if not names:
                names = cells
                if repeated := [column for column in names if column and names.count(column) > 1]:
                    raise UserError(f"{name} names the column {repeated[0]!r} more than once; give each its own name")
                continue
            if any(cells[len(names) :]):  # empty ones are a delimiter at the end of the line
                raise UserError(
                    f"{name}, line {number}, has {len(cells)} fields and the first line names {len(names)}; quote "
                    f"{_CALLED.get(delimiter, repr(delimiter))} in texts"
                )
            yield PlacedRow(number, f"{name}, line {number}", dict(zip(names, cells, strict=False)))
    except csv.Error as error:
        raise UserError(
            f"{name}, line {line}, is not CSV ({error}); a cell that begins with a quote ends with one, and quotes "
            "within it are doubled: mend it, or give a .jsonl"
        ) from None


def _json_rows(name: str, file: IO[bytes]) -> Iterator[PlacedRow]:
    """The objects of a list, or objects one behind the other."""
    for number, value in enumerate(json_values(name, file), start=1):
        where = f"{name}, object {number}"
        yield PlacedRow(number, where, _object(value, where))


def json_values(name: str, file: IO[bytes]) -> Iterator[Any]:
    """The values of a JSON list one by one; or those of a file that has several, or one, one behind the other.

    Raises:
      UserError: on reaching what is no JSON or no UTF-8, or a single value that is too large.
    """
    text = _Text(name, file)
    in_list = text.next_is("[")
    if in_list:
        text.take()
        if text.next_is("]"):
            text.take()
            text.require_end()
            return
    while text.peek():
        yield text.value()
        if in_list and not text.next_is(","):
            if not text.next_is("]"):
                raise UserError(f"{name}, line {text.line}, is not JSON: expected ',' or ']'; mend the file.")
            text.take()
            text.require_end()
            return
        if in_list:
            text.take()
    if in_list:
        raise UserError(f"{name}, line {text.line}, is not JSON: the list does not end; mend the file.")


class _Text:
    """JSON text that is read as far as it is wanted."""

    def __init__(self, name: str, file: IO[bytes]) -> None:
        self.name = name
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at = "", 0
        self._lines_before = 0  # of what is no longer held
        self._ended = False

    @property
    def line(self) -> int:
        return self._lines_before + self._text.count("\n", 0, self._at) + 1

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None, "it matches nothing too"
            self._at = space.end()
            if self._at < len(self._text) or not self._more(_PIECE):
                return self._text[self._at : self._at + 1]

    def next_is(self, character: str) -> bool:
        return self.peek() == character

    def take(self) -> None:
        self._at += 1

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, self._at = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                held = len(self._text) - self._at
                if held > LONGEST_LINE or not self._more(max(_PIECE, held)):
                    raise UserError(
                        f"{self.name}, line {self._lines_before + error.lineno}, column {error.colno}, is not JSON: "
                        f"{error.msg}; mend the file."
                    ) from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self.name}, line {self.line}, cannot be read as JSON: {error}.") from error
            else:
                return value

    def require_end(self) -> None:
        if self.peek():
            raise UserError(f"{self.name}, line {self.line}, is not JSON: more follows its end; mend the file.")

    def _more(self, size: int) -> bool:
        while not self._ended:
            piece = self._file.read(size)
            self._ended = not piece
            try:
                text = self._decoder.decode(piece, final=self._ended)
            except UnicodeDecodeError as error:
                raise UserError(f"{self.name} is not UTF-8 ({error.reason}): save the file as UTF-8.") from error
            if text:
                self._lines_before += self._text.count("\n", 0, self._at)
                self._text, self._at = self._text[self._at :] + text, 0
                return True
        return False


def json_of(line: str, where: str) -> Any:
    """The value that a line is; UserError where it is none."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, column {error.colno}, is not JSON: {error.msg}; mend the line.") from error
    except (ValueError, RecursionError) as error:
        # An integer of thousands of digits, or brackets thousands deep.
        raise UserError(f"{where}, cannot be read as JSON: {error}.") from error


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f'{where}, is a JSON {type(value).__name__} where an object {{"text": …}} is expected.')
    return value
