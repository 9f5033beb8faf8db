"""Samples whose tokens are known already: they are read and counted, and not tokenised.

In: a stream of samples, and the tables of those with which it begins. Out: the rest of the stream, and counts as if all
had been tokenised.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jax_extract.errors import UserError
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.token_table import TokenTable
from jax_extract.inputs.tokenizing.counts import InputCounts
from jax_extract.inputs.tokenizing.encoder import Encoder
from jax_extract.inputs.tokenizing.names import Names
from jax_extract.inputs.tokenizing.pipeline import chunks_of


def pass_over(
    samples: Iterator[Sample],
    known: Sequence[TokenTable],
    encoder: Encoder,
    names: Names,
    counts: InputCounts,
    content_of: Callable[[Sample], str],
) -> int:
    """Takes the known samples from the stream, and says how many there were, those without a token included.

    Args:
      known: of the samples from the first one on; at least one.
      names: takes their ids.
      counts: are filled.
      content_of: what a sample gave, for the counts.

    Raises:
      UserError: the stream has other samples.
    """
    there = _Column(known)
    first, count = 0, int(known[-1].sample_indices[-1]) + 1
    for chunk in chunks_of(itertools.islice(samples, count)):
        ids = [sample.sample_id for sample in chunk]
        names.first_repeated(ids)
        places, lengths, full_lengths, expected = there.take(first + len(chunk))
        with_tokens = (places - first).tolist()
        own = [ids[i] for i in with_tokens]
        if own != expected:
            raise UserError(f"the input has other samples than before, from {ids[0]!r} on")
        for i in sorted(set(range(len(chunk))) - set(with_tokens)):
            counts.leave_out(ids[i])
        opening = encoder.opening
        if opening and (begun := [s for s in chunk if s.token_ids is s.turns is None and s.text.startswith(opening)]):
            counts.take(encoder.encode(encoder.prepare(begun)))
        counts.add_samples(lengths, full_lengths, own, [content_of(chunk[i]) for i in with_tokens])
        first += len(chunk)
    if first < count:
        raise UserError(f"the input ends after {first:,} samples, and had {count:,} at least before")
    return first


class _Column:
    """The tables one behind the other, of which the next ones are taken."""

    def __init__(self, tables: Sequence[TokenTable]) -> None:
        self._tables = list(tables)
        self._at = 0  # sample of the first table

    def take(self, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
        """Those whose places in the input are before `stop`: places, lengths, full lengths, ids."""
        places, lengths, full_lengths = ([np.zeros(0, np.int64)] for _ in range(3))
        ids: list[str] = []
        while self._tables:
            table = self._tables[0]
            end = int(np.searchsorted(table.sample_indices, stop))
            places.append(table.sample_indices[self._at : end])
            lengths.append(table.lengths[self._at : end])
            full_lengths.append(table.full_lengths[self._at : end])
            ids += table.sample_ids[self._at : end]
            self._at = end
            if end < len(table):
                break
            self._tables.pop(0)
            self._at = 0
        return np.concatenate(places), np.concatenate(lengths), np.concatenate(full_lengths), ids
