"""Which token positions of a sample are kept: `all`, `from:k`, `last`, `mean`, `mean_from:k`, `first:n`, `every:k`, …

In: the user's words. Out: `Positions`, which selects on the device (before anything is buffered) and says
on the host which positions those rows are. Positions count the real tokens of a sample. A sample that is
too short for a position simply gives fewer rows, or none, and the next one's follow without a gap.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from models.errors import UserError
from models.packing import Packing

MEAN_POSITION = -1  # what stands for "no single token" where a row is a mean over several

_KINDS = "all, from:k, last, mean, mean_from:k, first:n, every:k, at:i,j,…"


@dataclass(frozen=True)
class Positions:
    """A choice of token positions, the same for every sample.

    Attributes:
      kind: `all` | `from` | `last` | `mean` | `first` | `every` | `at`.
      count: n of `first:n`, k of `every:k` (positions 0, k, 2k, …), k of `from:k` and `mean_from:k` (positions k,
        k + 1, …; of `mean` it is 0), else 0.
      indices: the ascending positions of `at`, else empty.
    """

    kind: Literal["all", "from", "last", "mean", "first", "every", "at"]
    count: int = 0
    indices: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Positions:
        """Reads `all`, `from:1`, `last`, `mean`, `mean_from:1`, `first:8`, `every:4` or `at:0,5,9`.

        Raises:
          UserError: it is none of these.
        """
        if text in ("all", "last", "mean"):
            return cls(text)
        if match := re.fullmatch(r"(mean_)?from:(\d{1,9})", text):
            if not (count := int(match[2])):  # nothing is left out: one name for one thing
                return cls("mean" if match[1] else "all")
            return cls("mean" if match[1] else "from", count)
        if match := re.fullmatch(r"(first|every):(\d{1,9})", text):
            if (count := int(match[2])) < 1:
                raise UserError(f"positions {text!r} keep nothing; the number must be at least 1")
            return cls("first", count) if match[1] == "first" else cls("every", count)
        if match := re.fullmatch(r"at:(\d{1,9}(?:,\d{1,9})*)", text):
            indices = tuple(sorted({int(i) for i in match[1].split(",")}))
            if len(indices) != match[1].count(",") + 1:
                raise UserError(f"positions {text!r} name a position twice; name each once")
            return cls("at", indices=indices)
        raise UserError(f"unknown positions {text!r}; expected one of: {_KINDS} (counted from 0)")

    def __str__(self) -> str:
        if self.kind == "at":
            return "at:" + ",".join(map(str, self.indices))
        if self.kind == "mean" and self.count:
            return f"mean_from:{self.count}"
        return f"{self.kind}:{self.count}" if self.count else self.kind

    @property
    def one_row_per_sample(self) -> bool:
        """True where no sample gives more than one row; of `mean_from:k` one without a position k gives none."""
        return self.kind in ("last", "mean")

    @property
    def begins(self) -> int:
        """The position before which no token is kept, nor is in a mean."""
        return self.count if self.kind in ("from", "mean") else 0

    @property
    def keeps_first(self) -> bool:
        """True where the first token of every sample is a row."""
        return self.kind in ("all", "first", "every") or self.indices[:1] == (0,)

    def of(self, length: int) -> np.ndarray:
        """int32 [rows]: the positions kept of a sample of `length` real tokens."""
        if self.kind == "mean":
            return np.full(int(length > self.count), MEAN_POSITION, np.int32)
        if self.kind == "last":
            return np.array([length - 1], np.int32)
        if self.kind == "at":
            return np.array([i for i in self.indices if i < length], np.int32)
        if self.kind == "first":
            return np.arange(min(self.count, length), dtype=np.int32)
        if self.kind == "from":
            return np.arange(self.count, max(self.count, length), dtype=np.int32)
        return np.arange(0, length, self.count or 1, dtype=np.int32)

    def rows(self, length: int) -> int:
        """How many rows a sample of `length` real tokens gives."""
        if self.kind in ("all", "from"):
            return max(0, length - self.count)
        if self.one_row_per_sample:
            return int(length > self.count)
        if self.kind == "first":
            return min(self.count, length)
        if self.kind == "every":
            return -(-length // self.count)
        return sum(i < length for i in self.indices)

    def rows_of(self, lengths: np.ndarray) -> np.ndarray:
        """int64 [samples]: the same of many."""
        lengths = np.asarray(lengths, np.int64)
        if self.kind in ("all", "from"):
            return np.maximum(0, lengths - self.count)
        if self.one_row_per_sample:
            return (lengths > self.count).astype(np.int64)
        if self.kind == "first":
            return np.minimum(self.count, lengths)
        if self.kind == "every":
            return -(-lengths // self.count)
        return np.searchsorted(self.indices, lengths, side="left").astype(np.int64)

    def slots(self, tokens: int, samples: int = 1) -> int:
        """How many rows are buffered for a row of `tokens` that holds up to `samples` samples."""
        if self.one_row_per_sample:
            return samples
        if self.kind == "from":  # the fewest are left out of a row that one sample fills
            return self.rows(tokens)
        if self.kind == "every":
            return min(tokens, (tokens + samples * (self.count - 1)) // self.count)
        if self.kind == "at":  # so many samples have room for so many tokens
            return min(tokens, sum(min(samples, tokens // (i + 1)) for i in self.indices))
        return min(tokens, samples * self.rows(tokens))

    def columns(self, packing: Packing) -> Array | None:
        """int32 [b, slots]: what `select` gathers; None where it gathers nothing (`all`, `mean`).

        Columns of tokens, ascending; of `mean_from:k` the samples. Those of a row that are kept come first and without
        gaps; what is left is not read.
        """
        if self.kind == "all":
            return None
        if self.kind == "mean":
            return jnp.argsort(packing.lengths <= self.count, axis=1, stable=True) if self.count else None
        if self.kind == "last":
            return jnp.maximum(packing.ends - 1, 0)
        positions = packing.positions
        columns = jnp.arange(packing.tokens, dtype=jnp.int32)[None, :]
        if self.kind == "first":
            kept = positions < self.count
        elif self.kind == "from":
            kept = positions >= self.count
        elif self.kind == "every":
            kept = positions % self.count == 0
        else:
            kept = (positions[:, :, None] == jnp.array(self.indices, jnp.int32)[None, None]).any(axis=-1)
        kept &= columns < packing.ends[:, -1:]
        found = jnp.sort(jnp.where(kept, columns, packing.tokens - 1), axis=1)
        return found[:, : self.slots(packing.tokens, packing.samples)]

    def select(self, x: Array, packing: Packing, columns: Array | None) -> Array:
        """x [b, tokens, width] -> [b, slots, width]: the rows at `columns`, or each sample's mean, or all."""
        if self.kind == "mean":
            counts = jnp.maximum(packing.lengths - self.count, 1)[:, :, None]
            x = packing.sums(x, self.count) / counts.astype(jnp.float32)
        return x if columns is None else jnp.take_along_axis(x, columns[:, :, None], axis=1)
