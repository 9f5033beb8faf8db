"""Whole folders: there with every byte durable, or not there.

In: what writes files into a folder. Out: the folder under its name. It is filled under another name and renamed when
all of it is on the disk, so that a kill leaves a folder that does not count and that the next attempt removes.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from jax_extract.store.storage.failpoints import step

_UNFINISHED = ".unfinished-"


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Makes `target`, filled by `fill`; OSError where a folder with files has that name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(target)
    unfinished.mkdir()
    try:
        with step("folder.fill"):
            fill(unfinished)
        for folder, _, files in os.walk(unfinished):
            for name in files:
                _sync(Path(folder, name))
            _sync(Path(folder))
        with step("folder.rename"):
            unfinished.rename(target)  # over an empty folder too
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _sync(target.parent)


def write_file(target: Path, fill: Callable[[Path], None], before_rename: Callable[[], None] | None = None) -> None:
    """Makes or replaces one file, filled by `fill`; `before_rename` is called when all of it is on the disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(target)
    try:
        fill(unfinished)
        _sync(unfinished)
        if before_rename is not None:
            before_rename()
        unfinished.rename(target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync(target.parent)


def remove_folder(target: Path) -> None:
    """Removes a folder; killed in between, what is left of it does not count."""
    unfinished = _unfinished(target)
    target.rename(unfinished)
    shutil.rmtree(unfinished)


def remove_unfinished(parent: Path) -> None:
    """Removes what killed attempts have left in a folder; only where nobody else writes."""
    for path in parent.glob(f"{_UNFINISHED}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _unfinished(target: Path) -> Path:
    return target.parent / f"{_UNFINISHED}{target.name}-{uuid.uuid4().hex[:12]}"


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
