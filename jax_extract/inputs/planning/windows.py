"""The batch plan: which samples are computed together, in which shapes, and where they are stored.

In: tokenised samples and frozen settings. Out: windows of parts, a pure function of the two, so that the same command
makes the same plan whatever devices it finds. A *batch* is what file names count, a *part* the unit of commit, a *slab*
what one device computes at once. Batches, parts and slabs are all cut from one order of the samples: slabs where
they leave no device idle (`rows`), batches and parts where the user and the storage want them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from jax_extract.inputs.planning.lanes import pack_for_all
from jax_extract.inputs.planning.slabs import FilledSlab, PlanSettings, Shapes, Slab, SlabShape
from jax_extract.inputs.planning.within_batches.packed import packed_batches, packed_slabs
from jax_extract.inputs.planning.within_batches.padded import padded_batches, padded_slabs
from jax_extract.inputs.token_table import TokenizedSample, TokenTable, windows_of

WINDOW_SAMPLES = 65_536
_CHUNK = 1_024


@dataclass(frozen=True, eq=False)
class Arrangement:
    """A window's samples in the order of the plan, and the slabs that they fill one behind the other.

    Attributes:
      table: the samples in the order of the input.
      order: int64 [samples]: which of them comes at each place.
      slabs: `first` is a place in `order`.
    """

    table: TokenTable
    order: np.ndarray
    slabs: tuple[Slab, ...]

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [samples], tokens at each place."""
        return self.table.lengths[self.order]

    @cached_property
    def bounds(self) -> array[int]:
        """[slabs + 1]: slab i has the places bounds[i] to bounds[i + 1]."""
        return array("q", [*(slab.first for slab in self.slabs), len(self.order)])

    def slabs_of(self, start: int, stop: int) -> range:
        """Numbers of the slabs that hold the samples at these places, or some of them."""
        return range(bisect_right(self.bounds, start) - 1, bisect_left(self.bounds, stop))

    def sample_at(self, place: int) -> TokenizedSample:
        return self.table[int(self.order[place])]

    def tokens_at(self, place: int) -> np.ndarray:
        """int32 [length] of the sample at a place."""
        return self.table.tokens_of(self.order[place])


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """The unit of commit: the samples at the places `start` to `stop` of an arrangement, and of their rows the order.

    A plan may have a hundred thousand of them, so they hold nothing else.

    Attributes:
      batch: counts from 1.
      part: counts from 1 within its batch.
      parts_in_batch: how many there are.
      version: of the plan.
      sha256: of the digest, 32 bytes; made when it is first asked for, where it is not known.
    """

    batch: int
    part: int
    parts_in_batch: int
    arrangement: Arrangement
    start: int
    stop: int
    version: int
    sha256: bytes = field(default=b"", repr=False)

    @property
    def digest(self) -> str:
        """sha256 over everything that decides the part's rows, but the model; of whole slabs, their other samples too.

        Those of other parts count by where they lie, as far as the part's own digest goes, and by what they are in
        the digest of the window.
        """
        if not self.sha256:
            made = part_digest(self.version, self.key, self.slabs, self.table)
            object.__setattr__(self, "sha256", bytes.fromhex(made))
        return self.sha256.hex()

    @property
    def key(self) -> tuple[int, int]:
        return self.batch, self.part

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def slab_numbers(self) -> range:
        """In the arrangement, of the slabs that hold samples of it."""
        return self.arrangement.slabs_of(self.start, self.stop)

    @property
    def slabs(self) -> list[Slab]:
        """Those that hold samples of it, as seen from its first one; the first may begin before that, below 0."""
        slabs = self.arrangement.slabs
        return [Slab(slabs[i].shape, slabs[i].first - self.start, slabs[i].counts) for i in self.slab_numbers]

    @property
    def table(self) -> TokenTable:
        """Its samples in their order."""
        return self.arrangement.table.take(self.arrangement.order[self.start : self.stop])

    @property
    def lengths(self) -> np.ndarray:
        """int64 [samples], tokens."""
        return self.arrangement.lengths[self.start : self.stop]

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())


