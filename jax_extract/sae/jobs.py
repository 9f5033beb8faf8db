"""What a sweep trains: every combination of layers, architectures, widths, sparsities, rates and seeds, and baselines.

In: a configuration and the layers of rows. Out: jobs, each with a name of its own, grouped by what one compiled step
can train.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_extract.errors import UserError
from jax_extract.sae.architecture import ANTHROPIC, WITH_K, Architecture, canonical
from jax_extract.sae.config import NONE, SaeTrainConfig
from jax_extract.sae.folder import stored_name
from jax_extract.sae.step import FREE, HELD, LENGTHS, Choice
from jax_extract.store.parts import Site

_OF_DECODER = {None: FREE, "frozen_decoder": HELD, "frozen_random": LENGTHS}


@dataclass(frozen=True)
class Job:
    """One SAE.

    Attributes:
      name: of its folder.
      sites: what it encodes: one, or of a crosscoder several.
      targets: what it reconstructs; `sites`, but of a transcoder.
      sources, goals: their places among the layers of the rows.
      sparsity: k, or the factor of the sparsity loss.
      baseline: which of its directions stay random; None of a trained one.
    """

    name: str
    sites: tuple[Site, ...]
    targets: tuple[Site, ...]
    sources: tuple[int, ...]
    goals: tuple[int, ...]
    architecture: Architecture
    sparsity: float
    learning_rate: float
    seed: int
    baseline: str | None

    def encoded(self, rows: np.ndarray) -> np.ndarray:
        """[n, d_in] of rows [n, layers, width]."""
        return rows[:, self.sources].reshape(len(rows), -1)

    def reconstructed(self, rows: np.ndarray) -> np.ndarray:
        """[n, d_out] of them."""
        return rows[:, self.goals].reshape(len(rows), -1)


def jobs_of(config: SaeTrainConfig, sites: Sequence[Site]) -> list[Job]:
    """UserError where a combination is none that can be trained.

    Args:
      sites: of the layers of the rows; of transcoders those that are encoded, and then as many that are reconstructed.
    """
    found: list[Job] = []
    names = [canonical(name) for name in dict.fromkeys(config.architecture)]
    baselines: list[str | None] = [None, *(b for b in dict.fromkeys(config.baselines) if b != NONE)]
    if config.crosscoder and len(sites) == 1:
        raise UserError("--crosscoder is of several layers, and there is one; give more --layers")
    for sources, goals in _views(config, len(sites)):
        encoded, reconstructed = (tuple(sites[place] for place in places) for places in (sources, goals))
        widths = config.d_sae or tuple(max(1, round(factor * encoded[0].width)) for factor in config.expansion_factor)
        for name in names:
            for d_sae in widths:
                for sparsity in config.sparsities(name):
                    architecture = _architecture(config, name, encoded, reconstructed, d_sae, sparsity)
                    for rate in config.learning_rate:
                        for seed in config.seed:
                            for baseline in baselines:
                                parts = [_where(config, encoded, reconstructed), name, f"d{d_sae}"]
                                parts += _rest(config, name, sparsity, rate, seed, baseline)
                                what = architecture, sparsity, rate, seed, baseline
                                found.append(Job("_".join(parts), encoded, reconstructed, sources, goals, *what))
    return found


def _views(config: SaeTrainConfig, count: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Places of layers that an SAE encodes, and that it reconstructs, of each SAE."""
    if config.crosscoder:
        return [(tuple(range(count)), tuple(range(count)))]
    if config.target_hook is not None:
        return [((i,), (count // 2 + i,)) for i in range(count // 2)]
    return [((i,), (i,)) for i in range(count)]


def grouped(jobs: Sequence[Job]) -> dict[Architecture, list[Job]]:
    """By what is compiled."""
    groups: dict[Architecture, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.architecture, []).append(job)
    return groups


def choices_of(jobs: Sequence[Job], scales: Sequence[float]) -> Choice:
    """Arrays over the jobs of a group; `scales` by place."""

    def each(value: list[Any], kind: type = np.float32) -> Any:
        return np.array(value, kind)

    with_k = [job.architecture.name in WITH_K for job in jobs]
    return Choice(
        source=each([job.sources[0] for job in jobs], np.int32),
        target=each([job.goals[0] for job in jobs], np.int32),
        scales=each([list(scales) for _ in jobs]),
        k=each([job.sparsity if k else 0.0 for job, k in zip(jobs, with_k, strict=True)]),
        sparsity=each([0.0 if k else job.sparsity for job, k in zip(jobs, with_k, strict=True)]),
        learning_rate=each([job.learning_rate for job in jobs]),
        encoder=each([FREE if job.baseline != "frozen_random" else LENGTHS for job in jobs], np.int32),
        decoder=each([_OF_DECODER[job.baseline] for job in jobs], np.int32),
    )


def _architecture(
    config: SaeTrainConfig,
    name: str,
    encoded: Sequence[Site],
    reconstructed: Sequence[Site],
    d_sae: int,
    sparsity: float,
) -> Architecture:
    if name in WITH_K and not 1 <= sparsity <= d_sae:
        raise UserError(f"--k {sparsity:g} must be from 1 to the {d_sae} latents; give fewer, or a larger --d_sae")
    if name == "topk" and sparsity != int(sparsity):
        raise UserError(f"--k {sparsity:g} of topk must be a whole number; batchtopk takes an average")
    nested: tuple[int, ...] = ()
    if name == "matryoshka_batchtopk":
        inner = {round(share * d_sae) for share in config.matryoshka_widths} - {0}
        nested = (*sorted(inner - {d_sae}), d_sae)
    architecture = Architecture(
        name,
        sum(site.width for site in encoded),
        sum(site.width for site in reconstructed),
        d_sae,
        k=int(sparsity) if name == "topk" else None,
        widths=nested,
        centred=config.target_hook is None and not config.crosscoder,
        layers=len(encoded),
        **(ANTHROPIC if name == "jumprelu" and config.l0_loss == "tanh" else {}),
    )
    stored_name(architecture)  # refuses what SAELens has no name for
    return architecture


def _where(config: SaeTrainConfig, encoded: Sequence[Site], reconstructed: Sequence[Site]) -> str:
    """What is encoded, and what is reconstructed where that is something else, in the name of a folder."""
    hook, layers = encoded[0].hook, [site.layer for site in encoded]
    if layers[0] is None:
        where = hook
    else:
        which = f"layer_{layers[0]}" if len(layers) == 1 else f"layers_{'_'.join(map(str, layers))}"
        is_plain = hook == "after_block" and config.target_hook is None
        where = which if is_plain else f"{which}_{hook}"
    if config.target_hook is not None:
        return f"{where}_to_{reconstructed[0].hook}"
    return f"{where}_crosscoder" if config.crosscoder else where


def _rest(
    config: SaeTrainConfig, name: str, sparsity: float, rate: float, seed: int, baseline: str | None
) -> list[str]:
    called = "k" if name in WITH_K else "l0_" if name == "jumprelu" else "l1_"
    rates = [f"lr{rate:g}"] if len(config.learning_rate) > 1 else []
    return [f"{called}{sparsity:g}", *rates, f"seed{seed}", *([baseline] if baseline else [])]
