"""`jax-extract sae features`: a page on which one looks at the features of an SAE, and the same for Neuronpedia.

In: `SaeFeaturesConfig`. Out: features.html and neuronpedia/batch-0.json, …. The texts of the run are read twice: once
for what is kept of all latents, once for what is shown of some.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jax_extract.devices.choice import use_devices
from jax_extract.errors import UserError, user_path
from jax_extract.interactive.model_of_run import ModelOfRun
from jax_extract.sae.evaluation.opened import OpenedSae, open_saes
from jax_extract.sae.evaluation.stability import nearest_directions, unit
from jax_extract.sae.features.config import SaeFeaturesConfig
from jax_extract.sae.features.contexts import SecondPass
from jax_extract.sae.features.feature import (
    NEIGHBOURS,
    Feature,
    Group,
    Neighbour,
    correlated,
    fifths,
    firing_together,
    histogram,
)
from jax_extract.sae.features.kept import Entries
from jax_extract.sae.features.logits import LogitTable, logit_tables
from jax_extract.sae.features.neuronpedia import batches
from jax_extract.sae.features.page import page
from jax_extract.sae.features.stream import FirstPass, Texts
from jax_extract.sae.saved import SUMMARY_FILE
from jax_extract.store.folders import require_usable, write_file
from jax_extract.store.reader import open_activations
from jax_extract.terminal import Terminal, plural
from models.hooks import HOOK_POINTS

PAGE_FILE, NEURONPEDIA_FOLDER = "features.html", "neuronpedia"
_TOGETHER = 2_048  # features that are looked up in one pass: what is counted of pairs takes memory
_READING = "reading texts"
_DENSITIES = np.arange(-6, 0.01, 0.25)  # log10 of a share of the rows
_NO_LOGITS = ("final_norm", "attention_out_raw", "ffn_out_raw")


def sae_features(config: SaeFeaturesConfig, terminal: Terminal | None = None) -> Path:
    """Makes the page and the files; returns the page's path.

    Raises:
      UserError: anything the user can mend.
    """
    config.check()
    terminal = terminal or Terminal()
    use_devices(config.device)
    sae = _one(config.sae)
    if beyond := [number for number in config.numbers or () if number >= sae.sae.d_sae]:
        raise UserError(f"--features {beyond[0]}: this SAE has the features 0 to {sae.sae.d_sae - 1}")
    others = _others(config, sae)
    place = config.activations or sae.run
    if place is None:
        raise UserError("this SAE does not say what it was trained on; name a run with --activations")
    run = open_activations(str(place))
    width = sum(site.width for site in sae.sites(run))
    if width != sae.sae.d_in:
        raise UserError(
            f"{sae.folder} is of rows of {sae.sae.d_in} values, and this run has {width}; give the run of its model"
        )
    output = user_path(config.output_dir or str(sae.folder / "features"), "--output_dir")
    require_usable(output, "--output_dir")
    texts = Texts.of(run, sae, config.rows, config.seed)
    return _Features(config, texts, others, ModelOfRun(run, config.model_path, terminal), output, terminal).make()


@dataclass(frozen=True)
class _Features:
    config: SaeFeaturesConfig
    texts: Texts
    others: Sequence[OpenedSae]
    model: ModelOfRun
    output: Path
    terminal: Terminal

    def make(self) -> Path:
        texts, config = self.texts, self.config
        _ = self.model.tokenizer  # refused before anything is computed
        self.terminal.line("texts", f"{texts.rows:,} rows of {plural(len(texts.samples), 'sample')}")
        first = FirstPass(texts, config.contexts[0], config.seed)
        self._read(first.take, "all latents")
        latents = self._chosen(first.counts)
        tops, some = first.tops(), first.random()
        logits = self._logits(latents)
        features: list[Feature] = []
        for start in range(0, len(latents), _TOGETHER):
            features += self._looked_up(latents[start : start + _TOGETHER], first, tops, some, logits)
        self._write(features, first.counts, first.rows)
        return self.output / PAGE_FILE

    def _read(self, take: Callable[[Any], None], of: str) -> None:
        with self.terminal.progress(self.texts.rows, f"{_READING}, {of}", " rows") as bar:
            for block in self.texts.blocks():
                take(block)
                bar.update(int(self.texts.offsets[block.samples.stop] - self.texts.offsets[block.samples.start]))

    def _chosen(self, counts: np.ndarray) -> np.ndarray:
        """int64, ascending: the latents that are shown."""
        alive, config = np.flatnonzero(counts), self.config
        if config.numbers is not None:
            return np.unique(config.numbers)
        if not len(alive):
            raise UserError("no feature is active in any of the rows that were read; give more --rows")
        if config.count is None or config.count >= len(alive):
            return alive
        return np.sort(np.random.default_rng(config.seed).choice(alive, max(1, config.count), replace=False))

    # ---------------------------------------------------------------------------------- what is shown

    def _looked_up(
        self, latents: np.ndarray, first: FirstPass, tops: Entries, some: Entries, logits: dict[int, LogitTable]
    ) -> list[Feature]:
        top, random = ({int(i): _of(entries, int(i)) for i in latents} for entries in (tops, some))
        parts = {
            i: fifths(entries, self.texts.sample_of(entries.row), self.config.contexts[1])
            for i, entries in random.items()
        }
        wanted = [np.unique(np.concatenate([top[i].row, *(rows for _, _, rows in parts[i])])) for i in top]
        second = SecondPass(self.texts, latents, wanted, self.config.before, self.config.after)
        self._read(second.take, plural(len(latents), "feature"))
        nearest, matches = self._nearest(latents), self._matches(latents)
        found = []
        for slot, latent in enumerate(latents.tolist()):
            both = second.together(slot)
            edges, counts = histogram(random[latent].value)
            groups = [
                Group(least, most, [second.contexts[latent, row] for row in rows.tolist()])
                for least, most, rows in parts[latent]
            ]
            found.append(
                Feature(
                    latent=latent,
                    density=float(first.counts[latent] / first.rows),
                    largest=float(max([0.0, *top[latent].value, *random[latent].value])),
                    edges=edges,
                    counts=counts,
                    top=[second.contexts[latent, row] for row in top[latent].row.tolist()],
                    groups=groups,
                    nearest=nearest[slot],
                    together=firing_together(latent, both, first.counts),
                    correlated=correlated(latent, both, first.sums, first.squares, first.rows),
                    matches=matches[slot],
                    logits=logits.get(latent),
                    direction=self._decoder[latent],
                )
            )
        return found

    @cached_property
    def _decoder(self) -> np.ndarray:
        return np.asarray(self.texts.sae.sae.params["W_dec"], np.float32)

    def _nearest(self, latents: np.ndarray) -> list[list[Neighbour]]:
        directions = unit(self._decoder)
        found = []
        for latent in latents.tolist():
            cosines = directions @ directions[latent]
            cosines[latent] = -np.inf
            order = np.argsort(-cosines)[:NEIGHBOURS]
            found.append([Neighbour(int(i), float(cosines[i])) for i in order if np.isfinite(cosines[i])])
        return found

    def _matches(self, latents: np.ndarray) -> list[list[Neighbour]]:
        found: list[list[Neighbour]] = [[] for _ in latents]
        for other in self.others:
            places, cosines = nearest_directions(self._decoder[latents], np.asarray(other.sae.params["W_dec"]))
            for slot, (place, cosine) in enumerate(zip(places.tolist(), cosines.tolist(), strict=True)):
                found[slot].append(Neighbour(place, cosine, _seed_name(other)))
        return found

    def _logits(self, latents: np.ndarray) -> dict[int, LogitTable]:
        """By latent; none where the directions are not in the residual stream, or the model is not here."""
        site = self.texts.sae.targets(self.texts.run)[-1]
        if HOOK_POINTS[site.hook].width != "d_model" or site.hook in _NO_LOGITS:
            return {}
        if self.model.path is None:
            self.terminal.line("note", f"{self.model.not_here}: logits are left out; --model_path names another")
            return {}
        model = self.model.load()
        directions = self._decoder[latents][:, -site.width :]
        return dict(zip(latents.tolist(), logit_tables(model, directions), strict=True))

    # ------------------------------------------------------------------------------------- what is written

    def _write(self, features: Sequence[Feature], counts: np.ndarray, rows: int) -> None:
        texts, sae = self.texts, self.texts.sae
        shares = counts[counts > 0] / rows
        density, _ = np.histogram(np.log10(shares), _DENSITIES)
        dead = float((counts == 0).mean())
        site = sae.targets(texts.run)[-1]
        name = str(texts.run.metadata.get("model_name") or "")
        facts = [
            name,
            " and ".join(
                dict.fromkeys(f"{s.hook}" + ("" if s.layer is None else f" {s.layer}") for s in sae.sites(texts.run))
            ),
            f"{sae.sae.d_sae:,} latents",
            f"L0 {counts.sum() / rows:.1f}",
            f"{dead:.1%} never active in {rows:,} rows",
        ]
        self.output.mkdir(parents=True, exist_ok=True)
        ids = [sample.sample_id for sample in texts.samples]
        told = page(sae.name, [fact for fact in facts if fact], features, (_DENSITIES, density), ids, self._token_texts)
        write_file(self.output / PAGE_FILE, lambda to: _write_text(to, told))
        folder = self.output / NEURONPEDIA_FOLDER
        folder.mkdir(exist_ok=True)
        for stale in folder.glob("batch-*.json"):
            stale.unlink()
        for number, batch in enumerate(batches(features, self._token_texts, name, site.layer, site.hook, sae.name)):
            said = json.dumps(batch, allow_nan=False)
            write_file(folder / f"batch-{number}.json", lambda to, said=said: _write_text(to, said))
        self.terminal.line(
            "page", f"{self.output / PAGE_FILE}: {plural(len(features), 'feature')}; open it in a browser"
        )
        self.terminal.line("json", f"{folder}/, for Neuronpedia")

    @cached_property
    def _texts_of_tokens(self) -> dict[int, str]:
        return {}

    def _token_texts(self, token_ids: np.ndarray) -> list[str]:
        known = self._texts_of_tokens
        if missing := [int(i) for i in dict.fromkeys(token_ids.tolist()) if i not in known]:
            known.update(zip(missing, self.model.token_texts(np.array(missing, np.int32)), strict=True))
        return [known[int(i)] for i in token_ids]


def _one(place: str) -> OpenedSae:
    found = open_saes([place])
    if len(found) > 1 or (user_path(place, "SAE") / SUMMARY_FILE).is_file():
        raise UserError(f"{place} holds {plural(len(found), 'SAE')}; name one of them, as in {found[0].folder}")
    return found[0]


def _others(config: SaeFeaturesConfig, sae: OpenedSae) -> list[OpenedSae]:
    """SAEs of other seeds: those that are named, or those beside it."""
    beside = sae.folder.resolve().parent
    if config.others is not None:
        found = open_saes(config.others) if config.others else []
    elif sae.said and (beside / SUMMARY_FILE).is_file():
        found = [other for other in open_saes([str(beside)]) if other.siblings == sae.siblings]
    else:
        found = []
    found = [other for other in found if other.folder.resolve() != sae.folder.resolve()]
    for other in found:
        if other.sae.d_out != sae.sae.d_out:
            raise UserError(
                f"--others: {other.folder} is of {other.sae.d_out} values, and {sae.folder} of {sae.sae.d_out}"
            )
    return found


def _of(entries: Entries, latent: int) -> Entries:
    first, last = np.searchsorted(entries.latent, [latent, latent + 1])
    return entries.some(np.arange(first, last))


def _seed_name(other: OpenedSae) -> str:
    seed = other.said.get("seed")
    return other.name if seed is None else f"seed {seed}"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
