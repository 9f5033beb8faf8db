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
        begun = jnp.where(starts[:, None, :] <= columns[:, :, None], starts[:, None, :], 0)
        return jnp.where(columns < self.ends[:, -1:], columns - jnp.max(begun, axis=-1), 0)

    @property
    def owned(self) -> Array:
        """bool [b, n, tokens]: which columns are real tokens of which sample."""
        columns = jnp.arange(self.tokens, dtype=jnp.int32)[None, None, :]
        ends = self.ends[:, :, None]
        return (columns >= ends - self.lengths[:, :, None]) & (columns < ends)


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
