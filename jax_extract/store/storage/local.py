"""Durable, create-only files in a local directory.

In: names and bytes. Out: files that are either whole and on the disk, or not there. A file is written
without a name where the system allows it and linked to its name when complete, so a killed run leaves
nothing half-written behind and no name is ever taken twice. Large files pass the page cache by where
the system allows it: they will not be read soon, and the processor has better things to do than copy.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import mmap
import os
import resource
import threading
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jax_extract.errors import UserError
from jax_extract.store.storage.failpoints import step
from jax_extract.store.storage.verbs import Chunk, Entry, Published, StorageFull, checked_name, crc32c

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_UNNAMED_FILES = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.EACCES, errno.EPERM}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_BUFFER = 4 << 20  # a multiple of every disk's block; few enough calls to keep a fast disk busy
_BLOCK = 4_096  # of every disk: addresses and sizes of direct writes are multiples
_WORTH_A_CALL = 1 << 20  # the end of a file is written directly too if there is so much of it
_HUGE_PAGE = 2 << 20
_READ = 4 << 20
# The disk serves all that are in its queue at one pace. With every lane in it, all would come back at the same
# time and the disk would be idle while they fill their next buffers.
_WRITES_AT_ONCE = 6
_OTHER_FILES = 64  # what the libraries and the compiler keep open besides shards


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


class Directory:
    """A local directory as a `Storage`."""

    buffer_bytes = _BUFFER

    def __init__(self, root: Path) -> None:
        self.root = root
        self.writing = threading.BoundedSemaphore(_WRITES_AT_ONCE)
        self._idle: list[np.ndarray] = []  # buffers of files that are done with: the first touch of a page is dear

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.root,)

    def __str__(self) -> str:
        return str(self.root)

    def where(self, name: str) -> str:
        return str(self.path(name))

    def path(self, name: str) -> Path:
        """The path of a name; refuses names that lead out of the directory."""
        return self.root / checked_name(name, self)

    def require_usable(self) -> None:
        root = self.root.absolute()
        nearest = next(path for path in (root, *root.parents) if path.exists())
        if not nearest.is_dir():
            raise UserError(f"directory {self.root} cannot be used: {nearest} is a file; name another directory")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"directory {self.root} cannot be written to; name another, or change its permissions")

    def make(self, *folders: str) -> None:
        for folder in ("", *folders):
            path = self.path(folder)
            missing = list(itertools.takewhile(lambda each: not each.exists(), (path, *path.parents)))
            try:
                path.mkdir(parents=True, exist_ok=True)
                for new in missing:  # a folder whose own name is lost in a power cut takes its files with it
                    _sync_folder(new.parent)
            except OSError as error:
                raise UserError(f"directory {path} cannot be made: {error.strerror}") from None

    def require_plain(self, folder: str) -> None:
        if self.path(folder).is_symlink():
            raise UserError(f"{self.path(folder)} is a link; a run's own folders are not: remove the link first")

    def create(self, name: str, own: str) -> LocalFile:
        return LocalFile(self, name, own)

    def write(self, name: str, data: bytes) -> None:
        with contextlib.closing(LocalFile(self, name)) as file:
            file.write(data)
            file.link(name)
        self.sync(str(PurePosixPath(name).parent))

    def replace(self, name: str, data: bytes) -> None:
        temporary = f"{name}.{uuid.uuid4().hex}"
        with contextlib.closing(LocalFile(self, temporary)) as file:
            file.write(data)
            file.link(temporary)
        with self.trouble_is_told(), step("local.replace"):
            self.path(temporary).replace(self.path(name))
        self.sync(str(PurePosixPath(name).parent))

    def read(self, name: str, offset: int = 0, size: int | None = None, generation: int | None = None) -> bytes:
        with self.path(name).open("rb") as file:
            file.seek(offset)
            return file.read() if size is None else file.read(size)

    def read_into(self, name: str, offset: int, buffer: memoryview, generation: int | None = None) -> int:
        got = 0
        with self.path(name).open("rb", buffering=0) as file:
            file.seek(offset)
            while got < len(buffer) and (n := file.readinto(buffer[got:])):
                got += n
        return got

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        root, read = str(self.root), {}
        for name in names:  # without an object for each path: there may be a hundred thousand
            with open(os.path.join(root, checked_name(name, self)), "rb", buffering=0) as file:  # noqa: PTH118
                read[name] = file.readall()
        return read

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    def written_at(self, name: str) -> datetime | None:
        path = self.path(name)
        return datetime.fromtimestamp(path.stat().st_mtime, UTC) if path.exists() else None

    def entries(self, folder: str = "") -> dict[str, Entry]:
        path = self.path(folder)
        if not path.is_dir():
            return {}
        sizes: dict[str, Entry] = {}
        with os.scandir(path) as found:
            for file in found:
                try:
                    if file.is_file():
                        sizes[file.name] = Entry(file.stat().st_size)
                except FileNotFoundError:  # gone since it was listed, as temporary files are
                    continue
        return {name: sizes[name] for name in sorted(sizes)}

    def names(self, folder: str = "") -> list[str]:
        path = self.path(folder)
        if not path.is_dir():
            return []
        with os.scandir(path) as found:
            return sorted(file.name for file in found if file.is_file())

    def delete(self, name: str) -> None:
        with self.trouble_is_told(), step("local.delete"):
            self.path(name).unlink(missing_ok=True)

    def sync(self, folder: str = "") -> None:
        with self.trouble_is_told(), step("local.sync_folder"):
            _sync_folder(self.path(folder))

    def lend_buffer(self) -> np.ndarray:
        """uint8 [_BUFFER] to gather in what is written next; to be given back with `take_back`."""
        try:
            return self._idle.pop()
        except IndexError:
            return _new_buffer()

    def take_back(self, buffer: np.ndarray) -> None:
        self._idle.append(buffer)

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

    def free_bytes(self) -> int | None:
        root = self.root.absolute()
        stat = os.statvfs(next(path for path in (root, *root.parents) if path.exists()))
        # A file system without blocks, as /proc and some network ones, does not tell; its first write does.
        return stat.f_bavail * stat.f_frsize if stat.f_blocks else None


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _new_buffer() -> np.ndarray:
    """uint8 [_BUFFER] in huge pages where there are any: the disk takes a few large pieces faster than many pages."""
    memory = mmap.mmap(-1, _BUFFER + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % _HUGE_PAGE
    return whole[start : start + _BUFFER]


class LocalFile:
    """A file being written in a `Directory`; a `PendingFile`."""

    def __init__(self, directory: Directory, name: str, own: str | None = None) -> None:
        self._directory = directory
        self._name = name
        self._own = own
        self._temporary: Path | None = None
        self._fd = -1
        self._direct = False
        self._buffer: np.ndarray | None = None
        self._filled = 0
        self.size = 0
        self.crc32c = 0
        with directory.trouble_is_told(), step("local.create"):
            self._fd = self._open(directory.root)

    def _open(self, root: Path) -> int:
        try:
            return os.open(root, os.O_TMPFILE | os.O_RDWR, 0o644)
        except (OSError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_UNNAMED_FILES:
                raise
        self._temporary = root / f".writing-{uuid.uuid4().hex}"
        return os.open(self._temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)

    def write(self, data: Chunk) -> int:
        rest = np.frombuffer(data, np.uint8)
        if self._buffer is None:
            self._buffer = self._directory.lend_buffer()
        while len(rest):
            piece = rest[: _BUFFER - self._filled]
            self._buffer[self._filled : self._filled + len(piece)] = piece  # other threads go on meanwhile
            self._filled += len(piece)
            rest = rest[len(piece) :]
            if self._filled == _BUFFER:
                self._drain(_BUFFER, direct=True)
        self.crc32c = crc32c(data, self.crc32c)
        self.size += len(data)
        return len(data)

    def publish(self) -> Published:
        assert self._own is not None
        for name in (self._name, self._own):
            try:
                self.link(name)
            except FileExistsError:
                if not self._is_in(name):
                    continue
            return Published(name)
        raise FileExistsError(self._own)

    def link(self, name: str) -> None:
        """Makes the content durable and gives it this name; FileExistsError where the name is taken."""
        target = self._directory.path(name)
        with self._directory.trouble_is_told():
            if self._filled >= _WORTH_A_CALL:
                self._drain(self._filled // _BLOCK * _BLOCK, direct=True)
            if self._filled:
                self._drain(self._filled, direct=False)
            with step("local.fsync"):
                os.fsync(self._fd)
            with step("local.link"):
                try:
                    self._link(target)
                except OSError as error:
                    if error.errno in _NO_LINKS:
                        raise UserError(
                            f"{self._directory.root} is on a file system without hard links ({error.strerror}), which "
                            "keep a name from being taken twice; write to another one, or to a bucket"
                        ) from None
                    raise

    def discard(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._buffer is not None:
            self._directory.take_back(self._buffer)
            self._buffer = None
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)

    close = discard

    def _drain(self, size: int, direct: bool) -> None:
        """Writes the first `size` bytes that wait; directly only whole blocks."""
        with self._directory.trouble_is_told(), step("local.write"):
            assert self._buffer is not None
            self._pass_page_cache_by(direct)
            view = self._buffer[:size].data
            done = 0
            with self._directory.writing:
                while done < len(view):
                    done += self._write_some(view[done:])
            left = self._filled - size
            self._buffer[:left] = self._buffer[size : self._filled].copy()
        self._filled = left

    def _write_some(self, rest: memoryview) -> int:
        try:
            return os.write(self._fd, rest)
        except OSError as error:
            if not (self._direct and error.errno == errno.EINVAL):
                raise
        self._pass_page_cache_by(False)  # a file system that promises it and then wants other alignment
        return os.write(self._fd, rest)

    def _pass_page_cache_by(self, wanted: bool) -> None:
        if wanted == self._direct or not hasattr(os, "O_DIRECT"):
            return
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
        except OSError:  # a file system that cannot; the page cache serves
            return
        self._direct = wanted

    def _link(self, target: Path) -> None:
        if self._temporary is None:
            root = os.open(self._directory.root, os.O_RDONLY | os.O_DIRECTORY)
            try:
                # Only linkat follows the /proc link, and only a directory descriptor makes Python call it.
                os.link(f"/proc/self/fd/{self._fd}", target, src_dir_fd=root, follow_symlinks=True)
            finally:
                os.close(root)
        else:
            os.link(self._temporary, target)

    def _is_in(self, name: str) -> bool:
        """Whether the file that has the name already holds the same bytes."""
        value = 0
        with self._directory.path(name).open("rb") as existing:
            if os.fstat(existing.fileno()).st_size != self.size:
                return False
            while chunk := existing.read(_READ):
                value = crc32c(chunk, value)
        return value == self.crc32c
