"""How well an SAE does on rows that it was not trained on.

In: an SAE as it is used after training, held-out rows and their samples. Out: `Metrics`. Sums are made a part of the
rows at a time, on the device, and added in float64. Formulas: docs/sae.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_extract.sae.architecture import OVER_BATCH, Architecture
from jax_extract.sae.selection import active, kth_largest_of_all, kth_largest_of_rows

ROWS_AT_ONCE = 2_048


@dataclass(frozen=True)
class Metrics:
    """Attributes:
    rows: that these are of.
    explained_variance: 1 - Σ |x - x̂|² / Σ |x - mean|².
    l0: mean number of active latents of a row.
    mse: mean squared error of a value, in units of the rows as they are.
    cosine: mean cosine of a row and its reconstruction.
    l2_ratio: mean of |x̂| / |x|.
    reconstruction_bias: Σ x·x̂ / Σ |x̂|², by which reconstructions would have to be multiplied to fit best
      (Rajamanoharan et al. 2024, 2404.16014).
    dead: share of the latents that were active in none of the rows.
    """

    rows: int
    explained_variance: float
    l0: float
    mse: float
    cosine: float
    l2_ratio: float
    reconstruction_bias: float
    dead: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def pre_activations(architecture: Architecture, params: Mapping[str, Array], x: Array) -> Array:
    """float32 [b, f] of scaled rows, without the encoder's biases."""
    if architecture.centred:
        x = x - params["b_dec"][None]
    return jnp.matmul(x, params["W_enc"], precision=lax.Precision.HIGHEST)


def latents(architecture: Architecture, params: Mapping[str, Array], x: Array, threshold: Array) -> Array:
    """float32 [b, f] of scaled rows [b, d], as the stored SAE has them.

    Args:
      threshold: float32 [], of a BatchTopK SAE.
    """
    z = pre_activations(architecture, params, x)
    if architecture.name == "gated":
        magnitude = z * jnp.exp(params["r_mag"])[None] + params["b_mag"][None]
        return jnp.where(z + params["b_gate"][None] > 0, jnp.maximum(magnitude, 0), 0)
    pre = z + params["b_enc"][None]
    if architecture.name == "standard":
        return jnp.maximum(pre, 0)
    if architecture.name == "jumprelu":
        return jnp.where(pre > jnp.maximum(params["threshold"], 0)[None], pre, 0)
    norms = jnp.linalg.norm(params["W_dec"], axis=1)
    scaled = pre * norms[None]
    if architecture.name == "topk":
        assert architecture.k is not None
        return jnp.where(active(pre, norms, kth_largest_of_rows(scaled, architecture.k)), pre, 0)
    return jnp.where(scaled > threshold, jnp.maximum(pre, 0), 0)


@partial(jax.jit, static_argnums=0)
def _sums(
    architecture: Architecture, params: Mapping[str, Array], x: Array, scale: Array, threshold: Array, shift: Array
) -> dict[str, Array]:
    """Of rows [b, d] as they are; `shift` [d] is near their mean, so that float32 sums lose nothing."""
    f = latents(architecture, params, x * scale, threshold)
    out = jnp.matmul(f, params["W_dec"], precision=lax.Precision.HIGHEST) + params["b_dec"][None]
    out = out / scale
    from_mean = x - shift[None]
    norm, of_out = jnp.linalg.norm(x, axis=1), jnp.linalg.norm(out, axis=1)
    dot = jnp.sum(x * out, axis=1)
    tiny = jnp.float32(1e-20)
    return {
        "error": jnp.sum(jnp.square(x - out), axis=1),
        "square": jnp.sum(jnp.square(from_mean), axis=1),
        "shifted": jnp.sum(from_mean, axis=0),
        "l0": jnp.sum((f > 0).astype(jnp.float32), axis=1),
        "cosine": dot / jnp.maximum(norm * of_out, tiny),
        "ratio": of_out / jnp.maximum(norm, tiny),
        "dot": dot,
        "own": jnp.square(of_out),
        "fired": jnp.any(f > 0, axis=0),
    }


def measure(
    architecture: Architecture, params: Mapping[str, Any], rows: np.ndarray, scale: float, threshold: float
) -> Metrics:
    """Of rows [n, d] as they are."""
    shift = rows.astype(np.float64).mean(axis=0)
    sums: dict[str, Any] = {}
    fired = np.zeros(architecture.d_sae, bool)
    for part in _parts(rows):
        found = _sums(
            architecture, params, part, jnp.float32(scale), jnp.float32(threshold), jnp.asarray(shift, jnp.float32)
        )
        for name, value in found.items():
            if name == "fired":
                fired |= np.asarray(value)
            else:
                sums[name] = sums.get(name, 0.0) + np.asarray(value, np.float64).sum(axis=0)
    n = len(rows)
    variance = sums["square"] - (sums["shifted"] ** 2).sum() / n
    return Metrics(
        rows=n,
        explained_variance=float(1 - sums["error"] / variance),
        l0=float(sums["l0"] / n),
        mse=float(sums["error"] / n / rows.shape[1]),
        cosine=float(sums["cosine"] / n),
        l2_ratio=float(sums["ratio"] / n),
        reconstruction_bias=float(sums["dot"] / max(sums["own"], 1e-300)),
        dead=float(1 - fired.mean()),
    )


@partial(jax.jit, static_argnums=0)
def _kth(architecture: Architecture, params: Mapping[str, Array], x: Array, k: Array, guess: Array) -> Array:
    pre = pre_activations(architecture, params, x) + params["b_enc"][None]
    return kth_largest_of_all(
        pre, jnp.linalg.norm(params["W_dec"], axis=1), jnp.floor(k * x.shape[0]).astype(jnp.int32), guess
    )


def calibrated(
    architecture: Architecture, params: Mapping[str, Any], rows: np.ndarray, scale: float, k: float, guess: float
) -> float:
    """The threshold with which rows have k active latents on average; `guess` of what has no such threshold.

    It is the mean of those of parts of the rows: the moving average of training lags behind a short one.
    """
    if architecture.name not in OVER_BATCH:
        return guess
    found = [
        float(_kth(architecture, params, part * np.float32(scale), jnp.float32(k), jnp.float32(guess)))
        for part in _parts(rows)
        if len(part) == ROWS_AT_ONCE or len(rows) < ROWS_AT_ONCE
    ]
    return float(np.mean(found))


def _parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield rows[start : start + ROWS_AT_ONCE].astype(np.float32)
