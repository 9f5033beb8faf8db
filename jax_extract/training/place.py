"""Where a training is kept: what is there of it already, and that nobody else works there.

In: an output folder and the settings of what is asked for. Out: the newest whole checkpoint to go on from, or the end
of a training that is done, or nothing; UserError where what is there is another training's, or damaged.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_extract.errors import UserError
from jax_extract.store.folders import remove_unfinished
from jax_extract.training.checkpoints import (
    ANEW,
    FINAL_MODEL,
    TrainerState,
    checkpoint_folder,
    read_state,
    remove_training,
    require_free,
    saved_steps,
)

_LOCK_FILE = ".lock"


@dataclass(frozen=True)
class Found:
    """What is there. `is_final` where the training is done."""

    folder: Path
    state: TrainerState
    is_final: bool


@contextlib.contextmanager
def held(output: Path, overwrite: bool) -> Iterator[None]:
    """Inside, this process alone trains there; what killed ones have left unfinished is gone."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / _LOCK_FILE).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another training is writing to {output}; wait until it has ended, or give another --output_dir"
            ) from None
        require_free(output)
        remove_unfinished(output)
        if overwrite:
            remove_training(output)
        yield


def find(output: Path, settings: Mapping[str, Any], numerics: Mapping[str, Any] | None) -> Found | None:
    """What to go on from; `numerics` None where they may be others."""
    final = output / FINAL_MODEL
    steps = saved_steps(output)
    if final.exists():
        found = Found(final, read_state(final, f"remove {final} to make it again"), True)
    elif steps:
        folder = checkpoint_folder(output, steps[-1])
        before = f"from step {steps[-2]}" if len(steps) > 1 else "from the beginning"
        found = Found(folder, read_state(folder, f"remove {folder} to go on {before}"), False)
        if found.state.global_step != steps[-1]:
            raise UserError(
                f"{folder} is of step {found.state.global_step}; give it its own name back, or remove it to go on "
                f"{before}"
            )
    else:
        return None
    _require_same(output, found, settings)
    if not found.is_final and numerics is not None and (other := _first_other(found.state.numerics, numerics)):
        raise UserError(
            f"{found.folder} was computed with {other} {found.state.numerics.get(other)!s:.80} and here it is "
            f"{numerics.get(other)}, which changes the last bits; go on with --allow_numeric_change True "
            f"(ALLOW_NUMERIC_CHANGE=true), {ANEW}"
        )
    return found


def _require_same(output: Path, found: Found, settings: Mapping[str, Any]) -> None:
    before = found.state.settings
    if (other := _first_other(before, settings)) is None:
        return
    if other == "model_config":
        said, asked = before[other], settings[other]
        inner = _first_other(said, asked)
        what = f"a model with {inner} {said.get(inner)!r}, and {asked.get(inner)!r} was asked for"
    elif other == "dataset":
        what = "a training on other data than the dataset holds"
    else:
        what = f"a training with {other} {before.get(other)!r}, and {settings.get(other)!r} was asked for"
    raise UserError(f"{output} holds {what}; give another --output_dir (RUN_NAME or OUTPUT_DIR), {ANEW}")


def _first_other(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first key under which the two differ."""
    return next((key for key in {**other, **one} if one.get(key) != other.get(key)), None)
