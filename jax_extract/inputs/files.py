"""Files as people keep them: plain, or compressed with gzip, Zstandard, bzip2 or xz, read as a stream.

In: a path, or a file that is open already. Out: its bytes or its lines, decompressed on the way; what is damaged,
broken off or no UTF-8 is a UserError with its place. Nothing is held but what was asked for.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePath
from typing import IO, Any, cast

from jax_extract.errors import UserError

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
LONGEST_LINE = 1 << 28  # bytes; a small archive could otherwise hold a line that no memory does
LARGEST_WHOLE = 1 << 31  # bytes of what is decompressed into memory at once
_PIECE = 1 << 20  # bytes

Opened = Callable[[], IO[bytes]]


def kind_and_stem(path: PurePath) -> tuple[str, str]:
    """(".jsonl", "tasks") of tasks.jsonl as of tasks.JSONL.gz; ("", …) without an ending."""
    plain = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return plain.suffix.lower(), plain.stem


@contextlib.contextmanager
def open_bytes(name: str, opened: Opened) -> Iterator[IO[bytes]]:
    """What a file holds, decompressed as its name says.

    Args:
      name: path or URL; begins the errors.
      opened: opens it for reading.

    Raises:
      UserError: also while reading, where the compressed data are damaged or broken off.
    """
    ending = PurePath(name).suffix.lower()
    try:
        with opened() as file, _decompressed(file, ending) as plain:
            yield plain
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(_damaged(name, ending, error)) from error
    except OSError as error:
        # bz2 and pyarrow raise a bare OSError without a number; those of networks and disks are others.
        if ending in COMPRESSIONS and type(error) is OSError and error.errno is None:
            raise UserError(_damaged(name, ending, error)) from error
        raise


def local(path: Path) -> contextlib.AbstractContextManager[IO[bytes]]:
    """`open_bytes` of a file here, where whatever the system says becomes a UserError too."""
    return _told(path)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[IO[bytes]]:
    try:
        with open_bytes(str(path), partial(path.open, "rb")) as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def whole_text(path: Path) -> str:
    """All of a local file as text.

    Raises:
      UserError: it cannot be read, is not UTF-8, or is too large to be held.
    """
    with local(path) as file:
        content = file.read(LARGEST_WHOLE + 1)
    if len(content) > LARGEST_WHOLE:
        raise UserError(
            f"{path} holds more than {LARGEST_WHOLE >> 30} GiB in one piece: give one object a line (.jsonl)."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error


def byte_lines(name: str, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """All lines with their numbers from 1, line ends included; UserError on reaching one that no memory should hold."""
    # Only "\n" ends a line: JSON strings may hold U+2028, which `str.splitlines` would cut at.
    for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), start=1):
        if len(line) > LONGEST_LINE:
            raise UserError(
                f"{name}, line {number}, is longer than {LONGEST_LINE >> 20} MiB: cut it, or mend the file."
            )
        yield number, line


def decoded(name: str, number: int, line: bytes) -> str:
    """A line of `byte_lines` as text; UserError where it is not UTF-8."""
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}, line {number}, byte {error.start}, is not UTF-8: save the file as UTF-8.") from error


def lines(name: str, file: IO[bytes]) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1, without their line ends.

    Raises:
      UserError: on reaching a line that is not UTF-8, or longer than any text.
    """
    for number, raw in byte_lines(name, file):
        if (line := decoded(name, number, raw)).strip():
            yield number, line.removesuffix("\n").removesuffix("\r")


def _decompressed(file: IO[bytes], ending: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    if ending == ".gz":
        return _closing(gzip.GzipFile(fileobj=file))
    if ending == ".xz":
        return _closing(lzma.LZMAFile(file))
    if ending == ".bz2":
        import bz2  # with zlib and lzma a module that some builds of Python lack

        return _closing(bz2.BZ2File(file))
    if ending == ".zst":
        import pyarrow as pa  # comes with `datasets`; Python itself reads Zstandard from 3.14 on

        return _closing(io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"), _PIECE))
    if isinstance(file, io.BufferedReader):
        return contextlib.nullcontext(file)
    # Files of the hub read whole blocks anew for every line.
    return _closing(io.BufferedReader(cast(Any, file), _PIECE))


def _closing(stream: Any) -> contextlib.AbstractContextManager[IO[bytes]]:
    return contextlib.closing(stream)


def _damaged(name: str, ending: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"{name} is damaged, broken off or not compressed as its ending {ending} says ({reason}): fetch it again."
