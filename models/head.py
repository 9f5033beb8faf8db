"""The language-model head: which token comes next.

In: parameters, rows of the final norm. Out: logits. Extraction has no head; generation asks for it. Dimension
letters: b batch, t tokens, d width of the stream.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from models.layers import Numerics
from models.ports import Gather, Parameters


def head_logits(
    params: Parameters, x: Array, numerics: Numerics, gather: Gather, soft_cap: float | None = None
) -> Array:
    """x float32 [b, t, d] -> float32 [b, t, vocab]; a model without a head of its own uses its embedding.

    Args:
      soft_cap: logits x become soft_cap * tanh(x / soft_cap) (Gemma 2, 2024, section 2); None leaves them.
    """
    name = "head" if "head" in params else "embedding"
    bias = gather("head_bias", params["head_bias"]) if "head_bias" in params else None
    logits = numerics.linear(x, gather(name, params[name]), bias)
    return logits if soft_cap is None else jnp.float32(soft_cap) * jnp.tanh(logits / jnp.float32(soft_cap))
