"""What several architectures really share: numerics, norms, activations, rotary embedding.

In: arrays and small static configurations. Out: arrays. Dimension letters in every einsum:
b batch, t tokens, d width, f output features, h head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

LONGEST_SUM = 384  # terms, on processors: docs/decisions/long-sums.md


@dataclass(frozen=True)
class Numerics:
    """How matrix products are computed: operands in `dtype`, sums and everything else in float32.

    `float32` asks for the highest precision, because TPUs and GPUs otherwise round the operands.
    The residual stream is float32 in both modes, so that bfloat16 runs lose nothing between blocks.
    `attention` is what computes attention: `accelerated_attention.attention_backend` says what can.
    `longest_sum` is how many terms of a sum one accumulator takes in `long_linear`; None for all of them.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["blockwise", "splash", "cudnn"] = "blockwise"
    longest_sum: int | None = None

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

    def long_linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        """The same, for sums over d in which one term may outweigh all others.

        Once such a term is in an accumulator, each later one is rounded to that term's precision: so no accumulator
        is given more than `longest_sum` of them.
        """
        d = weight.shape[1]
        cuts = list(range(self.longest_sum or d, d, self.longest_sum or d))
        y = reduce(jnp.add, map(self.linear, jnp.split(x, cuts, axis=2), jnp.split(weight, cuts, axis=1)))
        return y if bias is None else y + bias.astype(jnp.float32)[None, None, :]


def embed(table: Array, tokens: Array) -> Array:
    """table [v, d], tokens int32 [b, t] -> float32 [b, t, d]; what lies beyond the table is clipped to its end."""
    return jnp.take(table, tokens, axis=0, mode="clip").astype(jnp.float32)


def split_heads(qkv: Array, heads: int, key_heads: int) -> tuple[Array, Array, Array]:
    """[b, t, (heads + 2 key_heads) h], queries before keys before values -> each as [b, t, its heads, h]."""
    b, t, width = qkv.shape
    per_head = qkv.reshape(b, t, heads + 2 * key_heads, width // (heads + 2 * key_heads))
    query, key, value = jnp.split(per_head, (heads, heads + key_heads), axis=2)
    return query, key, value


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    """x [..., d] scaled to unit root mean square over its last axis, times weight [d]; float32.

    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, eq. 4.
    """
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + jnp.float32(epsilon))
    weight = weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return weight * (x * scale)


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
    """x [..., d] without its mean and with unit variance over its last axis, times weight [d], plus bias [d]; float32.

    Ba, Kiros and Hinton, "Layer Normalization", 2016, eq. 3.
    """
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + jnp.float32(epsilon))
    weight, bias = (v.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,)) for v in (weight, bias))
    return centred * scale * weight + bias


def soft_capped(x: Array, cap: float | None) -> Array:
    """cap * tanh(x / cap), which leaves small values and never goes beyond the cap (Gemma 2, 2024, section 2)."""
    return x if cap is None else jnp.float32(cap) * jnp.tanh(x / jnp.float32(cap))


