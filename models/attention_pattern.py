"""The attention pattern, softmax weights of each token over its sample, so computed that it can be kept and changed.

In: queries, keys and values, where the keys of each query's sample lie, taps. Out: what attention mixes, taps.
Dimension letters: b batch, q query tokens, s key columns, p positions in a sample, g key/value heads, r query heads per
key/value head, h head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from models.hooks import PATTERN
from models.layers import Numerics, soft_capped
from models.taps import Taps

QUERY_ROWS = 128  # of a block: logits of all heads are held for so many queries and every key of their row


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampleKeys:
    """Where each query finds the keys of its sample, and which of them it sees; all int32 [b, q].

    Attributes:
      start: the column of the sample's first key.
      first, last: positions that are seen.
      gap_at, gap: so many columns before this position belong to nobody.
    """

    start: Array
    first: Array
    last: Array
    gap_at: Array
    gap: Array

    @classmethod
    def in_rows(cls, positions: Array, reach: Array) -> SampleKeys:
        """Of samples that lie one behind the other.

        Args:
          positions: int32 [b, t], of each token in its sample.
          reach: int32 [b, t], how many tokens back each one sees, besides itself.
        """
        columns = jnp.arange(positions.shape[1], dtype=jnp.int32)[None]
        nothing = jnp.zeros_like(positions)
        return cls(columns - positions, positions - reach, positions, nothing, nothing)

    def columns(self, places: int) -> Array:
        """int32 [b, q, p]: of the key at each position; beyond the sample's end, anywhere."""
        positions = jnp.arange(places, dtype=jnp.int32)[None, None]
        start, gap_at, gap = (x[:, :, None] for x in (self.start, self.gap_at, self.gap))
        return start + positions + jnp.where(positions < gap_at, 0, gap)

    def positions(self, columns: int) -> Array:
        """int32 [b, q, s]: of the key in each column; of other samples' below `first` or above `last`."""
        start, gap_at, gap = (x[:, :, None] for x in (self.start, self.gap_at, self.gap))
        along = jnp.arange(columns, dtype=jnp.int32)[None, None] - start
        return jnp.where(along < gap_at, along, jnp.where(along < gap_at + gap, -1, along - gap))

    def sees(self, positions: Array) -> Array:
        """bool, of positions [b or 1, q or 1, n]."""
        return (positions >= self.first[:, :, None]) & (positions <= self.last[:, :, None])


def attend_visibly(
    query: Array,
    key: Array,
    value: Array,
    keys: SampleKeys,
    layer: Array,
    taps: Taps,
    numerics: Numerics,
    soft_cap: float | None,
) -> tuple[Array, Taps]:
    """Attention by softmax in two steps, with the hook point `attention_pattern` between them.

    A row of the pattern has a weight for each of the first positions of a sample, head by head; weights on later ones
    are neither kept nor changed. Weights that a change puts on what a token does not see are taken away again, so that
    what is kept is what is mixed.

    Args:
      query: float32 [b, q, g * r, h], scaled already.
      key, value: [b, s, g, h].

    Returns:
      float32 [b, q, g * r * h], and taps.
    """
    b, tokens, heads, _ = query.shape
    columns, groups = key.shape[1:3]
    places = taps.plan.pattern_tokens
    size = min(tokens, QUERY_ROWS)
    blocks = -(-tokens // size)

    def in_blocks(x: Array) -> Array:
        """[b, q, …] -> [blocks, b, size, …]."""
        padded = jnp.pad(x, [(0, blocks * size - tokens if axis == 1 else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(padded.reshape(b, blocks, size, *x.shape[2:]), 1, 0)

    def whole(x: Array) -> Array:
        """[blocks, b, size, …] -> [b, q, all values of a query]."""
        return jnp.moveaxis(x, 0, 1).reshape(b, blocks * size, -1)[:, :tokens]

    def by_group(x: Array) -> Array:
        """[b, q, all values of a query] -> [b, q, g, r, values of a head]."""
        return x.reshape(b, tokens, groups, heads // groups, -1)

    def by_column(queries: Array, keys: SampleKeys) -> Array:
        """float32 [b, size, g, r, s]."""
        logits = soft_capped(numerics.einsum("bqgrh,bsgh->bqgrs", queries, key), soft_cap)
        seen = keys.sees(keys.positions(columns))[:, :, None, None]
        return jax.nn.softmax(jnp.where(seen, logits, jnp.float32(-jnp.inf)), axis=-1)

    def by_position(block: tuple[Array, SampleKeys]) -> Array:
        """float32 [b, size, g, r, p]."""
        weights, at = by_column(*block), block[1].columns(places)
        return jnp.take_along_axis(weights, at[:, :, None, None], axis=-1, mode="clip")

    def mixed(block: tuple[Array, Array, SampleKeys]) -> Array:
        """float32 [b, size, g, r, h]."""
        pattern, queries, keys = block
        positions = keys.positions(columns)
        at = positions[:, :, None, None]
        weights = jnp.take_along_axis(pattern, at, axis=-1, mode="clip")
        if columns > places:  # computed again, which holds less than to remember them would
            weights = jnp.where(at < places, weights, by_column(queries, keys))
        weights = jnp.where(keys.sees(positions)[:, :, None, None], weights, jnp.float32(0))
        return numerics.einsum("bqgrs,bsgh->bqgrh", weights, value)

    queries, keys_of_blocks = in_blocks(by_group(query)), jax.tree.map(in_blocks, keys)
    pattern = whole(jax.lax.map(by_position, (queries, keys_of_blocks)))
    pattern = taps.change(PATTERN, layer, pattern)
    pattern = jnp.where(jnp.tile(keys.sees(_positions(places)), (1, 1, heads)), pattern, jnp.float32(0))
    taps = taps.keep(PATTERN, layer, pattern)
    return whole(jax.lax.map(mixed, (in_blocks(by_group(pattern)), queries, keys_of_blocks))), taps


def _positions(places: int) -> Array:
    return jnp.arange(places, dtype=jnp.int32)[None, None]
