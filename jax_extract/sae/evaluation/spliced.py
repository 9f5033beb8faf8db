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
    positions: of the run that they were trained on, which has rows of no other tokens.
    """

    model: Model
    texts: Mapping[str, np.ndarray]
    sites: Sequence[Site]
    positions: str = "all"

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
        kept = self._kept(sae)
        x = np.concatenate([self._rows(site)[kept] for site in sae.sites(self.clean)], axis=1)
        parts = [np.asarray(sae.sae(x[i : i + _AT_ONCE])) for i in range(0, len(x), _AT_ONCE)]
        out = np.concatenate([np.zeros((0, sae.sae.d_out), np.float32), *parts])
        targets = sae.targets(self.clean)
        by_site = np.split(out, np.cumsum([site.width for site in targets])[:-1], axis=1)
        return self._with(dict(zip(targets, by_site, strict=True)), kept)

    def ablated(self, sae: OpenedSae, kind: str) -> Losses:
        """Of the model where those rows are zeros, or their mean, instead."""
        kept, put = self._kept(sae), {}
        for site in sae.targets(self.clean):
            rows = self._rows(site)[kept]
            value = rows.mean(axis=0, dtype=np.float64) if kind == "mean" and len(rows) else np.zeros(site.width)
            put[site] = np.broadcast_to(value.astype(np.float32), rows.shape)
        return self._with(put, kept)

    def _rows(self, site: Site) -> np.ndarray:
        return np.asarray(self.clean.get(site.layer, site.hook), np.float32)

    def _kept(self, sae: OpenedSae) -> np.ndarray:
        """bool [rows]: those that the SAE is for, by position and by norm, of tokens that the run has rows of."""
        kept = self._wanted(sae.positions) & self._wanted(self.positions)
        for site in dict.fromkeys((*sae.sites(self.clean), *sae.targets(self.clean))):
            with np.errstate(over="ignore"):
                kept &= np.linalg.norm(self._rows(site), axis=1) <= sae.largest_norm(site)
        return kept

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
