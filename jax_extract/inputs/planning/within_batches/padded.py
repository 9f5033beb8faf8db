"""Slabs of samples of similar length, each in a row of its own that is padded.

In: a window of samples. Out: shapes and batches of filled slabs. What accelerators compute: their
attention kernels take whole rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jax_extract.inputs.planning.slabs import (
    SLAB_OVERHEAD_TOKENS,
    FilledSlab,
    PlanSettings,
    Shapes,
    SlabShape,
    cheapest_runs,
)
from jax_extract.inputs.token_table import TokenizedSample


def padded_batches(
    samples: list[TokenizedSample], settings: PlanSettings, shapes: Shapes, more_to_come: bool
) -> tuple[Shapes, list[list[FilledSlab]]]:
    """Longest samples first; `shapes` are those of the windows before, if there were any."""
    ordered = sorted(samples, key=lambda s: (-s.length, s.sample_index))
    shapes = shapes or _choose_shapes([s.length for s in ordered], settings, more_to_come)
    size = settings.samples_per_batch
    return shapes, [list(_slabs(ordered[at : at + size], shapes)) for at in range(0, len(ordered), size)]


def padded_slabs(batches: list[list[TokenizedSample]], settings: PlanSettings) -> tuple[Shapes, list[list[FilledSlab]]]:
    """Batches as they are given, the longest samples first, each in slabs of its own."""
    shapes = _choose_shapes([sample.length for batch in batches for sample in batch], settings, more_to_come=False)
    return shapes, [list(_slabs(batch, shapes)) for batch in batches]


def _slabs(batch: list[TokenizedSample], shapes: Shapes) -> Iterator[FilledSlab]:
    first = 0
    while first < len(batch):
        shape = next(shape for shape in shapes if shape.length >= batch[first].length)
        yield shape, [[sample] for sample in batch[first : first + shape.rows]]
        first += shape.rows


def _row_choices(settings: PlanSettings, length: int) -> list[int]:
    """Rows that a slab of this padded length may have: divisors of `rows`, so that slabs fill batches evenly."""
    most = max(1, min(settings.rows, settings.most_tokens() // length))
    return [r for r in range(most, 0, -1) if settings.rows % r == 0]


def _choose_shapes(longest_first: list[int], settings: PlanSettings, more_to_come: bool) -> Shapes:
    """The slab shapes in which the least is computed: at most `max_shapes`, and none that does not pay.

    A run of samples that share a shape has the padded length of its first sample and the rows that suit it
    best; it costs whole steps of a slab on every device. `more_to_come` adds the maximum length, so that every
    later sample fits.
    """
    padded = np.array([settings.padded(n) for n in longest_first])
    starts = np.flatnonzero(np.diff(padded, prepend=-1))
    needs = padded[starts]
    cost, rows = _run_costs(starts, np.append(starts, len(padded)), needs, settings)
    runs = cheapest_runs(cost, settings.max_shapes - more_to_come, settings.compile_tokens)
    chosen = {int(needs[start]): int(rows[start, end]) for start, end in runs}
    if more_to_come:
        longest = settings.padded(settings.max_length)
        chosen.setdefault(longest, _row_choices(settings, longest)[0])
    return tuple(SlabShape(length, rows, 1) for length, rows in sorted(chosen.items()))


def _run_costs(
    starts: np.ndarray, ends: np.ndarray, needs: np.ndarray, settings: PlanSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Of every run of samples [starts[i], ends[j]): (cost in slab tokens, best rows); inf where it is empty."""
    batch = settings.samples_per_batch
    per_batch = settings.slabs_at_once
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
        for r in _row_choices(settings, int(length)):
            slabs = -(-head // r) + whole // r - (-tail // r)
            total = (-(-slabs // slabs_at_once) * slabs_at_once + idle) * (r * length + SLAB_OVERHEAD_TOKENS)
            better = (ends > start) & (total < cost[i])
            cost[i][better], rows[i][better] = total[better], r
    return cost, rows
