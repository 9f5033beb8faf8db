"""Texts around rows in which a latent is active, and what else is active there.

In: latents, and of each the rows to show. Out: `Context`s with the latent's activation at every token of a window, and
how often two latents are active together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import csr_array

from jax_extract.sae.features.stream import Block, Texts


@dataclass(frozen=True, eq=False)
class Context:
    """A window of a text.

    Attributes:
      sample: its place in `Texts.samples`.
      begin: the token position of its first token.
      tokens: int32 [n].
      values: float32 [n], the latent's activation at each; 0 where no row of it was stored.
      peak: the number of the token that it was chosen for.
    """

    sample: int
    begin: int
    tokens: np.ndarray
    values: np.ndarray
    peak: int


@dataclass(frozen=True, eq=False)
class Together:
    """Of one latent and all others.

    Attributes:
      counts: int64 [latents], rows in which both are active.
      products: float64 [latents], the sum of the products of their activations.
    """

    counts: np.ndarray
    products: np.ndarray


@dataclass(eq=False)
class SecondPass:
    """What is looked up for some latents.

    Attributes:
      latents: which.
      wanted: of each, rows of the stream to show.
    """

    texts: Texts
    latents: np.ndarray
    wanted: Sequence[np.ndarray]
    before: int
    after: int
    contexts: dict[tuple[int, int], Context] = field(default_factory=dict)  # by latent and row

    def __post_init__(self) -> None:
        every = self.texts.sae.sae.d_sae
        self._slot = np.full(every, -1)
        self._slot[self.latents] = np.arange(len(self.latents))
        self._counts = np.zeros((len(self.latents), every), np.int64)
        self._products = np.zeros((len(self.latents), every))
        pairs = [(row, slot) for slot, rows in enumerate(self.wanted) for row in rows.tolist()]
        self._centres = np.array(sorted(pairs), np.int64).reshape(-1, 2)

    def take(self, block: Block) -> None:
        size = int(self.texts.offsets[block.samples.stop]) - block.first_row
        shape = (size, self.texts.sae.sae.d_sae)
        places = block.rows - block.first_row, block.latents
        values = csr_array((block.values.astype(np.float64), places), shape)
        active = csr_array((np.ones(len(block.rows)), places), shape)
        self._counts += (active[:, self.latents].T @ active).toarray().astype(np.int64)
        self._products += (values[:, self.latents].T @ values).toarray()
        self._look_up(block, size)

    def together(self, slot: int) -> Together:
        return Together(self._counts[slot], self._products[slot])

    def _look_up(self, block: Block, size: int) -> None:
        first, last = np.searchsorted(self._centres[:, 0], [block.first_row, block.first_row + size])
        if first == last:
            return
        slots = self._slot[block.latents]
        chosen = np.flatnonzero(slots >= 0)
        chosen = chosen[np.lexsort((block.rows[chosen], slots[chosen]))]
        key = slots[chosen] * np.int64(size) + (block.rows[chosen] - block.first_row)
        values = block.values[chosen]
        for row, slot in self._centres[first:last].tolist():
            place = int(self.texts.sample_of(np.array([row]))[0])
            sample = self.texts.samples[place]
            offset = int(self.texts.offsets[place])
            centre = int(sample.positions[row - offset])
            begin = max(0, centre - self.before)
            end = min(len(sample.token_ids), centre + self.after + 1)
            shown = np.zeros(end - begin, np.float32)
            rows = np.flatnonzero((sample.positions >= begin) & (sample.positions < end))
            keys = slot * np.int64(size) + (rows + offset - block.first_row)
            at = np.minimum(np.searchsorted(key, keys), max(len(key) - 1, 0))
            there = key[at] == keys if len(key) else np.zeros(len(keys), bool)
            shown[sample.positions[rows[there]] - begin] = values[at[there]]
            self.contexts[int(self.latents[slot]), row] = Context(
                place, begin, sample.token_ids[begin:end], shown, centre - begin
            )
