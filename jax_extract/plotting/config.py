"""The configuration of `jax-extract plot`: one frozen dataclass, which is also the command line.

In: flags. Out: `PlotConfig`, checked as far as that goes without looking at files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from jax_extract.errors import UserError
from jax_extract.layer_words import LayerWord, layer_words

Picture = Literal["norms", "spectrum", "pca", "lens", "loss", "nodes", "pareto", "density"]
FEWEST_ROWS = 2
TOKEN, POSITION = "token", "position"  # what rows are coloured by, unless it is a field


@dataclass(frozen=True)
class PlotConfig:
    """Draw pictures of a run, of a training of stage 02, or of sparse autoencoders, as PNG and SVG.

    Attributes:
      place: run directory or gs://bucket/prefix; or the folder of a training, of SAEs or of token representations.
      output_dir: folder for the pictures; by default plots/ in the place.
      pictures: norms, spectrum, pca, lens (of a run), loss (of a training), nodes (of token representations), pareto,
        density (of SAEs); by default all that there is something for.
      layers: counted from 0, or from the end: 3, -1 (the last), 2-5 (both among them), all, or several of these; by
        default all that the run holds.
      hook_points: by name or TransformerLens name; by default all that the run holds.
      color_by: of the rows in pca: token, position, or a field of the samples, such as label; by default token.
      sample: whose tokens the logit lens shows, by id; by default the first of the input.
      model_path: model for the logit lens, which is loaded, and for the text of tokens; by default the run's own, if it
        is on this machine.
      dataset_dir: of the walks, whose graph.json joins the nodes of the map; by default ../dataset of the training.
      rows: most rows of a layer that are read, in whole samples from all over the run.
      seed: which samples these are.
    """

    place: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PLACE")]
    output_dir: str | None = None
    pictures: tuple[Picture, ...] | None = None
    layers: tuple[LayerWord, ...] | None = None
    hook_points: tuple[str, ...] | None = None
    color_by: str | None = None
    sample: str | None = None
    model_path: str | None = None
    dataset_dir: str | None = None
    rows: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", layer_words(self.layers, "--layers"))

    def check(self) -> None:
        for name in ("pictures", "layers", "hook_points"):
            if getattr(self, name) == ():
                raise UserError(f"--{name} is empty; name at least one, or leave the flag out")
        if self.rows < FEWEST_ROWS:
            raise UserError(f"--rows {self.rows} is too few for a picture; give {FEWEST_ROWS} or more")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed} is negative; give 0 or more")

    def asked(self, picture: Picture) -> bool:
        """Whether it is named."""
        return self.pictures is not None and picture in self.pictures

    def wants(self, picture: Picture) -> bool:
        """Whether it is named, or none is."""
        return self.pictures is None or picture in self.pictures
