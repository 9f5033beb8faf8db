"""Sparse autoencoders in a notebook: what `jax-extract sae train` does, as a function.

In: a run, an array or the path of either, and the options of the command. Out: the trained SAEs, by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jax_extract.errors import UserError
from jax_extract.sae.autoencoder import SparseAutoencoder
from jax_extract.sae.command import InMemory, sae_train
from jax_extract.sae.config import SaeTrainConfig
from jax_extract.store.reader import Run
from jax_extract.terminal import Terminal
from models.nearest import nearest


def train_saes(
    activations: str | Path | InMemory, output_dir: str | Path, *, silent: bool = False, **options: Any
) -> dict[str, SparseAutoencoder]:
    """Trains sparse autoencoders, or goes on where an earlier call ended.

    Args:
      activations: a run, or the path of one; rows [rows, width] or [rows, layers, width], or a file of them; or an
        iterable of batches of such rows, arrays or tensors, with `training_rows`. A second call with the same rows
        goes on.
      output_dir: where each SAE gets a folder.
      silent: tell nothing on the terminal.
      options: those of `jax-extract sae train`, one value or several: `k=32`, `k=[16, 32]`, `architecture="topk"`.

    Returns:
      Every SAE by its name, baselines too.

    Raises:
      UserError: anything that can be mended; no checkpoint is lost.
    """
    held = None if isinstance(activations, str | Path) else activations
    said = str(activations) if held is None else "in memory"
    if held is not None and not isinstance(held, Run | Iterable):
        raise UserError(f"{activations!r:.60} is no run, array of rows or iterable of such; give one, or a path")
    config = SaeTrainConfig(said, str(output_dir), **_as_flags(options))
    summary = sae_train(config, Terminal(silent=silent), held)
    return {sae["name"]: SparseAutoencoder.open(Path(output_dir) / sae["name"]) for sae in summary["saes"]}


def _as_flags(options: dict[str, Any]) -> dict[str, Any]:
    """Options as the command has them; UserError that names one that there is not."""
    fields = {field.name: field for field in dataclasses.fields(SaeTrainConfig)}
    found = {}
    for name, value in options.items():
        if name not in fields:
            near = nearest(name, list(fields))
            raise UserError(f"there is no option {name!r}" + (f"; did you mean {near!r}?" if near else ""))
        if name == "layers" and value is not None:
            several = value if isinstance(value, list | tuple | range) else [value]
            found[name] = ",".join(map(str, several))
        elif isinstance(fields[name].default, tuple) or name == "d_sae":
            found[name] = value if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
        else:
            found[name] = value
    return found
