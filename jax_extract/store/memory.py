"""A run that lives in memory: what a notebook gets, through the same sink and the same reader.

In: parts and captured blocks. Out: `MemoryPart`s, which the reader treats like parts on disk.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np

from jax_extract.store.parts import PartContent, Site
from jax_extract.store.writer import Blocks, row_pieces


class MemoryPart:
    """One part's rows, by site."""

    def __init__(self, content: PartContent, arrays: dict[tuple[str, int | None], np.ndarray]) -> None:
        self.content = content
        self._arrays = arrays

    def rows(self, site: Site, start: int, stop: int) -> np.ndarray:
        return self._arrays[site.key][start:stop]


class MemorySink:
    """Collects parts; the rows are copied out of the captured blocks, which are padded and die young."""

    def __init__(self, sites: Sequence[Site], dtype: str) -> None:
        self._sites = sites
        self._dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        self._content: PartContent | None = None
        self._arrays: dict[tuple[str, int | None], np.ndarray] = {}
        self._filled = 0
        self.parts: list[MemoryPart] = []

    def begin(self, content: PartContent) -> None:
        self._content = content
        self._arrays = {site.key: np.empty((content.rows, site.width), self._dtype) for site in self._sites}
        self._filled = 0

    def append(self, blocks: Blocks, kept: Sequence[int]) -> None:
        for key, array in self._arrays.items():
            at = self._filled
            for piece in row_pieces(blocks[key], kept):
                rows = piece.reshape(-1, array.shape[1])
                array[at : at + len(rows)] = rows
                at += len(rows)
        self._filled += sum(kept)

    def commit(self) -> None:
        assert self._content is not None
        self.parts.append(MemoryPart(self._content, self._arrays))
        self.abandon()

    def abandon(self) -> None:
        self._content, self._arrays = None, {}
