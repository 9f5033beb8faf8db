"""The configuration of `jax-extract sae features`: one frozen dataclass, which is also the command line.

In: flags. Out: `SaeFeaturesConfig`, checked as far as that goes without looking at files or devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from jax_extract.devices.choice import DeviceChoice
from jax_extract.errors import UserError

_MOST = 2**31 - 1
ALL = "all"


@dataclass(frozen=True)
class SaeFeaturesConfig:
    """Make a page of the features of a sparse autoencoder, and JSON files for Neuronpedia.

    Attributes:
      sae: folder of one SAE.
      activations: run whose texts are shown, a directory or gs://bucket/prefix; by default the one that it was trained
        on.
      output_dir: folder for features.html and neuronpedia/; by default features/ in the folder of the SAE.
      model_path: model for the text of tokens and for logits; by default the run's own, if it is on this machine.
      features: how many, drawn at random among those that are active; or their numbers, as in 3 17 42; or all.
      rows: most rows that are read, in whole samples.
      contexts: texts of each feature in which it is most active, and random ones of each fifth of its activations.
      before, after: tokens of a text that are shown on either side.
      others: folders of SAEs, as of another seed, whose nearest directions are told; by default those that differ by
        their seed alone and lie beside it.
      seed: of all that is drawn.
      device: auto, cpu, gpu or tpu.
    """

    sae: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SAE")]
    activations: str | None = None
    output_dir: str | None = None
    model_path: str | None = None
    features: tuple[str, ...] = ("1000",)
    rows: int = 200_000
    contexts: tuple[int, int] = (10, 3)
    before: int = 24
    after: int = 8
    others: tuple[str, ...] | None = None
    seed: int = 0
    device: DeviceChoice = "auto"

    def check(self) -> None:
        for name, least in (("rows", 1), ("before", 0), ("after", 0), ("seed", 0)):
            if not least <= getattr(self, name) <= _MOST:
                raise UserError(f"--{name} {getattr(self, name)} must be from {least} to {_MOST}")
        if min(self.contexts) < 0 or not max(self.contexts):
            raise UserError(
                f"--contexts {self.contexts[0]} {self.contexts[1]} must be two numbers from 0, one above it"
            )
        for word in self.features:
            if word != ALL and not word.isdecimal():
                raise UserError(f"--features {word!r} is no number; give how many, several numbers, or all")
        if ALL in self.features and len(self.features) > 1:
            raise UserError(f"--features {' '.join(self.features)} names all and others; give one of both")
        if not self.features:
            raise UserError("--features is empty; give how many, several numbers, or all")

    @property
    def numbers(self) -> list[int] | None:
        """Those that are named; None where a count or all is asked for."""
        return [int(word) for word in self.features] if len(self.features) > 1 else None

    @property
    def count(self) -> int | None:
        """How many; None for all."""
        return None if self.features[0] == ALL else int(self.features[0])
