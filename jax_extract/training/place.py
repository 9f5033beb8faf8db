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
    HERE,
    STATE_FILE,
    Kind,
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
def held(kind: Kind, output: Path, overwrite: bool) -> Iterator[None]:
    """Inside, this process alone trains there; what killed ones have left unfinished is gone."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / _LOCK_FILE).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another training is writing to {output}; wait until it has ended, or give another --output_dir"
            ) from None
        require_free(kind, output)
        remove_unfinished(output)
        if overwrite:
            remove_training(kind, output)
        yield


def find(kind: Kind, output: Path, settings: Mapping[str, Any], numerics: Mapping[str, Any] | None) -> Found | None:
    """What to go on from; `numerics` None where they may be others."""
    final = output / kind.final
    steps = saved_steps(output)
    if (final / STATE_FILE if kind.final == HERE else final).exists():
        found = Found(final, read_state(kind, final, f"remove {final} to make it again"), True)
    elif steps:
        folder = checkpoint_folder(output, steps[-1])
        before = f"from step {steps[-2]}" if len(steps) > 1 else "from the beginning"
        found = Found(folder, read_state(kind, folder, f"remove {folder} to go on {before}"), False)
        if found.state.global_step != steps[-1]:
            raise UserError(
                f"{folder} is of step {found.state.global_step}; give it its own name back, or remove it to go on "
                f"{before}"
            )
    else:
        return None
    _require_same(kind, output, found, settings)
    if not found.is_final and numerics is not None and (other := first_other(found.state.numerics, numerics)):
        raise UserError(
            f"{found.folder} was computed with {other} {found.state.numerics.get(other)!s:.80} and here it is "
            f"{numerics.get(other)}, which changes the last bits; {kind.nevertheless}, "
            f"{kind.anew}"
        )
    return found


def _require_same(kind: Kind, output: Path, found: Found, settings: Mapping[str, Any]) -> None:
    before = found.state.settings
    if (other := first_other(before, settings)) is None:
        return
    what = kind.other(other, before.get(other), settings.get(other))
    raise UserError(f"{output} holds {what}; {kind.elsewhere}, {kind.anew}")


def first_other(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first key under which the two differ."""
    return next((key for key in {**other, **one} if one.get(key) != other.get(key)), None)
