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

from jax_extract.inputs.columns import Texts, joined, json_column, offsets_of

PROMPT_TOKENS = "prompt_tokens"  # of a sample's meta, where an answer follows


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
    def prompt_length(self) -> int:
        """Tokens before an answer, where one follows."""
        return int(self.meta.get(PROMPT_TOKENS, self.length))

    @property
    def truncated(self) -> bool:
        return self.length < self.full_length


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
        return cls(
            np.concatenate([sample.token_ids for sample in samples] or [np.zeros(0)]).astype(np.int32, copy=False),
            offsets_of(np.array([sample.length for sample in samples], np.int64)),
            np.array([sample.sample_index for sample in samples], np.int64),
            np.array([sample.full_length for sample in samples], np.int64),
            Texts.of(sample.sample_id for sample in samples),
            json_column([sample.meta for sample in samples]),
        )

    @classmethod
    def joined(cls, tables: Sequence[TokenTable]) -> TokenTable:
        """Tables one behind the other, in new memory."""
        return cls(
            np.concatenate([np.zeros(0, np.int32), *(table.token_ids for table in tables)]),
            offsets_of(np.concatenate([np.zeros(0, np.int64), *(table.lengths for table in tables)])),
            np.concatenate([np.zeros(0, np.int64), *(table.sample_indices for table in tables)]),
            np.concatenate([np.zeros(0, np.int64), *(table.full_lengths for table in tables)]),
            joined([table.sample_ids for table in tables]),
            joined([table.meta for table in tables]),
        )

    def between(self, first: int, last: int) -> TokenTable:
        """Samples `first` to `last` (without `last`), in the memory of this table."""
        offsets = self.offsets[first : last + 1]
        return TokenTable(
            self.token_ids[offsets[0] : offsets[-1]],
            offsets - offsets[0],
            self.sample_indices[first:last],
            self.full_lengths[first:last],
            self.sample_ids[first:last],
            self.meta[first:last],
        )

    def with_tokens(self) -> TokenTable:
        """Without the samples that have no token; the token ids are in the memory of this table."""
        there = np.flatnonzero(self.lengths)
        return TokenTable(
            self.token_ids,
            np.append(self.offsets[there], self.offsets[-1]),
            self.sample_indices[there],
            self.full_lengths[there],
            Texts.of(self.sample_ids[i] for i in there.tolist()),
            Texts.of(self.meta[i] for i in there.tolist()),
        )

    def take(self, indices: np.ndarray) -> TokenTable:
        """The samples at these places, in this order, in new memory."""
        starts, ends = self.offsets[indices], self.offsets[indices + 1]
        pieces = [self.token_ids[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
        places = indices.tolist()
        return TokenTable(
            np.concatenate([np.zeros(0, np.int32), *pieces]),
            offsets_of(ends - starts),
            self.sample_indices[indices],
            self.full_lengths[indices],
            *([str(texts[i]) for i in places] for texts in (self.sample_ids, self.meta)),
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

    def tokens_of(self, index: int) -> np.ndarray:
        """int32 [length] of one sample."""
        return self.token_ids[self.offsets[index] : self.offsets[index + 1]]

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [samples]."""
        return np.diff(self.offsets)


def windows_of(tables: Iterable[TokenTable], most: int) -> Iterator[tuple[TokenTable, bool]]:
    """Tables joined, and cut after every `most` samples; with each whether the input ends with it.

    No more is read than what shows whether it does. An empty input gives nothing.
    """
    waiting: list[TokenTable] = []
    count = 0
    for table in tables:
        if not len(table):
            continue
        waiting.append(table)
        count += len(table)
        while count > most:
            cut = len(waiting[-1]) - (count - most)
            head, rest = waiting[-1].between(0, cut), waiting[-1].between(cut, len(waiting[-1]))
            yield TokenTable.joined([*waiting[:-1], head]), False
            waiting, count = [rest], len(rest)
    if waiting:
        yield TokenTable.joined(waiting), True
