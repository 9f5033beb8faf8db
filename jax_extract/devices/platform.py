"""What differs by platform: default dtype, slab size, padding granularity.

In: the devices that JAX sees. Out: `PlatformDefaults`, and the names that go into the numerics fingerprint.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class PlatformDefaults:
    """Attributes:
    dtype: compute dtype.
    slab_tokens: most tokens (rows x length) that one device computes at once.
    packed: samples lie one behind the other in a slab, instead of each in a row of its own.
    length_multiple: padded lengths are multiples of this.
    compile_tokens: slab tokens that one more shape must save to be worth compiling.
    """

    dtype: str
    slab_tokens: int
    packed: bool
    length_multiple: int
    compile_tokens: int


# CPU: 4,096 tokens keep a slab's captures small, and matrix products of 2,048 tokens already run at their peak.
# A compilation takes seconds, in which that many tokens of a small model could be computed.
CPU = PlatformDefaults("float32", 4_096, True, 16, 1_000)
# Accelerators: enough tokens to hide the parameter traffic; 128 is the tile of the matrix units.
ACCELERATOR = PlatformDefaults("bfloat16", 16_384, False, 128, 500_000)


def platform_defaults() -> PlatformDefaults:
    return CPU if jax.default_backend() == "cpu" else ACCELERATOR


def device_kind() -> str:
    """Such as `cpu` or `TPU v5 lite`."""
    return jax.devices()[0].device_kind
