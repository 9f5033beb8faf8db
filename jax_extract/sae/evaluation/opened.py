"""Trained SAEs as they are found on the disk, with what they say of their training.

In: folders that sae train or SAELens wrote. Out: `OpenedSae`s, each with the hook points that it is of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_extract.errors import UserError, damage_is_told, user_path
from jax_extract.sae.autoencoder import SparseAutoencoder
from jax_extract.sae.folder import CONFIG_FILE
from jax_extract.sae.saved import SUMMARY_FILE, read_summary
from jax_extract.sae.sources import HeldOut, key_of
from jax_extract.store.parts import Site
from jax_extract.store.reader import Run


@dataclass(frozen=True, eq=False)
class OpenedSae:
    """Attributes:
    said: what cfg.json says of the training; empty of an SAE that another library trained.
    """

    name: str
    folder: Path
    sae: SparseAutoencoder
    said: dict[str, Any]

    @property
    def trained_on(self) -> dict[str, Any]:
        return self.said.get("trained_on") or {}

    @property
    def positions(self) -> str:
        """Which tokens' rows it is for."""
        positions = self.trained_on.get("positions") or "from:1"
        return "all" if positions.startswith("mean") else positions  # of a run of means, all rows are such

    @property
    def run(self) -> str | None:
        """Where the run lies that it was trained on; None where it was no run."""
        about = self.trained_on
        of_run = "array" not in about and "input" not in about and about.get("activations") != "in memory"
        return about.get("activations") if of_run else None

    @property
    def layers(self) -> int:
        """Of a crosscoder; 1 of the others."""
        layer = self.said.get("layer")
        return len(layer) if isinstance(layer, list) else 1

    @property
    def baseline(self) -> str | None:
        return self.said.get("baseline")

    @property
    def held_out(self) -> HeldOut | None:
        """Which samples it was not trained on; None where that is not known."""
        known = self.trained_on.get("held_out")
        return HeldOut(float(known["share"]), int(known["seed"])) if known else None

    @property
    def siblings(self) -> tuple[Any, ...]:
        """What it has in common with those that differ by their seed alone."""
        names = ("architecture", "d_sae", "sparsity", "learning_rate", "baseline", "target_hook_point")
        return (*(str(self.said.get(name)) for name in (*names, "layer", "hook_point")), self.folder.resolve().parent)

    def sites(self, run: Run) -> tuple[Site, ...]:
        """What it encodes; UserError where the run does not hold it."""
        if "hook_point" in self.said:
            layer = self.said["layer"]
            return tuple(
                run.site(one, self.said["hook_point"]) for one in (layer if isinstance(layer, list) else [layer])
            )
        name = self.sae.metadata.get("hook_name")
        if not isinstance(name, str):
            raise UserError(
                f"{self.folder / CONFIG_FILE} does not say of which hook point it is; add metadata.hook_name"
            )
        hook, named = run.hook_point(name)
        return (run.site(next(iter(named)) if named else None, hook),)

    def targets(self, run: Run) -> tuple[Site, ...]:
        """What it reconstructs."""
        sites = self.sites(run)
        if hook := self.said.get("target_hook_point"):
            return tuple(run.site(site.layer, hook) for site in sites)
        name = self.sae.metadata.get("hook_name_out")
        if not self.said and isinstance(name, str) and name:
            hook, named = run.hook_point(name)
            return (run.site(next(iter(named)) if named else None, hook),)
        return sites

    def largest_norm(self, site: Site) -> float:
        """Above which it is not for rows of this site; infinity where that is not known."""
        norms = (self.trained_on.get("largest_norm") or {}).get("norms") or []
        keys = list(self.trained_on.get("hook_names") or {})
        norm = norms[keys.index(key_of(site))] if key_of(site) in keys else None
        return float("inf") if norm is None else float(norm)


def open_saes(places: Sequence[str]) -> list[OpenedSae]:
    """All SAEs of these places, in their order; UserError where one holds none, or one is damaged."""
    found: dict[Path, OpenedSae] = {}
    for place in places:
        folder = user_path(place, "SAES")
        if (folder / CONFIG_FILE).is_file():
            found.setdefault(folder.resolve(), _opened(folder))
        elif (folder / SUMMARY_FILE).is_file():
            with damage_is_told(str(folder / SUMMARY_FILE), "write it again with jax-extract sae train"):
                names = [Path(str(sae["name"])).name for sae in read_summary(folder)["saes"]]
            if not names:
                raise UserError(f"{folder / SUMMARY_FILE} names no SAE; write it again with jax-extract sae train")
            for name in names:
                found.setdefault((folder / name).resolve(), _opened(folder / name))
        else:
            raise UserError(f"{folder} holds no {SUMMARY_FILE} and no {CONFIG_FILE}; give what sae train wrote")
    return list(found.values())


def _opened(folder: Path) -> OpenedSae:
    sae = SparseAutoencoder.open(folder)
    with damage_is_told(str(folder / CONFIG_FILE), "write it again, or restore it from a copy"):
        said = sae.metadata.get("jax_extract") or {}
        if said and not (isinstance(said, dict) and {"layer", "hook_point"} <= set(said)):
            raise ValueError("metadata.jax_extract lacks layer or hook_point")
    return OpenedSae(folder.resolve().name, folder, sae, said)
