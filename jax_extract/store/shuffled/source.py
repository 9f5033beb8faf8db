"""Where shuffled rows come from and where they wait: ranges of parts, and a pool of slots.

In: parts, pieces of them, slots. Out: the pieces' rows in their slots, each with its sample and position.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from jax_extract.errors import UserError
from jax_extract.store.file_part import FilePart, StoredPart
from jax_extract.store.parts import PartContent, Site
from jax_extract.store.shuffled.rows_wanted import KeptRows, RowsWanted
from jax_extract.store.storage.direct import PAGE, DirectDirectory, page_memory
from jax_extract.store.storage.local import Directory

_TOKENS_KEPT = 1 << 26  # bytes of token ids of parts: 16 million rows; those of more are read again


class Who:
    """Whose row each row of a part is, in as few bytes as that takes, because this is kept for every part."""

    def __init__(self, content: PartContent) -> None:
        self._offsets = content.row_offsets
        self._samples = content.sample_indices
        positions = content.row_positions
        self._first = positions[np.minimum(self._offsets[:-1], len(positions) - 1)] if len(positions) else positions
        second = positions[np.minimum(self._offsets[:-1] + 1, len(positions) - 1)] if len(positions) else positions
        self._step = np.where(np.diff(self._offsets) > 1, second - self._first, 0).astype(np.int32)
        self._positions: np.ndarray | None = None
        if not np.array_equal(self.of(0, len(positions))[1], positions):  # a list of positions that is no progression
            self._positions = positions

    def of(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample indices int64 and positions int32 of rows [start, stop)."""
        rows = np.arange(start, stop)
        place = np.searchsorted(self._offsets, rows, side="right") - 1
        if self._positions is not None:
            return self._samples[place], self._positions[start:stop]
        return self._samples[place], (self._first[place] + self._step[place] * (rows - self._offsets[place])).astype(
            np.int32
        )


