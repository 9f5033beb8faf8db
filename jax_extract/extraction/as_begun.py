"""What the same command means on another day: the commits, hook points and names that its run was begun with.

In: a configuration or a source, and the run that is there. Out: the same, as the run was begun.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator
from pathlib import Path

from jax_extract.config import ExtractConfig
from jax_extract.devices.processes import Processes
from jax_extract.extraction.place import Place
from jax_extract.inputs.fields import FIELDS_KEPT
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.sources import Source
from jax_extract.inputs.wrapping import Kept
from jax_extract.store.ledger import Ledger
from jax_extract.weights.checkpoint import is_hub_id
from models.hooks import BY_NAME_ONLY


def of_the_same_commits(config: ExtractConfig, place: Place, processes: Processes) -> ExtractConfig:
    """What is asked of the hub means the commit that it meant when the run that is there was begun, not the newest."""
    model, adapter = config.model_path, (config.adapter or "").partition("@")[0]
    model, adapter = (name if is_hub_id(name) and not Path(name).exists() else "" for name in (model, adapter))
    if config.overwrite or not (model or adapter) or (found := place.find(processes)) is None:
        return config
    begun = found.run["description"]
    asked = dict(begun.get("asked") or {"adapter": adapter})  # runs that do not say it: the newest
    if model and model == begun.get("model_path") and config.revision == asked.get("revision"):
        config = dataclasses.replace(config, revision=begun.get("model_revision"))
    if adapter and config.adapter == asked.get("adapter") and str(begun.get("adapter")).startswith(f"{adapter}@"):
        config = dataclasses.replace(config, adapter=begun["adapter"])
    return config


def of_the_same_hook_points(config: ExtractConfig, place: Place, processes: Processes) -> ExtractConfig:
    """A glob means what the model had when the run that is there was begun: a later version has more hook points."""
    globs = [name for name in config.hook_points if any(c in name for c in "*?[")]
    if config.overwrite or not globs or (found := place.find(processes)) is None:
        return config
    begun = found.run["description"].get("model_hook_points")
    if not begun:  # runs that do not say it: those of now
        return config
    names: list[str] = []
    for name in config.hook_points:
        meant = [point for point in begun if fnmatch.fnmatchcase(point, name) and point not in BY_NAME_ONLY]
        names += meant if name in globs and meant else [name]
    return dataclasses.replace(config, hook_points=tuple(names))


def named_as_begun(source: Source, config: ExtractConfig, found: Ledger | None) -> Source:
    """Samples of a local dataset are named after its path: a run goes on under the path that it was begun with."""
    begun = found.run["description"].get("source") if found else None
    given = config.dataset
    if source.kind != "dataset" or given is None or begun in (None, given) or not Path(given).expanduser().exists():
        return source

    def samples() -> Iterator[Sample]:
        for sample in source.samples():
            rest = f":{sample.meta.get('split')}:{sample.meta.get('row')}"
            sample_id = f"{begun}{rest}" if sample.sample_id == f"{given}{rest}" else sample.sample_id
            meta = {**sample.meta, "dataset": begun} if sample.meta.get("dataset") == given else sample.meta
            yield dataclasses.replace(sample, sample_id=sample_id, meta=meta)

    return dataclasses.replace(source, samples=samples)


def fields_as_begun(source: Source, kept: Kept) -> Source:
    """Samples without the other fields of their rows, where the run was begun before these were kept."""
    if kept.fields or source.text_column is None:
        return source

    def samples() -> Iterator[Sample]:
        for sample in source.samples():
            meta = {name: value for name, value in sample.meta.items() if name not in FIELDS_KEPT}
            yield dataclasses.replace(sample, meta=meta)

    return dataclasses.replace(source, samples=samples)
