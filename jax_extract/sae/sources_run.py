"""Rows of a run that `jax-extract extract` wrote, shuffled.

In: a run, its sites, positions. Out: a `Source`, in an order that the seed decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_extract.errors import UserError
from jax_extract.sae.sources import HeldOut, Reader, key_of
from jax_extract.store.parts import Site
from jax_extract.store.reader import Run
from jax_extract.store.shuffled.rows import ShuffledRows

_AT_ONCE = 1 << 12  # rows that are read for `some`


class RunSource:
    """Rows of a run at some positions."""

    def __init__(
        self, run: Run, sites: Sequence[Site], batch: int, seed: int, positions: str, held_out: HeldOut
    ) -> None:
        self.sites = tuple(sites)
        self._run, self._batch, self._seed = run, batch, seed
        self._positions, self._held_out = positions, held_out
        self._first = self._open(held_out.trained_on, batch)
        try:
            self._open(held_out, 1, drop_remainder=False)
        except UserError:
            raise UserError(
                f"--held_out {held_out.share} of the {len(run)} samples of this run holds out no row; give a larger "
                "share, another --seed, or more samples"
            ) from None

    @property
    def rows(self) -> int:
        return self._first.batches_per_epoch * self._batch

    @property
    def digest(self) -> str:
        return self._first.get_state()["run"]

    @property
    def about(self) -> dict[str, Any]:
        metadata = self._run.metadata
        aliases = metadata.get("model_hook_points") or {}
        names = {site: (aliases.get(site.hook) or "").replace("{i}", str(site.layer)) for site in self.sites}
        return {
            "model_name": metadata.get("model_name"),
            "positions": self._positions,
            "hook_names": {key_of(site): name or None for site, name in names.items()},
        }

    def reader(self) -> Reader:
        return _RunReader(self._open(self._held_out.trained_on, self._batch))

    def some(self, held_out: bool, count: int) -> tuple[np.ndarray, np.ndarray]:
        samples = self._held_out if held_out else self._held_out.trained_on
        found, of, total = [], [], 0
        with self._open(samples, _AT_ONCE, drop_remainder=False) as reader:
            for batch in reader:
                found.append(batch.activations)
                of.append(batch.sample_indices)
                total += len(batch)
                if total >= count:
                    break
        return np.concatenate(found)[:count], np.concatenate(of)[:count]

    def _open(self, samples: Any, rows: int, drop_remainder: bool = True) -> ShuffledRows:
        return self._run.shuffled(
            self.sites,
            rows=rows,
            seed=self._seed,
            positions=self._positions,
            samples=samples,
            epochs=None if drop_remainder else 1,
            drop_remainder=drop_remainder,
        )


class _RunReader:
    def __init__(self, rows: ShuffledRows) -> None:
        self._rows = rows
        self.get_state, self.set_state, self.close = rows.get_state, rows.set_state, rows.close

    def read(self) -> np.ndarray:
        return next(self._rows).activations
