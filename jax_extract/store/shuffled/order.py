"""The order in which a run's rows come out shuffled: a pure function of seed, epoch, shard and sizes.

In: how many rows each part has, what a row weighs, how much memory there is. Out: what is read one after
the other, and for every row read when it comes out.

Rows are read in pieces: ranges of one part's rows that begin and end where checksum blocks do. An epoch
takes all pieces in random order; this stream is divided among the shards, and cut into groups of about
equal size. The rows of group g are spread evenly over the windows g - reach to g + reach, and the rows of
a window come out in random order. So every row waits in memory for a random time, and the rows that come
out together were read over twice the stretch of the stream that fits into memory. Windows that would lie
before the first or after the last are folded back, so that all windows are about equally full.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from jax_extract.errors import UserError
from jax_extract.store.sidecar import BLOCK_BYTES

_GROUPS_IN_MEMORY = 64  # makes the stretch 1.67 times what fits; with endlessly many it would be 1.75 times
_LEAST_PIECES_IN_MEMORY = 8
# Sample index and position of a row. The order depends on it, and states that are stored on the order: the 4 bytes of
# the token id, which came later, are on top.
_WHO_BYTES = 12
_PHASE_BITS = 24


class _Use(IntEnum):
    """What random numbers are for; each use has its own."""

    PIECES = 0
    DEAL = 1
    PHASE = 2
    WINDOW = 3


def _random(count: int, *key: int) -> np.ndarray:
    """uint64 [count] that depend on the key alone.

    Philox's raw numbers stay the same from one version of NumPy to the next; what its `Generator` makes of them may
    change.
    """
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def random_order(count: int, *key: int) -> np.ndarray:
    """int64 [count], a random permutation that depends on the key alone."""
    low = np.uint64((1 << max(count - 1, 0).bit_length()) - 1)
    numbers = (_random(count, *key) & ~low) | np.arange(count, dtype=np.uint64)
    numbers.sort()
    return (numbers & low).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Layout:
    """How a run is cut for shuffling; the same in every epoch and shard.

    Attributes:
      pieces: int64 [pieces, 3]: part, first row, row behind the last; all rows that are kept, in storage order.
      piece_bytes: what reading a piece takes at one site, at most: whole checksum blocks.
      group_rows: rows of a group, about.
      reach: how many windows a row comes out early or late, at most.
      pool_rows: rows in memory at once, at most.
    """

    pieces: np.ndarray
    piece_bytes: int
    group_rows: int
    reach: int
    pool_rows: int

    @property
    def rows(self) -> int:
        return int((self.pieces[:, 2] - self.pieces[:, 1]).sum())

    @classmethod
    def of(
        cls,
        part_rows: Sequence[int],
        row_bytes: int,
        sites: int,
        buffer_bytes: int,
        read_bytes: int,
        shards: int,
        kept_before: Callable[[int, np.ndarray], np.ndarray] | None = None,
    ) -> Layout:
        """Cuts parts of so many rows, of `row_bytes` at each of the sites; UserError where the buffer is too small.

        With `kept_before`, which says how many rows of a part are kept before each of its rows, only kept rows count.

        An eighth of `buffer_bytes` is for what is being read, the rest for rows that wait.
        """
        pool = buffer_bytes * 7 // 8 // (sites * row_bytes + _WHO_BYTES)
        blocks = _piece_blocks(row_bytes, pool, read_bytes)
        pieces = np.array([piece for part, n in enumerate(part_rows) for piece in _cut(part, n, row_bytes, blocks)])
        if kept_before is not None:
            pieces = _kept_only(pieces, kept_before)
        longest = int((pieces[:, 2] - pieces[:, 1]).max())
        group = max(pool // _GROUPS_IN_MEMORY, longest)
        # What waits is half of 2 reach + 1 groups, a piece more at either end, and two rows a group because whole
        # rows are dealt. The eighth that is left is for reading ahead.
        reach = (pool * 7 // 8 - 2 * longest) // (group + 2) - 1
        most = -(-int((pieces[:, 2] - pieces[:, 1]).sum()) // shards)
        if most > pool and reach < 1:
            least = math.ceil((4 * longest + 5) * 8 / 7) * (sites * row_bytes + _WHO_BYTES) * 8 / 7
            raise UserError(
                f"buffer_bytes={buffer_bytes} is too small to shuffle rows of {sites * row_bytes} bytes that are read "
                f"{longest} at a time; give at least {math.ceil(least)}"
            )
        piece_bytes = (blocks + 1 + row_bytes // BLOCK_BYTES) * BLOCK_BYTES
        return cls(pieces, piece_bytes, group, max(reach, 0), min(pool, most))


def _piece_blocks(row_bytes: int, pool_rows: int, read_bytes: int) -> int:
    """How many checksum blocks make a piece.

    Every `period` blocks a row begins with a block, and pieces of such lengths share no block. Where that is too
    long, the block in which two pieces meet is read for both, so pieces are made longer than asked for.
    """
    period = row_bytes // math.gcd(row_bytes, BLOCK_BYTES)
    wanted = max(1, read_bytes // BLOCK_BYTES)
    blocks = period * max(1, round(wanted / period)) if period <= 2 * wanted else 2 * wanted
    most = max(1, pool_rows // _LEAST_PIECES_IN_MEMORY * row_bytes // BLOCK_BYTES)
    return blocks if blocks <= most else most // period * period or most


def _kept_only(pieces: np.ndarray, kept_before: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
    """The same pieces, their bounds counted in rows that are kept; those that keep none are left out."""
    counted = pieces.copy()
    for part in np.unique(pieces[:, 0]).tolist():
        of_part = pieces[:, 0] == part
        counted[of_part, 1:] = kept_before(part, pieces[of_part, 1:])
    return counted[counted[:, 1] < counted[:, 2]]


def _cut(part: int, rows: int, row_bytes: int, blocks: int) -> Iterator[tuple[int, int, int]]:
    """The pieces of one part."""
    starts = range(0, (rows - 1) * row_bytes + 1, blocks * BLOCK_BYTES) if rows else ()
    bounds = [*dict.fromkeys(-(-start // row_bytes) for start in starts), rows]
    return ((part, start, stop) for start, stop in itertools.pairwise(bounds))


class Epoch:
    """One shard's rows of one epoch.

    Attributes:
      rows: how many.
      fits: whether all of them can be in memory at once; then they are one window, in a uniformly random order.
      groups, windows: how many of each.
    """

    def __init__(self, layout: Layout, seed: int, epoch: int, shard: tuple[int, int]) -> None:
        index, count = shard
        first, end = layout.rows * index // count, layout.rows * (index + 1) // count
        self.rows = end - first
        self.fits = self.rows <= layout.pool_rows
        # A shard that fits has the same rows in every epoch, so that they need not be read again.
        pieces = layout.pieces[random_order(len(layout.pieces), seed, 0 if self.fits else epoch, _Use.PIECES)]
        ends = np.cumsum(pieces[:, 2] - pieces[:, 1])
        starts = ends - (pieces[:, 2] - pieces[:, 1])
        mine = (ends > first) & (starts < end)
        pieces, starts, ends = pieces[mine], starts[mine], ends[mine]
        pieces[:, 1] += np.maximum(first - starts, 0)  # the pieces in which shards meet are cut in two
        pieces[:, 2] -= np.maximum(ends - end, 0)
        group = np.maximum(starts - first, 0) // layout.group_rows
        self.groups = int(group[-1]) + 1 if len(group) else 0
        self.windows = min(self.groups, 1) if self.fits else self.groups
        self._pieces = pieces
        self._bounds = np.searchsorted(group, np.arange(self.groups + 1))
        self._reach = layout.reach
        self._key = (seed, epoch, index, count)

    def pieces(self, group: int) -> np.ndarray:
        """int64 [pieces, 3] of a group: part, first row, row behind the last."""
        return self._pieces[self._bounds[group] : self._bounds[group + 1]]

    def group_rows(self, group: int) -> int:
        pieces = self.pieces(group)
        return int((pieces[:, 2] - pieces[:, 1]).sum())

    def first_group(self, window: int) -> int:
        """The first group that has rows in this window or in a later one."""
        return 0 if self.fits else max(window - self._reach, 0)

    def last_group(self, window: int) -> int:
        """The group with which the window is complete."""
        return self.groups - 1 if self.fits else min(window + self._reach, self.groups - 1)

    def deal(self, group: int) -> Iterator[tuple[int, np.ndarray]]:
        """Windows, and which rows of the group, counted through its pieces, come out in them."""
        rows = self.group_rows(group)
        if self.fits:
            yield 0, np.arange(rows)
            return
        order = random_order(rows, *self._key, _Use.DEAL, group)
        phase = int(_random(1, *self._key, _Use.PHASE, group)[0]) >> (64 - _PHASE_BITS)
        # Row i of that order goes to the place (i + phase) / rows of the spread, 0 <= phase < 1. So every window
        # gets its share to within a row, which bounds the memory, and every row can go everywhere.
        spread = 2 * self._reach + 1
        scaled = (np.arange(spread + 1) * rows << _PHASE_BITS) - phase * spread
        bounds = np.clip(-(-scaled // (spread << _PHASE_BITS)), 0, rows)
        for place, (start, stop) in enumerate(itertools.pairwise(bounds.tolist())):
            if start < stop:
                yield self._folded(group - self._reach + place), order[start:stop]

    def _folded(self, window: int) -> int:
        if window < 0:
            return -1 - window
        return window if window < self.windows else 2 * self.windows - 1 - window

    def order(self, window: int, rows: int) -> np.ndarray:
        """int64 [rows]: in which order the rows of a window come out."""
        return random_order(rows, *self._key, _Use.WINDOW, window)