# By the names of config.json.
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_fast": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class TokenPlaces(Protocol):
    """Where the tokens of rows lie in their samples."""

    @property
    def positions(self) -> Array:
        """int32 [b, t]: of each token in its sample; 0 for padding."""
        ...

    @property
    def sample_lengths(self) -> Array:
        """int32 [b, t]: how many tokens the sample of each token has, as far as it is there."""
        ...

    @property
    def longest(self) -> int:
        """The most that a sample may have; known while compiling."""
        ...


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (Su et al., "RoFormer", 2021, eq. 34), with the scalings supported.

    Attributes:
      theta: base of the geometric series of frequencies.
      kind: what is done to them:
        `linear`: divided by `factor`.
        `llama3`: low ones divided by `factor`, high ones kept, a linear ramp between (as the Llama 3.1 release has it).
        `yarn`: the same with another ramp, from `beta_fast` to `beta_slow` turns within the original length, whose ends
          are whole numbers if `truncate` (Peng et al., "YaRN", 2023, section 3.2).
        `dynamic`: theta grows with a sample that is longer than the original length (the same, section 3.3).
        `longrope`: each divided by its own factor: by `long_factors` where the sample is longer than the original
          length, else by `short_factors` (Ding et al., "LongRoPE", 2024).
      factor, low_freq_factor, high_freq_factor: of the scaling.
      original_max_positions: the original length.
      attention_scale: what cosines and sines are multiplied by (YaRN, section 3.4).
    """

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn", "dynamic", "longrope"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    attention_scale: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @property
    def same_to(self) -> int | None:
        """Longest sample that is rotated as its beginnings are; None where all are."""
        return self.original_max_positions if self.kind in ("dynamic", "longrope") else None

    def allows(self, max_position_embeddings: int) -> int:
        """Longest sample that the scaling is for, in a model whose config.json says so many."""
        if self.kind in ("default", "llama3"):
            return max_position_embeddings
        original = max_position_embeddings if self.kind == "linear" else self.original_max_positions
        return max(max_position_embeddings, int(self.factor * original))

    def inverse_frequencies(self, head_width: int, sample_length: int = 1) -> np.ndarray:
        """float32 [head_width / 2], rounded step by step as PyTorch does; of a sample of so many tokens.

        At position 8,192 one unit in the last place here is 5e-4 radian there, so the power is taken
        in float64 and each later step rounded to float32. PyTorch's own float32 power differs from that in
        at most one unit in the last place, in a few frequencies of some (theta, head width) or none.
        """
        powers = self._powers(head_width, sample_length)
        if self.kind == "yarn":
            return self._yarn(powers, head_width)
        if self.kind == "longrope":
            is_long = sample_length > self.original_max_positions
            factors = np.array(self.long_factors if is_long else self.short_factors, np.float32)
            return np.float32(1) / (factors * powers)
        inverse = np.float32(1) / powers
        if self.kind == "linear":
            return (inverse / np.float32(self.factor)).astype(np.float32)
        if self.kind == "llama3":
            return self._llama3(inverse)
        return inverse

    def _powers(self, head_width: int, sample_length: int) -> np.ndarray:
        """float32 [head_width / 2]: theta to the powers from 0 to almost 1."""
        exponents = (np.arange(0, head_width, 2).astype(np.float32) / np.float32(head_width)).astype(np.float64)
        theta = np.float64(self.theta)
        if self.kind == "dynamic" and sample_length > self.original_max_positions:
            stretched = np.float32(self.factor) * np.float32(sample_length) / np.float32(self.original_max_positions)
            growth = np.float64(stretched - np.float32(self.factor - 1)) ** (head_width / (head_width - 2))
            theta = np.float64(np.float32(theta) * np.float32(growth))
        return np.power(theta, exponents).astype(np.float32)

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

    def _yarn(self, powers: np.ndarray, head_width: int) -> np.ndarray:
        def turning(turns: float) -> float:
            """Which frequency turns so often within the original length."""
            wavelength = self.original_max_positions / (turns * 2 * math.pi)
            return head_width * math.log(wavelength) / (2 * math.log(self.theta))

        first, last = turning(self.beta_fast), turning(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_width - 1)
        length = last - first or 0.001
        ramp = (np.arange(head_width // 2, dtype=np.float32) - np.float32(first)) / np.float32(length)
        kept = np.float32(1) - np.clip(ramp, np.float32(0), np.float32(1))
        scaled = np.float32(1) / (np.float32(self.factor) * powers)
        return scaled * (np.float32(1) - kept) + np.float32(1) / powers * kept

    def tables(self, tokens: TokenPlaces, head_width: int) -> tuple[Array, Array]:
        """(cosines, sines), float32 [b, t, head_width / 2], of tokens [b, t]."""
        angles = tokens.positions.astype(jnp.float32)[..., None] * self._frequencies(tokens, head_width)
        if self.attention_scale == 1.0:
            return jnp.cos(angles), jnp.sin(angles)
        scale = jnp.float32(self.attention_scale)
        return jnp.cos(angles) * scale, jnp.sin(angles) * scale

    def _frequencies(self, tokens: TokenPlaces, head_width: int) -> Array:
        """float32 [1, 1, head_width / 2] of all tokens; [b, t, head_width / 2] where the lengths of samples decide."""
        if self.same_to is None or tokens.longest <= self.same_to:
            return jnp.asarray(self.inverse_frequencies(head_width))[None, None]
        # Powers taken on the device would not be rounded as these are.
        lengths = range(self.same_to, tokens.longest + 1) if self.kind == "dynamic" else (self.same_to, tokens.longest)
        by_length = jnp.asarray(np.stack([self.inverse_frequencies(head_width, length) for length in lengths]))
        beyond = tokens.sample_lengths - jnp.int32(self.same_to)
        # Of LongRoPE there are two, of which all that is beyond has the second.
        return jnp.take(by_length, jnp.maximum(beyond, 0), axis=0, mode="clip")


def rotate(x: Array, tables: tuple[Array, Array]) -> Array:
    """x [b, t, heads, h] with the first values of each head rotated, as many as the tables have cosines and sines.

    The two halves of what is rotated are the two coordinates (Hugging Face's order).
    """
    cos, sin = (table[:, :, None, :] for table in tables)
    half = cos.shape[-1]
    first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