@dataclass(frozen=True, eq=False)
class Window:
    """Up to 65,536 samples, planned together; `digest` chains over all windows up to this one.

    `is_last` where the input ended with it.
    """

    number: int
    arrangement: Arrangement
    parts: tuple[Part, ...]
    shapes: Shapes
    digest: str
    is_last: bool


def plan_windows(
    samples: Iterable[TokenizedSample], settings: PlanSettings, window_samples: int = WINDOW_SAMPLES
) -> Iterator[Window]:
    """Plans lazily, a window at a time."""
    stream = iter(samples)
    tables = map(TokenTable.of, iter(lambda: list(itertools.islice(stream, _CHUNK)), []))
    return plan_tables(windows_of(tables, window_samples), settings)


def plan_tables(tables: Iterable[tuple[TokenTable, bool]], settings: PlanSettings) -> Iterator[Window]:
    """The same of windows that are tables, each with whether it is the last one."""
    planner = WindowPlanner(settings)
    return (planner.window(table, is_last) for table, is_last in tables)


class WindowPlanner:
    """Plans windows one after the other; holds what a window must know of those before it.

    That is how many batches they have, the slab shapes, which are those that suit the first one, and their digest.
    """

    def __init__(self, settings: PlanSettings) -> None:
        self._settings = settings
        self._number = 0
        self._batches = 0
        self._shapes: Shapes = ()
        self._digest = hashlib.sha256(json.dumps(settings.as_json(), sort_keys=True).encode()).hexdigest()

    def window(self, table: TokenTable, is_last: bool, digests: Sequence[bytes] = ()) -> Window:
        """The next one.

        Args:
          digests: of its parts, 32 bytes each, where they are known: then no token is looked at.
        """
        settings = self._settings
        arranged = _arranged if settings.version > 1 else _arranged_within_batches
        arrangement, self._shapes, cuts = arranged(table, settings, self._shapes, not is_last)
        places = (
            (batch, part, len(bounds) - 1, start, stop)
            for batch, bounds in enumerate(cuts, self._batches + 1)
            for part, (start, stop) in enumerate(itertools.pairwise(bounds), 1)
        )
        known = itertools.chain(digests, itertools.repeat(b""))
        parts = tuple(
            Part(batch, part, of, arrangement, start, stop, settings.version, digest)
            for (batch, part, of, start, stop), digest in zip(places, known, strict=False)
        )
        self._batches += len(cuts)
        self._digest = hashlib.sha256("".join([self._digest, *(part.digest for part in parts)]).encode()).hexdigest()
        number, self._number = self._number, self._number + 1
        return Window(number, arrangement, parts, self._shapes, self._digest, is_last)

    def pass_over(self, batches: int, digest: str) -> None:
        """A window after the first that need not be planned any more.

        Args:
          batches: in it and in all before it.
          digest: its own.
        """
        self._number += 1
        self._batches, self._digest = batches, digest


def layout_digest(window: Window) -> str:
    """sha256 over where a window's samples lie: their order, slabs and parts. With their content it decides digests."""
    arrangement = window.arrangement
    total = hashlib.sha256(arrangement.order.astype("<i8").tobytes())
    for slab in arrangement.slabs:
        total.update(np.array([*slab.shape, slab.first, len(slab.counts), *slab.counts], "<i8").tobytes())
    places = [(p.batch, p.part, p.parts_in_batch, p.start, p.stop) for p in window.parts]
    total.update(np.array(places, "<i8").tobytes())
    return total.hexdigest()


def slabs_of(batches: list[list[TokenizedSample]], settings: PlanSettings) -> tuple[Shapes, list[list[FilledSlab]]]:
    """Batches that somebody else has made, the longest samples first, in slabs; and the shapes that these have."""
    return (packed_slabs if settings.packed else padded_slabs)(batches, settings)


def shapes_of(parts: Iterable[Part]) -> set[SlabShape]:
    """That slabs of these parts have."""
    return {part.arrangement.slabs[number].shape for part in parts for number in part.slab_numbers}


