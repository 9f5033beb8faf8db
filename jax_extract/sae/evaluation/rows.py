"""Rows that SAEs are measured on: whole samples, none of which any of them was trained on.

In: a run, SAEs, how many rows. Out: `HeldOutRows`: of each SAE what it encodes and reconstructs, sample by sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jax_extract.errors import UserError
from jax_extract.sae.evaluation.opened import OpenedSae
from jax_extract.sae.rows import is_finite
from jax_extract.store.parts import Site
from jax_extract.store.reader import Run
from jax_extract.store.sample import SampleActivations
from jax_extract.store.shuffled.rows_wanted import RowsWanted


@dataclass(frozen=True, eq=False)
class HeldOutRows:
    """Attributes:
    samples: that are read, in the order of the input.
    held_out: whether they are those that were held out of the training; else the run is another one, or it is not
      known.
    """

    run: Run
    place: str
    samples: Sequence[SampleActivations]
    held_out: bool
    _read: dict[tuple[str, int | None], np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Run, place: str, saes: Sequence[OpenedSae], most: int, seed: int) -> HeldOutRows:
        """Samples drawn by the seed, as long as all their rows are no more than `most`; one at least."""
        digest = digest_of_run(run)
        trained_here = [sae for sae in saes if sae.trained_on.get("digest") == digest and sae.held_out is not None]
        everything = run.sample_indices
        kept = np.ones(len(everything), bool)
        for held_out in {(h.share, h.seed): h for sae in trained_here if (h := sae.held_out) is not None}.values():
            kept &= held_out(everything)
        if not kept.any():
            raise UserError("no sample was held out of the training of all of these SAEs; measure them one by one")
        chosen: dict[int, SampleActivations] = {}
        total = 0
        for number in np.random.default_rng(seed).permutation(np.flatnonzero(kept)).tolist():
            sample = run[number]
            total += len(sample.positions)
            if chosen and total > most:
                break
            chosen[number] = sample
        is_held_out = len(trained_here) == len(saes)
        return cls(run, place, [chosen[number] for number in sorted(chosen)], is_held_out)

    def __len__(self) -> int:
        return sum(len(sample.positions) for sample in self.samples)

    @property
    def said(self) -> str:
        return "that were held out" if self.held_out else "(which of them the SAEs were trained on is not known)"

    def of_sae(self, sae: OpenedSae) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows float32 [n, d_in], what is to be reconstructed [n, d_out], and where samples begin, int64 [s]."""
        encoded, targets = sae.sites(self.run), sae.targets(self.run)
        kept = self._wanted(sae.positions)
        for site in dict.fromkeys((*encoded, *targets)):
            rows = self._rows(site)
            with np.errstate(over="ignore", invalid="ignore"):
                kept &= is_finite(rows[:, None]) & (np.linalg.norm(rows, axis=1) <= sae.largest_norm(site))
        if not kept.any():
            raise UserError(f"{sae.name} is for none of the rows that were read; give more --rows")
        x, y = (np.concatenate([self._rows(site)[kept] for site in sites], axis=1) for sites in (encoded, targets))
        return x, y, np.flatnonzero(np.diff(self.numbers[kept], prepend=-1))

    @property
    def numbers(self) -> np.ndarray:
        """int64 [rows], the place of each row's sample in `samples`."""
        return np.repeat(np.arange(len(self.samples)), [len(sample.positions) for sample in self.samples])

    def _rows(self, site: Site) -> np.ndarray:
        """float32 [rows, width], of all samples."""
        if site.key not in self._read:
            found = [np.asarray(sample.get(site.layer, site.hook), np.float32) for sample in self.samples]
            self._read[site.key] = np.concatenate(found)
        return self._read[site.key]

    def _wanted(self, positions: str) -> np.ndarray:
        """bool [rows]."""
        wanted = RowsWanted.of(positions, None)
        if wanted is None:
            return np.ones(len(self), bool)
        return np.concatenate(
            [
                wanted.at(sample.positions, np.full(len(sample.positions), len(sample.token_ids) - 1))
                for sample in self.samples
            ]
        )


def digest_of_run(run: Run) -> str:
    """Of all that a run holds, as `shuffled` says it."""
    return run.shuffled(run.sites[:1], rows=1).get_state()["run"]
