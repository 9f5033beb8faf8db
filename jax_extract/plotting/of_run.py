"""The pictures of a run: norms, variance spectrum, principal components, logit lens.

In: an open run, what is wanted. Out: `Drawn` pictures one by one, a layer in memory at a time, and what was left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from jax_extract.errors import UserError
from jax_extract.interactive.model_of_run import ModelOfRun
from jax_extract.layer_words import layers_of
from jax_extract.plotting.colouring import Colouring, colouring_of
from jax_extract.plotting.components import Components
from jax_extract.plotting.config import FEWEST_ROWS, Picture, PlotConfig
from jax_extract.plotting.lens import Lens, draw_lens, following
from jax_extract.plotting.norms import Norms, draw_norms
from jax_extract.plotting.pca import draw_pca
from jax_extract.plotting.pictures import Drawn, LeftOut
from jax_extract.plotting.reading import SampledRows
from jax_extract.plotting.spectrum import draw_spectrum
from jax_extract.store.parts import Site
from jax_extract.store.reader import Run
from jax_extract.store.sample import SampleActivations
from jax_extract.store.token_text import token_texts
from jax_extract.terminal import Terminal, plural, ranges_text
from models.hooks import DEFAULT_HOOK_POINT, GATED, resolve_hook_points
from models.positions import Positions

PICTURES: tuple[Picture, ...] = ("norms", "spectrum", "pca", "lens")
_SPECTRA, _PANELS, _LENS_LAYERS = 12, 6, 16  # layers of a picture, spread over those of the run
_LENS_TOKENS = 14


@dataclass(frozen=True)
class RunPictures:
    run: Run
    config: PlotConfig
    terminal: Terminal

    def draw(self) -> Iterator[Drawn | LeftOut]:
        """What nobody asked for by name and cannot be drawn is left out.

        Raises:
          UserError: something that was asked for cannot be drawn; before anything is.
        """
        sites = self._sites
        if not len(self._sampled):
            raise UserError(f"{self.config.place} holds no row yet; draw it when parts are committed")
        self._check()
        read, samples = len(self._sampled), len(self._sampled.metas)
        of_run, of_samples = self._sampled.rows_in_run, self._sampled.samples_in_run
        said = (
            f"{read:,} of {of_run:,} rows a layer, {samples:,} of {plural(of_samples, 'sample')}; --rows sets how many"
        )
        self.terminal.line(
            "read", said if read < of_run else f"all {of_run:,} rows a layer, {plural(samples, 'sample')}"
        )
        for hook in dict.fromkeys(site.hook for site in sites):
            of_hook = [site for site in sites if site.hook == hook]
            if self.config.wants("norms"):
                yield self._norms(hook, of_hook)
            if self.config.wants("spectrum") or self.config.wants("pca"):
                yield from self._components(hook, of_hook)
        if self.config.wants("lens"):
            yield self._lens() if self._why_no_lens is None else LeftOut("lens", self._why_no_lens)

    def _check(self) -> None:
        if self.config.sample is not None:
            self.run.sample(self.config.sample)
        if self.config.model_path is not None:
            _ = self._model.tokenizer
        if self.config.wants("pca"):
            _ = self._colouring
        if self.config.asked("lens") and (why := self._why_no_lens) is not None:
            raise UserError(f"--pictures lens: {why}")

    # ------------------------------------------------------------------------------------------ what is read

    @cached_property
    def _sites(self) -> list[Site]:
        """Those asked for, by hook point and layer."""
        run, config = self.run, self.config
        hooks = run.hook_points if config.hook_points is None else [_hook(run, name) for name in config.hook_points]
        wanted = None if config.layers is None else layers_of(config.layers, int(run.metadata["num_hidden_layers"]))
        for layer in wanted or ():
            if layer not in run.layers:
                raise UserError(f"--layers: this run holds no layer {layer}; it holds {ranges_text(run.layers)}")
        sites = [
            site
            for hook in dict.fromkeys(hooks)
            for site in run.sites
            if site.hook == hook and (wanted is None or site.layer is None or site.layer in wanted)
        ]
        return sorted(sites, key=lambda site: (hooks.index(site.hook), -1 if site.layer is None else site.layer))

    @cached_property
    def _sampled(self) -> SampledRows:
        return SampledRows.of(self.run, self.config.rows, self.config.seed)

    def _caption(self, sites: Sequence[Site], rows: int, what: str = "") -> str:
        layers = [site.layer for site in sites if site.layer is not None]
        at = f"{plural(len(layers), 'layer')} ({ranges_text(layers)})  ·  " if layers else ""
        meta = self.run.metadata
        samples = plural(len(self._sampled.metas), "sample")
        return f"{meta['model_name']}  ·  {at}{rows:,} rows of {samples}  ·  positions {meta['positions']}{what}"

    # ---------------------------------------------------------------------------------- norms and components

    def _norms(self, hook: str, sites: Sequence[Site]) -> Drawn | LeftOut:
        norms = np.array([_norms_of(self._sampled.rows(site)) for site in sites])
        mean = [self.run.statistics(hook, layer=site.layer).mean_norm for site in sites]
        found = Norms.of([_name(site) for site in sites], norms, self._sampled.positions, mean, self._one_a_sample)
        if len(sites) == 1 and not found.by_positions:
            return self._left_out("norms", f"one layer of {hook} without positions; jax-extract inspect tells it")
        return Drawn(f"norms_{hook}", draw_norms(found, hook, self._caption(sites, len(self._sampled))))

    def _components(self, hook: str, sites: Sequence[Site]) -> Iterator[Drawn | LeftOut]:
        """Both pictures of the same components, without first tokens, along which all else would be a point."""
        kept = self._sampled.positions != 0
        if kept.sum() < FEWEST_ROWS:
            kept = np.ones(len(self._sampled), bool)
        if (rows := int(kept.sum())) < FEWEST_ROWS:
            for picture in ("spectrum", "pca"):
                if self.config.wants(picture):
                    yield self._left_out(picture, f"{plural(rows, 'row')} of {hook} has no variance")
            return
        what = "" if kept.all() else ", without first tokens"
        panels = _spread(sites, _PANELS) if self.config.wants("pca") else []
        spectra = _spread(sites, _SPECTRA) if self.config.wants("spectrum") else []
        found = {
            site.key: Components.of(self._sampled.rows(site)[kept])
            for site in sites
            if site in panels or site in spectra
        }
        if spectra:
            of_layers = {_name(site): found[site.key] for site in spectra}
            yield Drawn(f"spectrum_{hook}", draw_spectrum(of_layers, hook, self._caption(spectra, rows, what)))
        if panels:
            of_layers = {_name(site): found[site.key] for site in panels}
            colours = None if self._colouring is None else self._colouring.of_rows(kept)
            caption = self._caption(panels, rows, what)
            yield Drawn(f"pca_{hook}", draw_pca(of_layers, colours, hook, caption, self.config.seed))

    @cached_property
    def _colouring(self) -> Colouring | None:
        return colouring_of(self.config.color_by, self._sampled, self._model.token_texts)

    # ------------------------------------------------------------------------------------------------ the model

    @cached_property
    def _model(self) -> ModelOfRun:
        return ModelOfRun(self.run, self.config.model_path, self.terminal)

    @property
    def _why_no_lens(self) -> str | None:
        """None where it can be drawn."""
        if not self._sites_of_lens:
            return f"there is no {DEFAULT_HOOK_POINT} among what is drawn, which the final norm and the head read"
        if (self._sampled.token_ids < 0).all():
            return "every row is the mean of a sample, which is of no token"
        if self._model.path is None:
            return f"{self._model.not_here}; give --model_path"
        return None

    @property
    def _sites_of_lens(self) -> list[Site]:
        return [site for site in self._sites if site.hook == DEFAULT_HOOK_POINT]

    def _lens(self) -> Drawn:
        chosen = _spread(self._sites_of_lens, _LENS_LAYERS)
        tokens = self._tokens_of_lens()
        model = self._model.load()
        found = Lens.of(
            [int(site.layer or 0) for site in chosen],
            lambda layer: np.concatenate([sample.get(layer)[row : row + 1] for sample, row in tokens]),
            model.logits_of,
            [sample.sample_id if self._across else str(sample.positions[row]) for sample, row in tokens],
            np.array([sample.token_ids[sample.positions[row]] for sample, row in tokens], np.int32),
            np.array([following(sample.token_ids, sample.positions[row]) for sample, row in tokens], np.int32),
        )
        sample = tokens[0][0]
        whose = f"sample {sample.sample_id}: {len(tokens)} of {plural(len(sample.token_ids), 'token')}"
        if self._across:
            whose = f"the last token of {plural(len(tokens), 'sample')}"
        meta = self.run.metadata
        caption = f"{meta['model_name']}  ·  {len(chosen)} of {meta['num_hidden_layers']} layers  ·  {whose}"
        texts = partial(token_texts, model.tokenizer)
        return Drawn("lens", draw_lens(found, texts, caption, "sample" if self._across else "position"))

    @property
    def _one_a_sample(self) -> bool:
        return Positions.parse(str(self.run.metadata["positions"])).one_row_per_sample

    @property
    def _across(self) -> bool:
        """Whether the logit lens is of several samples, as one of them has only one row."""
        return self._one_a_sample and self.config.sample is None

    def _tokens_of_lens(self) -> list[tuple[SampleActivations, int]]:
        """Samples, with a row of each."""
        if self._across:
            found = [(sample, 0) for sample in self.run[:_LENS_TOKENS] if len(sample.positions)]
        else:
            sample = self.run.sample(self.config.sample) if self.config.sample is not None else self.run[0]
            found = [(sample, row) for row in range(len(sample.positions))][-_LENS_TOKENS:]
        if not found:
            raise UserError("--pictures lens: the first sample has no rows; name another with --sample")
        return found

    def _left_out(self, picture: Picture, why: str) -> LeftOut:
        """UserError where it was asked for."""
        if self.config.asked(picture):
            raise UserError(f"--pictures {picture}: {why}")
        return LeftOut(picture, why)


def _norms_of(rows: np.ndarray) -> np.ndarray:
    """float64 [rows]; NaN where one is not finite."""
    squares = np.einsum("nd,nd->n", rows, rows, dtype=np.float64)
    return np.sqrt(np.where(np.isfinite(squares), squares, np.nan))


def _hook(run: Run, name: str) -> str:
    """By name or TransformerLens name; UserError where the run does not hold it."""
    found = list(resolve_hook_points([name], run.metadata.get("model_hook_points", GATED)))
    for hook in found:
        if hook in run.hook_points:
            return hook
    raise UserError(f"--hook_points: this run holds no {found[0]!r}; it holds: {', '.join(run.hook_points)}")


def _name(site: Site) -> str:
    return site.hook if site.layer is None else str(site.layer)


def _spread(sites: Sequence[Site], most: int) -> list[Site]:
    """So many of them, evenly spaced, the first and the last among them."""
    return [sites[i] for i in np.unique(np.linspace(0, len(sites) - 1, min(most, len(sites))).round().astype(int))]