class _TokensOfParts:
    """Token ids of the rows of parts, of which as many are kept as there is room for."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, number: int) -> np.ndarray | None:
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
            return self._kept.get(number)

    def keep(self, number: int, tokens: np.ndarray) -> None:
        with self._lock:
            if number not in self._kept:
                self._kept[number] = tokens
                self._bytes += tokens.nbytes
            while self._bytes > _TOKENS_KEPT and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes


class Source:
    """The rows of some sites, by ranges of parts.

    Attributes:
      stored_rows: of each part.
      kept: which of them are wanted; None for all. Rows of pieces are counted among those.
    """

    def __init__(self, parts: Sequence[StoredPart], sites: Sequence[Site], wanted: RowsWanted | None = None) -> None:
        """With `wanted` the sidecars of all parts are read."""
        self.sites = tuple(sites)
        self.stored_rows = [part.record["rows"] if isinstance(part, FilePart) else part.content.rows for part in parts]
        self._parts = [past_the_page_cache(part) for part in parts]
        self._who: dict[int, Who] = {}
        self._tokens = _TokensOfParts()
        self._threads = threading.local()
        self.kept = KeptRows(wanted, map(self._content_of, range(len(parts)))) if wanted else None

    @property
    def rows(self) -> int:
        """How many there are to come out in an epoch."""
        return sum(self.kept.part_rows if self.kept else self.stored_rows)

    @cached_property
    def digest(self) -> str:
        """Of the run and of everything its committed parts hold."""
        marks = json.dumps([_mark(part) for part in self._parts], sort_keys=True)
        return hashlib.sha256(marks.encode()).hexdigest()[:32]

    @cached_property
    def dtype(self) -> np.dtype:
        return self._parts[0].rows(self.sites[0], 0, 0).dtype

    @property
    def row_bytes(self) -> int:
        """At one site; all have the same width."""
        return self.sites[0].width * self.dtype.itemsize

    def fill(self, pool: Pool, piece: tuple[int, int, int], slots: np.ndarray, piece_bytes: int) -> None:
        """Reads a piece into the pool; rows whose slot is -1 are not wanted."""
        if (slots < 0).all():
            return
        part, start, stop = piece
        wanted: Any = slice(None) if (slots >= 0).all() else slots >= 0
        slots = slots[wanted]
        if self.kept:
            places = self.kept.rows(part, start, stop)
            start, stop = int(places[0]), int(places[-1]) + 1
            wanted = (places - start)[wanted]
        samples, positions = self._who_of(part).of(start, stop)
        tokens = self._tokens_of(part)[start:stop]
        for number, site in enumerate(self.sites):
            rows = self._rows(site, part, start, stop, piece_bytes)
            pool.bits[:, number][slots] = rows.view(np.uint8)[wanted]
        pool.sample_indices[slots] = samples[wanted]
        pool.positions[slots] = positions[wanted]
        pool.token_ids[slots] = tokens[wanted]

    def _rows(self, site: Site, number: int, start: int, stop: int, piece_bytes: int) -> np.ndarray:
        """Rows of a part, in memory of this thread that its next read takes again."""
        part = self._parts[number]
        if not isinstance(part, FilePart):
            return part.rows(site, start, stop)
        if not hasattr(self._threads, "memory"):
            self._threads.memory = page_memory(piece_bytes + PAGE)
        return part.rows(site, start, stop, self._threads.memory)

    def _who_of(self, number: int) -> Who:
        if number not in self._who:  # two threads may both find out; they find the same
            self._content_of(number)
        return self._who[number]

    def _content_of(self, number: int) -> PartContent:
        """Of a part, of which is kept what is asked for again."""
        content = self._parts[number].content
        if content.rows != self.stored_rows[number]:
            raise UserError(
                f"part {content.key} has {content.rows} rows by its sidecar and {self.stored_rows[number]} by its "
                "commit record; restore both from a copy"
            )
        self._who[number] = Who(content)
        self._tokens.keep(number, content.row_token_ids)
        return content

    def _tokens_of(self, number: int) -> np.ndarray:
        """int32 [rows] of a part."""
        if (tokens := self._tokens.get(number)) is None:
            tokens = self._parts[number].content.row_token_ids
            self._tokens.keep(number, tokens)
        return tokens


def _mark(part: StoredPart) -> dict[str, Any]:
    """What tells a part from every other, without reading more of it than its commit record."""
    if isinstance(part, FilePart):
        record = part.record
        keys = ("run", "batch", "part", "rows", "plan")
        return {**{key: record[key] for key in keys}, "sidecar": record["sidecar"]["crc32c"]}
    content = part.content
    return {"batch": content.batch, "part": content.part, "rows": content.rows, "plan": content.plan}


def past_the_page_cache(part: StoredPart) -> StoredPart:
    """A part of a local run, read as what is shuffled is read."""
    if isinstance(part, FilePart) and type(part.storage) is Directory:
        return part.through(DirectDirectory(part.storage.root))
    return part


class Pool:
    """Slots for rows that wait.

    Attributes:
      bits: uint8 [slots, sites, row bytes]; NumPy moves them faster than bfloat16, and they need no alignment.
      sample_indices, positions, token_ids: [slots], whose they are, and of which token.
      free: how many slots are.
    """

    def __init__(self, slots: int, sites: int, row_bytes: int) -> None:
        self.bits = np.empty((slots, sites, row_bytes), np.uint8)
        self.sample_indices = np.empty(slots, np.int64)
        self.positions, self.token_ids = np.empty(slots, np.int32), np.empty(slots, np.int32)
        self._free = np.arange(slots)
        self.free = slots

    def take(self, count: int) -> np.ndarray:
        assert count <= self.free
        self.free -= count
        return self._free[self.free : self.free + count].copy()

    def give_back(self, slots: np.ndarray) -> None:
        self._free[self.free : self.free + len(slots)] = slots
        self.free += len(slots)
