"""Keys and values that are remembered while a model answers: the prompt at once, then one token a step.

In: queries, keys and values of a layer, rotated. Out: what attention mixes, and the cache with what is new. Every row
holds one sample. Prompts lie in the first columns, padded on the right to one length, and answers behind them all, so
that a step writes one column, the same in every row. Dimension letters: b batch, t tokens, n columns, g key/value
heads, r query heads per key/value head, h head width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from models.layers import Numerics, soft_capped
from models.self_attention import AttentionRule, WithinRows

# Of all layers: stacked on a leading axis, or a list with those of each, as the parameters are given.
PerLayer = Array | list[Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValueCache:
    """Attributes:
    keys, values: of every layer, [b, g, n, h] in the dtype of the matrix products.
    prompt_lengths: int32 [b], real tokens of each prompt.
    prompt_columns: int32 scalar, how many columns prompts have.
    """

    keys: PerLayer
    values: PerLayer
    prompt_lengths: Array
    prompt_columns: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefill:
    """Attention within the prompts, whose keys and values are remembered; the cache is stacked.

    Attributes:
      positions: int32 [b, prompt_columns], of each token in its prompt; 0 for padding.
    """

    cache: KeyValueCache
    positions: Array

    @classmethod
    def start(
        cls, positions: Array, lengths: Array, columns: int, layers: int, heads: tuple[int, int], dtype: str
    ) -> Prefill:
        """An empty cache of so many columns; `heads` are how many key/value heads there are, and their width."""
        groups, width = heads
        empty = jnp.zeros((layers, positions.shape[0], groups, columns, width), dtype)
        return cls(KeyValueCache(empty, empty, lengths, jnp.int32(positions.shape[1])), positions)

    def attend(
        self, rule: AttentionRule, layer: Array, query: Array, key: Array, value: Array, numerics: Numerics
    ) -> tuple[Array, Prefill]:
        mixed, _ = WithinRows(self.positions).attend(rule, layer, query, key, value, numerics)
        cache = dataclasses.replace(
            self.cache,
            keys=_written(self.cache.keys, key, layer, jnp.int32(0)),
            values=_written(self.cache.values, value, layer, jnp.int32(0)),
        )
        return mixed, dataclasses.replace(self, cache=cache)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoding:
    """Attention of one new token a row to all that is remembered, itself included.

    Attributes:
      step: int32 scalar, how many tokens of the answers are remembered already.
    """

    cache: KeyValueCache
    step: Array

    @property
    def positions(self) -> Array:
        """int32 [b, 1]"""
        return (self.cache.prompt_lengths + self.step)[:, None]

    def attend(
        self, rule: AttentionRule, layer: Array, query: Array, key: Array, value: Array, numerics: Numerics
    ) -> tuple[Array, Decoding]:
        column = self.cache.prompt_columns + self.step
        cache = dataclasses.replace(
            self.cache,
            keys=_written(self.cache.keys, key, layer, column),
            values=_written(self.cache.values, value, layer, column),
        )
        keys, values = _of_layer(cache.keys, layer), _of_layer(cache.values, layer)
        b, groups, columns, width = keys.shape
        scale = width**-0.5 if rule.scale is None else rule.scale
        query = (query * jnp.float32(scale)).reshape(b, groups, -1, width)
        logits = soft_capped(numerics.einsum("bgrh,bgnh->bgrn", query, keys), rule.soft_cap)
        visible = self._visible(columns, rule.window_of(layer))[:, None, None]
        logits = jnp.where(visible, logits, jnp.float32(-jnp.inf))
        weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)).astype(numerics.dtype)
        # The sum of what is multiplied, so that rounded weights still add up to one.
        total = jnp.sum(weights.astype(jnp.float32), axis=-1, keepdims=True)
        mixed = numerics.einsum("bgrn,bgnh->bgrh", weights, values) / total
        return mixed.reshape(b, 1, -1), dataclasses.replace(self, cache=cache)

    def _visible(self, columns: int, window: Array) -> Array:
        """bool [b, columns]: real tokens, as far back as the window lets a query see; 0 is all."""
        prompt, lengths = self.cache.prompt_columns, self.cache.prompt_lengths[:, None]
        column = jnp.arange(columns, dtype=jnp.int32)[None]
        in_prompt = column < prompt
        real = jnp.where(in_prompt, column < lengths, column <= prompt + self.step)
        position = jnp.where(in_prompt, column, lengths + column - prompt)
        return real & ((window == 0) | (self.positions - position < window))


def apart(cache: KeyValueCache) -> KeyValueCache:
    """A stacked cache as lists: a step then writes into a layer's own array, and copies nothing out of a stack."""
    return dataclasses.replace(cache, keys=list(cache.keys), values=list(cache.values))


def _of_layer(all_layers: PerLayer, layer: Array) -> Array:
    return all_layers[int(layer)] if isinstance(all_layers, list) else all_layers[layer]


def _written(all_layers: PerLayer, new: Array, layer: Array, column: Array) -> PerLayer:
    """With new [b, t, g, h] in a layer, from a column on."""
    if isinstance(all_layers, list):
        this = int(layer)
        new = new.transpose(0, 2, 1, 3).astype(all_layers[this].dtype)
        written = jax.lax.dynamic_update_slice_in_dim(all_layers[this], new, column, axis=2)
        return [*all_layers[:this], written, *all_layers[this + 1 :]]
    new = new.transpose(0, 2, 1, 3).astype(all_layers.dtype)
    zero = jnp.int32(0)
    return jax.lax.dynamic_update_slice(all_layers, new[None], (layer, zero, zero, column, zero))
