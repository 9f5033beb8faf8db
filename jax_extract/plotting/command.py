"""`jax-extract plot`: pictures of a run, of a training or of a sweep of SAEs, as PNG and SVG.

In: a place, what is wanted of it. Out: files in a folder, and a line for each.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jax_extract.errors import UserError, user_path
from jax_extract.plotting.config import PlotConfig
from jax_extract.store.folders import require_usable
from jax_extract.store.ledger import RUN_FILE
from jax_extract.store.reader import open_activations
from jax_extract.store.storage.verbs import BUCKET_SCHEME
from jax_extract.terminal import Terminal

if TYPE_CHECKING:
    from jax_extract.plotting.pictures import Drawn, LeftOut

_FOLDER = "plots"


def plot(config: PlotConfig, terminal: Terminal | None = None) -> list[Path]:
    """Writes the pictures; returns the files.

    Raises:
      UserError: matplotlib is not installed; the place is none of these; what was asked for cannot be drawn.
    """
    config.check()
    terminal = terminal or Terminal()
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("pictures are drawn by matplotlib, which is not installed: pip install 'jax_extract[plots]'")
    output = _output(config)
    written: list[Path] = []
    for each in _pictures(config, terminal):
        written += _write(each, output, terminal)
    if not written:
        raise UserError(f"there is nothing to draw in {config.place}")
    return written


def _pictures(config: PlotConfig, terminal: Terminal) -> Iterator[Drawn | LeftOut]:
    from jax_extract.plotting import of_run, of_saes, of_training

    if config.place.startswith(BUCKET_SCHEME):
        _require(config, of_run.PICTURES, "a run")
        return of_run.RunPictures(open_activations(config.place), config, terminal).draw()
    folder = user_path(config.place, "PLACE")
    if (folder / RUN_FILE).is_file():
        _require(config, of_run.PICTURES, "a run")
        return of_run.RunPictures(open_activations(folder), config, terminal).draw()
    if of_saes.SaePictures.holds(folder):
        _require(config, of_saes.PICTURES, "a sweep of sparse autoencoders")
        return of_saes.SaePictures(folder, config).draw()
    if (place := of_training.StagePlace.find(folder)) is not None:
        _require(config, of_training.PICTURES, "a training")
        return of_training.StagePictures(place, config).draw()
    raise UserError(
        f"{config.place!r} holds no run, no training, no sparse autoencoders and no token representations; give what "
        "--activations_dir, --output_dir or --representation_dir named"
    )


def _require(config: PlotConfig, known: tuple[str, ...], what: str) -> None:
    for picture in config.pictures or ():
        if picture not in known:
            raise UserError(f"--pictures {picture} is not of {what}; {config.place} is one, with: {', '.join(known)}")


def _output(config: PlotConfig) -> Path:
    if config.output_dir is None and config.place.startswith(BUCKET_SCHEME):
        raise UserError("a bucket takes no pictures; name a folder for them with --output_dir")
    flag = "--output_dir" if config.output_dir is not None else "PLACE"
    folder = user_path(config.output_dir or str(Path(config.place) / _FOLDER), flag)
    require_usable(folder, flag)
    return folder


def _write(drawn: Drawn | LeftOut, output: Path, terminal: Terminal) -> list[Path]:
    from jax_extract.plotting.pictures import LeftOut
    from jax_extract.plotting.style import save_picture

    if isinstance(drawn, LeftOut):
        terminal.line("left out", f"{drawn.picture}: {drawn.why}")
        return []
    output.mkdir(parents=True, exist_ok=True)
    files = save_picture(drawn.figure, output / drawn.name)
    terminal.line("picture", f"{files[0]} and {files[1].name}")
    return files
