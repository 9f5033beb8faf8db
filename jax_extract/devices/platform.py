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
    length_multiple: padded lengths are multiples of this.
    compile_tokens: tokens that could be computed in the time that compiling one more shape takes.
    """

    dtype: str
    slab_tokens: int
    length_multiple: int
    compile_tokens: int


# CPU: 4,096 tokens saturate the matrix products while the activations still fit the last-level cache.
_CPU = PlatformDefaults("float32", 4_096, 16, 200)
# Accelerators: enough tokens to hide the parameter traffic; 128 is the tile of the matrix units.
_ACCELERATOR = PlatformDefaults("bfloat16", 16_384, 128, 500_000)


def platform_defaults() -> PlatformDefaults:
    return _CPU if jax.default_backend() == "cpu" else _ACCELERATOR


def device_kind() -> str:
    """Such as `cpu` or `TPU v5 lite`."""
    return jax.devices()[0].device_kind
