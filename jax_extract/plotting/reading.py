"""Rows of a run for pictures: whole samples from all over it, no more than are asked for, a layer at a time.

In: a run. Out: `SampledRows`: whose rows they are, and the rows of any site. Memory holds one layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jax_extract.store.file_part import FilePart, StoredPart
from jax_extract.store.parts import Site
from jax_extract.store.reader import Run

_MOST_PARTS = 64  # each is opened once a layer


@dataclass(frozen=True)
class _Stretch:
    """Whole samples of a part, one behind the other: `first` to `last`, that one not among them."""

    part: StoredPart
    first: int
    last: int

    @property
    def rows(self) -> tuple[int, int]:
        offsets = self.part.content.row_offsets
        return int(offsets[self.first]), int(offsets[self.last])


@dataclass(frozen=True, eq=False)
class SampledRows:
    """Attributes:
    rows_in_run, samples_in_run: how many there are altogether.
    """

    stretches: tuple[_Stretch, ...]
    rows_in_run: int
    samples_in_run: int

    @classmethod
    def of(cls, run: Run, most: int, seed: int = 0) -> SampledRows:
        """About `most` rows, at least one sample; all, where the run has no more."""
        counts = [part.record["rows"] if isinstance(part, FilePart) else part.content.rows for part in run.parts]
        samples = sum(
            part.record["samples"] if isinstance(part, FilePart) else len(part.content.sample_ids) for part in run.parts
        )
        if sum(counts) <= most:
            whole = [_Stretch(part, 0, len(part.content.sample_ids)) for part in run.parts]
            return cls(tuple(whole), sum(counts), samples)
        random = np.random.default_rng(seed)
        filled = np.flatnonzero(counts)
        # Parts are ordered by the lengths of their samples: evenly spaced ones have all lengths.
        chosen = filled[np.linspace(0, len(filled) - 1, min(_MOST_PARTS, len(filled))).round().astype(int)]
        share = most / sum(counts[number] for number in chosen)
        found: dict[int, _Stretch] = {}
        taken = 0
        for number in random.permutation(chosen):
            if taken >= most:
                break
            found[number] = stretch = _stretch(run.parts[number], share, random)
            taken += stretch.rows[1] - stretch.rows[0]
        return cls(tuple(found[number] for number in sorted(found)), sum(counts), samples)

    @cached_property
    def positions(self) -> np.ndarray:
        """int32 [rows]; -1 where a row is a mean."""
        return self._of_rows("row_positions")

    @cached_property
    def token_ids(self) -> np.ndarray:
        """int32 [rows]; -1 where a row is a mean."""
        return self._of_rows("row_token_ids")

    @cached_property
    def metas(self) -> list[Mapping[str, Any]]:
        """Of each sample."""
        return [meta for one in self.stretches for meta in one.part.content.meta[one.first : one.last]]

    @cached_property
    def sample_of_row(self) -> np.ndarray:
        """int64 [rows], into `metas`."""
        counts = [np.diff(one.part.content.row_offsets[one.first : one.last + 1]) for one in self.stretches]
        lengths = np.concatenate([*counts, np.zeros(0, np.int64)])
        return np.repeat(np.arange(len(lengths)), lengths)

    def __len__(self) -> int:
        """How many rows."""
        return len(self.positions)

    def rows(self, site: Site) -> np.ndarray:
        """float32 [rows, width]."""
        read = [one.part.rows(site, *one.rows).astype(np.float32) for one in self.stretches]
        return np.concatenate([*read, np.zeros((0, site.width), np.float32)])

    def _of_rows(self, name: str) -> np.ndarray:
        found = [getattr(one.part.content, name)[slice(*one.rows)] for one in self.stretches]
        return np.concatenate([*found, np.zeros(0, np.int32)])


def _stretch(part: StoredPart, share: float, random: np.random.Generator) -> _Stretch:
    """Samples with about that share of the part's rows, beginning anywhere."""
    offsets = part.content.row_offsets
    wanted = share * int(offsets[-1])
    start = random.uniform(0, int(offsets[-1]) - wanted)
    first = int(np.searchsorted(offsets, start, side="right")) - 1
    last = int(np.searchsorted(offsets, offsets[first] + wanted))
    return _Stretch(part, first, min(last, len(offsets) - 1))
