"""Causal self-attention that has a gradient: every row is one sample, and the way back is what XLA makes of plain
products.

In: queries, keys and values of a layer, rotated. Out: what attention mixes. Blocks of queries in branches, as
extraction has them, would cost a backward pass of their own. Long rows are taken in blocks of queries, whose weights
are computed again on the way back, so that no tokens x tokens values are remembered.
Dimension letters: b batch, t query tokens, s key tokens, g key/value heads, r query heads per key/value head, h width.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from models.layers import Numerics, soft_capped
from models.self_attention import AttentionRule, WithinRows

_WHOLE = 1_024  # tokens of a row whose logits are kept whole
_QUERY_ROWS = 256  # of a block, beyond that


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CausalRows(WithinRows):
    """Every token sees the tokens before it in its row; what pads a row on the right is seen by no real token."""

    def attend(
        self, rule: AttentionRule, layer: Array, query: Array, key: Array, value: Array, numerics: Numerics
    ) -> tuple[Array, CausalRows]:
        """query float32 [b, t, g * r, h], key and value [b, t, g, h] -> float32 [b, t, g * r * h]."""
        b, t, heads, width = query.shape
        groups = key.shape[2]
        query = rule.scaled(query).reshape(b, t, groups, heads // groups, width)

        def mixed(query: Array, first: Array) -> Array:
            """Of some query tokens from `first` on."""
            logits = soft_capped(numerics.einsum("btgrh,bsgh->bgrts", query, key), rule.soft_cap)
            rows = first + jnp.arange(query.shape[1], dtype=jnp.int32)
            back = rows[:, None] - jnp.arange(t, dtype=jnp.int32)[None, :]
            visible = back >= 0
            if any(rule.windows):
                window = rule.window_of(layer)
                visible &= (window == 0) | (back < window)
            logits = jnp.where(visible[None, None, None], logits, jnp.float32(-jnp.inf))
            return numerics.einsum("bgrts,bsgh->btgrh", jax.nn.softmax(logits, axis=-1), value)

        if t <= _WHOLE:
            return mixed(query, jnp.int32(0)).reshape(b, t, heads * width), self
        blocks = -(-t // _QUERY_ROWS)
        query = jnp.pad(query, [(0, 0), (0, blocks * _QUERY_ROWS - t), (0, 0), (0, 0), (0, 0)])
        in_blocks = query.reshape(b, blocks, _QUERY_ROWS, *query.shape[2:]).swapaxes(0, 1)
        firsts = jnp.arange(blocks, dtype=jnp.int32) * _QUERY_ROWS
        _, found = jax.lax.scan(lambda _, each: (None, jax.checkpoint(mixed)(*each)), None, (in_blocks, firsts))
        return found.swapaxes(0, 1).reshape(b, blocks * _QUERY_ROWS, heads * width)[:, :t], self
