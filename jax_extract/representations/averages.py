"""Means of captured rows by the token that they are of, however many rows there are.

In: parts of an extraction whose positions are `all`. Out: per site [vocab, width], and how often each token occurred.
A sink like those that write files: memory holds one row a token and site, and sums are float64, so that neither the
number of occurrences nor the order of the batches shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from jax_extract.store.lanes import Call
from jax_extract.store.parts import PartContent, Site
from jax_extract.store.writer import Blocks, RowPiece, row_pieces


def representation_key(site: Site) -> str:
    """`layer_0_after_block`, or `final_norm` where a hook point has no layer."""
    return site.hook if site.layer is None else f"layer_{site.layer}_{site.hook}"


def bytes_of_sums(sites: Sequence[Site], vocab_size: int) -> int:
    return vocab_size * sum(site.width for site in sites) * np.dtype(np.float64).itemsize


class TokenMeans:
    """A `PartSink` that keeps sums.

    Attributes:
      occurrences: int64 [vocab].
    """

    buffer_bytes = 0

    def __init__(self, sites: Sequence[Site], vocab_size: int) -> None:
        self._sites = sites
        self.sums = {site.key: np.zeros((vocab_size, site.width), np.float64) for site in sites}
        self.occurrences = np.zeros(vocab_size, np.int64)

    def begin(self, content: PartContent) -> _OpenPart:
        ids = np.concatenate(content.token_ids)
        self.occurrences += np.bincount(ids, minlength=len(self.occurrences))
        return _OpenPart(self, ids)

    def close(self) -> None:
        """Nothing waits."""

    def cancel(self) -> None:
        """Nothing was written."""

    def means(self) -> Iterator[tuple[str, np.ndarray]]:
        """float32 [vocab, width] by name, one after the other; NaN where a token never occurred."""
        counts = np.where(self.occurrences, self.occurrences, 1)[:, None]
        for site in self._sites:
            mean = (self.sums[site.key] / counts).astype(np.float32)
            mean[self.occurrences == 0] = np.nan
            yield representation_key(site), mean


@dataclass
class _OpenPart:
    """Takes a part's rows in their order: those of its samples' tokens, one behind the other."""

    means: TokenMeans
    ids: np.ndarray
    _at: int = field(default=0)

    def append(self, blocks: Blocks, kept: Sequence[RowPiece], done: Call) -> None:
        count = sum(piece.count for piece in kept)
        ids = self.ids[self._at : self._at + count]
        order = np.argsort(ids, kind="stable")
        tokens, starts = np.unique(ids[order], return_index=True)
        for key, sums in self.means.sums.items():
            rows = np.concatenate(list(row_pieces(blocks[key], kept)))
            if len(tokens):
                sums[tokens] += np.add.reduceat(rows[order].astype(np.float64), starts, axis=0)
        self._at += count
        done()

    def commit(self) -> None:
        """The sums are where they stay."""
