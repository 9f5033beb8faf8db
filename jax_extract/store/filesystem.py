"""Durable, create-only files in a local directory.

In: names and bytes. Out: files that are either whole and on the disk, or not there. A file is written
without a name where the system allows it and linked to its name when complete, so a killed run leaves
nothing half-written behind and no name is ever taken twice. An object store can stand behind the same
few verbs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import google_crc32c
import numpy as np

from jax_extract.errors import UserError

Chunk = bytes | memoryview

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_UNNAMED_FILES = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.EACCES, errno.EPERM}
_BUFFER = 1 << 20
_OTHER_FILES = 64  # what the libraries and the compiler keep open besides shards


class StorageFull(UserError):
    """The disk, a quota or a file-size limit stops the run; what is committed stays."""


def require_open_files(sites: int) -> None:
    """Makes room for one open file a site; UserError where the system does not allow it."""
    needed = sites + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        if allowed < needed:
            raise UserError(
                f"{sites} files are written at once and only {hard} may be open; raise the limit (ulimit -n {needed}), "
                "or ask for fewer layers or hook points"
            )


def crc32c(data: Chunk, value: int = 0) -> int:
    """CRC32C of data, continuing from `value`."""
    return google_crc32c.extend(value, np.frombuffer(data, np.uint8))


class Directory:
    """A local directory of durable files; names are relative and use `/`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def require_usable(self) -> None:
        """UserError where the directory, or what it would be made in, cannot be written to."""
        root = self.root.absolute()
        nearest = next(path for path in (root, *root.parents) if path.exists())
        if not nearest.is_dir():
            raise UserError(f"directory {self.root} cannot be used: {nearest} is a file; name another directory")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"directory {self.root} cannot be written to; name another, or change its permissions")

    def make(self, *folders: str) -> None:
        """Creates the directory and these folders in it."""
        for folder in ("", *folders):
            try:
                self.path(folder).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"directory {self.path(folder)} cannot be made: {error.strerror}") from None

    def path(self, name: str) -> Path:
        """The path of a name; refuses names that lead out of the directory."""
        pure = PurePosixPath(str(name))
        if pure.is_absolute() or ".." in pure.parts:
            raise UserError(f"{name!r} leads out of {self.root}; the run's files were tampered with")
        return self.root / pure

    def create(self) -> PendingFile:
        """A new file without a name; give it one with `publish`."""
        return PendingFile(self)

    def write(self, name: str, data: bytes) -> None:
        """Creates a small durable file; FileExistsError where the name is taken."""
        with self.create() as file:
            file.write(data)
            file.publish(name)
        self.sync(str(PurePosixPath(name).parent))

    def replace(self, name: str, data: bytes) -> None:
        """Writes a durable file over whatever has the name; for what can be derived again."""
        with self.create() as file:
            file.write(data)
            temporary = f"{name}.{uuid.uuid4().hex}"
            file.publish(temporary)
        with self.trouble_is_told():
            self.path(temporary).replace(self.path(name))
        self.sync(str(PurePosixPath(name).parent))

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """`size` bytes from `offset` (fewer at the end of the file)."""
        with self.path(name).open("rb") as file:
            file.seek(offset)
            return file.read() if size is None else file.read(size)

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    def size(self, name: str) -> int:
        return self.path(name).stat().st_size

    def names(self, folder: str = "") -> list[str]:
        """Names of the files in a folder, sorted; none where the folder is missing."""
        path = self.path(folder)
        return sorted(entry.name for entry in path.iterdir() if entry.is_file()) if path.is_dir() else []

    def sync(self, folder: str = "") -> None:
        """Makes the names in a folder durable."""
        with self.trouble_is_told():
            fd = os.open(self.path(folder), os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    @contextlib.contextmanager
    def trouble_is_told(self) -> Iterator[None]:
        """Turns what the system says about writing here into one sentence; a taken name passes through."""
        try:
            yield
        except FileExistsError:
            raise
        except OSError as error:
            safe = "what is committed is safe"
            if error.errno in _NO_SPACE:
                raise StorageFull(
                    f"no space left for {self.root} ({error.strerror}); {safe}: free some space and run the same "
                    "command again to go on"
                ) from None
            raise UserError(
                f"{self.root} cannot be written ({error.strerror}); {safe}: mend that and run the same command again"
            ) from None

    def free_bytes(self) -> int:
        root = self.root.absolute()
        stat = os.statvfs(next(path for path in (root, *root.parents) if path.exists()))
        return stat.f_bavail * stat.f_frsize


class PendingFile:
    """A file being written. `size` and `crc32c` are those of everything written so far."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._temporary: Path | None = None
        self.size = 0
        self.crc32c = 0
        with directory.trouble_is_told():
            self._file = os.fdopen(self._open(directory.root), "wb", buffering=_BUFFER)

    def _open(self, root: Path) -> int:
        try:
            return os.open(root, os.O_TMPFILE | os.O_WRONLY, 0o644)
        except (OSError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_UNNAMED_FILES:
                raise
        self._temporary = root / f".writing-{uuid.uuid4().hex}"
        return os.open(self._temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)

    def __enter__(self) -> PendingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def write(self, data: Chunk) -> int:
        with self._directory.trouble_is_told():
            self._file.write(data)
        self.crc32c = crc32c(data, self.crc32c)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing: file-like callers flush more often than is good; `publish` makes everything durable."""

    def publish(self, name: str) -> None:
        """Makes the content durable and gives it its name; FileExistsError where the name is taken.

        The name itself is durable only after `Directory.sync` of its folder.
        """
        target = self._directory.path(name)
        with self._directory.trouble_is_told():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._link(target)

    def _link(self, target: Path) -> None:
        if self._temporary is None:
            root = os.open(self._directory.root, os.O_RDONLY | os.O_DIRECTORY)
            try:
                # Only linkat follows the /proc link, and only a directory descriptor makes Python call it.
                os.link(f"/proc/self/fd/{self._file.fileno()}", target, src_dir_fd=root, follow_symlinks=True)
            finally:
                os.close(root)
        else:
            os.link(self._temporary, target)

    def discard(self) -> None:
        """Closes the file; what was published stays, the rest is gone."""
        with contextlib.suppress(OSError):  # flushing what nobody will read may fail on a full disk
            self._file.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
