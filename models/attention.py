"""Causal attention over rows that hold several samples, in blocks of query rows.

In: queries, keys and values of a batch, and how far back each token sees. Out: what attention mixes.
Dimension letters in every einsum: b batch, t query tokens, s key tokens, g key/value heads, r query
heads per key/value head, h head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from models.layers import Numerics, soft_capped

QUERY_ROWS = 128  # of a block: enough for products near their peak
KEY_ROWS = 64  # of a unit, in which a block's keys are counted: few are multiplied that nobody sees
_HEADS_AT_ONCE = 3  # query heads, at least: fewer are too few rows for a product, more leave the processor's cache


def causal_attention(
    query: Array, key: Array, value: Array, *, reach: Array, numerics: Numerics, soft_cap: float | None = None
) -> Array:
    """Grouped-query causal attention in which no block of queries meets keys that none of it can see.

    A block of query rows is multiplied with the keys from the first that one of its rows sees up to its own
    end: neither what lies above the diagonal nor other samples' blocks are computed, and no tokens x tokens
    matrix exists. How many keys that are is known only at run time, so a block takes one of a few branches, each
    compiled for a number of keys; the exact softmax needs no second pass. Key/value heads are taken a few at a
    time, so that the logits of a step stay in a processor's cache however long the sample is.

    Args:
      query: float32 [b, t, g * r, h], scaled already.
      key, value: float32 [b, t, g, h].
      reach: int32 [b, t], how many tokens back each one sees, besides itself: its position in its sample, or less
        under a sliding window.
      numerics: of the two products; the softmax is float32.
      soft_cap: of the logits; None leaves them.

    Returns:
      float32 [b, t, g * r * h].
    """
    b, tokens, heads, width = query.shape
    groups = key.shape[2]
    size = QUERY_ROWS if tokens > KEY_ROWS else KEY_ROWS
    blocks = -(-tokens // size)
    padding = blocks * size - tokens
    together = _groups_at_once(groups, heads // groups)
    chunks = groups // together

    def arranged(x: Array) -> Array:
        """[b, t, heads, h] -> [chunks, b, g of a chunk, r, t, h]."""
        x = x.astype(numerics.dtype).reshape(b, tokens, chunks, together, -1, width)
        return _padded(x.transpose(2, 0, 3, 4, 1, 5), padding, axis=4)

    q = arranged(query)
    k, v = arranged(key)[:, :, :, 0], arranged(value)[:, :, :, 0]
    reach = _padded(reach, padding, axis=1)
    first_seen = jnp.min(
        (jnp.arange(blocks * size, dtype=jnp.int32)[None] - reach).reshape(b, blocks, size), axis=(0, 2)
    )
    ends = jnp.arange(1, blocks + 1, dtype=jnp.int32) * (size // KEY_ROWS)
    units_seen = ends - first_seen // KEY_ROWS

    def mix(units: int, block: Array, chunk: Array) -> Array:
        """One block of queries with so many units of keys up to its own end: [b, g, r, size, h]."""
        keys_seen = units * KEY_ROWS
        start, first = block * size, jnp.maximum((block + 1) * size - keys_seen, 0)
        # One slice each: a chunk that is taken out first is copied whole.
        rows = jax.lax.dynamic_slice(q, (chunk, 0, 0, 0, start, 0), (1, *q.shape[1:4], size, width))[0]
        keys, values = (
            jax.lax.dynamic_slice(a, (chunk, 0, 0, first, 0), (1, *a.shape[1:3], keys_seen, width))[0] for a in (k, v)
        )
        offsets = jnp.arange(size, dtype=jnp.int32)[:, None] - jnp.arange(keys_seen, dtype=jnp.int32)[None, :]
        back = (start - first + offsets)[None]
        visible = (back >= 0) & (back <= jax.lax.dynamic_slice_in_dim(reach, start, size, axis=1)[:, :, None])
        # Kept whole, mask and weights are passes over less memory than XLA's own fusion makes of them.
        mask = jax.lax.optimization_barrier(jnp.where(visible, jnp.float32(0), jnp.float32(-jnp.inf)))
        logits = soft_capped(numerics.einsum("bgrth,bgsh->bgrts", rows, keys), soft_cap) + mask[:, None, None]
        weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)).astype(numerics.dtype)
        weights = jax.lax.optimization_barrier(weights)
        # The sum of what is multiplied, so that rounded weights still add up to one.
        total = jnp.sum(weights.astype(jnp.float32), axis=-1, keepdims=True)
        return numerics.einsum("bgrts,bgsh->bgrth", weights, values) / total

    sizes = _branch_sizes(size // KEY_ROWS, blocks * size // KEY_ROWS)
    branches: list[Callable[[Array, Array], Array]] = [partial(mix, units) for units in sizes]
    branch_of = jnp.array(np.searchsorted(sizes, np.arange(sizes[-1] + 1)), jnp.int32)

    def step(_: None, place: Array) -> tuple[None, Array]:
        block, chunk = place // chunks, place % chunks
        return None, jax.lax.switch(branch_of[units_seen[block]], branches, block, chunk)

    _, mixed = jax.lax.scan(step, None, jnp.arange(blocks * chunks, dtype=jnp.int32))
    mixed = mixed.reshape(blocks, chunks, b, together, heads // groups, size, width)
    return mixed.transpose(2, 0, 5, 1, 3, 4, 6).reshape(b, blocks * size, heads * width)[:, :tokens]


def _groups_at_once(groups: int, heads_a_group: int) -> int:
    """Key/value heads that a step takes: a divisor of all."""
    fitting = (n for n in range(1, groups) if groups % n == 0 and n * heads_a_group >= _HEADS_AT_ONCE)
    return next(fitting, groups)


def _padded(x: Array, columns: int, axis: int) -> Array:
    return jnp.pad(x, [(0, columns if at == axis else 0) for at in range(x.ndim)]) if columns else x


def _branch_sizes(least: int, most: int) -> list[int]:
    """Numbers of units of keys that have a branch: every one up to 8, then steps of an eighth to a quarter."""
    sizes, size = [], least
    while size < most:
        sizes.append(size)
        size += max(1, (1 << size.bit_length()) // 8)
    return [*sizes, most]
