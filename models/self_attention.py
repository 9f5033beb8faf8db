"""Causal self-attention of a block, whoever computes it: blocks of queries anywhere, a kernel where there is one.

In: queries, keys and values of a layer, rotated. Out: what attention mixes. Dimension letters: b batch, t tokens,
g key/value heads, r query heads per key/value head, h head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from models.accelerated_attention import kernel_attention
from models.attention import causal_attention
from models.attention_pattern import SampleKeys, attend_visibly
from models.hooks import PATTERN
from models.layers import Numerics, TokenPlaces
from models.packing import InWholeRows
from models.taps import Taps


@dataclass(frozen=True)
class AttentionRule:
    """What an architecture asks of attention, besides causality.

    Attributes:
      scale: of the logits; None is 1 / sqrt(h).
      soft_cap: logits x become soft_cap * tanh(x / soft_cap); None leaves them.
      windows: per layer, how many positions a query sees, itself included, 0 for all; empty where no layer has one.
    """

    scale: float | None = None
    soft_cap: float | None = None
    windows: tuple[int, ...] = ()

    def window_of(self, layer: Array) -> Array:
        """int32 scalar; 0 where the layer sees all."""
        return jnp.asarray(self.windows or (0,), jnp.int32)[layer if self.windows else 0]

    def scaled(self, query: Array) -> Array:
        """Queries [..., h], so that their products with keys are the logits."""
        return query * jnp.float32(query.shape[-1] ** -0.5 if self.scale is None else self.scale)


class SelfAttention(TokenPlaces, Protocol):
    """Attends for one layer after the other, and may remember keys and values between them."""

    def attend(
        self, rule: AttentionRule, layer: Array, query: Array, key: Array, value: Array, numerics: Numerics
    ) -> tuple[Array, Self]:
        """query float32 [b, t, g * r, h], key and value [b, t, g, h] -> float32 [b, t, g * r * h]."""
        ...

    def attend_visibly(
        self, rule: AttentionRule, layer: Array, query: Array, key: Array, value: Array, taps: Taps, numerics: Numerics
    ) -> tuple[Array, Taps, Self]:
        """The same, whatever computes attention elsewhere, through the hook point `attention_pattern`."""
        ...


Attention = TypeVar("Attention", bound=SelfAttention)


def attend(
    rule: AttentionRule,
    attention: Attention,
    layer: Array,
    query: Array,
    key: Array,
    value: Array,
    taps: Taps,
    numerics: Numerics,
) -> tuple[Array, Taps, Attention]:
    """Attention of a block through its hook points `attention_pattern` and `attention_heads`.

    Args:
      query: float32 [b, t, g * r, h], rotated.
      key, value: float32 [b, t, g, h], keys rotated.

    Returns:
      float32 [b, t, g * r * h], taps, attention with what it remembers.
    """
    if taps.keeps_or_changes(PATTERN):
        mixed, taps, attention = attention.attend_visibly(rule, layer, query, key, value, taps, numerics)
    else:
        mixed, attention = attention.attend(rule, layer, query, key, value, numerics)
    mixed, taps = taps.visit("attention_heads", layer, mixed)
    return mixed, taps, attention


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WithinRows(InWholeRows):
    """Every token sees the tokens of its own sample that lie before it in its row."""

    positions: Array

    def attend(
        self, rule: AttentionRule, layer: Array, query: Array, key: Array, value: Array, numerics: Numerics
    ) -> tuple[Array, WithinRows]:
        query = rule.scaled(query)
        if numerics.attention == "blockwise":
            reach = self._reach(rule, layer)
            mixed = causal_attention(query, key, value, reach=reach, numerics=numerics, soft_cap=rule.soft_cap)
            return mixed, self
        kernels = [
            partial(
                kernel_attention,
                positions=self.positions,
                window=window or None,
                numerics=numerics,
                soft_cap=rule.soft_cap,
            )
            for window in _distinct(rule.windows)
        ]
        chosen = jnp.sum(jnp.asarray(_distinct(rule.windows)[:-1], jnp.int32) < rule.window_of(layer))
        return jax.lax.switch(chosen, kernels, query, key, value), self

    def attend_visibly(
        self, rule: AttentionRule, layer: Array, query: Array, key: Array, value: Array, taps: Taps, numerics: Numerics
    ) -> tuple[Array, Taps, Self]:
        keys = SampleKeys.in_rows(self.positions, self._reach(rule, layer))
        mixed, taps = attend_visibly(rule.scaled(query), key, value, keys, layer, taps, numerics, rule.soft_cap)
        return mixed, taps, self

    def _reach(self, rule: AttentionRule, layer: Array) -> Array:
        """int32 [b, t]: how many tokens back each one sees, besides itself."""
        if not any(rule.windows):
            return self.positions
        window = rule.window_of(layer)
        return jnp.where(window == 0, self.positions, jnp.minimum(self.positions, window - 1))


def _distinct(windows: Sequence[int]) -> list[int]:
    """Ascending: a kernel is compiled for each."""
    return sorted(set(windows)) or [0]
