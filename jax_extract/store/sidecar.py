"""The sidecar of a part: everything about its rows that the shards themselves need not repeat.

In: a `PartContent` and the files written for it. Out: one safetensors file with the samples' indices,
token ids and positions as arrays, and, for each shard, where its array lies and the CRC32C of every
block of it, so that any range of rows can be read and checked without reading the whole file; and sums over its rows.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from jax_extract.errors import UserError, damage_is_told
from jax_extract.store.checksums import crc32c_of_end
from jax_extract.store.parts import PartContent, Site, offsets
from jax_extract.store.row_sums import RowSums
from jax_extract.store.storage.verbs import Chunk, Storage, crc32c

BLOCK_BYTES = 1 << 20

_MEND = "restore it from a copy, or give its part up to be computed again with jax-extract sweep --damaged"


class BlockChecksums:
    """CRC32C of every 1 MiB block of a stream of bytes."""

    def __init__(self) -> None:
        self._done: list[int] = []
        self._open = 0
        self._filled = 0

    def update(self, data: Chunk) -> None:
        view = memoryview(data)
        while view:
            piece = view[: BLOCK_BYTES - self._filled]
            self._open = crc32c(piece, self._open)
            self._filled += len(piece)
            view = view[len(piece) :]
            if self._filled == BLOCK_BYTES:
                self._done.append(self._open)
                self._open = self._filled = 0

    def values(self) -> list[int]:
        return [*self._done, *([self._open] if self._filled else [])]


class RunningChecksums:
    """CRC32C of every 1 MiB block of an array, from the running one of its file: no byte is looked at a second time.

    Attributes:
      room: how many bytes the open block still takes; more are not to be written at once.
    """

    def __init__(self, running: int) -> None:
        """`running` is the CRC32C of what lies before the first block."""
        self.room = BLOCK_BYTES
        self._done: list[int] = []
        self._before = self._running = running

    def advance(self, size: int, running: int) -> None:
        """`size` more bytes were written, with which the whole has the CRC32C `running`."""
        self.room -= size
        self._running = running
        if not self.room:
            self._close()

    def values(self) -> list[int]:
        """To be called at the end of the array."""
        if self.room < BLOCK_BYTES:
            self._close()
        return self._done

    def _close(self) -> None:
        self._done.append(crc32c_of_end(self._before, self._running, BLOCK_BYTES - self.room))
        self._before = self._running
        self.room = BLOCK_BYTES


@dataclass(frozen=True)
class StoredArray:
    """Where one site's rows lie.

    Attributes:
      path: shard file.
      offset: of the array's first byte in it.
      blocks: CRC32C of each 1 MiB block of the array.
      sums: over its rows; None where the part keeps none.
    """

    site: Site
    path: str
    offset: int
    blocks: tuple[int, ...]
    sums: RowSums | None = None


@dataclass(frozen=True)
class Sidecar:
    content: PartContent
    arrays: tuple[StoredArray, ...]

    def to_bytes(self) -> bytes:
        content = self.content
        tensors = {
            "sample_indices": content.sample_indices,
            "full_lengths": content.full_lengths,
            "token_offsets": offsets([len(t) for t in content.token_ids]),
            "token_ids": _concatenate(content.token_ids),
            "row_offsets": content.row_offsets,
            "positions": _concatenate(content.positions),
            "block_offsets": offsets([len(array.blocks) for array in self.arrays]),
            "block_crc32c": np.array([block for array in self.arrays for block in array.blocks], np.uint32),
            **_sums_tensors([array.sums for array in self.arrays]),
        }
        metadata = {
            "batch": str(content.batch),
            "part": str(content.part),
            "parts_in_batch": str(content.parts_in_batch),
            "plan": content.plan,
            "sample_ids": json.dumps(content.sample_ids),
            "meta": json.dumps([dict(meta) for meta in content.meta]),
            "files": json.dumps(
                [
                    {
                        "path": a.path,
                        "hook": a.site.hook,
                        "layer": a.site.layer,
                        "width": a.site.width,
                        "offset": a.offset,
                    }
                    for a in self.arrays
                ]
            ),
        }
        return _in_order(safetensors.numpy.save(tensors, metadata))

    @classmethod
    def read(cls, storage: Storage, name: str, expected_crc32c: int, generation: int | None = None) -> Sidecar:
        """Reads and checks a sidecar; UserError where it is missing or damaged."""
        path = storage.where(name)
        try:
            with damage_is_told(f"sidecar {path}", _MEND):
                data = storage.read(name, generation=generation)
                if crc32c(data) != expected_crc32c:
                    raise ValueError("its checksum is wrong")
                return cls._parse(data)
        except SafetensorError as error:
            raise UserError(f"sidecar {path} is damaged ({error}); {_MEND}") from None

    @classmethod
    def _parse(cls, data: bytes) -> Sidecar:
        tensors = safetensors.numpy.load(data)
        metadata: dict[str, str] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        content = PartContent(
            batch=int(metadata["batch"]),
            part=int(metadata["part"]),
            parts_in_batch=int(metadata["parts_in_batch"]),
            sample_indices=tensors["sample_indices"],
            sample_ids=tuple(json.loads(metadata["sample_ids"])),
            token_ids=_split(tensors["token_ids"], tensors["token_offsets"]),
            positions=_split(tensors["positions"], tensors["row_offsets"]),
            full_lengths=tensors["full_lengths"],
            meta=tuple(json.loads(metadata["meta"])),
            plan=metadata["plan"],
        )
        samples = len(content.sample_ids)
        counts = [len(content.sample_indices), len(content.full_lengths), len(content.meta)]
        counts += [len(content.token_ids), len(content.positions)]
        if counts != [samples] * len(counts) or not all(isinstance(name, str) for name in content.sample_ids):
            raise ValueError("its parts do not belong together")
        blocks = _split(tensors["block_crc32c"], tensors["block_offsets"])
        files: list[dict[str, Any]] = json.loads(metadata["files"])
        if not all(type(f["width"]) is int and type(f["offset"]) is int for f in files):
            raise ValueError("a width or an offset is no whole number")
        sums = _sums_in(tensors, [f["width"] for f in files])
        arrays = tuple(
            StoredArray(
                Site(f["hook"], f["layer"], f["width"]), f["path"], f["offset"], tuple(map(int, block)), of_rows
            )
            for f, block, of_rows in zip(files, blocks, sums, strict=True)
        )
        return cls(content, arrays)


def _sums_tensors(sums: Sequence[RowSums | None]) -> dict[str, np.ndarray]:
    """Nothing where there are none."""
    there = [each for each in sums if each is not None]
    if not there or len(there) < len(sums):
        return {}
    return {
        "sum_rows": np.array([each.rows for each in there], np.int64),
        "sum_values": np.concatenate([each.values for each in there]),
        "sum_squares": np.concatenate([each.squares for each in there]),
        "norms": np.array([(each.norms, each.least_norm, each.largest_norm) for each in there]),
    }


def _sums_in(tensors: Mapping[str, np.ndarray], widths: Sequence[int]) -> list[RowSums | None]:
    if "sum_rows" not in tensors:
        return [None] * len(widths)
    values, squares = (_split(tensors[name], offsets([*widths])) for name in ("sum_values", "sum_squares"))
    rows, norms = tensors["sum_rows"].tolist(), tensors["norms"].tolist()
    return [RowSums(*each[:3], *each[3]) for each in zip(rows, values, squares, norms, strict=True)]


def _in_order(data: bytes) -> bytes:
    """A safetensors file with the keys of its header in order.

    The library writes the strings in an order of its own each time; equal content is to be equal bytes, so that
    what a killed attempt has left is adopted.
    """
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _concatenate(pieces: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.concatenate(pieces, dtype=np.int32) if pieces else np.zeros(0, np.int32)


def _split(values: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, ...]:
    if bounds.dtype != np.int64 or not len(bounds) or bounds[0] != 0 or bounds[-1] != len(values):
        raise ValueError("its offsets do not fit its values")
    if (np.diff(bounds) < 0).any():
        raise ValueError("its offsets run backwards")
    return tuple(values[start:stop] for start, stop in itertools.pairwise(bounds))
