"""Whether SAEs that differ by their seed alone find the same directions, and where a decoder's bias lies.

In: decoders [d_sae, d_out]. Out: how well they match, and checks of the bias.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SAME = 0.7  # the cosine above which two latents count as one (Paulo and Belrose 2025, 2501.16615)
_MATCHED = 8_192  # latents that are assigned to each other one to one: the time grows with their cube
_AT_ONCE = 2_048


def unit(decoder: np.ndarray) -> np.ndarray:
    """float32 [d_sae, d_out], directions of norm 1."""
    norms = np.linalg.norm(decoder, axis=1, keepdims=True)
    return (decoder / np.maximum(norms, np.finfo(np.float32).tiny)).astype(np.float32)


def nearest_directions(decoder: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each direction the nearest one of the others: its number int64 [d_sae], and the cosine float32 [d_sae]."""
    a, b = unit(decoder), unit(others)
    places, cosines = [], []
    for start in range(0, len(a), _AT_ONCE):
        found = a[start : start + _AT_ONCE] @ b.T
        places.append(found.argmax(axis=1))
        cosines.append(found.max(axis=1))
    return np.concatenate(places), np.concatenate(cosines)


def agreement(decoder: np.ndarray, others: np.ndarray) -> dict[str, Any]:
    """How far two SAEs have found the same directions.

    Returns:
      `mean_max_cosine`: the mean, over the latents of both, of the cosine with the nearest of the other one's
      (Sharkey, Braun and Millidge 2022). `matched_cosine`: of a one-to-one assignment with the largest sum (Paulo and
      Belrose 2025); None of more than 8,192 latents. `shared`: the share of latents of which either is above 0.7.
    """
    forth, back = nearest_directions(decoder, others)[1], nearest_directions(others, decoder)[1]
    said: dict[str, Any] = {"mean_max_cosine": float((forth.mean() + back.mean()) / 2), "matched_cosine": None}
    matched = forth
    if max(len(decoder), len(others)) <= _MATCHED:
        from scipy.optimize import linear_sum_assignment

        cosines = unit(decoder) @ unit(others).T
        rows, columns = linear_sum_assignment(cosines, maximize=True)
        matched = cosines[rows, columns]
        said["matched_cosine"] = float(matched.mean())
    return {**said, "shared": float((matched > SAME).mean())}


def bias_checks(decoder: np.ndarray, bias: np.ndarray, mean: np.ndarray, square: float) -> dict[str, float]:
    """Where the bias of a decoder lies: it should be near the mean of the rows, and no latent should stand for it.

    Args:
      mean: float64 [d_out], of the rows; square: the mean squared distance of a row from it.

    Returns:
      `cosine_with_mean`; `norm_ratio`, its norm by the mean's; `explained_variance`, of the bias alone, which is 0 at
      best; `largest_cosine_with_latent`.
    """
    b = bias.astype(np.float64)
    norm, of_mean = max(float(np.linalg.norm(b)), 1e-300), max(float(np.linalg.norm(mean)), 1e-300)
    return {
        "cosine_with_mean": float(b @ mean / norm / of_mean),
        "norm_ratio": norm / of_mean,
        "explained_variance": float(-((b - mean) ** 2).sum() / square),
        "largest_cosine_with_latent": float(np.abs(unit(decoder) @ (b / norm)).max()),
    }
