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

from models.layers import Numerics

QUERY_ROWS = 64  # of a block: its logits stay in a processor's cache, and few keys are multiplied that nobody sees


def causal_attention(query: Array, key: Array, value: Array, *, reach: Array, numerics: Numerics) -> Array:
    """Grouped-query causal attention in which no block of queries meets keys that none of it can see.

    A block of query rows is multiplied with the keys from the first that one of its rows sees up to its own
    end: neither what lies above the diagonal nor other samples' blocks are computed, and no tokens x tokens
    matrix exists. How many keys that are is known only at run time, so a block takes one of a few branches, each
    compiled for a number of keys; the exact softmax needs no second pass.

    Args:
      query: float32 [b, t, g * r, h].
      key, value: float32 [b, t, g, h].
      reach: int32 [b, t], how many tokens back each one sees, besides itself: its position in its sample, or less
        under a sliding window.
      numerics: of the two products; the softmax is float32.

    Returns:
      float32 [b, t, g * r * h].
    """
    b, tokens, heads, width = query.shape
    groups = key.shape[2]
    size = min(QUERY_ROWS, tokens)
    blocks = -(-tokens // size)
    padding = blocks * size - tokens
    q = (query * jnp.float32(width**-0.5)).reshape(b, tokens, groups, heads // groups, width)
    q = _padded(q.astype(numerics.dtype).transpose(0, 2, 3, 1, 4), padding, axis=3)
    k = _padded(key.astype(numerics.dtype).transpose(0, 2, 1, 3), padding, axis=2)
    v = _padded(value.astype(numerics.dtype).transpose(0, 2, 1, 3), padding, axis=2)
    reach = _padded(reach, padding, axis=1)
    first_seen = jnp.min(
        (jnp.arange(blocks * size, dtype=jnp.int32)[None] - reach).reshape(b, blocks, size), axis=(0, 2)
    )
    blocks_seen = jnp.arange(1, blocks + 1, dtype=jnp.int32) - first_seen // size

    def mix(seen: int, block: Array) -> Array:
        """One block of queries with the `seen` blocks of keys up to its own end: [b, g, r, size, h]."""
        start, first = block * size, jnp.maximum((block + 1 - seen) * size, 0)
        rows = jax.lax.dynamic_slice_in_dim(q, start, size, axis=3)
        keys, values = (jax.lax.dynamic_slice_in_dim(a, first, seen * size, axis=2) for a in (k, v))
        offsets = jnp.arange(size, dtype=jnp.int32)[:, None] - jnp.arange(seen * size, dtype=jnp.int32)[None, :]
        back = (start - first + offsets)[None]
        visible = (back >= 0) & (back <= jax.lax.dynamic_slice_in_dim(reach, start, size, axis=1)[:, :, None])
        # Kept whole, mask and weights are passes over less memory than XLA's own fusion makes of them.
        mask = jax.lax.optimization_barrier(jnp.where(visible, jnp.float32(0), jnp.float32(-jnp.inf)))
        logits = numerics.einsum("bgrth,bgsh->bgrts", rows, keys) + mask[:, None, None]
        weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)).astype(numerics.dtype)
        weights = jax.lax.optimization_barrier(weights)
        # The sum of what is multiplied, so that rounded weights still add up to one.
        total = jnp.sum(weights.astype(jnp.float32), axis=-1, keepdims=True)
        return numerics.einsum("bgrts,bgsh->bgrth", weights, values) / total

    sizes = _branch_sizes(blocks)
    branches: list[Callable[[Array], Array]] = [partial(mix, seen) for seen in sizes]
    branch_of = jnp.array(np.searchsorted(sizes, np.arange(blocks + 1)), jnp.int32)

    def step(_: None, block: Array) -> tuple[None, Array]:
        return None, jax.lax.switch(branch_of[blocks_seen[block]], branches, block)

    _, mixed = jax.lax.scan(step, None, jnp.arange(blocks, dtype=jnp.int32))  # [blocks, b, g, r, size, h]
    return mixed.transpose(1, 0, 4, 2, 3, 5).reshape(b, blocks * size, heads * width)[:, :tokens]


def _padded(x: Array, columns: int, axis: int) -> Array:
    return jnp.pad(x, [(0, columns if at == axis else 0) for at in range(x.ndim)]) if columns else x


def _branch_sizes(blocks: int) -> list[int]:
    """Numbers of key blocks that have a branch: every one up to 8, then steps of an eighth to a quarter."""
    sizes, size = [], 1
    while size < blocks:
        sizes.append(size)
        size += max(1, (1 << size.bit_length()) // 8)
    return [*sizes, blocks]
