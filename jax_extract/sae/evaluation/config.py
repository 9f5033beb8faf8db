"""The configuration of `jax-extract sae eval`: one frozen dataclass, which is also the command line.

In: flags. Out: `SaeEvalConfig`, checked as far as that goes without looking at files or devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from jax_extract.devices.choice import DeviceChoice
from jax_extract.errors import UserError

_MOST = 2**31 - 1


@dataclass(frozen=True)
class SaeEvalConfig:
    """Measure sparse autoencoders on held-out samples, and in the model that they are of.

    Attributes:
      saes: what sae train wrote, all of which is measured; or folders of single SAEs, SAELens' too.
      activations: run to measure on, a directory or gs://bucket/prefix; by default the one that they were trained on,
        of which samples that were held out are taken.
      model_path: model in which rows are replaced by their reconstructions; by default the run's own, if it is on this
        machine.
      rows: most rows that are measured, in whole samples.
      loss_samples: samples on which the model is run; 0 leaves the model out.
      resamples: of the samples, for confidence intervals.
      confidence: share of the resamples that lie within an interval.
      seed: of the choice of samples and of the resamples.
      output: file that is written; by default sae_evaluation.json in the first of the folders.
      device: auto, cpu, gpu or tpu.
      mesh_shape: DATA,MODEL over all devices, of the model; by default all on DATA.
    """

    saes: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SAES")]
    activations: str | None = None
    model_path: str | None = None
    rows: int = 32_768
    loss_samples: int = 32
    resamples: int = 1_000
    confidence: float = 0.95
    seed: int = 0
    output: str | None = None
    device: DeviceChoice = "auto"
    mesh_shape: str | None = None

    def check(self) -> None:
        if not self.saes:
            raise UserError("no SAES are named; give the folder that sae train wrote")
        for name, least in (("rows", 1), ("loss_samples", 0), ("resamples", 1), ("seed", 0)):
            if not least <= getattr(self, name) <= _MOST:
                raise UserError(f"--{name} {getattr(self, name)} must be from {least} to {_MOST}")
        if not 0 < self.confidence < 1:
            raise UserError(f"--confidence {self.confidence} must be a share, above 0 and below 1")
