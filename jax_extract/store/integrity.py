"""Whether the bytes of a part are still those that were committed.

In: a commit record, and the place where its files lie. Out: its sidecar, and a `Flaw` for every file that does not
match its checksums: the record's over the whole file, the sidecar's over each block of its array. Files are read in
pieces.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import ml_dtypes
import numpy as np

from jax_extract.errors import UserError, damage_is_told
from jax_extract.store.ledger import Key, Ledger, Record
from jax_extract.store.sidecar import BLOCK_BYTES, BlockChecksums, Sidecar, StoredArray
from jax_extract.store.storage.verbs import Entry, Storage, crc32c
from jax_extract.store.survey import entries_of, wrong_with
from jax_extract.store.writer import lanes_for

NAMED = 20  # how many of a kind are named; the rest are counted

_CHUNK = 8 << 20  # bytes of a file that are in memory at once, in each of a few threads
_MANY = 1 << 20  # parts, of which as many are read at once as the place takes

Advance = Callable[[int], object]  # of bytes that were read


@dataclass(frozen=True)
class Flaw:
    """What is wrong with a file.

    Attributes:
      says: a sentence that names it.
      certain: False where it could not be read at all, which may pass.
    """

    says: str
    certain: bool = True


def dtype_of(ledger: Ledger) -> np.dtype:
    """Of the stored values, as NumPy has it."""
    with damage_is_told(f"the run in {ledger.storage}", "restore its _run folder from a copy"):
        stored = ledger.run["identity"]["capture_dtype"]
        return np.dtype(ml_dtypes.bfloat16 if stored == "bfloat16" else stored)


def flawed_parts(ledger: Ledger, records: Mapping[Key, Record], advance: Advance) -> dict[Key, list[Flaw]]:
    """Reads every file of these parts that is in the ledger's place; what is wrong, of those that have a flaw."""
    entries, itemsize = entries_of(ledger.storage), dtype_of(ledger).itemsize
    lock = threading.Lock()

    def read(count: int) -> None:
        with lock:
            advance(count)

    def check(record: Record) -> list[Flaw]:
        flaws = list(_flaws(record, ledger.storage, entries, itemsize, read))
        # Once more: what was damaged on its way here is whole where it lies, and what is given up is gone.
        return flaws and list(_flaws(record, ledger.storage, entries, itemsize, lambda _: None))

    with ThreadPoolExecutor(lanes_for(str(ledger.storage), _MANY)) as pool:
        found = dict(zip(records, pool.map(check, records.values()), strict=True))
    return {key: flaws for key, flaws in found.items() if flaws}


def _flaws(
    record: Record, storage: Storage, entries: Mapping[str, Entry], itemsize: int, advance: Advance
) -> Iterator[Flaw]:
    sidecar, flaw = read_sidecar(record, storage, entries, advance)
    if flaw:
        yield flaw
    arrays = sidecar.arrays if sidecar else ()
    if sidecar and sorted(array.path for array in arrays) != sorted(file["path"] for file in record["files"]):
        yield Flaw(f"sidecar {record['sidecar']['path']} and its record name different files")
    for file in record["files"]:
        if flaw := shard_flaw(file, record, storage, entries, arrays, itemsize, advance):
            yield flaw


def read_sidecar(
    record: Record, storage: Storage, entries: Mapping[str, Entry], advance: Advance
) -> tuple[Sidecar | None, Flaw | None]:
    """A sidecar, or what is wrong with it."""
    file = record["sidecar"]
    if wrong := wrong_with(file, record, entries):
        return None, Flaw(wrong)
    try:
        # By itself: trouble with the place ends the command, and only what has arrived can be damaged.
        data = storage.read(file["path"], generation=file.get("generation"))
    except OSError as error:
        return None, _unread(file["path"], error)
    advance(len(data))
    if crc32c(data) != file["crc32c"]:
        return None, Flaw(f"sidecar {file['path']} is changed: it does not match its checksum")
    arrived = SimpleNamespace(where=storage.where, read=lambda *_, **__: data)
    try:
        return Sidecar.read(cast(Storage, arrived), file["path"], file["crc32c"]), None
    except UserError as error:
        return None, Flaw(str(error))


def shard_flaw(
    file: Mapping[str, Any],
    record: Record,
    storage: Storage,
    entries: Mapping[str, Entry],
    arrays: Iterable[StoredArray],
    itemsize: int,
    advance: Advance,
    watch: Callable[[memoryview], object] | None = None,
) -> Flaw | None:
    """Reads a whole shard once, against its own checksum and those of the blocks of its array, if that is given.

    `watch` gets the bytes of the array, in order and in pieces.
    """
    name = str(file["path"])
    if (wrong := wrong_with(file, record, entries)) or name not in entries:  # which is elsewhere
        return Flaw(wrong) if wrong else None
    try:
        with damage_is_told(f"what the sidecar says of {name}", "restore the part from a copy"):
            array = next((array for array in arrays if array.path == name), None)
            start = array.offset if array else 0
            stop = start + (record["rows"] * array.site.width * itemsize if array else 0)
            expected = array.blocks if array else ()
            if array and not (
                0 <= start <= stop <= file["bytes"] and len(expected) == -(-(stop - start) // BLOCK_BYTES)
            ):
                return Flaw(f"{name} cannot hold the array that its sidecar describes")
    except UserError as error:
        return Flaw(str(error))
    return _changed(file, storage, start, stop, expected, advance, watch or (lambda _: None))


def _changed(
    file: Mapping[str, Any],
    storage: Storage,
    start: int,
    stop: int,
    expected: Iterable[int],
    advance: Advance,
    watch: Callable[[memoryview], object],
) -> Flaw | None:
    """Where a file, whose array lies from `start` to `stop`, does not match its checksums."""
    name, size = str(file["path"]), int(file["bytes"])
    total, blocks, at = 0, BlockChecksums(), 0
    buffer = memoryview(bytearray(min(_CHUNK, size)))
    while at < size:
        piece = buffer[: min(_CHUNK, size - at)]
        try:
            got = storage.read_into(name, at, piece, file.get("generation"))
        except OSError as error:
            return _unread(name, error)
        advance(got)
        if got < len(piece):
            return Flaw(f"{name} is cut short at byte {at + got}")
        total = crc32c(piece, total)
        of_array = piece[max(0, start - at) : max(0, stop - at)]
        blocks.update(of_array)
        watch(of_array)
        at += got
    pairs = zip(blocks.values(), expected, strict=True)
    changed = [str(i) for i, (is_now, was) in enumerate(pairs) if is_now != was]
    if changed:
        return Flaw(f"{name} is changed: block {some_of(changed)} of its array does not match its checksum")
    return Flaw(f"{name} is changed: it does not match its checksum") if total != file["crc32c"] else None


def _unread(name: str, error: OSError) -> Flaw:
    return Flaw(f"{name} cannot be read ({error.strerror or error})", certain=False)


def some_of(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest
