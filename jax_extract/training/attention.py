"""Causal self-attention for training: every row is one sample, and the gradient is what XLA makes of plain products.

In: queries, keys and values of a layer, rotated. Out: what attention mixes. Rows are short here, so the logits of a
layer are kept whole; blocks of queries in branches, as extraction has them, would cost a backward pass of their own.
Dimension letters: b batch, t query tokens, s key tokens, g key/value heads, r query heads per key/value head, h width.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from models.layers import Numerics, soft_capped
from models.self_attention import AttentionRule, WithinRows


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
        logits = soft_capped(numerics.einsum("btgrh,bsgh->bgrts", query, key), rule.soft_cap)
        back = jnp.arange(t, dtype=jnp.int32)[:, None] - jnp.arange(t, dtype=jnp.int32)[None, :]
        visible = back >= 0
        if any(rule.windows):
            window = rule.window_of(layer)
            visible &= (window == 0) | (back < window)
        logits = jnp.where(visible[None, None, None], logits, jnp.float32(-jnp.inf))
        mixed = numerics.einsum("bgrts,bsgh->btgrh", jax.nn.softmax(logits, axis=-1), value)
        return mixed.reshape(b, t, heads * width), self
