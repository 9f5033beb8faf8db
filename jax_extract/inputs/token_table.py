"""Tokenised samples as arrays: what a plan is made of, and what is kept of an input between two sessions.

In: token ids and names. Out: `TokenTable`, some 8 bytes a token and a few dozen a sample, however many there are;
an object for a sample exists while somebody looks at it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class TokenizedSample:
    """A sample as the model sees it.

    Attributes:
      sample_index: place in the input, from 0, samples without tokens included.
      sample_id: the source's name for it.
      token_ids: int32 [length], special tokens included, at most the maximum length.
      full_length: how many tokens it had before truncation.
      meta: the source's JSON values.
    """

    sample_index: int
    sample_id: str
    token_ids: np.ndarray
    full_length: int
    meta: Mapping[str, Any]

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def truncated(self) -> bool:
        return self.length < self.full_length


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
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(text) for text in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def take(self, indices: np.ndarray) -> Texts:
        """Those at these places."""
        return Texts(*_take(self.data, self.offsets, indices))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        return bytes(self.data[self.offsets[index] : self.offsets[index + 1]]).decode("utf-8", "surrogatepass")


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Samples in the order of the input.

    Attributes:
      token_ids: int32 [tokens], of all samples one behind the other.
      offsets: int64 [samples + 1]: sample i has the tokens offsets[i] to offsets[i + 1].
      sample_indices: int64 [samples], places in the input; samples without a token have none here.
      full_lengths: int64 [samples], tokens before truncation.
      sample_ids: of each.
      meta: of each, as JSON; empty where there is none.
    """

    token_ids: np.ndarray
    offsets: np.ndarray
    sample_indices: np.ndarray
    full_lengths: np.ndarray
    sample_ids: Sequence[str]
    meta: Sequence[str]

    @classmethod
    def of(cls, samples: Iterable[TokenizedSample]) -> TokenTable:
        samples = list(samples)
        offsets = np.zeros(len(samples) + 1, np.int64)
        np.cumsum([sample.length for sample in samples], out=offsets[1:])
        return cls(
            np.concatenate([sample.token_ids for sample in samples] or [np.zeros(0)]).astype(np.int32, copy=False),
            offsets,
            np.array([sample.sample_index for sample in samples], np.int64),
            np.array([sample.full_length for sample in samples], np.int64),
            Texts.of(sample.sample_id for sample in samples),
            Texts.of(json.dumps(dict(sample.meta)) if sample.meta else "" for sample in samples),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> TokenizedSample:
        meta = self.meta[index]
        return TokenizedSample(
            int(self.sample_indices[index]),
            self.sample_ids[index],
            self.tokens_of(index),
            int(self.full_lengths[index]),
            json.loads(meta) if meta else {},
        )

    def __iter__(self) -> Iterator[TokenizedSample]:
        return (self[i] for i in range(len(self)))

    def take(self, indices: np.ndarray) -> TokenTable:
        """The samples at these places, in this order."""
        token_ids, offsets = _take(self.token_ids, self.offsets, indices)
        names, meta = (
            texts.take(indices) if isinstance(texts, Texts) else [texts[i] for i in indices]
            for texts in (self.sample_ids, self.meta)
        )
        return TokenTable(token_ids, offsets, self.sample_indices[indices], self.full_lengths[indices], names, meta)

    def tokens_of(self, index: int) -> np.ndarray:
        """int32 [length] of one sample."""
        return self.token_ids[self.offsets[index] : self.offsets[index + 1]]

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [samples]."""
        return np.diff(self.offsets)


def _take(data: np.ndarray, offsets: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pieces of `data` at these places, one behind the other, and their offsets."""
    starts, ends = offsets[indices], offsets[np.asarray(indices) + 1]
    taken = np.zeros(len(starts) + 1, np.int64)
    np.cumsum(ends - starts, out=taken[1:])
    pieces = [data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    return np.concatenate(pieces) if pieces else data[:0], taken
