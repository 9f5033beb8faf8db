"""What the chips of a pod can do, as their maker publishes it.

In: the device kind that JAX names. Out: a `Chip`. Figures are those of the Cloud TPU documentation, pages "TPU v5e",
"TPU v5p" and "TPU v6e" (cloud.google.com/tpu/docs), read on 2026-11-21: peak, memory and the interconnect of a chip in
both directions, which is divided here by its ports and by two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Attributes:
    name: as in a topology's name.
    peak_flops: of bfloat16 products, a second.
    memory_bytes, memory_bytes_per_second: of its HBM.
    link_bytes_per_second: of one interconnect link in one direction.
    slices: that are sold, by their axes.
    """

    name: str
    peak_flops: float
    memory_bytes: float
    memory_bytes_per_second: float
    link_bytes_per_second: float
    slices: tuple[str, ...] = ()


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
    *("8x16x16", "16x16x16", "16x16x24"),
)
CHIPS: Mapping[str, Chip] = {
    "TPU v5 lite": Chip("v5e", 197e12, 16e9, 819e9, 400e9 / 4 / 2, _FLAT),
    "TPU v5": Chip("v5p", 459e12, 95e9, 2_765e9, 1_200e9 / 6 / 2, _CUBES),
    "TPU v6 lite": Chip("v6e", 918e12, 32e9, 1_638e9, 800e9 / 4 / 2, _FLAT),
}
