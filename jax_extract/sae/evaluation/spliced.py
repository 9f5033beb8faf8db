"""What the model loses when rows are replaced: by their reconstruction, by zeros, or by their mean.

In: a loaded model, texts as token ids, hook points, SAEs. Out: losses by sample: the cross-entropy of the tokens that
follow, and the KL divergence from the model as it is, both in nats. Rows that an SAE is not for stay as they are: other
positions, and norms above the largest that it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jax_extract.forward.edit import Edit
from jax_extract.interactive.model import Model
from jax_extract.sae.evaluation.opened import OpenedSae
from jax_extract.store.parts import Site
from jax_extract.store.reader import Run
from models.positions import Positions


@dataclass(frozen=True, eq=False)
class Losses:
    """Attributes:
    tokens: float64 [s], that are predicted of each sample.
    missed: float64 [s], the sum of their cross-entropies; divergence: of their KL divergences.
    """

    tokens: np.ndarray
    missed: np.ndarray
    divergence: np.ndarray


@dataclass(frozen=True, eq=False)
class Spliced:
    """Attributes:
    texts: token ids by the id of their sample, of two tokens at least.
    sites: of all SAEs, what they encode and what they reconstruct.
    """

    model: Model
    texts: Mapping[str, np.ndarray]
    sites: Sequence[Site]

    @cached_property
    def clean(self) -> Run:
        """Rows of all sites, and of the stream behind the last block, of the model as it is."""
        return self.model.run(dict(self.texts), capture=self._capture(self.sites)).run

    @property
    def losses(self) -> Losses:
        """Of the model as it is."""
        return self._losses(self.clean)

    def replaced(self, sae: OpenedSae) -> Losses:
        """Of the model under the reconstructions of an SAE."""
        encoded = sae.sites(self.clean)
        rows = {site: np.asarray(self.clean.get(site.layer, site.hook), np.float32) for site in encoded}
        kept = self._wanted(sae.positions)
        for site, each in rows.items():
            with np.errstate(over="ignore"):
                kept &= np.linalg.norm(each, axis=1) <= sae.largest_norm(site)
        x = np.concatenate([rows[site][kept] for site in encoded], axis=1)
        out = np.concatenate([np.asarray(sae.sae(x[i : i + _AT_ONCE])) for i in range(0, len(x), _AT_ONCE)])
        targets = sae.targets(self.clean)
        parts = np.split(out, np.cumsum([site.width for site in targets])[:-1], axis=1)
        return self._with(dict(zip(targets, parts, strict=True)), kept)

    def ablated(self, targets: Sequence[Site], positions: str, kind: str) -> Losses:
        """Of the model where rows of some hook points are zeros, or their mean."""
        kept = self._wanted(positions)
        put = {}
        for site in targets:
            rows = np.asarray(self.clean.get(site.layer, site.hook), np.float32)
            value = rows[kept].mean(axis=0, dtype=np.float64) if kind == "mean" else np.zeros(site.width)
            put[site] = np.broadcast_to(value.astype(np.float32), (int(kept.sum()), site.width))
        return self._with(put, kept)

    def _with(self, rows: Mapping[Site, np.ndarray], kept: np.ndarray) -> Losses:
        there = {}
        for site, new in rows.items():
            there[site] = np.array(self.clean.get(site.layer, site.hook), np.float32)
            there[site][kept] = new
        source = self.clean.with_rows(there)
        edits = [Edit(site.hook, "patch", layer=site.layer, source=source) for site in rows]
        return self._losses(self.model.run(dict(self.texts), capture=self._capture(()), edits=edits).run)

    def _losses(self, run: Run) -> Losses:
        last = self.model.config.num_hidden_layers - 1
        rows, of_clean = (np.asarray(each.get(last), np.float32) for each in (run, self.clean))
        lengths = np.array([len(tokens) for tokens in self.texts.values()])
        ends = np.cumsum(lengths) - 1
        predicting = np.ones(len(rows), bool)
        predicting[ends] = False
        following = np.concatenate([tokens[1:] for tokens in self.texts.values()])
        missed, divergence = self.model.next_token_losses(rows[predicting], following, of_clean[predicting])
        begins = np.concatenate([[0], np.cumsum(lengths - 1)[:-1]])
        sums = [np.add.reduceat(each.astype(np.float64), begins) for each in (missed, divergence)]
        return Losses(lengths - 1.0, *sums)

    def _wanted(self, positions: str) -> np.ndarray:
        """bool [rows], those of the positions that an SAE is for."""
        parsed, found = Positions.parse(positions), []
        for tokens in self.texts.values():
            mask = np.zeros(len(tokens), bool)
            mask[parsed.of(len(tokens))] = True
            found.append(mask)
        return np.concatenate(found)

    def _capture(self, sites: Sequence[Site]) -> dict[str, Any]:
        wanted: dict[str, set[int] | None] = {}
        for hook, layer in [*(site.key for site in sites), ("after_block", self.model.config.num_hidden_layers - 1)]:
            if layer is None:
                wanted[hook] = None
            else:
                layers = wanted.setdefault(hook, set())
                assert layers is not None
                layers.add(layer)
        return {hook: sorted(layers) if layers else None for hook, layers in wanted.items()}


_AT_ONCE = 4_096
