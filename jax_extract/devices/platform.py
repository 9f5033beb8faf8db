"""What differs by platform: default dtype, slab size, samples a row, padding granularity.

In: the devices that JAX sees. Out: `PlatformDefaults`, and the names that go into the numerics fingerprint.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class PlatformDefaults:
    """Attributes:
    dtype: compute dtype.
    slab_tokens: most tokens (rows x length) that one device computes at once.
    packed: a slab is a single row.
    samples_a_row: most samples that lie one behind the other in a row; 0 for any number.
    length_multiple: padded lengths are multiples of this.
    compile_tokens: slab tokens that one more shape must save to be worth compiling.
    compiles_at_once: all programs are compiled at the start, side by side. On CPU devices steps need the processors
      themselves, and while a program is compiled for a GPU, kernels are timed there.
    """

    dtype: str
    slab_tokens: int
    packed: bool
    samples_a_row: int
    length_multiple: int
    compile_tokens: int
    compiles_at_once: bool = False


# CPU: 4,096 tokens keep a slab's captures small, and matrix products of 2,048 tokens already run at their peak.
# A compilation takes seconds, in which that many tokens of a small model could be computed.
CPU = PlatformDefaults("float32", 4_096, True, 0, 16, 1_000)
# Accelerators: enough tokens to hide the parameter traffic; 128 is the tile of the matrix units.
TPU = PlatformDefaults("bfloat16", 16_384, False, 0, 128, 100_000, True)
# cuDNN's attention cannot tell the samples of a row apart, and takes rows of any multiple of 64 tokens.
GPU = dataclasses.replace(TPU, samples_a_row=1, length_multiple=64, compiles_at_once=False)


def platform_defaults() -> PlatformDefaults:
    """How many devices there are does not count: the same command makes the same slabs on any mesh."""
    return {"cpu": CPU, "tpu": TPU}.get(jax.default_backend(), GPU)


def device_kind() -> str:
    """Such as `cpu` or `TPU v5 lite`."""
    return jax.devices()[0].device_kind
