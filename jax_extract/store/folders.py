"""Whole folders: there with every byte durable, or not there.

In: what writes files into a folder. Out: the folder under its name. It is filled under another name and renamed when
all of it is on the disk, so that a kill leaves a folder that does not count and that the next attempt at the same
target removes. The same for one file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from jax_extract.errors import UserError
from jax_extract.store.storage.failpoints import step

_UNFINISHED = ".unfinished-"
_DIGITS = 12  # at the end of such a name, an attempt's own


def require_usable(folder: Path, flag: str) -> None:
    """UserError where no folder can be made, or nothing can be made in it."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise UserError(f"{flag} {folder} cannot be used: {nearest} is no folder; name another directory")
    try:
        with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=nearest):
            pass
    except OSError as error:
        raise UserError(
            f"{flag} {folder} cannot be written to ({error.strerror}); name another, or change its permissions"
        ) from None


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Makes `target`, filled by `fill`; UserError where that cannot be, as where a folder with files has that name."""
    with _whole(target, Path.mkdir) as unfinished:
        with step("folder.fill"):
            fill(unfinished)
        for folder, _, files in os.walk(unfinished):
            for name in files:
                _sync(Path(folder, name))
            _sync(Path(folder))
        with step("folder.rename"):
            unfinished.rename(target)  # over an empty folder too


def write_file(target: Path, fill: Callable[[Path], None], before_rename: Callable[[], None] | None = None) -> None:
    """Makes or replaces one file, filled by `fill`; `before_rename` is called when all of it is on the disk.

    Raises:
      UserError: it cannot be written; what had the name before is as it was.
    """
    with _whole(target, Path.touch) as unfinished:
        fill(unfinished)
        _sync(unfinished)
        if before_rename is not None:
            before_rename()
        unfinished.rename(target)


@contextlib.contextmanager
def _whole(target: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A name to write under, held while inside; before, what killed attempts at this target have left is removed."""
    unfinished = _unfinished(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.iterdir():
            if left.name[:-_DIGITS] == unfinished.name[:-_DIGITS]:
                with _held(left) as nobody_writes:
                    if nobody_writes:
                        _remove(left)
        make(unfinished)
        with _held(unfinished):
            yield unfinished
        _sync(target.parent)
    except BaseException as error:
        _remove(unfinished)
        if isinstance(error, OSError):
            raise UserError(
                f"{target} cannot be written ({error.strerror or error}); what is whole stays: mend that, such as a "
                "full disk, and run the same command again"
            ) from None
        raise


@contextlib.contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Whether nobody else holds it; then it is held while inside. The end of a process ends its hold."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # somebody holds it, or the file system knows no holding
            yield False
        else:
            yield True
    finally:
        os.close(fd)


def remove_folder(target: Path) -> None:
    """Removes a folder; killed in between, what is left of it does not count."""
    unfinished = _unfinished(target)
    target.rename(unfinished)
    shutil.rmtree(unfinished)


def remove_unfinished(parent: Path) -> None:
    """Removes what killed attempts have left in a folder; only where nobody else writes."""
    for path in parent.glob(f"{_UNFINISHED}*"):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _unfinished(target: Path) -> Path:
    return target.parent / f"{_UNFINISHED}{target.name}-{uuid.uuid4().hex[:_DIGITS]}"


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