def part_digest(version: int, key: tuple[int, int], slabs: Sequence[Slab], samples: TokenTable) -> str:
    """sha256 over a part: its place, where its samples lie in slabs as seen from the first one, and what they are."""
    total = hashlib.sha256(json.dumps([key, [slab.as_json() for slab in slabs]]).encode())
    if version == 1:
        for sample in samples:
            total.update(json.dumps([sample.sample_index, sample.sample_id, sample.full_length]).encode())
            total.update(sample.token_ids.tobytes())
        return total.hexdigest()
    names = [name.encode("utf-8", "surrogatepass") for name in samples.sample_ids]
    for numbers in (samples.sample_indices, samples.full_lengths, samples.lengths, [len(name) for name in names]):
        total.update(np.asarray(numbers, "<i8").tobytes())
    total.update(b"".join(names))
    total.update(samples.token_ids.astype("<i4", copy=False).tobytes())
    return total.hexdigest()


Cuts = list[list[int]]  # of each batch, the places where its parts begin, and where the last one ends


def _arranged(
    table: TokenTable, settings: PlanSettings, shapes: Shapes, more_to_come: bool
) -> tuple[Arrangement, Shapes, Cuts]:
    packed = pack_for_all(table.lengths, settings, shapes, more_to_come)
    arrangement = Arrangement(table, packed.order, packed.slabs)
    size = settings.samples_per_batch
    batches = [(start, min(start + size, len(table))) for start in range(0, len(table), size)]
    return arrangement, packed.shapes, [_cut(arrangement, start, stop, settings) for start, stop in batches]


def _cut(arrangement: Arrangement, start: int, stop: int, settings: PlanSettings) -> list[int]:
    """The parts of a batch: cut between slabs, so that their largest shard stays below the limit.

    Where a part's slabs belong to one host, a part has as many of one shape as the host has devices at most, and a slab
    that is shared with another batch makes a part of its own, which goes to the host of the other part.
    """
    if settings.positions.one_row_per_sample:
        return [start, stop]
    cuts, size, count, before = [start], 0, 0, None
    for number in arrangement.slabs_of(start, stop):
        slab = arrangement.slabs[number]
        first, last = max(start, slab.first), min(stop, slab.first + slab.count)
        more = settings.bytes_per_row * int(settings.positions.rows_of(arrangement.lengths[first:last]).sum())
        shared = (first, last) != (slab.first, slab.first + slab.count)
        apart = settings.rows_stay and (count == settings.devices_of_host or shared or before != slab.shape)
        if first > cuts[-1] and (size + more > settings.max_shard_bytes or apart):
            cuts.append(first)
            size = count = 0
        size, count, before = size + more, count + 1, None if shared else slab.shape
    return [*cuts, stop]


def _arranged_within_batches(
    table: TokenTable, settings: PlanSettings, shapes: Shapes, more_to_come: bool
) -> tuple[Arrangement, Shapes, Cuts]:
    """As runs of version 1 are planned."""
    samples = list(table)
    place = {id(sample): i for i, sample in enumerate(samples)}
    arrange = packed_batches if settings.packed else padded_batches
    shapes, batches = arrange(samples, settings, shapes, more_to_come)
    order: list[int] = []
    slabs: list[Slab] = []
    cuts: Cuts = []
    for batch in batches:
        cuts.append([len(order)])
        size = 0
        for shape, rows in batch:
            members = [sample for row in rows for sample in row]
            more = sum(settings.positions.rows(s.length) for s in members) * settings.bytes_per_row
            whole = settings.positions.one_row_per_sample
            if len(order) > cuts[-1][-1] and size + more > settings.max_shard_bytes and not whole:
                cuts[-1].append(len(order))
                size = 0
            slabs.append(Slab(shape, len(order), tuple(map(len, rows))))
            order += [place[id(sample)] for sample in members]
            size += more
        cuts[-1].append(len(order))
    return Arrangement(table, np.array(order, np.int64), tuple(slabs)), shapes, cuts
