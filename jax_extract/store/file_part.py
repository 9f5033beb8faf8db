"""One part of a run, read by ranges of its files.

In: a storage and a commit record. Out: rows of a site. Only ranges of rows are read, at the offsets that
the sidecar names, whatever the shard format: nothing is unpickled. Every block read is checked against
its CRC32C.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jax_extract.errors import UserError, damage_is_told
from jax_extract.store.parts import PartContent, Site
from jax_extract.store.row_sums import RowSums
from jax_extract.store.sidecar import BLOCK_BYTES, Sidecar, StoredArray
from jax_extract.store.storage.direct import PAGE
from jax_extract.store.storage.verbs import Storage, crc32c

_SIDECARS_KEPT = 16
_MEND = "restore it from a copy, or give its part up to be computed again with jax-extract sweep"


class StoredPart(Protocol):
    """A part that can be read."""

    @property
    def content(self) -> PartContent: ...

    def rows(self, site: Site, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a site's array, [rows, width]."""
        ...


class Sidecars:
    """A run's sidecars, of which a few are kept: random access meets the same parts again, a full pass each once."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._kept: OrderedDict[tuple[str, int | None], Sidecar] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._storage,)

    def of(self, record: Mapping[str, Any]) -> Sidecar:
        """The sidecar that a commit record names; UserError where it is missing or damaged."""
        named = record["sidecar"]
        key = named["path"], named.get("generation")
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        sidecar = Sidecar.read(self._storage, named["path"], named["crc32c"], named.get("generation"))
        with self._lock:
            self._kept[key] = sidecar
            while len(self._kept) > _SIDECARS_KEPT:
                self._kept.popitem(last=False)
        return sidecar


class FilePart:
    """A committed part, read by ranges of its files."""

    def __init__(
        self,
        storage: Storage,
        record: Mapping[str, Any],
        dtype: str,
        sidecars: Sidecars,
    ) -> None:
        self._storage = storage
        self._record = record
        self._dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        self._sidecars = sidecars
        self._found: dict[tuple[str, int | None], tuple[StoredArray, int | None, int]] = {}

    @property
    def record(self) -> Mapping[str, Any]:
        """Its commit record."""
        return self._record

    @property
    def storage(self) -> Storage:
        return self._storage

    def through(self, storage: Storage) -> FilePart:
        """The same part, its rows read through another `Storage` of the same place."""
        part = copy.copy(self)
        part._storage = storage
        return part

    @property
    def _sidecar(self) -> Sidecar:
        return self._sidecars.of(self._record)

    @property
    def content(self) -> PartContent:
        return self._sidecar.content

    def sums(self, site: Site) -> RowSums | None:
        """Over the rows of a site, where they were summed when they were written."""
        return next((array.sums for array in self._sidecar.arrays if array.site.key == site.key), None)

    def rows(self, site: Site, start: int, stop: int, memory: np.ndarray | None = None) -> np.ndarray:
        """As `StoredPart.rows`; in `memory` where that is given: uint8, whole pages, one more than the blocks take."""
        row_bytes = site.width * self._dtype.itemsize
        if site.key not in self._found:
            self._found[site.key] = self._find(site, row_bytes)  # remembered: a sidecar is long, and few are kept
        array, generation, total = self._found[site.key]
        data = self._bytes(array, generation, start * row_bytes, stop * row_bytes, total, memory)
        return data.view(self._dtype).reshape(stop - start, site.width)

    def _find(self, site: Site, row_bytes: int) -> tuple[StoredArray, int | None, int]:
        """Where a site's rows lie, the generation of that file, and how many bytes they are."""
        sidecar = self._sidecar
        arrays = {array.site.key: array for array in sidecar.arrays}
        total = sidecar.content.rows * row_bytes
        files = {file["path"]: file for file in self._record["files"]}
        with damage_is_told(f"the sidecar of part {sidecar.content.key}", "restore it from a copy"):
            array = arrays[site.key]
            self._storage.where(array.path)  # refuses a path that leads out, by its own sentence
            file = files[array.path]
            if not 0 <= array.offset <= file["bytes"] - total or len(array.blocks) != -(-total // BLOCK_BYTES):
                raise ValueError(f"it does not fit {array.path}")
        return array, file.get("generation"), total

    def _bytes(
        self,
        array: StoredArray,
        generation: int | None,
        start: int,
        stop: int,
        total: int,
        memory: np.ndarray | None = None,
    ) -> np.ndarray:
        """uint8 [stop - start] of an array of `total` bytes, read in whole blocks that are checked."""
        if start == stop:
            return np.zeros(0, np.uint8)
        first, last = start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)
        begin, end = first * BLOCK_BYTES, min(last * BLOCK_BYTES, total)
        if memory is None:
            data = np.empty(end - begin, np.uint8)
        else:
            lies = (array.offset + begin) % PAGE  # as in the file, so that the disk can put it there itself
            data = memory[lies : lies + end - begin]
        try:
            got = self._storage.read_into(array.path, array.offset + begin, data.data, generation)
        except OSError as error:
            raise UserError(
                f"shard {array.path} of {self._storage} cannot be read: {error.strerror}; restore it from a copy"
            ) from None
        if got < len(data):
            raise UserError(f"shard {array.path} is cut short; {_MEND} {self._storage} --damaged")
        for block in range(first, last):
            at = block * BLOCK_BYTES - begin
            if crc32c(data[at : at + BLOCK_BYTES].data) != array.blocks[block]:
                raise UserError(
                    f"shard {array.path} is damaged (block {block} does not match its checksum); "
                    f"{_MEND} {self._storage} --damaged"
                )
        return data[start - begin : stop - begin]
