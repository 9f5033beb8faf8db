"""What every decoder does around its blocks: they are scanned, a layer's parameters whole only while it runs.

In: a block, the final norm, the stream that enters the first block, taps, attention, parameters of the blocks. Out:
taps filled, and attention with what it remembers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from models.hooks import Taps
from models.ports import Gather, Parameters
from models.self_attention import SelfAttention

# (parameters of the layer, stream float32 [b, t, d], taps, attention, layer int32) -> the same three
Carry = tuple[Array, Taps, SelfAttention]
Block = Callable[[Parameters, Array, Taps, SelfAttention, Array], Carry]


def run_decoder(
    block: Block,
    final_norm: Callable[[Array], Array],
    x: Array,
    taps: Taps,
    attention: SelfAttention,
    blocks: Parameters | list[Parameters],
    gather: Gather,
) -> tuple[Taps, SelfAttention]:
    """Runs `taps.num_blocks` blocks on the stream x, float32 [b, t, d], and the final norm where it is wanted.

    Args:
      blocks: their parameters, stacked on a leading layer axis; or a list with those of each. A list is compiled layer
        by layer, and nothing is copied out of a stack: for steps so short that reading parameters is all they do.
    """

    def body(carry: Carry, xs: tuple[Parameters, Array]) -> tuple[Carry, None]:
        shards, layer = xs
        return block(gather("blocks", shards), *carry, layer), None

    x, taps = taps.visit("embeddings", None, x)
    n = taps.num_blocks
    carry = (x, taps, attention)
    if isinstance(blocks, list):
        for layer, shards in enumerate(blocks[:n]):
            known = cast(Array, np.int32(layer))  # while compiling, so that a cache of lists can be indexed with it
            carry = block(gather("blocks", shards), *carry, known)
    elif n:
        stacked = jax.tree.map(lambda p: p[:n], blocks)
        carry, _ = jax.lax.scan(body, carry, (stacked, jnp.arange(n, dtype=jnp.int32)))
    x, taps, attention = carry
    # The input of the block after the last one that runs is the output of that one.
    if n in dict(taps.plan.layers).get("residual_before", ()):
        x, taps = taps.visit("residual_before", jnp.int32(n), x)
    if taps.plan.needs_final_norm:
        _, taps = taps.visit("final_norm", None, final_norm(x))
    return taps, attention
