"""What is kept of a window's samples until the run is whole: arrays in a file, mapped and not read.

In: arrays by name, and JSON about them. Out: `_run/tokens/NNNNNN.safetensors`, created once and checked when it is
looked at. No row depends on these files: where one is missing, the input is read again, as it is where one is found
damaged at the start. Token ids are checked when they are first asked for; damage to them ends the session and is told.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jax_extract.errors import damage_is_told
from jax_extract.store.ledger import FOREIGN, TOKENS, Ledger
from jax_extract.store.storage.failpoints import step
from jax_extract.store.storage.local import Directory
from jax_extract.store.storage.verbs import Storage, crc32c

_NAME = re.compile(r"\d{6,}(_attempt_[0-9a-f]+)?\.safetensors")
_DTYPES = {"I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "U8": np.dtype("u1")}  # the widest first: all are aligned
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_FIRST_READ = 1 << 16  # bytes: of most files the whole header
_LARGEST_HEADER = 1 << 26
MEND = "remove it and give the same command again"


def file_name(number: int) -> str:
    """Of a window, counted from 0."""
    return f"{TOKENS}/{number:06d}.safetensors"


def sizes(storage: Storage) -> dict[str, int]:
    """Name -> bytes of all files that are ours, also those that an attempt has left under its own name."""
    there = storage.entries(TOKENS)
    return {f"{TOKENS}/{name}": entry.size for name, entry in there.items() if _NAME.fullmatch(name)}


def write(ledger: Ledger, number: int, arrays: Mapping[str, np.ndarray], said: Mapping[str, Any], attempt: str) -> None:
    """Stores a window's arrays (int64, int32 or uint8, one-dimensional), unless there is a file of it by then.

    Args:
      said: plain JSON.
      attempt: names a file that does not become the window's.
    """
    storage, name = ledger.storage, file_name(number)
    storage.make(TOKENS)
    ordered = sorted(arrays.items(), key=lambda item: list(_DTYPES.values()).index(item[1].dtype))
    own = f"{name.removesuffix('.safetensors')}_attempt_{attempt}.safetensors"
    file = storage.create(name, own)
    try:
        file.write(_header(ledger.run["run_id"], number, ordered, said))
        for _, array in ordered:
            file.write(np.ascontiguousarray(array).data.cast("B"))
        with step("tokens.file"):
            published = file.publish()
        if published.name == own:  # another worker was faster
            storage.delete(own)
    finally:
        file.discard()


def _header(run_id: str, number: int, arrays: list[tuple[str, np.ndarray]], said: Mapping[str, Any]) -> bytes:
    entries: dict[str, Any] = {}
    at = 0
    for name, array in arrays:
        entries[name] = {"dtype": _CODES[array.dtype], "shape": [len(array)], "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    sums = {name: crc32c(np.ascontiguousarray(array).data.cast("B")) for name, array in arrays}
    about = {"run": run_id, "window": str(number), "said": json.dumps(said), "crc32c": json.dumps(sums)}
    entries["__metadata__"] = {**about, "header_crc32c": str(_checksum(entries, about))}
    data = json.dumps(entries).encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data


def _place(entry: Mapping[str, Any], after: int) -> tuple[np.dtype[Any], int, int]:
    first, last = entry["data_offsets"]
    return _DTYPES[entry["dtype"]], after + int(first), after + int(last)


def _checksum(entries: Mapping[str, Any], about: Mapping[str, str]) -> int:
    """Of a header, its checksum left out."""
    plain = {name: value for name, value in entries.items() if name != "__metadata__"}
    return crc32c(json.dumps([plain, dict(about)], sort_keys=True).encode())


@dataclass(frozen=True)
class TokenFile:
    """A window's file, of which the header was read and checked.

    Attributes:
      said: what was said about the arrays.
      places: of each array its dtype, and the bytes of the file that it has.
    """

    storage: Storage
    name: str
    said: Mapping[str, Any]
    places: Mapping[str, tuple[np.dtype[Any], int, int]]
    checksums: Mapping[str, int]

    @classmethod
    def open(cls, ledger: Ledger, number: int) -> TokenFile | None:
        """None where there is no such file, or it is another run's; UserError where it is damaged."""
        storage, name = ledger.storage, file_name(number)
        try:
            with damage_is_told(storage.where(name), MEND), _missing_passes():
                begin = storage.read(name, 0, _FIRST_READ)
                size = 8 + int.from_bytes(begin[:8], "little")
                if size > _LARGEST_HEADER:
                    raise ValueError("it has no header")
                if len(begin) < size:
                    begin += storage.read(name, len(begin), size - len(begin))
                entries = json.loads(begin[8:size])
                about = entries["__metadata__"]
                checksum = int(about.pop("header_crc32c"))
                if checksum != _checksum(entries, about):
                    raise ValueError("the checksum of its header is wrong")
                if about["run"] != ledger.run["run_id"] or about["window"] != str(number):
                    raise _Foreign(FOREIGN)
                places = {array: _place(entry, size) for array, entry in entries.items() if array != "__metadata__"}
                return cls(storage, name, json.loads(about["said"]), places, json.loads(about["crc32c"]))
        except (_Missing, _Foreign):
            return None

    def array(self, name: str) -> np.ndarray:
        """An array, checked; in a directory it is mapped. UserError where it is damaged."""
        with damage_is_told(self.storage.where(self.name), MEND):
            dtype, start, stop = self.places[name]
            data = self._bytes(start, stop)
            if len(data) != stop - start:
                raise ValueError("it is cut short")
            if crc32c(data.data) != self.checksums[name]:
                raise ValueError(f"the checksum of {name} is wrong")
            return data.view(dtype)

    def _bytes(self, start: int, stop: int) -> np.ndarray:
        if start == stop:
            return np.zeros(0, np.uint8)
        if self._mapped is not None:
            return self._mapped[start:stop]
        data = np.empty(stop - start, np.uint8)
        return data[: self.storage.read_into(self.name, start, data.data)]

    @cached_property
    def _mapped(self) -> np.ndarray | None:
        if not isinstance(self.storage, Directory):
            return None
        # Not numpy's own class, each slice of which costs as much as a sample.
        return np.asarray(np.memmap(self.storage.path(self.name), np.uint8, "r"))


class _Missing(Exception):
    pass


class _Foreign(Exception):
    pass


@contextlib.contextmanager
def _missing_passes() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise _Missing from None
