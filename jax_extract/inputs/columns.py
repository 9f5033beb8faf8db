"""Columns of many short texts (ids, JSON) that hold no object a text.

In: texts, or dicts. Out: a sequence of strings, each of which exists while somebody looks at it: `Texts` in one piece
of memory, `Records` for JSON objects that differ in whole numbers alone, `Chained` for columns of several kinds.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_JSON = json.JSONEncoder()


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """int64 [lengths + 1]: where each begins, and where the last one ends."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


@dataclass(frozen=True, eq=False)
class Texts(Sequence[str]):
    """Many short texts in one piece of memory.

    Attributes:
      data: uint8 [bytes], UTF-8 one behind the other; lone surrogates are encoded as they are.
      offsets: int64 [texts + 1].
    """

    data: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        texts = list(texts)
        data = "".join(texts).encode("utf-8", "surrogatepass")
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        if len(data) != lengths.sum():  # not ASCII alone
            encoded = (len(text.encode("utf-8", "surrogatepass")) for text in texts)
            lengths = np.fromiter(encoded, np.int64, len(texts))
        return cls(np.frombuffer(data, np.uint8), offsets_of(lengths))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            first, last = _range(index, len(self))
            offsets = self.offsets[first : last + 1]
            return Texts(self.data[offsets[0] : offsets[-1]], offsets - offsets[0])
        index = _place(index, len(self))
        return bytes(self.data[self.offsets[index] : self.offsets[index + 1]]).decode("utf-8", "surrogatepass")


@dataclass(frozen=True, eq=False)
class Records(Sequence[str]):
    """JSON objects with the same keys in the same order, whose values are the same text or a whole number of its own.

    Attributes:
      keys: of each.
      values: of each key: the text, or int64 [records].
      count: how many.
    """

    keys: tuple[str, ...]
    values: tuple[str | np.ndarray, ...]
    count: int

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Records | None:
        """None where the rows are not so."""
        if not rows or len(found := set(map(tuple, rows))) != 1:
            return None
        (keys,) = found
        if not all(type(key) is str for key in keys):
            return None
        values: list[str | np.ndarray] = []
        for key in keys:
            column = [row[key] for row in rows]
            kinds = set(map(type, column))
            if kinds == {int}:
                try:
                    values.append(np.array(column, np.int64))
                except OverflowError:
                    return None
            elif kinds == {str} and len(set(column)) == 1:
                values.append(column[0])
            else:
                return None
        return cls(keys, tuple(values), len(rows))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            first, last = _range(index, self.count)
            cut = tuple(value if isinstance(value, str) else value[first:last] for value in self.values)
            return Records(self.keys, cut, last - first)
        index = _place(index, self.count)
        if not self.keys:
            return ""
        said = (value if isinstance(value, str) else int(value[index]) for value in self.values)
        return _JSON.encode(dict(zip(self.keys, said, strict=True)))

    def goes_on_in(self, other: Sequence[str]) -> bool:
        """Whether the two are one column."""
        return (
            isinstance(other, Records)
            and other.keys == self.keys
            and all(
                (type(a), a if isinstance(a, str) else None) == (type(b), b if isinstance(b, str) else None)
                for a, b in zip(self.values, other.values, strict=True)
            )
        )


class Chained(Sequence[str]):
    """Columns one behind the other."""

    def __init__(self, columns: Sequence[Sequence[str]]) -> None:
        self._columns = [column for column in columns if len(column)]
        self._ends = list(itertools.accumulate(map(len, self._columns)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            first, last = _range(index, len(self))
            ends = zip(self._columns, self._ends, strict=True)
            starts = ((column, end - len(column)) for column, end in ends)
            return joined([column[max(0, first - start) : max(0, last - start)] for column, start in starts])
        index = _place(index, len(self))
        of = bisect.bisect_right(self._ends, index)
        return self._columns[of][index - (self._ends[of] - len(self._columns[of]))]


def json_column(rows: Sequence[Mapping[str, Any]]) -> Sequence[str]:
    """Each row as JSON; empty where it has no key."""
    records = Records.of(rows)
    return Texts.of(_JSON.encode(dict(row)) if row else "" for row in rows) if records is None else records


def joined(columns: Sequence[Sequence[str]]) -> Sequence[str]:
    """Columns one behind the other, in new memory where they are of one kind."""
    columns = [column for column in columns if len(column)]
    if not columns:
        return Texts.of(())
    first = columns[0]
    texts = [column for column in columns if isinstance(column, Texts)]
    if len(texts) == len(columns):
        lengths = np.concatenate([np.diff(column.offsets) for column in texts])
        return Texts(np.concatenate([column.data for column in texts]), offsets_of(lengths))
    records = [column for column in columns if isinstance(column, Records)]
    if isinstance(first, Records) and all(first.goes_on_in(column) for column in columns):
        pieces = zip(*(column.values for column in records), strict=True)
        values = tuple(p[0] if isinstance(p[0], str) else np.concatenate(p) for p in pieces)
        return Records(first.keys, values, sum(map(len, records)))
    return Chained(columns)


def _range(asked: slice, count: int) -> tuple[int, int]:
    first, last, step = asked.indices(count)
    if step != 1:
        raise ValueError("columns are cut without steps")
    return first, max(first, last)


def _place(index: int, count: int) -> int:
    if not -count <= index < count:
        raise IndexError(index)
    return index + count if index < 0 else index
