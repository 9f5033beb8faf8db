"""How well an SAE does on rows that it was not trained on.

In: an SAE as it is stored, held-out rows and whose they are. Out: `Sums` by sample, and the `Metrics` that they come
to, of all samples or of any of them as often as is wanted. What is summed is made a part of the rows at a time, on the
device, and added in float64. Formulas: docs/sae.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_extract.sae.autoencoder import Form, Params, SparseAutoencoder, decode, encode
from jax_extract.sae.selection import counted, kth_largest_of_all

ROWS_AT_ONCE = 2_048
VALUES = ("explained_variance", "l0", "mse", "cosine", "l2_ratio", "reconstruction_bias")


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
        """JSON has no infinity and no NaN, which rows without variance give: those are null."""
        said = {name: value for name, value in asdict(self).items() if value is not None}
        return {
            name: value if isinstance(value, tuple) or math.isfinite(value) else None for name, value in said.items()
        }


@dataclass(frozen=True, eq=False)
class Sums:
    """Over the rows of each of s samples.

    Attributes:
      rows: float64 [s].
      of_rows: float64 [s, 5]: active latents, cosines, ratios of norms, x·x̂ and |x̂|².
      error, square: float64 [s, layers], squared distances of rows from their reconstruction, and from near their mean.
      shifted: float64 [s, d_out], distances from near their mean.
      fired: int64 [d_sae], rows of any sample in which each latent is active.
    """

    rows: np.ndarray
    of_rows: np.ndarray
    error: np.ndarray
    square: np.ndarray
    shifted: np.ndarray
    fired: np.ndarray

    def metrics(self) -> Metrics:
        """Of all samples."""
        one = np.ones((1, len(self.rows)))
        [values] = self.values(one)
        by_layer = tuple(self._by_layer(one)[0].tolist()) if self.error.shape[1] > 1 else None
        known = dict(zip(VALUES, values.tolist(), strict=True))
        dead = float(1 - (self.fired > 0).mean())
        return Metrics(rows=int(self.rows.sum()), **known, dead=dead, explained_variance_by_layer=by_layer)

    def values(self, times: np.ndarray) -> np.ndarray:
        """float64 [t, 6]: the metrics from `explained_variance` to `reconstruction_bias`, of samples taken so many
        times.

        Args:
          times: float64 [t, s].
        """
        n = times @ self.rows
        error, square = (times @ sums for sums in (self.error, self.square))
        variance = square.sum(axis=1) - ((times @ self.shifted) ** 2).sum(axis=1) / n
        l0, cosine, ratio, dot, own = (times @ self.of_rows).T
        error = error.sum(axis=1)
        variance[variance <= 0] = np.nan
        bias = dot / np.maximum(own, 1e-300)
        return np.stack(
            [1 - error / variance, l0 / n, error / n / self.shifted.shape[1], cosine / n, ratio / n, bias], 1
        )

    def _by_layer(self, times: np.ndarray) -> np.ndarray:
        """float64 [t, layers], explained variances."""
        layers = self.error.shape[1]
        squares = ((times @ self.shifted) ** 2).reshape(len(times), layers, -1).sum(axis=2)
        return 1 - times @ self.error / (times @ self.square - squares / (times @ self.rows)[:, None])


@partial(jax.jit, static_argnums=(0, 1))
def _measured(form: Form, layers: int, params: Params, x: Array, y: Array, shift: Array) -> tuple[Array, ...]:
    """Of rows [b, d] and [b, o]; `shift` [o] is near the mean of these, so that float32 sums lose nothing."""
    f = encode(form, params, x)
    out = decode(form, params, f)
    norm, of_out = jnp.linalg.norm(y, axis=1), jnp.linalg.norm(out, axis=1)
    dot = jnp.sum(y * out, axis=1)
    tiny = jnp.float32(1e-20)

    def by_layer(values: Array) -> Array:
        return jnp.sum(jnp.square(values).reshape(len(values), layers, -1), axis=2)

    active = f > 0
    cosine, ratio = dot / jnp.maximum(norm * of_out, tiny), of_out / jnp.maximum(norm, tiny)
    of_rows = jnp.stack([jnp.sum(active.astype(jnp.float32), axis=1), cosine, ratio, dot, jnp.square(of_out)], axis=1)
    return of_rows, by_layer(y - out), by_layer(y - shift[None]), counted(active)


def sums_of(
    sae: SparseAutoencoder, rows: np.ndarray, targets: np.ndarray, begins: np.ndarray | None = None, layers: int = 1
) -> Sums:
    """Of rows [n, d_in], from which it is to reconstruct the targets [n, d_out].

    Args:
      begins: int64 [s], where the rows of each sample begin, ascending from 0 and none twice; None for one sample.
      layers: of a crosscoder.
    """
    begins = np.zeros(1, np.int64) if begins is None else begins
    shift = targets.mean(axis=0, dtype=np.float64).astype(np.float32)
    found: list[list[np.ndarray]] = []
    fired = np.zeros(sae.d_sae, np.int64)
    for x, y in zip(_parts(rows), _parts(targets), strict=True):
        *of_rows, active = map(np.asarray, _measured(sae.form, layers, sae.params, x, y, jnp.asarray(shift)))
        found.append([each.astype(np.float64) for each in of_rows])
        fired += active
    each, error, square = (np.add.reduceat(np.concatenate(column), begins) for column in zip(*found, strict=True))
    shifted = np.add.reduceat(targets - shift.astype(np.float64), begins)
    return Sums(np.diff([*begins, len(rows)]).astype(np.float64), each, error, square, shifted, fired)


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
