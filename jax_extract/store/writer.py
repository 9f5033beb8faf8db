"""Writes parts: a shard for every site, then the sidecar, then the commit record.

In: a `PartContent`, then captured blocks in row order. Out: durable files and a record that names them.
Rows go to the files as they come, so memory holds no part, however large. A name that is taken by
equal content is adopted; by other content, the attempt's own name is used and the record says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from jax_extract.store.filesystem import Directory, PendingFile, crc32c
from jax_extract.store.formats import ENCODERS, SUFFIXES, ShardEncoder, ShardHeader
from jax_extract.store.ledger import PARTS, Ledger, part_name
from jax_extract.store.parts import PartContent, Site
from jax_extract.store.sidecar import BlockChecksums, Sidecar, StoredArray

Blocks = Mapping[tuple[str, int | None], np.ndarray]  # site key -> [samples, positions, width]


class PartSink(Protocol):
    """What takes parts: the directory writer here, or the memory of a notebook."""

    def begin(self, content: PartContent) -> None: ...

    def append(self, blocks: Blocks, kept: Sequence[int]) -> None:
        """Further samples: of each, the first `kept[i]` positions of its block are rows of the shard."""
        ...

    def commit(self) -> None: ...

    def abandon(self) -> None:
        """Lets go of a part that was begun; nothing of it stays."""
        ...


@dataclass
class _Shard:
    site: Site
    file: PendingFile
    encoder: ShardEncoder
    checksums: BlockChecksums = field(default_factory=BlockChecksums)


class PartWriter:
    """The directory's `PartSink`; one part at a time."""

    def __init__(self, ledger: Ledger, sites: Sequence[Site], shard_format: str, dtype: str, attempt: str) -> None:
        self._ledger = ledger
        self._directory: Directory = ledger.directory
        self._sites = sites
        self._format = shard_format
        self._dtype = dtype
        self._attempt = attempt
        self._content: PartContent | None = None
        self._shards: list[_Shard] = []
        self._not_finite = 0  # rows of this part, over all sites, with a value that is no finite number

    def begin(self, content: PartContent) -> None:
        self._content = content
        self._not_finite = 0
        for site in self._sites:
            header = ShardHeader(
                content.rows, site.width, self._dtype, site.hook, site.layer, content.sample_ids, content.row_offsets
            )
            file = self._directory.create()
            try:
                self._shards.append(_Shard(site, file, ENCODERS[self._format](file, header)))
            except BaseException:
                file.discard()
                raise

    def append(self, blocks: Blocks, kept: Sequence[int]) -> None:
        for shard in self._shards:
            for piece in row_pieces(blocks[shard.site.key], kept):
                rows = piece.reshape(-1).view(np.uint8).data
                if not np.isfinite(piece).all():
                    finite = np.isfinite(piece.reshape(-1, shard.site.width)).all(axis=1)
                    self._not_finite += int((~finite).sum())
                shard.encoder.append(rows)
                shard.checksums.update(rows)

    def commit(self) -> None:
        content = self._content
        assert content is not None
        arrays, files = [], []
        for shard in self._shards:
            shard.encoder.finish()
            name = shard.site.shard_name(content.batch, content.part, content.parts_in_batch, SUFFIXES[self._format])
            name = self._publish(shard.file, name)
            arrays.append(StoredArray(shard.site, name, shard.encoder.offset, tuple(shard.checksums.values())))
            files.append(
                {
                    "path": name,
                    "hook": shard.site.hook,
                    "layer": shard.site.layer,
                    "bytes": shard.file.size,
                    "crc32c": shard.file.crc32c,
                    "generation": None,
                }
            )
        self._directory.sync()
        with self._directory.create() as sidecar:
            sidecar.write(Sidecar(content, tuple(arrays)).to_bytes())
            sidecar_name = self._publish(sidecar, f"{PARTS}/{part_name(content.key)}.safetensors")
            self._directory.sync(PARTS)
        record: dict[str, Any] = {
            "batch": content.batch,
            "part": content.part,
            "parts_in_batch": content.parts_in_batch,
            "samples": len(content.sample_ids),
            "tokens": content.tokens,
            "rows": content.rows,
            "not_finite_rows": self._not_finite,
            "plan": content.plan,
            "attempt": self._attempt,
            "sidecar": {"path": sidecar_name, "bytes": sidecar.size, "crc32c": sidecar.crc32c},
            "files": files,
        }
        self._ledger.commit(record)
        self.abandon()

    def abandon(self) -> None:
        """Lets go of the part that is being written; nothing of it stays."""
        for shard in self._shards:
            shard.file.discard()
        self._shards = []
        self._content = None

    def _publish(self, file: PendingFile, name: str) -> str:
        try:
            file.publish(name)
            return name
        except FileExistsError:
            if self._same(file, name):
                return name
        stem, _, suffix = name.rpartition(".")
        own = f"{stem}_attempt_{self._attempt}.{suffix}"
        file.publish(own)
        return own

    def _same(self, file: PendingFile, name: str) -> bool:
        """Whether the file that has the name already holds the same bytes."""
        if self._directory.size(name) != file.size:
            return False
        value = 0
        with self._directory.path(name).open("rb") as existing:
            while chunk := existing.read(1 << 22):
                value = crc32c(chunk, value)
        return value == file.crc32c


def row_pieces(block: np.ndarray, kept: Sequence[int]) -> Iterator[np.ndarray]:
    """The rows of a block [samples, positions, width] that are no padding, as contiguous pieces in order."""
    if all(rows == block.shape[1] for rows in kept):
        yield block[: len(kept)]
        return
    for i, rows in enumerate(kept):
        if rows:
            yield block[i, :rows]
