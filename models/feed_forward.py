"""The two kinds of feed-forward network, with their hook points.

In: a block's parameters and its normed stream. Out: what the network adds to the stream, before any norm behind it,
and taps. Dimension letters: b batch, t tokens, d width of the stream, f width of the network.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from models.layers import Numerics
from models.ports import Parameters
from models.taps import Taps


def gated(
    p: Parameters, x: Array, taps: Taps, layer: Array, activation: Callable[[Array], Array], numerics: Numerics
) -> tuple[Array, Taps]:
    """down(activation(gate(x)) * up(x)) of x float32 [b, t, d]; gate and up are one product.

    Shazeer, "GLU Variants Improve Transformer", 2020, eq. 6.
    """
    gate, up = jnp.split(numerics.linear(x, p["gate_up"], p.get("gate_up_bias")), 2, axis=-1)
    gate, taps = taps.visit("ffn_gate", layer, gate)
    up, taps = taps.visit("ffn_up", layer, up)
    hidden, taps = taps.visit("ffn_hidden", layer, activation(gate) * up)
    return numerics.long_linear(hidden, p["down"], p.get("down_bias")), taps


def ungated(
    p: Parameters, x: Array, taps: Taps, layer: Array, activation: Callable[[Array], Array], numerics: Numerics
) -> tuple[Array, Taps]:
    """down(activation(up(x))) of x float32 [b, t, d]."""
    up, taps = taps.visit("ffn_up", layer, numerics.linear(x, p["up"], p["up_bias"]))
    hidden, taps = taps.visit("ffn_hidden", layer, activation(up))
    return numerics.long_linear(hidden, p["down"], p["down_bias"]), taps
