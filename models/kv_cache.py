"""Keys and values that are remembered while a model answers: the prompt at once, then one token a step.

In: queries, keys and values of a layer, rotated. Out: what attention mixes, and the cache with what is new. Every row
of the cache holds one sample. Prompts lie in the first columns, padded on the right to one length, and answers behind
them all, so that a step writes one column, the same in every row. Prompts are read in whatever packing, some at a time.
Dimension letters: b batch, t tokens, n columns, g key/value
heads, r query heads per key/value head, h head width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from models.attention_pattern import SampleKeys, attend_visibly
from models.layers import Numerics, soft_capped
from models.packing import InWholeRows, Packing
from models.self_attention import AttentionRule, WithinRows
from models.taps import Taps

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

    @classmethod
    def empty(
        cls, lengths: Array, prompt_columns: Array, shape: tuple[int, int, int, int], dtype: str
    ) -> KeyValueCache:
        """Stacked; `shape` is layers, key/value heads, columns, head width."""
        layers, groups, columns, width = shape
        nothing = jnp.zeros((layers, lengths.shape[0], groups, columns, width), dtype)
        return cls(nothing, nothing, lengths, prompt_columns)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefill(InWholeRows):
    """Attention within prompts, some of a cache's, whose keys and values are remembered; the cache is stacked.

    Attributes:
      positions: int32 [b, t], of each token in its prompt; 0 for padding.
      places: int32 [m, n], where the tokens of each prompt lie among all b * t; beyond a prompt's end, anywhere.
      rows: int32 [m], of the cache, each prompt's; beyond the last where there is no prompt.
    """

    cache: KeyValueCache
    positions: Array
    places: Array
    rows: Array

    @classmethod
    def into(cls, cache: KeyValueCache, packing: Packing, rows: Array) -> Prefill:
        """`rows` int32 [b, samples of a row] of the cache, for the prompts that lie in `packing`."""
        first = jnp.arange(packing.lengths.shape[0], dtype=jnp.int32)[:, None] * jnp.int32(packing.tokens)
        starts = (first + packing.ends - packing.lengths).reshape(-1)
        columns = jnp.arange(_stack(cache.keys).shape[3], dtype=jnp.int32)
        return cls(cache, packing.positions, starts[:, None] + columns[None], rows.reshape(-1))

    def attend(
        self, rule: AttentionRule, layer: Array, query: Array, key: Array, value: Array, numerics: Numerics
    ) -> tuple[Array, Prefill]:
        mixed, _ = WithinRows(self.positions).attend(rule, layer, query, key, value, numerics)
        return mixed, self._remembering(layer, key, value)

    def attend_visibly(
        self, rule: AttentionRule, layer: Array, query: Array, key: Array, value: Array, taps: Taps, numerics: Numerics
    ) -> tuple[Array, Taps, Prefill]:
        rows = WithinRows(self.positions)
        mixed, taps, _ = rows.attend_visibly(rule, layer, query, key, value, taps, numerics)
        return mixed, taps, self._remembering(layer, key, value)

    def _remembering(self, layer: Array, key: Array, value: Array) -> Prefill:
        cache = dataclasses.replace(
            self.cache,
            keys=self._with(self.cache.keys, key, layer),
            values=self._with(self.cache.values, value, layer),
        )
        return dataclasses.replace(self, cache=cache)

    def _with(self, all_layers: PerLayer, new: Array, layer: Array) -> Array:
        """With new [b, t, g, h] in a layer, a whole row for each prompt; what is behind its end is never looked at."""
        stack = _stack(all_layers)
        tokens = new.astype(stack.dtype).reshape(-1, *new.shape[2:])
        prompts = jnp.take(tokens, self.places, axis=0, mode="clip").transpose(0, 2, 1, 3)
        return stack.at[layer, self.rows].set(prompts, mode="drop")


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

    @property
    def sample_lengths(self) -> Array:
        """int32 [b, 1]: a sample ends with its newest token; keys that are remembered stay as they were rotated."""
        return self.positions + jnp.int32(1)

    @property
    def longest(self) -> int:
        keys = self.cache.keys
        return (keys[0] if isinstance(keys, list) else keys).shape[-2]

    def attend(
        self, rule: AttentionRule, layer: Array, query: Array, key: Array, value: Array, numerics: Numerics
    ) -> tuple[Array, Decoding]:
        cache = self._remembering(layer, key, value)
        keys, values = _of_layer(cache.keys, layer), _of_layer(cache.values, layer)
        b, groups, columns, width = keys.shape
        query = rule.scaled(query).reshape(b, groups, -1, width)
        logits = soft_capped(numerics.einsum("bgrh,bgnh->bgrn", query, keys), rule.soft_cap)
        visible = self._visible(columns, rule.window_of(layer))[:, None, None]
        logits = jnp.where(visible, logits, jnp.float32(-jnp.inf))
        weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)).astype(numerics.dtype)
        # The sum of what is multiplied, so that rounded weights still add up to one.
        total = jnp.sum(weights.astype(jnp.float32), axis=-1, keepdims=True)
        mixed = numerics.einsum("bgrn,bgnh->bgrh", weights, values) / total
        return mixed.reshape(b, 1, -1), dataclasses.replace(self, cache=cache)

    def attend_visibly(
        self, rule: AttentionRule, layer: Array, query: Array, key: Array, value: Array, taps: Taps, numerics: Numerics
    ) -> tuple[Array, Taps, Decoding]:
        cache = self._remembering(layer, key, value)
        # As all attention has them: [b, n, g, h].
        keys, values = (_of_layer(each, layer).transpose(0, 2, 1, 3) for each in (cache.keys, cache.values))
        window, lengths = rule.window_of(layer), self.cache.prompt_lengths[:, None]
        last = self.positions
        places = SampleKeys(
            start=jnp.zeros_like(last),
            first=jnp.where(window == 0, 0, jnp.maximum(last - window + 1, 0)),
            last=last,
            gap_at=lengths,
            gap=self.cache.prompt_columns - lengths,
        )
        query = rule.scaled(query)
        mixed, taps = attend_visibly(query, keys, values, places, layer, taps, numerics, rule.soft_cap)
        return mixed, taps, dataclasses.replace(self, cache=cache)

    def _remembering(self, layer: Array, key: Array, value: Array) -> KeyValueCache:
        column = self.cache.prompt_columns + self.step
        return dataclasses.replace(
            self.cache,
            keys=_written(self.cache.keys, key, layer, column),
            values=_written(self.cache.values, value, layer, column),
        )

    def _visible(self, columns: int, window: Array) -> Array:
        """bool [b, columns]: real tokens, as far back as the window lets a query see; 0 is all."""
        prompt, lengths = self.cache.prompt_columns, self.cache.prompt_lengths[:, None]
        column = jnp.arange(columns, dtype=jnp.int32)[None]
        in_prompt = column < prompt
        real = jnp.where(in_prompt, column < lengths, column <= prompt + self.step)
        position = jnp.where(in_prompt, column, lengths + column - prompt)
        return real & ((window == 0) | (self.positions - position < window))


def _stack(all_layers: PerLayer) -> Array:
    assert not isinstance(all_layers, list), "prompts are read into a stacked cache"
    return all_layers


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
