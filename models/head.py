"""The language-model head: which token comes next.

In: parameters, rows of the final norm. Out: logits. Extraction has no head; generation asks for it. Dimension
letters: b batch, t tokens, d width of the stream.
"""

from __future__ import annotations

from jax import Array

from models.layers import Numerics
from models.ports import Gather, ModelConfig, Parameters


def logits(_: ModelConfig, params: Parameters, x: Array, numerics: Numerics, gather: Gather) -> Array:
    """x float32 [b, t, d] -> float32 [b, t, vocab]; a model without a head of its own uses its embedding."""
    name = "head" if "head" in params else "embedding"
    bias = gather("head_bias", params["head_bias"]) if "head_bias" in params else None
    return numerics.linear(x, gather(name, params[name]), bias)
