"""A run that lives in memory: what a notebook gets, through the same sink and the same reader.

In: parts and captured blocks. Out: `MemoryPart`s, which the reader treats like parts on disk.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np

from jax_extract.store.lanes import Call
from jax_extract.store.parts import PartContent, Site
from jax_extract.store.writer import Blocks, RowPiece, row_pieces


class MemoryPart:
    """One part's rows, by site; filled block by block."""

    def __init__(self, content: PartContent, sites: Sequence[Site], dtype: np.dtype) -> None:
        self.content = content
        self._arrays = {site.key: np.empty((content.rows, site.width), dtype) for site in sites}
        self._filled = 0

    def rows(self, site: Site, start: int, stop: int) -> np.ndarray:
        return self._arrays[site.key][start:stop]

    def append(self, blocks: Blocks, kept: Sequence[RowPiece], done: Call) -> None:
        for key, array in self._arrays.items():
            at = self._filled
            for rows in row_pieces(blocks[key], kept):
                array[at : at + len(rows)] = rows
                at += len(rows)
        self._filled += sum(piece.count for piece in kept)
        done()

    def commit(self) -> None:
        """The rows are where they stay."""


class MemorySink:
    """Collects parts; the rows are copied out of the captured blocks, which are padded and die young."""

    buffer_bytes = 0

    def __init__(self, sites: Sequence[Site], dtype: str) -> None:
        self._sites = sites
        self._dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        self.parts: list[MemoryPart] = []

    def begin(self, content: PartContent) -> MemoryPart:
        part = MemoryPart(content, self._sites, self._dtype)
        self.parts.append(part)
        return part

    def close(self) -> None:
        """Nothing waits."""

    def cancel(self) -> None:
        self.parts.clear()
