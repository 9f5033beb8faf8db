"""Which document each row of a run is of, and which of its tokens: of samples that are contexts, joined from several.

In: the content of parts. Out: names of documents and positions in them. A sample that is no context is a document
itself, so that the same lines serve every run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jax_extract.errors import UserError
from jax_extract.store.parts import PartContent

_POSITION_BITS = 31


class Piece(NamedTuple):
    """A stretch of one document within a sample.

    Attributes:
      document: its id.
      first: the token position within the document at which the stretch begins.
      tokens: how many.
      at: the token position within the sample at which it begins.
    """

    document: str
    first: int
    tokens: int
    at: int


def pieces_of(sample_id: str, tokens: int, meta: Mapping[str, Any]) -> tuple[Piece, ...]:
    """What a sample is made of, in order; tokens between pieces, such as a BOS, are of no document."""
    if "pieces" not in meta:
        return (Piece(sample_id, 0, tokens, 0),)
    return tuple(Piece(str(p["document"]), int(p["first"]), int(p["tokens"]), int(p["at"])) for p in meta["pieces"])


class Documents:
    """A table of the pieces of samples, in memory: 32 bytes each, and the name of each document."""

    def __init__(self, blocks: Iterable[Iterable[tuple[int, Piece]]]) -> None:
        """Pieces with the index of their sample, a block at a time."""
        numbers: dict[str, int] = {}
        tables = [np.zeros((0, 5), np.int64)]
        for block in blocks:
            rows = [
                (index, piece.at, piece.tokens, piece.first, numbers.setdefault(piece.document, len(numbers)))
                for index, piece in block
            ]
            tables.append(np.array(rows, np.int64).reshape(-1, 5))
        table = np.concatenate(tables)
        table = table[np.lexsort((table[:, 1], table[:, 0]))]
        self._index = table[:, 0].copy()
        self._keys = (self._index << _POSITION_BITS) | table[:, 1]
        self._at, self._tokens, self._first, self._number = table[:, 1:].astype(np.int32).T
        self._names = np.array([*numbers, ""], object)

    @classmethod
    def of_parts(cls, contents: Iterable[PartContent]) -> Documents:
        return cls(map(_pieces_of_part, contents))

    def of(self, sample_indices: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Run.documents`."""
        samples, positions = np.broadcast_arrays(np.asarray(sample_indices, np.int64), np.asarray(positions, np.int64))
        begin, end = (np.searchsorted(self._index, samples, side) for side in ("left", "right"))
        if len(missing := samples[begin == end]):
            raise UserError(f"this run holds no sample with the index {missing[0]}")
        keys = (samples << _POSITION_BITS) | np.maximum(positions, 0)
        places = np.maximum(np.searchsorted(self._keys, keys, "right") - 1, begin)
        within = positions - self._at[places]
        of_piece = (within >= 0) & (within < self._tokens[places])
        of_whole = (positions < 0) & (end - begin == 1)  # the mean over a sample that is of one document alone
        names = self._names[np.where(of_piece | of_whole, self._number[places], -1)]
        found = np.where(of_piece, self._first[places] + within, -1)
        return names.astype(np.str_), found.astype(np.int32)


def documents_of(pieces: Iterable[Piece], positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of the rows of one sample."""
    return Documents([((0, piece) for piece in pieces)]).of(np.zeros(len(positions), np.int64), positions)


def _pieces_of_part(content: PartContent) -> Iterator[tuple[int, Piece]]:
    for index, name, tokens, meta in zip(
        content.sample_indices, content.sample_ids, content.token_ids, content.meta, strict=True
    ):
        for piece in pieces_of(name, len(tokens), meta):
            yield int(index), piece
