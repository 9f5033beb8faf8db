"""Samples in rows, rows in slabs, slabs in steps that leave no device idle.

In: how long samples are, and the settings of a plan. Out: `Packed`: the order in which samples are computed and
stored, and the slabs that they fill, one behind the other. Which batch a sample is stored in follows from the order:
slabs do not ask for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jax_extract.inputs.planning.slabs import PlanSettings, Shapes, Slab


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
    raise NotImplementedError
