"""The pictures of a sweep of sparse autoencoders: explained variance against active latents, and how often each fires.

In: the folder that sae train wrote; sae_evaluation.json in it where sae eval has been there. Out: `Drawn` pictures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_extract.errors import UserError, damage_is_told
from jax_extract.plotting.config import Picture, PlotConfig
from jax_extract.plotting.density import draw_density
from jax_extract.plotting.pareto import Point, draw_pareto
from jax_extract.plotting.pictures import Drawn, LeftOut
from jax_extract.sae.evaluation.command import EVALUATION_FILE
from jax_extract.sae.saved import SUMMARY_FILE, read_summary
from jax_extract.terminal import plural

PICTURES: tuple[Picture, ...] = ("pareto", "density")


@dataclass(frozen=True)
class SaePictures:
    folder: Path
    config: PlotConfig

    @classmethod
    def holds(cls, folder: Path) -> bool:
        return (folder / SUMMARY_FILE).is_file() or (folder / EVALUATION_FILE).is_file()

    def draw(self) -> Iterator[Drawn | LeftOut]:
        evaluated = self.folder / EVALUATION_FILE
        has_intervals = evaluated.is_file()
        if has_intervals:
            with damage_is_told(str(evaluated), "write it again with jax-extract sae eval"):
                saes = json.loads(evaluated.read_text(encoding="utf-8"))["saes"]
                points, rows = [_point(sae) for sae in saes], saes[0]["rows"]
        else:
            with damage_is_told(str(self.folder / SUMMARY_FILE), "write it again with jax-extract sae train"):
                saes = [_flat(sae) for sae in read_summary(self.folder)["saes"]]
                points, rows = [_point(sae) for sae in saes], saes[0]["rows"]
        caption = f"{self.folder.resolve().name}  ·  {plural(len(saes), 'SAE')}  ·  {rows:,} rows"
        if self.config.wants("pareto"):
            yield Drawn("pareto", draw_pareto(points, caption))
        if self.config.wants("density"):
            if not has_intervals:
                yield self._left_out("density", f"there is no {EVALUATION_FILE} in {self.folder}; sae eval writes it")
            else:
                yield Drawn("density", draw_density(saes, caption))

    def _left_out(self, picture: Picture, why: str) -> LeftOut:
        """UserError where it was asked for."""
        if self.config.asked(picture):
            raise UserError(f"--pictures {picture}: {why}")
        return LeftOut(picture, why)


def _flat(sae: dict[str, Any]) -> dict[str, Any]:
    """One of the summary, as sae_evaluation.json has it: numbers without intervals."""
    metrics = {
        name: {"value": sae["metrics"][name], "low": None, "high": None} for name in ("explained_variance", "l0")
    }
    return {**sae, "rows": sae["metrics"]["rows"], "metrics": metrics}


def _point(sae: dict[str, Any]) -> Point:
    metrics, layer = sae["metrics"], sae.get("layer")
    variance = metrics["explained_variance"]
    where = "" if layer is None else f"layer {layer}, " if isinstance(layer, int) else "crosscoder, "
    return Point(
        group=f"{where}{sae.get('architecture') or sae['name']}, {sae['d_sae']:,} latents",
        baseline=sae.get("baseline"),
        l0=metrics["l0"]["value"],
        explained_variance=variance["value"],
        interval=None if variance["low"] is None else (variance["low"], variance["high"]),
    )
