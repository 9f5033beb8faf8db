"""What the store needs of a place that keeps files.

In: nothing. Out: `Storage`: files by relative name, each either whole and durable or not there, and no name
ever taken twice. Everything above (ledger, writer, reader, upload) speaks to these verbs alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol

import google_crc32c
import numpy as np

from jax_extract.errors import UserError

Chunk = bytes | memoryview

BUCKET_SCHEME = "gs://"


class StorageFull(UserError):
    """The disk, a quota or a file-size limit stops the run; what is committed stays."""


class NameTaken(Exception):
    """Ours is not there and cannot be sent again: other content took the name, or the upload was lost or damaged.

    The part is to be written anew.
    """


class Entry(NamedTuple):
    """What a place says of a file. `crc32c` and `generation` are None where it keeps none."""

    size: int
    crc32c: int | None = None
    generation: int | None = None


@dataclass(frozen=True)
class Published:
    """Under which name a file is there, and its generation where the place counts them."""

    name: str
    generation: int | None = None


class PendingFile(Protocol):
    """A file being written. `size` and `crc32c` are those of everything written so far."""

    size: int
    crc32c: int

    def write(self, data: Chunk) -> int: ...

    def publish(self) -> Published:
        """Makes the content durable under its name.

        Where the name is taken by equal content, that is adopted; by other content, the file gets its own
        name instead. In a directory the name itself is durable only after `Storage.sync` of its folder.

        Raises:
          NameTaken: the content cannot be given another name any more; only of a bucket.
        """
        ...

    def discard(self) -> None:
        """Lets go of the file; what was published stays, the rest is gone."""
        ...


class Storage(Protocol):
    """Durable, create-only files under a root. `str()` is the place as the user wrote it; it can be pickled."""

    buffer_bytes: int
    """What one pending file may hold in memory."""

    def where(self, name: str) -> str:
        """The whole path of a name, for messages; UserError where the name leads out of the place."""
        ...

    def require_usable(self) -> None:
        """UserError where the place cannot be reached or written to."""
        ...

    def make(self, *folders: str) -> None:
        """Creates the place and these folders in it, where that means anything."""
        ...

    def require_plain(self, folder: str) -> None:
        """UserError where a folder is a link to somewhere else: a run's own folders are not."""
        ...

    def create(self, name: str, own: str) -> PendingFile:
        """A new file that becomes `name`, or `own` where other content has that name."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Creates a small durable file; FileExistsError where the name is taken."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Writes a durable file over whatever has the name; for what can be derived again."""
        ...

    def read(self, name: str, offset: int = 0, size: int | None = None, generation: int | None = None) -> bytes:
        """`size` bytes from `offset` (fewer at the end); FileNotFoundError where there is no such file."""
        ...

    def read_into(self, name: str, offset: int, buffer: memoryview, generation: int | None = None) -> int:
        """Fills the buffer from `offset`; returns how many bytes there were."""
        ...

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """Many small files, at once where that is faster; FileNotFoundError as `read`."""
        ...

    def exists(self, name: str) -> bool: ...

    def written_at(self, name: str) -> datetime | None:
        """When a file was written, as far as the place knows it."""
        ...

    def entries(self, folder: str = "") -> dict[str, Entry]:
        """The files that lie directly in a folder, by name, sorted; none where the folder is missing."""
        ...

    def names(self, folder: str = "") -> list[str]:
        """The names alone, which in a directory costs less."""
        ...

    def delete(self, name: str) -> None:
        """Removes a file, if it is there."""
        ...

    def sync(self, folder: str = "") -> None:
        """Makes the names in a folder durable."""
        ...

    def free_bytes(self) -> int | None:
        """Room that is left; None where there is no limit."""
        ...


_PLAIN = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)*", re.ASCII)


def checked_name(name: str, place: object) -> str:
    """A relative name with `/`; UserError where it leads out of the place, as only a tampered record has it."""
    if isinstance(name, str) and _PLAIN.fullmatch(name):
        return name
    pure = PurePosixPath(str(name))
    if pure.is_absolute() or ".." in pure.parts or "\0" in str(name):
        raise UserError(f"{name!r} leads out of {place}; the run's files were tampered with")
    return "" if str(pure) == "." else str(pure)


def crc32c(data: Chunk, value: int = 0) -> int:
    """CRC32C of data, continuing from `value`."""
    return google_crc32c.extend(value, np.frombuffer(data, np.uint8))
