"""`jax-extract sae eval`: how good trained SAEs are, on samples that they have not seen and in the model.

In: `SaeEvalConfig`. Out: sae_evaluation.json, and lines. Every number that is a mean over rows or tokens has a
confidence interval by sample.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from jax_extract.devices.choice import use_devices
from jax_extract.errors import UserError, user_path
from jax_extract.interactive.model_of_run import ModelOfRun
from jax_extract.progress import COMPUTING, Progress
from jax_extract.sae.evaluation.config import SaeEvalConfig
from jax_extract.sae.evaluation.intervals import Bootstrap, Interval
from jax_extract.sae.evaluation.opened import OpenedSae, open_saes
from jax_extract.sae.evaluation.pareto import front
from jax_extract.sae.evaluation.rows import HeldOutRows
from jax_extract.sae.evaluation.spliced import Losses, Spliced
from jax_extract.sae.evaluation.stability import agreement, bias_checks
from jax_extract.sae.metrics import VALUES, Sums, sums_of
from jax_extract.store.folders import write_file
from jax_extract.store.parts import Site
from jax_extract.store.reader import open_activations
from jax_extract.terminal import Terminal, plural

EVALUATION_FILE = "sae_evaluation.json"
DENSE = 0.1  # of the rows: a latent that is active in more is dense
_DENSITIES = np.arange(-6, 0.01, 0.25)  # log10 of the share of rows: edges of the histogram
_ABLATIONS = ("zero", "mean")
_FEWEST_TOKENS = 2  # of a sample, of which one can be predicted


def sae_eval(config: SaeEvalConfig, terminal: Terminal | None = None) -> dict[str, Any]:
    """Measures, and writes; returns what sae_evaluation.json says.

    Raises:
      UserError: anything the user can mend.
    """
    config.check()
    terminal = terminal or Terminal()
    use_devices(config.device)
    saes = open_saes(config.saes)
    place = config.activations or next((sae.run for sae in saes if sae.run), None)
    if place is None:
        raise UserError("these SAEs do not say what they were trained on; name a run with --activations")
    run = open_activations(str(place))
    for sae in saes:
        _require_widths(sae, [sae.sites(run), sae.targets(run)])
    rows = HeldOutRows.of(run, str(place), saes, config.rows, config.seed)
    return _Evaluation(config, saes, rows, ModelOfRun(run, config.model_path, terminal), terminal).run_all()


@dataclass(frozen=True)
class _Evaluation:
    config: SaeEvalConfig
    saes: Sequence[OpenedSae]
    rows: HeldOutRows
    model: ModelOfRun
    terminal: Terminal

    def run_all(self) -> dict[str, Any]:
        rows, config = self.rows, self.config
        self.terminal.line("rows", f"{len(rows):,} rows of {plural(len(rows.samples), 'sample')} {rows.said}")
        spliced = self._spliced()
        kinds = {(sae.targets(rows.run), sae.positions) for sae in self.saes}
        runs = 1 + len(_ABLATIONS) * len(kinds) + len(self.saes) if spliced else 0
        with self.terminal.progress(len(self.saes) + runs, COMPUTING, " passes") as bar:
            told = [self._of(sae, spliced, bar) for sae in self.saes]
        points = [(sae["metrics"]["l0"]["value"], sae["metrics"]["explained_variance"]["value"]) for sae in told]
        trained = [i for i, sae in enumerate(self.saes) if sae.baseline is None]
        on_front = [trained[i] for i in front([points[i] for i in trained])]
        found = {
            "activations": rows.place,
            "rows": len(rows),
            "samples": len(rows.samples),
            "held_out": rows.held_out,
            "confidence": {"share": config.confidence, "resamples": config.resamples, "of": "samples"},
            "model": None if spliced is None else self._of_model(spliced),
            "saes": told,
            "pareto_front": [self.saes[i].name for i in on_front],
            "stability": list(self._stability()),
        }
        output = user_path(config.output or str(Path(config.saes[0]) / EVALUATION_FILE), "--output")
        write_file(output, partial(_write, found))
        self._tell(found, output)
        return found

    # ---------------------------------------------------------------------------------------- one SAE

    def _of(self, sae: OpenedSae, spliced: Spliced | None, bar: Progress) -> dict[str, Any]:
        x, y, begins = self.rows.of_sae(sae)
        sums = sums_of(sae.sae, x, y, begins, sae.layers)
        metrics = sums.metrics()
        intervals = dict(zip(VALUES, self._bootstrap(len(begins)).intervals(sums.values), strict=True))
        said: dict[str, Any] = {
            "name": sae.name,
            **{
                name: sae.said.get(name)
                for name in ("architecture", "layer", "hook_point", "sparsity", "seed", "baseline")
            },
            "d_sae": sae.sae.d_sae,
            "rows": metrics.rows,
            "metrics": {name: _plain(interval) for name, interval in intervals.items()},
            **_densities(sums),
            "decoder_bias": _bias(sae, y),
        }
        if metrics.explained_variance_by_layer:
            said["explained_variance_by_layer"] = list(metrics.explained_variance_by_layer)
        bar.update(1)
        return {**said, "spliced": None if spliced is None else self._of_splice(sae, spliced, bar)}

    def _bootstrap(self, samples: int) -> Bootstrap:
        return Bootstrap.of(samples, self.config.resamples, self.config.confidence, self.config.seed)

    # ------------------------------------------------------------------------------------- the model

    def _spliced(self) -> Spliced | None:
        """None where no model is to be run, or none is here."""
        if not self.config.loss_samples:
            return None
        if self.model.path is None:
            self.terminal.line("note", f"{self.model.not_here}: what it loses is left out; --model_path names another")
            return None
        if why := self._why_no_splice():
            self.terminal.line("note", f"{why}, so what the model loses is left out")
            return None
        chosen = [sample for sample in self.rows.samples if len(sample.token_ids) >= _FEWEST_TOKENS]
        texts = {sample.sample_id: sample.token_ids for sample in chosen[: self.config.loss_samples]}
        sites = dict.fromkeys(
            site for sae in self.saes for site in (*sae.sites(self.rows.run), *sae.targets(self.rows.run))
        )
        if not texts:
            return None
        positions = str(self.rows.run.metadata.get("positions") or "all")
        return Spliced(self.model.load(self.config.mesh_shape), texts, list(sites), positions)

    def _why_no_splice(self) -> str | None:
        """None where rows can be replaced in the model."""
        if str(self.rows.run.metadata.get("positions")).startswith("mean"):
            return "rows of this run are means over texts"
        if any(site.hook == "final_norm" for sae in self.saes for site in sae.targets(self.rows.run)):
            return "final_norm is behind all that the model computes"
        return None

    @cached_property
    def _losses(self) -> dict[Any, Losses]:
        """Those of the model as it is, and under ablations, which several SAEs are compared with."""
        return {}

    def _once(self, key: Any, bar: Progress, compute: Callable[[], Losses]) -> Losses:
        if key not in self._losses:
            self._losses[key] = compute()
            bar.update(1)
        return self._losses[key]

    def _of_splice(self, sae: OpenedSae, spliced: Spliced, bar: Progress) -> dict[str, Any]:
        targets = sae.targets(self.rows.run)
        clean = self._once(None, bar, lambda: spliced.losses)
        zero, mean = (
            self._once(
                (kind, targets, sae.positions, *map(sae.largest_norm, (*sae.sites(self.rows.run), *targets))),
                bar,
                lambda kind=kind: spliced.ablated(sae, kind),
            )
            for kind in _ABLATIONS
        )
        replaced = spliced.replaced(sae)
        bar.update(1)

        def values(times: np.ndarray) -> np.ndarray:
            tokens = times @ clean.tokens
            own, without, of_zero, of_mean = (times @ each.missed / tokens for each in (replaced, clean, zero, mean))
            return np.stack(
                [
                    own,
                    own - without,
                    times @ replaced.divergence / tokens,
                    (of_zero - own) / (of_zero - without),
                    (of_mean - own) / (of_mean - without),
                ],
                axis=1,
            )

        names = ("cross_entropy", "added_cross_entropy", "kl", "recovered_of_zero", "recovered_of_mean")
        intervals = self._bootstrap(len(clean.tokens)).intervals(values)
        said: dict[str, Any] = {name: _plain(each) for name, each in zip(names, intervals, strict=True)}
        of_all = clean.tokens.sum()
        return {
            **said,
            "zero_cross_entropy": zero.missed.sum() / of_all,
            "mean_cross_entropy": mean.missed.sum() / of_all,
        }

    def _of_model(self, spliced: Spliced) -> dict[str, Any]:
        clean = self._losses[None]
        [interval] = self._bootstrap(len(clean.tokens)).intervals(
            lambda times: (times @ clean.missed / (times @ clean.tokens))[:, None]
        )
        return {
            "name": spliced.model.name,
            "samples": len(spliced.texts),
            "tokens": int(clean.tokens.sum()),
            "cross_entropy": _plain(interval),
        }

    # --------------------------------------------------------------------------------- several SAEs

    def _stability(self) -> Iterator[dict[str, Any]]:
        """Pairs of SAEs that differ by their seed alone."""
        groups: dict[Any, list[OpenedSae]] = {}
        for sae in self.saes:
            if sae.said:
                groups.setdefault(sae.siblings, []).append(sae)
        for group in groups.values():
            for one, other in combinations(group, 2):
                decoders = [np.asarray(each.sae.params["W_dec"]) for each in (one, other)]
                yield {"saes": [one.name, other.name], "baseline": one.baseline, **agreement(*decoders)}

    def _tell(self, found: Mapping[str, Any], output: Path) -> None:
        if found["model"] is not None:
            model = found["model"]
            self.terminal.line(
                "model",
                f"{model['name']} on {plural(model['samples'], 'sample')}, {model['tokens']:,} tokens: cross-entropy "
                f"{_text(model['cross_entropy'], '.4f')}",
            )
        for sae in found["saes"]:
            metrics, splice = sae["metrics"], sae["spliced"]
            text = f"{sae['name']}: explained variance {_text(metrics['explained_variance'], '.4f')}, L0 "
            text += f"{metrics['l0']['value']:.1f}, dead {sae['dead']:.1%}"
            if splice is not None:
                text += f"; cross-entropy {_text(splice['added_cross_entropy'], '+.4f')}, recovered of zero "
                text += f"{_text(splice['recovered_of_zero'], '.2%')}, KL {splice['kl']['value']:.4f}"
            self.terminal.line("sae", text)
        for pair in found["stability"]:
            if pair["baseline"] is None:
                self.terminal.line(
                    "seeds",
                    f"{' and '.join(pair['saes'])}: mean max cosine {pair['mean_max_cosine']:.3f}, "
                    f"{pair['shared']:.1%} of the latents shared",
                )
        self.terminal.line("output", str(output))


def _write(found: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _require_widths(sae: OpenedSae, sites: Sequence[Sequence[Site]]) -> None:
    for of_rows, width in zip(sites, (sae.sae.d_in, sae.sae.d_out), strict=True):
        if (there := sum(site.width for site in of_rows)) != width:
            raise UserError(
                f"{sae.folder} is of rows of {width} values, and this run has {there} at {of_rows[0].hook}; give the "
                "run of its model with --activations"
            )


def _densities(sums: Sums) -> dict[str, Any]:
    shares = sums.fired / sums.rows.sum()
    active = np.log10(np.maximum(shares[shares > 0], 10.0 ** _DENSITIES[0]))
    counts, _ = np.histogram(active, _DENSITIES)
    return {
        "dead": float((shares == 0).mean()),
        "dense": float((shares > DENSE).mean()),
        "density": {"log10_edges": _DENSITIES.tolist(), "latents": counts.tolist()},
    }


def _bias(sae: OpenedSae, targets: np.ndarray) -> dict[str, float]:
    mean = targets.mean(axis=0, dtype=np.float64)
    square = float(np.square(targets - mean).sum(axis=1).mean())
    return bias_checks(np.asarray(sae.sae.params["W_dec"]), np.asarray(sae.sae.params["b_dec"]), mean, square)


def _plain(interval: Interval) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if np.isfinite(value) else None for name, value in interval.to_json().items()}


def _text(interval: Mapping[str, float | None], form: str) -> str:
    each = (interval[name] for name in ("value", "low", "high"))
    value, low, high = ("–" if number is None else format(number, form) for number in each)
    return f"{value} ({low} to {high})"
