"""Which walks a step sees: a pure function of the seed and the step, so that a resumed training sees the same.

In: walks, sizes, a seed. Out: int32 [a, b, t] token ids and [a, b] lengths of any step. Every epoch sees every walk
once, in an order of its own; the last step of an epoch has what is left. Rows without a walk have length 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jax_extract.inputs.walk_dataset import Walks

_ORDER_STREAM = 1  # of the seed's random numbers, beside those of the first weights


@dataclass(frozen=True)
class Batches:
    """Attributes:
    rows: walks of a batch.
    batches: of a step.
    multiple: rows are filled up to a multiple of this with empty ones.
    """

    walks: Walks
    rows: int
    batches: int
    epochs: int
    seed: int
    multiple: int

    @property
    def steps_an_epoch(self) -> int:
        return -(-len(self.walks.tokens) // (self.rows * self.batches))

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_an_epoch

    def from_step(self, done: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The steps that follow when so many are done."""
        for epoch in range(done // self.steps_an_epoch, self.epochs):
            order = np.random.default_rng([self.seed, _ORDER_STREAM, epoch]).permutation(len(self.walks.tokens))
            first = done - epoch * self.steps_an_epoch if epoch == done // self.steps_an_epoch else 0
            size = self.rows * self.batches
            for step in range(first, self.steps_an_epoch):
                yield self.rows_of(order[step * size : (step + 1) * size])

    def rows_of(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The walks in as many full batches as they fill, and the rest in the next one."""
        padded = -(-self.rows // self.multiple) * self.multiple
        tokens = np.zeros((self.batches, padded, self.walks.tokens.shape[1]), np.int32)
        lengths = np.zeros((self.batches, padded), np.int32)
        for batch in range(-(-len(chosen) // self.rows)):
            of_batch = chosen[batch * self.rows : (batch + 1) * self.rows]
            tokens[batch, : len(of_batch)] = self.walks.tokens[of_batch]
            lengths[batch, : len(of_batch)] = self.walks.lengths[of_batch]
        return tokens, lengths


def evaluation_batches(walks: Walks, rows: int, multiple: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All walks in order: int32 [b, t] and [b], all of one shape."""
    rows = min(rows, len(walks.tokens))
    whole = Batches(walks, rows, 1, 1, 0, multiple)
    for start in range(0, len(walks.tokens), rows):
        tokens, lengths = whole.rows_of(np.arange(start, min(start + rows, len(walks.tokens))))
        yield tokens[0], lengths[0]
