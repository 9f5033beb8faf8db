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
from jax_extract.inputs.planning.slabs import SLAB_OVERHEAD_TOKENS, PlanSettings

_MOST = 256
_BUSY = 0.9  # of what so many devices compute


def pack_for_all(lengths: np.ndarray, settings: PlanSettings, more_to_come: bool) -> tuple[int, Packed]:
    """Of 256, 128 … 1 devices the most that samples of these lengths (int64) keep busy, and the plan for them."""
    tokens, longest = int(lengths.sum()), settings.padded(int(lengths.max()))
    devices = _MOST
    while True:
        # In a step with the longest sample, every device computes as many tokens.
        if devices == 1 or _BUSY * devices * (longest + SLAB_OVERHEAD_TOKENS) <= tokens:
            packed = pack(lengths, dataclasses.replace(settings, devices=devices), more_to_come=more_to_come)
            if devices == 1 or tokens >= _BUSY * _computed(packed, devices):
                return devices, packed
        devices //= 2


def _computed(packed: Packed, devices: int) -> int:
    """Tokens of all devices in all steps, with what it costs to start a slab."""
    slabs = ((shape, sum(1 for _ in same)) for shape, same in itertools.groupby(packed.slabs, lambda slab: slab.shape))
    return sum(-(-count // devices) * devices * (shape.tokens + SLAB_OVERHEAD_TOKENS) for shape, count in slabs)
