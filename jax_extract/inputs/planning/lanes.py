"""For how many devices a plan is made: as many as its samples keep busy, whatever devices there are.

In: how long samples are. Out: a power of two. Slabs come in whole steps of so many, so a mesh of that many devices, or
of any power of two below, has work for all of its devices in every step. The devices of the machine do not come into
it: the same command makes the same slabs on one device and on 256, and with them the same bytes.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from jax_extract.inputs.planning.rows import Packed, pack
from jax_extract.inputs.planning.slabs import SLAB_OVERHEAD_TOKENS, PlanSettings, Shapes

_MOST = 256
_BUSY = 0.85  # of what so many devices compute, and of what it costs to start slabs


def pack_for_all(
    lengths: np.ndarray, settings: PlanSettings, shapes: Shapes = (), more_to_come: bool = False
) -> Packed:
    """The plan for the most devices, of 256, 128 … 1, that samples of these lengths (int64 [samples]) keep busy.

    Args:
      shapes, more_to_come: see `pack`.
    """
    tokens, longest = int(lengths.sum()), settings.padded(int(lengths.max()))
    devices = _MOST
    while True:
        # In a step with the longest sample, every device computes as many tokens.
        if devices == 1 or _BUSY * devices * (longest + SLAB_OVERHEAD_TOKENS) <= tokens:
            packed = pack(lengths, dataclasses.replace(settings, devices=devices), shapes, more_to_come)
            if devices == 1 or tokens >= _BUSY * _computed(packed, devices):
                return packed
        devices //= 2


def _computed(packed: Packed, devices: int) -> int:
    """Tokens of all devices in all steps, with what it costs to start a slab."""
    slabs = ((shape, sum(1 for _ in same)) for shape, same in itertools.groupby(packed.slabs, lambda slab: slab.shape))
    return sum(-(-count // devices) * devices * (shape.tokens + SLAB_OVERHEAD_TOKENS) for shape, count in slabs)
