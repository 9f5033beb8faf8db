"""Which tokens a latent's direction makes more likely, and which less.

In: a loaded model, directions. Out: of each the tokens of the largest and the smallest logits. A direction goes through
the
final norm and the head by itself, as if it were all of the residual stream: an attribution of first order, which leaves
out what later blocks make of it (the logit lens of nostalgebraist 2020; of an SAE's decoder Bricken et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jax_extract.interactive.model import Model

TOKENS = 10
_BARS = 50
_AT_ONCE = 1 << 25  # logits


@dataclass(frozen=True, eq=False)
class LogitTable:
    """Logits are about their mean over the vocabulary.

    Attributes:
      most, least: int32 [10], tokens; most_values, least_values: float32 [10], their logits, from the farthest on.
      edges: float32 [51]; counts: int64 [50], a histogram over the vocabulary.
    """

    most: np.ndarray
    most_values: np.ndarray
    least: np.ndarray
    least_values: np.ndarray
    edges: np.ndarray
    counts: np.ndarray


def logit_tables(model: Model, directions: np.ndarray) -> list[LogitTable]:
    """Of directions float32 [n, width] in the residual stream."""
    found: list[LogitTable] = []
    step = max(1, _AT_ONCE // int(model.config.vocab_size))
    for start in range(0, len(directions), step):
        part = directions[start : start + step]
        padded = np.zeros((step, part.shape[1]), np.float32)  # of one length, so that one program does all
        padded[: len(part)] = part
        logits = model.logits_of(padded)[: len(part)]
        found += [_table(row - row.mean()) for row in logits]
    return found


def _table(logits: np.ndarray) -> LogitTable:
    count = min(TOKENS, len(logits))
    most = np.argpartition(-logits, count - 1)[:count]
    least = np.argpartition(logits, count - 1)[:count]
    most, least = most[np.argsort(-logits[most])], least[np.argsort(logits[least])]
    counts, edges = np.histogram(logits, _BARS)
    return LogitTable(most, logits[most], least, logits[least], edges.astype(np.float32), counts)
