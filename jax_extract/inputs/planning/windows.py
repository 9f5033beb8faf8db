"""The batch plan: which samples are computed together, in which shapes, and where they are stored.

In: tokenised samples and frozen settings. Out: windows of parts, a pure function of the two, so that
the same command makes the same plan whatever devices it finds. A *batch* is what file names count, a
*part* the unit of work and commit, a *slab* what one device computes at once. How samples fill slabs is
decided by `packed` or `padded`; the longest slabs come first.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from jax_extract.inputs.planning.slabs import FilledSlab, PlanSettings, Shapes, Slab
from jax_extract.inputs.planning.within_batches.packed import packed_batches, packed_slabs
from jax_extract.inputs.planning.within_batches.padded import padded_batches, padded_slabs
from jax_extract.inputs.token_table import TokenizedSample

WINDOW_SAMPLES = 65_536


@dataclass(frozen=True)
class Part:
    """The unit of work. `batch` counts from 1, `part` from 1 within its batch."""

    batch: int
    part: int
    parts_in_batch: int
    samples: tuple[TokenizedSample, ...]
    slabs: tuple[Slab, ...]

    @cached_property
    def digest(self) -> str:
        """sha256 over everything that decides the part's rows, but the model."""
        total = hashlib.sha256(json.dumps([self.key, [slab.as_json() for slab in self.slabs]]).encode())
        for sample in self.samples:
            total.update(json.dumps([sample.sample_index, sample.sample_id, sample.full_length]).encode())
            total.update(sample.token_ids.tobytes())
        return total.hexdigest()

    @property
    def key(self) -> tuple[int, int]:
        return self.batch, self.part

    @property
    def tokens(self) -> int:
        return sum(sample.length for sample in self.samples)


@dataclass(frozen=True)
class Window:
    """Up to 65,536 samples, planned together; `digest` chains over all windows up to this one.

    `is_last` where the input ended with it.
    """

    number: int
    parts: tuple[Part, ...]
    shapes: Shapes
    digest: str
    is_last: bool


def plan_windows(
    samples: Iterable[TokenizedSample], settings: PlanSettings, window_samples: int = WINDOW_SAMPLES
) -> Iterator[Window]:
    """Plans lazily, a window at a time; the slab shapes are those that suit the first window."""
    shapes: Shapes = ()
    arrange = packed_batches if settings.packed else padded_batches
    digest = hashlib.sha256(json.dumps(settings.as_json(), sort_keys=True).encode()).hexdigest()
    batch = 1
    stream = iter(samples)
    following = list(itertools.islice(stream, window_samples))
    for number in itertools.count():
        window, following = following, list(itertools.islice(stream, window_samples))
        if not window:
            return
        shapes, batches = arrange(window, settings, shapes, more_to_come=bool(following))
        parts = tuple(part for number, slabs in enumerate(batches, batch) for part in _parts(number, slabs, settings))
        batch += len(batches)
        digest = hashlib.sha256("".join([digest, *(part.digest for part in parts)]).encode()).hexdigest()
        yield Window(number, parts, shapes, digest, not following)


def slabs_of(batches: list[list[TokenizedSample]], settings: PlanSettings) -> tuple[Shapes, list[list[FilledSlab]]]:
    """Batches that somebody else has made, the longest samples first, in slabs; and the shapes that these have."""
    return (packed_slabs if settings.packed else padded_slabs)(batches, settings)


def _parts(batch: int, slabs: list[FilledSlab], settings: PlanSettings) -> Iterator[Part]:
    """A batch in parts whose largest shard stays below the limit, cut between whole slabs."""
    cuts: list[list[FilledSlab]] = [[]]
    size = 0
    for slab in slabs:
        more = sum(settings.positions.rows(s.length) for row in slab[1] for s in row) * settings.bytes_per_row
        if cuts[-1] and size + more > settings.max_shard_bytes and not settings.positions.one_row_per_sample:
            cuts.append([])
            size = 0
        cuts[-1].append(slab)
        size += more
    for number, cut in enumerate(cuts, 1):
        yield _part(batch, number, len(cuts), cut)


def _part(batch: int, number: int, parts_in_batch: int, filled: list[FilledSlab]) -> Part:
    samples: list[TokenizedSample] = []
    slabs: list[Slab] = []
    for shape, rows in filled:
        slabs.append(Slab(shape, len(samples), tuple(map(len, rows))))
        samples.extend(sample for row in rows for sample in row)
    return Part(batch, number, parts_in_batch, tuple(samples), tuple(slabs))
