"""The batch plan: which samples are computed together, in which shapes, and where they are stored.

In: tokenised samples and frozen settings. Out: windows of parts, a pure function of the two, so that
the same command makes the same plan whatever devices it finds. Samples are sorted within a window,
longest first (the largest shape is tried first); a *batch* is what file names count, a *part* the unit
of work and commit, a *slab* the compute shape of one device. Few slab shapes are used, chosen by
dynamic programming so that the least is padded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jax_extract.inputs.tokenize import TokenizedSample
from models.positions import Positions

WINDOW_SAMPLES = 65_536
MAX_SHARD_BYTES = 256_000_000
# What starting a slab costs, in tokens: it reads every parameter once. Keeps slabs from becoming tiny.
SLAB_OVERHEAD_TOKENS = 64

Shapes = tuple[tuple[int, int], ...]  # (padded length, rows) of the slabs in use, ascending


@dataclass(frozen=True)
class PlanSettings:
    """What the plan depends on besides the samples; frozen in run.json.

    Attributes:
      samples_per_batch: `batch_size` x devices of the mesh that starts the run.
      rows: most rows of a slab (`batch_size`).
      slab_tokens: most tokens of a slab, where a single row is not longer.
      length_multiple: padded lengths are multiples of this.
      max_length: longest sample, in tokens.
      compile_tokens: what one more slab shape must save to be worth compiling.
      max_shapes: how many slab shapes may be used at most.
      positions: which positions are stored.
      bytes_per_row: of the widest hook point, in the stored dtype.
      hosts: processes of the program that starts the run. They compute a part each, and sit out what others
        compute in another shape, so with many of them a shape must serve more parts.
      max_shard_bytes: size of one shard's array at which a batch is cut into parts.
    """

    samples_per_batch: int
    rows: int
    slab_tokens: int
    length_multiple: int
    max_length: int
    positions: Positions
    bytes_per_row: int
    compile_tokens: int = 0
    max_shapes: int = 16
    hosts: int = 1
    max_shard_bytes: int = MAX_SHARD_BYTES

    def row_choices(self, length: int) -> list[int]:
        """Rows that a slab of this padded length may have: divisors of `rows`, so that slabs fill batches evenly."""
        most = max(1, min(self.rows, self.slab_tokens // length))
        return [r for r in range(most, 0, -1) if self.rows % r == 0]

    def padded(self, length: int) -> int:
        return -(-length // self.length_multiple) * self.length_multiple

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "positions": str(self.positions)}


@dataclass(frozen=True)
class Slab:
    """What one device computes at once: `count` samples of a part from `first` on, in [rows, length]."""

    rows: int
    length: int
    first: int
    count: int


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
        total = hashlib.sha256(json.dumps([self.key, [dataclasses.astuple(s) for s in self.slabs]]).encode())
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
    digest = hashlib.sha256(json.dumps(settings.as_json(), sort_keys=True).encode()).hexdigest()
    batch = 1
    stream = iter(samples)
    following = list(itertools.islice(stream, window_samples))
    for number in itertools.count():
        window, following = following, list(itertools.islice(stream, window_samples))
        if not window:
            return
        ordered = sorted(window, key=lambda s: (-s.length, s.sample_index))
        if not shapes:
            shapes = choose_shapes([s.length for s in ordered], settings, more_to_come=bool(following))
        parts = tuple(_parts(ordered, settings, shapes, batch))
        batch = parts[-1].batch + 1
        digest = hashlib.sha256("".join([digest, *(part.digest for part in parts)]).encode()).hexdigest()
        yield Window(number, parts, shapes, digest, not following)


def choose_shapes(longest_first: list[int], settings: PlanSettings, more_to_come: bool = False) -> Shapes:
    """The slab shapes in which the least is computed: at most `max_shapes`, and none that does not pay.

    Exact dynamic programming over runs of samples that share a shape. A run [i, j) has the padded length
    of its first sample and the rows that suit it best; it costs whole steps of a slab on every device.
    `more_to_come` adds the maximum length, so that every later sample fits.
    """
    padded = np.array([settings.padded(n) for n in longest_first])
    starts = np.flatnonzero(np.diff(padded, prepend=-1))
    needs = padded[starts]
    cost, rows = _run_costs(starts, np.append(starts, len(padded)), needs, settings)
    groups = len(needs)
    best = np.full(groups + 1, np.inf)
    best[0] = 0.0
    choices: list[np.ndarray] = []
    totals: list[float] = []
    for _ in range(min(max(1, settings.max_shapes - more_to_come), groups)):
        through = best[:groups, None] + cost
        choices.append(through.argmin(axis=0))
        best = through.min(axis=0)
        totals.append(float(best[groups]) + len(choices) * settings.compile_tokens)
    shapes: dict[int, int] = {}
    end = groups
    for choice in reversed(choices[: int(np.argmin(totals)) + 1]):
        start = int(choice[end])
        shapes[int(needs[start])] = int(rows[start, end])
        end = start
    if more_to_come:
        longest = settings.padded(settings.max_length)
        shapes.setdefault(longest, settings.row_choices(longest)[0])
    return tuple(sorted(shapes.items()))


def _run_costs(
    starts: np.ndarray, ends: np.ndarray, needs: np.ndarray, settings: PlanSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Of every run of samples [starts[i], ends[j]): (cost in slab tokens, best rows); inf where it is empty."""
    batch = settings.samples_per_batch
    per_batch = max(1, batch // settings.rows)
    slabs_at_once = settings.hosts * per_batch
    # Parts of two shapes put hosts out of step: until the shape changes, on average, for half a part each.
    idle = (settings.hosts - 1) * per_batch // 2
    cost = np.full((len(starts), len(ends)), np.inf)
    rows = np.ones(cost.shape, np.int64)
    for i, (start, length) in enumerate(zip(starts, needs, strict=True)):
        # A slab does not cross batches: the run's share of its first and last batch is rounded up on its own.
        head = np.minimum(ends, -(-(start + 1) // batch) * batch) - start
        tail = np.where(ends - start > head, (ends - start - head) % batch, 0)
        whole = ends - start - head - tail
        for r in settings.row_choices(int(length)):
            slabs = -(-head // r) + whole // r - (-tail // r)
            total = (-(-slabs // slabs_at_once) * slabs_at_once + idle) * (r * length + SLAB_OVERHEAD_TOKENS)
            better = (ends > start) & (total < cost[i])
            cost[i][better], rows[i][better] = total[better], r
    return cost, rows


def _parts(ordered: list[TokenizedSample], settings: PlanSettings, shapes: Shapes, first_batch: int) -> Iterator[Part]:
    for number, start in enumerate(range(0, len(ordered), settings.samples_per_batch), first_batch):
        cuts = _cut(ordered[start : start + settings.samples_per_batch], settings)
        for k, samples in enumerate(cuts, 1):
            yield Part(number, k, len(cuts), tuple(samples), tuple(_slabs(samples, shapes)))


def _cut(batch: list[TokenizedSample], settings: PlanSettings) -> list[list[TokenizedSample]]:
    """A batch in parts whose largest shard stays below the limit, cut between whole slabs where possible."""
    if settings.positions.one_row_per_sample:
        return [batch]
    cuts: list[list[TokenizedSample]] = [[]]
    size = 0
    for sample in batch:
        more = settings.positions.rows(sample.length) * settings.bytes_per_row
        if cuts[-1] and size + more > settings.max_shard_bytes:
            whole = len(cuts[-1]) // settings.rows * settings.rows or len(cuts[-1])
            cuts.append(cuts[-1][whole:])
            del cuts[-2][whole:]
            size = sum(settings.positions.rows(s.length) * settings.bytes_per_row for s in cuts[-1])
        cuts[-1].append(sample)
        size += more
    return cuts


def _slabs(samples: list[TokenizedSample], shapes: Shapes) -> Iterator[Slab]:
    first = 0
    while first < len(samples):
        length, rows = next(shape for shape in shapes if shape[0] >= samples[first].length)
        count = min(rows, len(samples) - first)
        yield Slab(rows, length, first, count)
        first += count
