"""Samples in rows, rows in slabs, slabs in steps that leave no device idle.

In: how long samples are, and the settings of a plan. Out: `Packed`: the order in which samples are computed and
stored, and the slabs that they fill, one behind the other. Which batch a sample is stored in follows from the order:
slabs do not ask for it. Shapes are chosen by `shapes`, rows are filled by `filling`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jax_extract.inputs.planning.filling import Supply
from jax_extract.inputs.planning.shapes import cheapest_lengths, cheapest_of_given
from jax_extract.inputs.planning.slabs import PlanSettings, Shapes, Slab, SlabShape
from jax_extract.inputs.planning.stages import Limits, Stage, stages_of


@dataclass(frozen=True, eq=False)
class Packed:
    """Attributes:
    order: int64 [samples]: which sample comes at each place.
    slabs: in the order in which they are computed, those of one shape together, the longest rows first; `first`
      is a place in `order`, and each slab begins where the one before it ends.
    shapes: that a slab may have, ascending.
    """

    order: np.ndarray
    slabs: tuple[Slab, ...]
    shapes: Shapes


def pack(lengths: np.ndarray, settings: PlanSettings, shapes: Shapes = (), more_to_come: bool = False) -> Packed:
    """Places samples of these lengths (int64 [samples], tokens).

    Args:
      shapes: those of the windows before, where there were any: no others may be used.
      more_to_come: later windows will have to do with these shapes, so one of them takes the longest sample allowed.
    """
    by_length = np.argsort(lengths, kind="stable")
    ascending = lengths[by_length]
    limits = Limits(settings, int(ascending[-1]))
    if shapes:
        chosen = cheapest_of_given(ascending, limits, shapes)
    else:
        reserved = more_to_come and limits.shortest_row < settings.padded(settings.max_length)
        chosen = cheapest_lengths(ascending, limits, settings.max_shapes - reserved)
    stages = stages_of(chosen, Supply(ascending), limits, shapes)
    given = {shape.length: shape for shape in shapes}
    used = [given.get(stage.length) or _shape(stage, settings) for stage in stages]
    slabs = tuple(_slabs(stages, used))
    if not shapes:
        shapes = tuple(sorted([*used, *(_for_the_longest(used, settings, lengths) if more_to_come else [])]))
    return Packed(_order(stages, by_length), slabs, shapes)


def _shape(stage: Stage, settings: PlanSettings) -> SlabShape:
    return SlabShape(stage.length, stage.rows, _rounded(stage.samples, settings))


def _rounded(samples: int, settings: PlanSettings) -> int:
    """Samples of a row that are compiled for, so that rows of a later window find room."""
    return settings.samples_a_row or 1 << (samples - 1).bit_length()


def _for_the_longest(used: list[SlabShape], settings: PlanSettings, lengths: np.ndarray) -> Iterator[SlabShape]:
    """A shape for samples of a later window that are longer than those of the first, where one is missing."""
    length = settings.padded(settings.max_length)
    if used[0].length < length:
        yield SlabShape(length, 1, _rounded(-(-length * len(lengths) // int(lengths.sum())), settings))


def _slabs(stages: list[Stage], shapes: list[SlabShape]) -> Iterator[Slab]:
    first = 0
    for stage, shape in zip(stages, shapes, strict=True):
        counts = itertools.chain.from_iterable(itertools.repeat(rows.samples, rows.number) for rows in stage.filled)
        while slab := tuple(itertools.islice(counts, shape.rows)):
            yield Slab(shape, first, slab)
            first += sum(slab)


def _order(stages: list[Stage], by_length: np.ndarray) -> np.ndarray:
    """Which sample comes at each place; of those of one length the first ones come first."""
    placed: list[int] = []  # tokens of the sample at each place
    for rows in itertools.chain.from_iterable(stage.filled for stage in stages):
        row: list[int] = []
        for count, size in rows.pieces:
            row += [size] * count
        placed += row * rows.number
    order = np.empty(len(by_length), np.int64)
    order[np.argsort(np.array(placed), kind="stable")] = by_length
    return order
