"""Which latents of a batch are active: the largest of each row, or of the whole batch.

In: float32 [b, f] values. Out: the smallest value that is among the k largest, by counting instead of sorting: the bits
of a float that is not negative are an integer that grows with it, so that the k-th largest of a batch is found by a few
counts of how many are at least so large. Where it lay in the step before is nearly where it lies now.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

_AROUND = (-512, -64, -8, -1, 1, 8, 64, 512)  # probes about the guess, in units of its reach
_WITHIN = (-0.1, -0.02, -0.004, 0.0, 0.004, 0.02, 0.1)  # and about where a straight line has k, in shares of a bracket
_FIRST_REACH = 1 << 11  # bits: 0.02 % of a value, so that the first pass looks 12 % up and down
_ABOUT_GUESS = 2  # passes
_NEAR = 1 << 19  # bits
_INFINITY = 0x7F800000  # bits, which no value's are above
_ROWS_AT_ONCE = 32


class _Bracket(NamedTuple):
    """At least k values are at least `low`, fewer than k are at least `high`; bits of floats."""

    low: Array
    high: Array
    at_low: Array
    at_high: Array
    passes: Array


def kth_largest_of_all(values: Array, weights: Array, k: Array, guess: Array) -> Array:
    """float32 []: the k-th largest positive value of [b, f], or the smallest positive float where there are fewer.

    Args:
      values: float32 [b, f]; negative ones do not count.
      weights: float32 [f], by which they are multiplied.
      k: int32 [], at least 1.
      guess: float32 [], where it may lie.
    """
    top = jnp.int32(_INFINITY)
    middle = jnp.clip(lax.bitcast_convert_type(guess, jnp.int32), 2, top - 1)

    def goes_on(at: _Bracket) -> Array:
        return (at.high - at.low > 1) & (at.at_low > k)

    def narrow(at: _Bracket) -> _Bracket:
        far = (at.passes < _ABOUT_GUESS) & (at.high - at.low > _NEAR)
        probes = jnp.sort(jnp.clip(jnp.where(far, _around(middle, at), _within(at, k)), at.low + 1, at.high - 1))
        counts = _at_least(values, weights, probes)
        enough = jnp.sum((counts >= k).astype(jnp.int32))
        lows = jnp.concatenate([at.low[None], probes])
        highs = jnp.concatenate([probes, at.high[None]])
        at_lows = jnp.concatenate([at.at_low[None], counts])
        at_highs = jnp.concatenate([counts, at.at_high[None]])
        return _Bracket(lows[enough], highs[enough], at_lows[enough], at_highs[enough], at.passes + 1)

    size = jnp.int32(values.size)  # at least as many as are positive: they are not counted for that alone
    found = lax.while_loop(goes_on, narrow, _Bracket(jnp.int32(1), top, size, jnp.int32(0), jnp.int32(0)))
    return lax.bitcast_convert_type(found.low, jnp.float32)


def _around(middle: Array, at: _Bracket) -> Array:
    """About the guess, farther apart from pass to pass."""
    steps = (_FIRST_REACH << (6 * at.passes)) * jnp.array(_AROUND, jnp.int32)
    return middle + jnp.minimum(steps, _INFINITY - middle)


def _within(at: _Bracket, k: Array) -> Array:
    """Between the ends: near where a straight line through their counts has k, and in the middle."""
    width = (at.high - at.low).astype(jnp.float32)
    share = (at.at_low - k).astype(jnp.float32) / jnp.maximum(at.at_low - at.at_high, 1).astype(jnp.float32)
    shares = jnp.concatenate([share + jnp.array(_WITHIN, jnp.float32), jnp.array([0.5], jnp.float32)])
    return at.low + (jnp.clip(shares, 0.0, 1.0) * width).astype(jnp.int32)


def _at_least(values: Array, weights: Array, probes: Array) -> Array:
    """int32 [p]: how many of [b, f], times weights [f], are at least each probe, which is bits of a float.

    One reduction of several operands: on CPUs XLA fuses it with the comparisons, and one of a single operand not.
    """
    bits = lax.bitcast_convert_type(jnp.maximum(values * weights[None], 0.0), jnp.int32)
    several = tuple((bits >= probe).astype(jnp.int32) for probe in probes)
    counts = lax.reduce(several, (jnp.int32(0),) * len(several), _added, (1,))
    return jnp.stack([jnp.sum(each) for each in counts])


def _added(one: tuple[Array, ...], other: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def smallest_chosen(values: Array, weights: Array, chosen: Array) -> Array:
    """float32 []: of values [b, f] times weights [f], the smallest that is chosen; infinity where none is."""
    scaled = jnp.where(chosen, values * weights[None], jnp.inf)

    def smaller(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.minimum(one[0], other[0]), one[1] + other[1]

    operands = scaled, chosen.astype(jnp.int32)  # two, for the reason of `_at_least`
    of_rows, _ = lax.reduce(operands, (jnp.float32(jnp.inf), jnp.int32(0)), smaller, (1,))
    return jnp.min(of_rows)


def counted(chosen: Array) -> Array:
    """int32 [f]: in how many rows of [b, f] each latent is chosen."""
    if chosen.shape[0] % _ROWS_AT_ONCE:
        return _counted_at_once(chosen)
    return lax.platform_dependent(chosen, cpu=_counted_by_blocks, default=_counted_at_once)


def _counted_at_once(chosen: Array) -> Array:
    return jnp.sum(chosen, axis=0, dtype=jnp.int32)


def _counted_by_blocks(chosen: Array) -> Array:
    """Some rows at a time, so that the comparisons stay in a processor's cache."""

    def more(so_far: Array, some: Array) -> tuple[Array, None]:
        return so_far + jnp.sum(some, axis=0, dtype=jnp.int32), None

    blocks = chosen.reshape(-1, _ROWS_AT_ONCE, chosen.shape[1])
    return lax.scan(more, jnp.zeros(chosen.shape[1], jnp.int32), blocks)[0]


def kth_largest_of_rows(values: Array, k: int) -> Array:
    """float32 [b, 1]: the k-th largest value of each row of [b, f]."""
    largest = lax.optimization_barrier(lax.top_k(values, k)[0])  # sliced at once it would be a whole sort
    return largest[:, -1:]


def active(values: Array, weights: Array, threshold: Array) -> Array:
    """bool [b, f]: values times weights [f] that are at least the threshold, and positive."""
    return (values * weights[None] >= threshold) & (values > 0)
