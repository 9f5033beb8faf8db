"""One latent, with all that is shown of it.

In: what two passes over the texts have found, the weights. Out: `Feature`, from which the page and the files for
Neuronpedia are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jax_extract.sae.features.contexts import Context, Together
from jax_extract.sae.features.kept import Entries
from jax_extract.sae.features.logits import LogitTable

FIFTHS = 5
_BARS = 20
NEIGHBOURS = 6


@dataclass(frozen=True)
class Neighbour:
    """Another latent, and how near it is: a cosine, a share or a correlation."""

    latent: int
    value: float
    of: str = ""


@dataclass(frozen=True, eq=False)
class Group:
    """Activations of one fifth of all, from `least` to `most`."""

    least: float
    most: float
    contexts: Sequence[Context]


@dataclass(frozen=True, eq=False)
class Feature:
    """Attributes:
    density: share of the rows in which it is active.
    largest: its largest activation.
    edges: float32 [21]; counts: int64 [20], a histogram of its activations (of a random sample of 256).
    top: where it is most active, a text once.
    groups: fifths of its activations, from the largest.
    nearest: by the cosine of decoder directions; together: by the share of rows of either in which both are active
      (Jaccard); correlated: by the correlation of activations; matches: in other SAEs, by the cosine of directions.
    direction: float32 [d_out], of the decoder.
    """

    latent: int
    density: float
    largest: float
    edges: np.ndarray
    counts: np.ndarray
    top: Sequence[Context]
    groups: Sequence[Group]
    nearest: Sequence[Neighbour]
    together: Sequence[Neighbour]
    correlated: Sequence[Neighbour]
    matches: Sequence[Neighbour]
    logits: LogitTable | None
    direction: np.ndarray


def histogram(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges float32 [21] from 0 on, counts int64 [20]."""
    top = float(values.max()) if len(values) else 1.0
    counts, edges = np.histogram(values, _BARS, (0.0, top))
    return edges.astype(np.float32), counts


def fifths(some: Entries, samples: np.ndarray, each: int) -> list[tuple[float, float, np.ndarray]]:
    """Of a random sample of a latent's activations: bounds of each fifth, and rows of it, one of a text.

    Args:
      some: in the order of their random priority; samples: int64 [n], whose rows they are.
    """
    found = []
    order = np.argsort(-some.value, kind="stable")
    for part in np.array_split(order, FIFTHS):
        if not len(part):
            continue
        drawn = np.sort(part)  # by random priority
        _, first = np.unique(samples[drawn], return_index=True)
        rows = some.row[drawn[np.sort(first)]][:each]
        found.append((float(some.value[part].min()), float(some.value[part].max()), rows))
    return found


def firing_together(latent: int, both: Together, counts: np.ndarray) -> list[Neighbour]:
    """Those of the largest Jaccard similarity."""
    union = counts[latent] + counts - both.counts
    return _largest(latent, both.counts / np.maximum(union, 1))


def correlated(latent: int, both: Together, sums: np.ndarray, squares: np.ndarray, rows: int) -> list[Neighbour]:
    """Those of the largest correlation of activations.

    Args:
      sums, squares: float64 [latents], of all activations and of their squares, over `rows` rows.
    """
    means = sums / rows
    spread = np.sqrt(np.maximum(squares / rows - means**2, 0))
    covariance = both.products / rows - means[latent] * means
    return _largest(latent, covariance / np.maximum(spread[latent] * spread, 1e-30))


def _largest(latent: int, values: np.ndarray) -> list[Neighbour]:
    values = values.copy()
    values[latent] = -np.inf
    order = np.argsort(-values)[:NEIGHBOURS]
    return [Neighbour(int(i), float(values[i])) for i in order if values[i] > 0]
