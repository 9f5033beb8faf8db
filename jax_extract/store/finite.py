"""Values that are no finite numbers: whether there are any, and in which rows.

In: stored values, or the bytes of an array in pieces. Out: whether all are finite; the rows that hold infinite or
undefined values, and how many of each.
"""

from __future__ import annotations

import numpy as np

FLOAT16_ENDS = (
    "float16 ends at 65,504, and what is beyond is stored as infinity: extract again with --capture_dtype bfloat16 or "
    "float32, into another --activations_dir"
)
_AT_ONCE = 1 << 20  # bytes, which stay in the cache


def all_finite(values: np.ndarray) -> bool:
    """Whether every value [n] is finite, from its extremes: fast, and nothing is made on the way."""
    if values.dtype == np.float32:
        return bool(np.isfinite(values.max()) and np.isfinite(values.min()))  # both are undefined if any value is
    # There is no fast maximum of 16-bit floats, so it is that of their bits. From its sign's infinity on, a value
    # is not finite. Signed, the positive values are above the negative ones; unsigned, it is the other way round.
    infinity = 0x7C00 if values.dtype == np.float16 else 0x7F80
    positive, negative = values.view(np.int16).max(), values.view(np.uint16).max()
    return int(positive) < infinity and int(negative) < 0x8000 | infinity


class NotFiniteRows:
    """Looks for them in the bytes of an array, which arrive in order, in pieces that end anywhere.

    Attributes:
      infinite, undefined: how many values are infinite, and how many are no numbers at all.
    """

    def __init__(self, width: int, dtype: np.dtype) -> None:
        self.infinite = self.undefined = 0
        self._dtype = dtype
        self._row_bytes = width * dtype.itemsize
        self._seen = 0  # rows
        self._found: list[np.ndarray] = []
        self._begun = b""  # of a row whose end has not arrived

    @property
    def rows(self) -> np.ndarray:
        """int64, the numbers of the rows that hold such values."""
        return np.concatenate([*self._found, np.zeros(0, np.int64)])

    def add(self, piece: memoryview) -> None:
        if self._begun:
            missing = self._row_bytes - len(self._begun)
            self._begun += piece[:missing].tobytes()
            piece = piece[missing:]
            if len(self._begun) < self._row_bytes:
                return
            self._look(memoryview(self._begun))
        whole = len(piece) // self._row_bytes * self._row_bytes
        self._look(piece[:whole])
        self._begun = piece[whole:].tobytes()

    def _look(self, data: memoryview) -> None:
        step = max(1, _AT_ONCE // self._row_bytes) * self._row_bytes
        for start in range(0, len(data), step):
            some = np.frombuffer(data[start : start + step], np.uint8).copy()  # lies as its type wants it
            values = some.view(self._dtype)
            if not all_finite(values):
                rows = values.reshape(-1, self._row_bytes // self._dtype.itemsize)
                undefined, finite = np.isnan(rows), np.isfinite(rows)
                self.undefined += int(undefined.sum())
                self.infinite += int((~finite & ~undefined).sum())
                self._found.append(self._seen + np.flatnonzero(~finite.all(axis=1)))
            self._seen += len(some) // self._row_bytes
