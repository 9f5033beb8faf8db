"""How samples lie in rows of tokens: one behind the other from column 0, the rest of a row is padding.

In: the real tokens of each sample of each row. Out: `Packing`, from which a forward takes the position of
every token in its own sample, and the capture which columns are whose. A batch that pads every sample to a
row of its own is the case of one sample a row.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

_FEW = 16  # samples of a row, each of which every column may be compared with
_OWNED_AT_ONCE = 1 << 20  # samples x columns of a row: 4 MB in float32
_BLOCK = 128  # columns: the tile of a matrix unit


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packing:
    """Attributes:
    lengths: int32 [b, n], real tokens of up to n samples of each row, in order; 0 where there is none.
    tokens: columns of a row (static).
    """

    lengths: Array
    tokens: int = dataclasses.field(metadata={"static": True})

    @property
    def samples(self) -> int:
        """Most samples of a row."""
        return self.lengths.shape[1]

    @property
    def ends(self) -> Array:
        """int32 [b, n]: the column behind each sample; of an absent one, that of the last."""
        return jnp.cumsum(self.lengths, axis=1)

    @property
    def positions(self) -> Array:
        """int32 [b, tokens]: of each token in its own sample; 0 for padding, so that it sees nothing but itself."""
        columns = jnp.arange(self.tokens, dtype=jnp.int32)[None, :]
        starts = self.ends - self.lengths
        if self.samples <= _FEW:  # compiles sooner
            begun = jnp.where(starts[:, None, :] <= columns[:, :, None], starts[:, None, :], 0).max(axis=-1)
        else:
            # An absent sample begins where padding does, or behind the row, where it is dropped.
            rows = jnp.arange(starts.shape[0], dtype=jnp.int32)[:, None]
            begun = jnp.zeros((starts.shape[0], self.tokens), jnp.int32).at[rows, starts].set(starts, mode="drop")
            begun = jax.lax.cummax(begun, axis=1)
        return jnp.where(columns < self.ends[:, -1:], columns - begun, 0)

    @property
    def owned(self) -> Array:
        """bool [b, n, tokens]: which columns are real tokens of which sample."""
        columns = jnp.arange(self.tokens, dtype=jnp.int32)[None, None, :]
        ends = self.ends[:, :, None]
        return (columns >= ends - self.lengths[:, :, None]) & (columns < ends)

    def sums(self, x: Array, first: int = 0) -> Array:
        """x [b, tokens, width] -> float32 [b, n, width]: over the tokens of each sample; 0 for an absent one.

        Args:
          first: the position from which on tokens count. What is before may be a hundred times as large: it is left
            out of the sum, and not subtracted from it.
        """
        x = x.astype(jnp.float32)
        if first:
            x = jnp.where((self.positions >= first)[:, :, None], x, jnp.float32(0))
        if self.samples * self.tokens <= _OWNED_AT_ONCE:
            return _products("bnt,btd->bnd", self.owned, x)
        return self._sums_by_blocks(x)

    def _sums_by_blocks(self, x: Array) -> Array:
        """The same where `owned` would be large: over blocks of columns first, then over the blocks of a sample."""
        b, tokens, width = x.shape
        blocks = -(-tokens // _BLOCK)
        slots = min(self.samples, _BLOCK)  # samples that a block can hold tokens of

        def in_blocks(values: Array, beyond: int) -> Array:
            """[b, tokens, ...] -> [b, blocks, _BLOCK, ...]."""
            widths = [(0, 0), (0, blocks * _BLOCK - tokens), *[(0, 0)] * (values.ndim - 2)]
            padded = jnp.pad(values, widths, constant_values=beyond)
            return padded.reshape(b, blocks, _BLOCK, *values.shape[2:])

        real = jnp.arange(tokens, dtype=jnp.int32)[None, :] < self.ends[:, -1:]
        begun = jnp.cumsum((self.positions == 0) & real, axis=1, dtype=jnp.int32) - 1
        sample = in_blocks(jnp.where(real, begun, self.samples), self.samples)
        first = sample[:, :, 0]  # of each block
        slot = sample - first[:, :, None]
        mine = (slot[:, :, None, :] == jnp.arange(slots, dtype=jnp.int32)[None, None, :, None]) & (
            sample < self.samples
        )[:, :, None, :]
        parts = _products("bkmt,bktd->bkmd", mine, in_blocks(x, 0))

        # A sample has a part in its first block, one in its last, and blocks between that are its own.
        head, tail = (self.ends - self.lengths) // _BLOCK, jnp.maximum(self.ends - 1, 0) // _BLOCK
        samples = jnp.arange(self.samples, dtype=jnp.int32)[None, :]

        def part_in(block: Array) -> Array:
            """[b, n, width] of the block [b, n] that each sample has tokens in."""
            slot = samples - jnp.take_along_axis(first, block, axis=1)
            places = jnp.clip(block * slots + slot, 0, blocks * slots - 1)[:, :, None]
            return jnp.take_along_axis(parts.reshape(b, blocks * slots, width), places, axis=1)

        columns = jnp.arange(blocks, dtype=jnp.int32)[None, None, :]
        between = (head[:, :, None] < columns) & (columns < tail[:, :, None])
        total = part_in(jnp.minimum(head, blocks - 1)) + _products("bnk,bkd->bnd", between, parts[:, :, 0])
        total += jnp.where((tail > head)[:, :, None], part_in(tail), jnp.float32(0))
        return jnp.where((self.lengths > 0)[:, :, None], total, jnp.float32(0))


def _products(how: str, chosen: Array, x: Array) -> Array:
    """Sums of what is chosen, always in float32: a long sum in bfloat16 would lose the small terms."""
    return jnp.einsum(how, chosen.astype(jnp.float32), x, precision=jax.lax.Precision.HIGHEST)


class InWholeRows:
    """What rotations ask of tokens that lie in rows with all of their samples; see `layers.TokenPlaces`."""

    positions: Array  # int32 [b, t]

    @property
    def sample_lengths(self) -> Array:
        """int32 [b, t]: of prompts, where answers follow them and are not there yet."""
        return sample_lengths(self.positions)

    @property
    def longest(self) -> int:
        return self.positions.shape[1]


def sample_lengths(positions: Array) -> Array:
    """int32 [b, tokens]: how many tokens the sample of each token has in its row; 1 for padding.

    Args:
      positions: int32 [b, tokens], of each token in its sample, as `Packing.positions` are.
    """
    rows, tokens = positions.shape
    columns = jnp.arange(tokens, dtype=jnp.int32)[None, :]
    begins = jnp.where(positions == 0, columns, jnp.int32(tokens))
    next_one = jax.lax.cummin(begins, axis=1, reverse=True)
    behind = jnp.concatenate([next_one[:, 1:], jnp.full((rows, 1), tokens, jnp.int32)], axis=1)
    return behind - columns + positions
