"""Samples whose tokens are known already: they are read and counted, and not tokenised.

In: a stream of samples, and what is known of those with which it begins. Out: the rest of the stream, and counts as if
all had been tokenised.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from jax_extract.errors import UserError
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.token_table import TokenTable
from jax_extract.inputs.tokenizing.counts import InputCounts
from jax_extract.inputs.tokenizing.encoder import Encoder
from jax_extract.inputs.tokenizing.names import Names
from jax_extract.inputs.tokenizing.pipeline import Chunk, chunks_of


class Passed(NamedTuple):
    """A chunk of known samples.

    Attributes:
      places: in the chunk, of those that have a token.
      lengths: int64, tokens of each of these.
      full_lengths: int64, before truncation.
    """

    chunk: Chunk
    places: list[int]
    lengths: np.ndarray
    full_lengths: np.ndarray


class Known(Protocol):
    def pass_over(self, samples: Iterator[Sample]) -> Iterator[Passed]:
        """Takes the known samples from the stream; UserError where it has others."""
        ...

    def rest(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        """The stream behind them, where it was taken so far."""
        ...


def pass_over(
    samples: Iterator[Sample],
    known: Known,
    encoder: Encoder,
    names: Names,
    counts: InputCounts,
    content_of: Callable[[Sample], str],
) -> int:
    """Takes the known samples from the stream, and says how many there were, those without a token included.

    Args:
      names: takes their ids.
      counts: are filled.
      content_of: what a sample gave, for the counts.
    """
    count = 0
    for chunk, places, lengths, full_lengths in known.pass_over(samples):
        ids = [sample.sample_id for sample in chunk]
        names.first_repeated(ids)
        for i in sorted(set(range(len(chunk))).difference(places)):
            counts.leave_out(ids[i])
        opening = encoder.opening
        if opening and (begun := [s for s in chunk if s.token_ids is s.turns is None and s.text.startswith(opening)]):
            counts.take(encoder.encode(encoder.prepare(begun)))
        counts.add_samples(lengths, full_lengths, [ids[i] for i in places], [content_of(chunk[i]) for i in places])
        count += len(chunk)
    return count


def other_samples(where: str) -> UserError:
    return UserError(
        f"the input has other samples than those that the run was begun with ({where}); restore the inputs, choose "
        "another --activations_dir, or start anew with --overwrite"
    )


@dataclass(frozen=True)
class KnownTables:
    """The samples from the first one on, as they were tokenised; at least one."""

    tables: Sequence[TokenTable]

    def pass_over(self, samples: Iterator[Sample]) -> Iterator[Passed]:
        first, count = 0, int(self.tables[-1].sample_indices[-1]) + 1
        known = _Column(self.tables)
        for chunk in chunks_of(itertools.islice(samples, count)):
            indices, lengths, full_lengths, names = known.take(first + len(chunk))
            places = (indices - first).tolist()
            if [chunk[i].sample_id for i in places] != names:
                raise other_samples(f"from {chunk[0].sample_id!r} on")
            yield Passed(chunk, places, lengths, full_lengths)
            first += len(chunk)
        if first < count:
            raise other_samples(f"it ends after {first:,}")

    def rest(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        return samples


class _Column:
    """Tables one behind the other, of which the next samples are taken."""

    def __init__(self, tables: Iterable[TokenTable]) -> None:
        self._tables = iter(tables)
        self._table = next(self._tables, None)
        self._at = 0  # sample of the table

    def take(self, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
        """Those whose places in the input are before `stop`: places, lengths, full lengths, ids."""
        indices, lengths, full_lengths = ([np.zeros(0, np.int64)] for _ in range(3))
        names: list[str] = []
        while self._table is not None:
            table, at = self._table, self._at
            self._at = end = int(np.searchsorted(table.sample_indices, stop))
            indices.append(table.sample_indices[at:end])
            lengths.append(table.lengths[at:end])
            full_lengths.append(table.full_lengths[at:end])
            names += table.sample_ids[at:end]
            if end < len(table):
                break
            self._table, self._at = next(self._tables, None), 0
        return np.concatenate(indices), np.concatenate(lengths), np.concatenate(full_lengths), names


@dataclass(frozen=True)
class KnownDocuments:
    """The samples before a certain one.

    Attributes:
      names: of those that have a token.
      last: id of the one behind them.
    """

    names: Iterator[str]
    last: str
    _found: list[Sample] = field(default_factory=list)

    def pass_over(self, samples: Iterator[Sample]) -> Iterator[Passed]:
        expected = next(self.names, None)
        for chunk in chunks_of(self._before_last(samples)):
            places: list[int] = []
            for i, sample in enumerate(chunk):
                if sample.sample_id == expected:
                    places.append(i)
                    expected = next(self.names, None)
            lengths = np.ones(len(places), np.int64)  # which nobody counts of documents
            yield Passed(chunk, places, lengths, lengths)
        if expected is not None or not self._found:
            raise other_samples(f"{self.last if expected is None else expected!r} is missing")

    def rest(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        return itertools.chain(self._found, samples)

    def _before_last(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        for sample in samples:
            if sample.sample_id == self.last:
                self._found.append(sample)
                return
            yield sample
