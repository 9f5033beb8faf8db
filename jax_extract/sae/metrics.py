"""How well an SAE does on rows that it was not trained on.

In: an SAE as it is stored, held-out rows. Out: `Metrics`. Sums are made a part of the
rows at a time, on the device, and added in float64. Formulas: docs/sae.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_extract.sae.autoencoder import Form, Params, SparseAutoencoder, decode, encode
from jax_extract.sae.selection import kth_largest_of_all

ROWS_AT_ONCE = 2_048


@dataclass(frozen=True)
class Metrics:
    """Attributes:
    rows: that these are of.
    explained_variance: 1 - Σ |x - x̂|² / Σ |x - mean|²; x is what is to be reconstructed.
    l0: mean number of active latents of a row.
    mse: mean squared error of a value, in units of the rows as they are.
    cosine: mean cosine of a row and its reconstruction.
    l2_ratio: mean of |x̂| / |x|.
    reconstruction_bias: Σ x·x̂ / Σ |x̂|², by which reconstructions would have to be multiplied to fit best
      (Rajamanoharan et al. 2024, 2404.16014).
    dead: share of the latents that were active in none of the rows.
    explained_variance_by_layer: of a crosscoder.
    """

    rows: int
    explained_variance: float
    l0: float
    mse: float
    cosine: float
    l2_ratio: float
    reconstruction_bias: float
    dead: float
    explained_variance_by_layer: tuple[float, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@partial(jax.jit, static_argnums=(0, 1))
def _sums(form: Form, layers: int, params: Params, x: Array, y: Array, shift: Array) -> dict[str, Array]:
    """Of rows [b, d] and [b, o]; `shift` [o] is near the mean of these, so that float32 sums lose nothing."""
    f = encode(form, params, x)
    out = decode(form, params, f)
    from_mean = y - shift[None]
    norm, of_out = jnp.linalg.norm(y, axis=1), jnp.linalg.norm(out, axis=1)
    dot = jnp.sum(y * out, axis=1)
    tiny = jnp.float32(1e-20)

    def by_layer(values: Array) -> Array:
        return jnp.sum(jnp.square(values).reshape(len(values), layers, -1), axis=2)

    return {
        "error": by_layer(y - out),
        "square": by_layer(from_mean),
        "shifted": jnp.sum(from_mean, axis=0),
        "l0": jnp.sum((f > 0).astype(jnp.float32), axis=1),
        "cosine": dot / jnp.maximum(norm * of_out, tiny),
        "ratio": of_out / jnp.maximum(norm, tiny),
        "dot": dot,
        "own": jnp.square(of_out),
        "fired": jnp.any(f > 0, axis=0),
    }


def measure(sae: SparseAutoencoder, rows: np.ndarray, targets: np.ndarray, layers: int = 1) -> Metrics:
    """Of rows [n, d_in], from which it is to reconstruct the targets [n, d_out]; `layers` are those of a crosscoder."""
    shift = targets.mean(axis=0, dtype=np.float64)
    sums: dict[str, Any] = {}
    fired = np.zeros(sae.d_sae, bool)
    for x, y in zip(_parts(rows), _parts(targets), strict=True):
        found = _sums(sae.form, layers, sae.params, x, y, jnp.asarray(shift, jnp.float32))
        fired |= np.asarray(found.pop("fired"))
        shifted = np.asarray(found.pop("shifted"), np.float64)
        sums["shifted"] = sums.get("shifted", 0.0) + shifted
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + np.asarray(value, np.float64).sum(axis=0)
    n = len(rows)
    variance = sums["square"] - (sums["shifted"] ** 2).reshape(layers, -1).sum(axis=1) / n
    by_layer = 1 - sums["error"] / variance
    return Metrics(
        rows=n,
        explained_variance=float(1 - sums["error"].sum() / variance.sum()),
        l0=float(sums["l0"] / n),
        mse=float(sums["error"].sum() / n / targets.shape[1]),
        cosine=float(sums["cosine"] / n),
        l2_ratio=float(sums["ratio"] / n),
        reconstruction_bias=float(sums["dot"] / max(sums["own"], 1e-300)),
        dead=float(1 - fired.mean()),
        explained_variance_by_layer=tuple(by_layer.tolist()) if layers > 1 else None,
    )


@partial(jax.jit, static_argnums=0)
def _kth(form: Form, params: Params, x: Array, k: Array, guess: Array) -> Array:
    activations = encode(form, params, x)
    count = jnp.floor(k * x.shape[0]).astype(jnp.int32)
    return kth_largest_of_all(activations, jnp.ones(activations.shape[1]), count, guess)


def calibrated(form: Form, params: Params, rows: np.ndarray, k: float, guess: float) -> float:
    """The threshold with which rows have k active latents on average, of a folded BatchTopK SAE.

    It is the mean of those of parts of the rows: the moving average of training lags behind a short one. `form` is that
    of a ReLU, which leaves all activations that there are to be chosen from.
    """
    whole = [part for part in _parts(rows) if len(part) == ROWS_AT_ONCE] or [rows.astype(np.float32)]
    found = [_kth(form, params, part, jnp.float32(k), jnp.float32(guess)) for part in whole]
    return float(np.mean([float(each) for each in found]))


def _parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield rows[start : start + ROWS_AT_ONCE].astype(np.float32)
