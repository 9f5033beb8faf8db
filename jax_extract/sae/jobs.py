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
from jax_extract.sae.architecture import WITH_K, Architecture, canonical
from jax_extract.sae.config import NONE, SaeTrainConfig
from jax_extract.sae.step import FREE, HELD, LENGTHS, Choice
from jax_extract.store.parts import Site

_OF_DECODER = {None: FREE, "frozen_decoder": HELD, "frozen_random": LENGTHS}


@dataclass(frozen=True)
class Job:
    """One SAE.

    Attributes:
      name: of its folder.
      place: of its layer among those of the rows.
      sparsity: k, or the factor of the sparsity loss.
      baseline: which of its directions stay random; None of a trained one.
    """

    name: str
    site: Site
    place: int
    architecture: Architecture
    sparsity: float
    learning_rate: float
    seed: int
    baseline: str | None


def jobs_of(config: SaeTrainConfig, sites: Sequence[Site]) -> list[Job]:
    """UserError where a combination is none that can be trained."""
    found: list[Job] = []
    names = [canonical(name) for name in dict.fromkeys(config.architecture)]
    baselines: list[str | None] = [None, *(b for b in dict.fromkeys(config.baselines) if b != NONE)]
    for place, site in enumerate(sites):
        widths = config.d_sae or tuple(max(1, round(factor * site.width)) for factor in config.expansion_factor)
        for name in names:
            for d_sae in widths:
                for sparsity in config.sparsities(name):
                    architecture = _architecture(config, name, site.width, d_sae, sparsity)
                    for rate in config.learning_rate:
                        for seed in config.seed:
                            for baseline in baselines:
                                parts = _parts(config, site, name, d_sae, sparsity, rate, seed, baseline)
                                job = Job("_".join(parts), site, place, architecture, sparsity, rate, seed, baseline)
                                found.append(job)
    return found


def grouped(jobs: Sequence[Job]) -> dict[Architecture, list[Job]]:
    """By what is compiled."""
    groups: dict[Architecture, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.architecture, []).append(job)
    return groups


def choices_of(jobs: Sequence[Job], scales: Sequence[float]) -> Choice:
    """Arrays over the jobs of a group; `scales` by place."""

    def each(value: list[float], kind: type = np.float32) -> Any:
        return np.array(value, kind)

    places = each([job.place for job in jobs], np.int32)
    scale = each([scales[job.place] for job in jobs])
    with_k = [job.architecture.name in WITH_K for job in jobs]
    return Choice(
        source=places,
        target=places,
        scale_in=scale,
        scale_out=scale,
        k=each([job.sparsity if k else 0.0 for job, k in zip(jobs, with_k, strict=True)]),
        sparsity=each([0.0 if k else job.sparsity for job, k in zip(jobs, with_k, strict=True)]),
        learning_rate=each([job.learning_rate for job in jobs]),
        encoder=each([FREE if job.baseline != "frozen_random" else LENGTHS for job in jobs], np.int32),
        decoder=each([_OF_DECODER[job.baseline] for job in jobs], np.int32),
    )


def _architecture(config: SaeTrainConfig, name: str, width: int, d_sae: int, sparsity: float) -> Architecture:
    if name in WITH_K and not 1 <= sparsity <= d_sae:
        raise UserError(f"--k {sparsity:g} must be from 1 to the {d_sae} latents; give fewer, or a larger --d_sae")
    if name == "topk" and sparsity != int(sparsity):
        raise UserError(f"--k {sparsity:g} of topk must be a whole number; batchtopk takes an average")
    nested: tuple[int, ...] = ()
    if name == "matryoshka_batchtopk":
        inner = {round(share * d_sae) for share in config.matryoshka_widths} - {0}
        nested = (*sorted(inner - {d_sae}), d_sae)
    k = int(sparsity) if name == "topk" else None
    return Architecture(name, width, width, d_sae, k=k, widths=nested)


def _parts(
    config: SaeTrainConfig,
    site: Site,
    name: str,
    d_sae: int,
    sparsity: float,
    rate: float,
    seed: int,
    baseline: str | None,
) -> list[str]:
    where = site.hook if site.layer is None else f"layer_{site.layer}"
    where = where if site.hook == "after_block" or site.layer is None else f"{where}_{site.hook}"
    called = "k" if name in WITH_K else "l0_" if name == "jumprelu" else "l1_"
    parts = [where, name, f"d{d_sae}", f"{called}{sparsity:g}"]
    parts += [f"lr{rate:g}"] if len(config.learning_rate) > 1 else []
    return [*parts, f"seed{seed}", *([baseline] if baseline else [])]
