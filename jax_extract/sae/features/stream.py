"""The activations of all latents on the texts of a run, a part of the rows at a time.

In: an SAE, samples. Out: `Block`s of whole samples, and what one pass over them keeps: how often each latent is active,
the texts in which it is most, random ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jax_extract.errors import UserError
from jax_extract.sae.evaluation.opened import OpenedSae
from jax_extract.sae.features.kept import Entries, Kept
from jax_extract.sae.rows import is_finite
from jax_extract.store.reader import Run
from jax_extract.store.sample import SampleActivations
from jax_extract.store.shuffled.rows_wanted import RowsWanted

_ROWS = 4_096  # that are encoded at once
RANDOM = 256  # activations of each latent of which quantiles and histograms are made


@dataclass(frozen=True, eq=False)
class Block:
    """Some samples, one after the other.

    Attributes:
      first_row: of the stream.
      samples: their places in `Texts.samples`.
      rows: int64 [n], places of the active latents' rows in the stream; latents: int64 [n]; values: float32 [n].
      count: rows that the SAE is for.
    """

    first_row: int
    samples: range
    rows: np.ndarray
    latents: np.ndarray
    values: np.ndarray
    count: int


@dataclass(frozen=True, eq=False)
class Texts:
    """Attributes:
    samples: that are read.
    offsets: int64 [samples + 1], rows of the stream.
    """

    run: Run
    sae: OpenedSae
    samples: Sequence[SampleActivations]
    offsets: np.ndarray

    @classmethod
    def of(cls, run: Run, sae: OpenedSae, most: int, seed: int) -> Texts:
        """Samples drawn by the seed, as long as all their rows are no more than `most`; one at least."""
        chosen, total = [], 0
        for place in np.random.default_rng(seed).permutation(len(run)).tolist():
            sample = run[place]
            total += len(sample.positions)
            if chosen and total > most:
                break
            chosen.append(place)
        samples = [run[place] for place in sorted(chosen)]
        if any((sample.positions < 0).any() for sample in samples):
            raise UserError(
                "the rows of this run are means over texts, which no token can be shown of; give another run"
            )
        return cls(run, sae, samples, np.cumsum([0, *(len(sample.positions) for sample in samples)]))

    @property
    def rows(self) -> int:
        return int(self.offsets[-1])

    def sample_of(self, rows: np.ndarray) -> np.ndarray:
        """int64 [n], the place of each row's sample in `samples`."""
        return np.searchsorted(self.offsets, rows, side="right") - 1

    def blocks(self) -> Iterator[Block]:
        """Of all samples, in order."""
        begin = 0
        while begin < len(self.samples):
            end = int(np.searchsorted(self.offsets, self.offsets[begin] + _ROWS, side="right")) - 1
            end = max(begin + 1, end)
            yield self._block(range(begin, end))
            begin = end

    def _block(self, places: range) -> Block:
        samples, first = [self.samples[i] for i in places], int(self.offsets[places.start])
        sites = self.sae.sites(self.run)
        x = np.concatenate(
            [
                np.concatenate([np.asarray(s.get(site.layer, site.hook), np.float32) for site in sites], axis=1)
                for s in samples
            ]
        )
        if not len(x):
            nothing = np.zeros(0, np.int64)
            return Block(first, places, nothing, nothing, np.zeros(0, np.float32), 0)
        meant = np.concatenate([self._meant(sample) for sample in samples]) & is_finite(x[:, None])
        at = 0
        for site in sites:
            with np.errstate(over="ignore", invalid="ignore"):
                meant &= np.linalg.norm(x[:, at : at + site.width], axis=1) <= self.sae.largest_norm(site)
            at += site.width
        found = [self._active(x[start : start + _ROWS]) for start in range(0, len(x), _ROWS)]
        rows, latents, values = (np.concatenate(column) for column in zip(*found, strict=True))
        rows = rows + np.repeat(np.arange(len(found)) * _ROWS, [len(each) for each, _, _ in found])
        kept = meant[rows]
        return Block(first, places, rows[kept] + first, latents[kept], values[kept], int(meant.sum()))

    def _active(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        padded = np.zeros((_ROWS, x.shape[1]), np.float32)  # of one length, so that one program does all
        padded[: len(x)] = np.where(np.isfinite(x), x, 0)
        f = np.asarray(self.sae.sae.encode(padded))[: len(x)]
        rows, latents = np.nonzero(f > 0)
        return rows, latents, f[rows, latents]

    def _meant(self, sample: SampleActivations) -> np.ndarray:
        """bool [rows]: those of positions that the SAE is for."""
        wanted = RowsWanted.of(self.sae.positions, None)
        if wanted is None:
            return np.ones(len(sample.positions), bool)
        return wanted.at(sample.positions, np.full(len(sample.positions), len(sample.token_ids) - 1))


class FirstPass:
    """What is kept of all latents.

    Attributes:
      counts: int64 [latents], rows in which each is active.
      sums, squares: float64 [latents], of their activations.
      rows: that the SAE is for.
    """

    def __init__(self, texts: Texts, contexts: int, seed: int) -> None:
        latents = texts.sae.sae.d_sae
        self.rows = 0
        self.counts = np.zeros(latents, np.int64)
        self.sums, self.squares = np.zeros(latents), np.zeros(latents)
        self._texts = texts
        self._tops, self._some = Kept(latents, contexts), Kept(latents, RANDOM)
        self._random = np.random.default_rng(seed)

    def take(self, block: Block) -> None:
        self.rows += block.count
        latents, values = len(self.counts), block.values.astype(np.float64)
        self.counts += np.bincount(block.latents, minlength=latents)
        self.sums += np.bincount(block.latents, values, latents)
        self.squares += np.bincount(block.latents, values**2, latents)
        priority = self._random.random(len(block.rows)).astype(np.float32)
        self._some.add(Entries(block.latents, block.rows, block.values, priority))
        # Of a text only its largest activation of a latent: samples are whole in a block.
        order = np.lexsort((-block.values, self._texts.sample_of(block.rows), block.latents))
        of, samples = block.latents[order], self._texts.sample_of(block.rows)[order]
        first = (np.diff(of, prepend=-1) != 0) | (np.diff(samples, prepend=-1) != 0)
        best = order[first]
        self._tops.add(Entries(block.latents[best], block.rows[best], block.values[best], block.values[best]))

    def tops(self) -> Entries:
        """Of each latent the texts in which it is most active, one row of each."""
        return self._tops.entries()

    def random(self) -> Entries:
        """Of each latent a uniform sample of its activations, in descending order of their priority."""
        return self._some.entries()
