"""What several architectures really share: numerics, RMS norm, rotary embedding.

In: arrays and small static configurations. Out: arrays. Dimension letters in every einsum:
b batch, t tokens, d width, f output features, h head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclass(frozen=True)
class Numerics:
    """How matrix products are computed: operands in `dtype`, sums and everything else in float32.

    `float32` asks for the highest precision, because TPUs and GPUs otherwise round the operands.
    The residual stream is float32 in both modes, so that bfloat16 runs lose nothing between blocks.
    `attention` is what computes attention: `accelerated_attention.attention_backend` says what can.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["blockwise", "splash", "cudnn"] = "blockwise"

    @property
    def precision(self) -> jax.lax.Precision | None:
        return jax.lax.Precision.HIGHEST if self.dtype == "float32" else None

    def einsum(self, equation: str, a: Array, b: Array) -> Array:
        """float32 result of a product whose operands are rounded to `dtype`."""
        return jnp.einsum(
            equation,
            a.astype(self.dtype),
            b.astype(self.dtype),
            precision=self.precision,
            preferred_element_type=jnp.float32,
        )

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        """x [b, t, d] times weight [f, d] (the checkpoint's orientation), plus bias [f] -> [b, t, f]."""
        y = self.einsum("btd,fd->btf", x, weight)
        return y if bias is None else y + bias.astype(jnp.float32)[None, None, :]


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    """x [..., d] scaled to unit root mean square over its last axis, times weight [d]; float32.

    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, eq. 4.
    """
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + jnp.float32(epsilon))
    weight = weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return weight * (x * scale)


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (Su et al., "RoFormer", 2021, eq. 34), with the two scalings supported.

    Attributes:
      theta: base of the geometric series of frequencies.
      kind: `default`, `linear` (positions divided by `factor`) or `llama3` (low frequencies divided by
        `factor`, high ones kept, a linear ramp between; the Llama 3.1 release defines it).
      factor, low_freq_factor, high_freq_factor, original_max_positions: of the scaling.
    """

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def inverse_frequencies(self, head_width: int) -> np.ndarray:
        """float32 [head_width / 2], rounded step by step as PyTorch does.

        At position 8,192 one unit in the last place here is 5e-4 radian there, so the power is taken
        in float64 and each later step rounded to float32. PyTorch's own float32 power differs from that in
        at most one unit in the last place, in a few frequencies of some (theta, head width) or none.
        """
        exponents = (np.arange(0, head_width, 2).astype(np.float32) / np.float32(head_width)).astype(np.float64)
        inverse = np.float32(1) / np.power(np.float64(self.theta), exponents).astype(np.float32)
        if self.kind == "linear":
            return (inverse / np.float32(self.factor)).astype(np.float32)
        if self.kind == "llama3":
            return self._llama3(inverse)
        return inverse

    def _llama3(self, inverse: np.ndarray) -> np.ndarray:
        context = self.original_max_positions
        wavelength = np.float32(2 * math.pi) / inverse
        ramp = (np.float32(context) / wavelength - np.float32(self.low_freq_factor)) / np.float32(
            self.high_freq_factor - self.low_freq_factor
        )
        scaled = inverse / np.float32(self.factor)
        mixed = (np.float32(1) - ramp) * inverse / np.float32(self.factor) + ramp * inverse
        is_low = wavelength > context / self.low_freq_factor
        is_high = wavelength < context / self.high_freq_factor
        return np.where(is_low, scaled, np.where(is_high, inverse, mixed)).astype(np.float32)

    def tables(self, positions: Array, head_width: int) -> tuple[Array, Array]:
        """(cosines, sines), float32 [b, t, head_width / 2], of positions int32 [b, t]."""
        angles = (
            positions.astype(jnp.float32)[..., None] * jnp.asarray(self.inverse_frequencies(head_width))[None, None]
        )
        return jnp.cos(angles), jnp.sin(angles)


class Places(NamedTuple):
    """Where the tokens of a batch stand in their samples, as attention wants to know it.

    Attributes:
      positions: int32 [b, t], of each token in its sample; 0 for padding.
      rotary: (cosines, sines), float32 [b, t, head_width / 2], of those positions.
    """

    positions: Array
    rotary: tuple[Array, Array]

    @classmethod
    def of(cls, positions: Array, rotary: Rotary, head_width: int) -> Places:
        return cls(positions, rotary.tables(positions, head_width))


def rotate(x: Array, tables: tuple[Array, Array]) -> Array:
    """x [b, t, heads, h] rotated; the two halves of a head are the two coordinates (Hugging Face's order)."""
    cos, sin = (table[:, :, None, :] for table in tables)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
