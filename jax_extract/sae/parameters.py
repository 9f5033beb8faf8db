"""The weights of a sparse autoencoder, as they begin.

In: an architecture, a seed, the mean of the rows. Out: float32 arrays under SAELens' names: W_enc [d_in, d_sae],
W_dec [d_sae, d_out], b_dec [d_out]; b_enc [d_sae], of a gated one b_gate, b_mag and r_mag [d_sae] instead; threshold
[d_sae] of a JumpReLU SAE. Directions of the decoder are uniformly random rows of one small norm, the encoder is its
transpose (Anthropic, circuits update of April 2024), and the bias of the decoder is the mean of the rows. A direction
of a crosscoder has a part for each layer, of equal norms.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jax_extract.sae.architecture import Architecture

Parameters = dict[str, np.ndarray]
DECODER_NORM = 0.1
FIRST_THRESHOLD = {"step": 0.01, "tanh": 0.1}  # of a JumpReLU SAE, by its sparsity loss, in units of scaled rows


def first_parameters(
    architecture: Architecture, seed: int, mean: np.ndarray | None = None, decoder_norm: float = DECODER_NORM
) -> Parameters:
    """float32 arrays on the host.

    Args:
      mean: float [d_out], of scaled rows; zeros where left out.
    """
    d_in, d_out, d_sae = architecture.d_in, architecture.d_out, architecture.d_sae
    random = np.random.default_rng([seed, d_out, d_sae])
    drawn = random.uniform(-1.0, 1.0, (d_sae, d_out)).astype(np.float32)
    parts = drawn.reshape(d_sae, architecture.layers, -1)
    parts *= decoder_norm / np.sqrt(architecture.layers) / np.linalg.norm(parts, axis=2, keepdims=True)
    decoder = parts.reshape(d_sae, d_out)
    if d_in == d_out:
        encoder = decoder.T.copy()
    else:
        encoder = random.uniform(-1.0, 1.0, (d_sae, d_in)).astype(np.float32)
        encoder = (encoder * (decoder_norm / np.linalg.norm(encoder, axis=1, keepdims=True))).T.copy()
    bias = np.zeros(d_out, np.float32) if mean is None else np.asarray(mean, np.float32)
    found = {"W_enc": encoder, "W_dec": decoder, "b_dec": bias}
    biases = ("b_gate", "b_mag", "r_mag") if architecture.name == "gated" else ("b_enc",)
    found |= {name: np.zeros(d_sae, np.float32) for name in biases}
    if architecture.name == "jumprelu":
        found["threshold"] = np.full(d_sae, FIRST_THRESHOLD[architecture.sparsity_loss], np.float32)
    return found


def norms_by_layer(decoder: Any, layers: int, xp: Any = np) -> Any:
    """[f, layers], of the parts that directions [f, o] have for each layer; their sums are the norms that losses have.

    That is the norm itself where there is one layer, and what Lindsey et al. (Anthropic, October 2024) weigh the
    latents of a crosscoder by.

    Args:
      xp: numpy or jax.numpy, whichever `decoder` is of.
    """
    return xp.sqrt(xp.sum(xp.square(decoder.reshape(decoder.shape[0], layers, -1)), axis=2))
