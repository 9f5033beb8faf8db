"""Writes parts: a shard for every site, then the sidecar, then the commit record.

In: a `PartContent`, then captured blocks in row order. Out: durable files and a record that names them.
Rows go to the files as they come, so memory holds no part, however large. The shards of a part are
written side by side, each by the same lane from part to part, so that at most one shard a site is open;
a last lane seals parts, while the others are at the next one already.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from jax_extract.store.finite import all_finite
from jax_extract.store.formats import ENCODERS, SUFFIXES, ShardEncoder, ShardHeader
from jax_extract.store.lanes import Call, Countdown, Lanes
from jax_extract.store.ledger import PARTS, Key, Ledger, part_name
from jax_extract.store.parts import PartContent, Site
from jax_extract.store.row_sums import FEWEST_ROWS, SUMMING_BYTES, SummedRows
from jax_extract.store.sidecar import RunningChecksums, Sidecar, StoredArray
from jax_extract.store.storage.failpoints import step
from jax_extract.store.storage.verbs import BUCKET_SCHEME, NameTaken, PendingFile, Published

Blocks = Mapping[tuple[str, int | None], np.ndarray]  # site key -> [rows, positions, width], of a slab


class RowPiece(NamedTuple):
    """Positions of one row of a block, from `first` on, that are rows of a shard."""

    row: int
    first: int
    count: int


KEEPS_SUMS = "row_sums"  # in the description of a run

_DISK_LANES = 16  # while most wait for the disk or for a processor, one copies and the disk is never idle
_CANCEL_SECONDS = 20.0
_BUCKET_LANES = 32  # an upload waits for the network, not for a processor


class OpenPart(Protocol):
    """A part that takes rows."""

    def append(self, blocks: Blocks, kept: Sequence[RowPiece], done: Call) -> None:
        """Further rows: those pieces of every block, in this order.

        May return before the rows are written; `done` is called when the blocks are not needed any more.
        """
        ...

    def commit(self) -> None:
        """All rows are there. May return before the part is durable."""
        ...


class PartSink(Protocol):
    """What takes parts: the writer here, or the memory of a notebook."""

    def begin(self, content: PartContent) -> OpenPart: ...

    def close(self) -> None:
        """Waits until all that was committed is durable; raises what failed."""
        ...

    def cancel(self) -> None:
        """Lets go of everything that is not durable yet."""
        ...


class PartWriter:
    """The `PartSink` of a ledger's storage.

    Attributes:
      buffer_bytes: what the files that are open at once may hold in memory, besides the blocks.
      keeps_sums: whether sidecars hold sums over rows: in runs that were begun since there are such.
      committed: parts that have a record when this writer is done with them.
      refused: parts to be written again, because other content took a name while theirs was on its way.
    """

    def __init__(
        self,
        ledger: Ledger,
        sites: Sequence[Site],
        shard_format: str,
        dtype: str,
        attempt: str,
        on_failure: Callable[[BaseException], None] = lambda _: None,
        on_commit: Callable[[Mapping[str, Any]], None] = lambda _: None,
        before_part: Callable[[Key, int], None] = lambda key, nbytes: None,
        on_refusal: Callable[[Key], None] = lambda key: None,
        one_file_per_layer: bool = False,
    ) -> None:
        self.ledger = ledger
        self.storage = ledger.storage
        self.sites = tuple(sites)
        self.format = shard_format
        self.dtype = dtype
        self.attempt = attempt
        self.one_file_per_layer = one_file_per_layer
        self.lanes = Lanes(lanes_for(str(ledger.storage), len(sites)) + 1, on_failure)
        self._on_failure = on_failure
        self._failure: BaseException | None = None
        self.keeps_sums = bool(ledger.run["description"].get(KEEPS_SUMS))
        self.buffer_bytes = len(sites) * (ledger.storage.buffer_bytes + (SUMMING_BYTES if self.keeps_sums else 0))
        self.committed = 0
        self.refused = 0
        self._on_commit = on_commit
        self._before_part = before_part  # may wait for the room that the part's rows take
        self._on_refusal = on_refusal
        self._open: set[_OpenPart] = set()
        self._winding_up = False
        self._lock = threading.Lock()

    @property
    def sealing_lane(self) -> int:
        return len(self.lanes.busy_seconds) - 1

    @property
    def value_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    def begin(self, content: PartContent) -> OpenPart:
        values = content.rows * sum(site.width for site in self.sites)
        self._before_part(content.key, values * self.value_bytes)
        part = _OpenPart(self, content)
        with self._lock:
            part.abandoned = self._winding_up
            self._open.add(part)
        return part

    def close(self) -> None:
        try:
            self.lanes.close()
            if self._failure is not None:
                raise self._failure
        finally:
            self._discard_open()

    def cancel(self) -> None:
        """Makes durable what has all its rows, if that goes quickly, and lets go of the rest."""
        with contextlib.suppress(Exception):  # what failed before is being told
            self.commit_what_is_complete(_CANCEL_SECONDS)
        self.lanes.cancel()
        self._discard_open()

    def commit_what_is_complete(self, seconds: float) -> bool:
        """Abandons parts that lack rows and makes the others durable; False where the time did not suffice.

        The loop may go on meanwhile; whatever it still brings is abandoned too.
        """
        with self._lock:
            self._winding_up = True
            for part in self._open:
                part.abandoned = part.abandoned or not part.complete
        return self.lanes.wait(seconds)

    def fail(self, failure: BaseException) -> None:
        """A part could not be written: no other is begun or goes on, but those that have all their rows do."""
        with self._lock:
            self._failure = self._failure or failure
            self._winding_up = True
            for part in self._open:
                part.abandoned = part.abandoned or not part.complete
        self._on_failure(failure)

    def completes(self, part: _OpenPart) -> bool:
        """Takes note that a part has all its rows; False where it was abandoned before."""
        with self._lock:
            part.complete = not part.abandoned
        return part.complete

    def closed(self, part: _OpenPart, record: Mapping[str, Any] | None) -> None:
        """A part is done with; `record` is that of the place, be it this writer's or another's."""
        with self._lock:
            self._open.discard(part)
        part.discard()
        if record is not None:
            self.committed += 1
            self._on_commit(record)

    def refuse(self, part: _OpenPart) -> None:
        """A part cannot be committed as it is, and is done with here."""
        self.refused += 1
        self._on_refusal(part.key)
        self.closed(part, None)

    def _discard_open(self) -> None:
        with self._lock:
            parts, self._open = self._open, set()
        for part in parts:
            part.discard()


def lanes_for(place: str, sites: int) -> int:
    """How many shards are written at once."""
    return max(1, min(sites, _BUCKET_LANES if place.startswith(BUCKET_SCHEME) else _DISK_LANES))


class _OpenPart:
    def __init__(self, writer: PartWriter, content: PartContent) -> None:
        self._writer = writer
        self._content = content
        self.complete = False
        self.abandoned = False
        lanes = writer.sealing_lane
        self._shards = [(i % lanes, _Shard(writer, content, site)) for i, site in enumerate(writer.sites)]

    @property
    def key(self) -> Key:
        return self._content.key

    def append(self, blocks: Blocks, kept: Sequence[RowPiece], done: Call) -> None:
        if self.abandoned:
            done()
            return
        countdown = Countdown(len(self._shards), done)
        for lane, shard in self._shards:
            self._submit(lane, partial(self._append, shard, blocks[shard.site.key], kept, countdown))

    def commit(self) -> None:
        if not self._writer.completes(self):
            return
        countdown = Countdown(len(self._shards), lambda: self._submit(self._writer.sealing_lane, self._seal))
        for lane, shard in self._shards:
            self._submit(lane, partial(self._finish, shard, countdown))

    def discard(self) -> None:
        for _, shard in self._shards:
            shard.discard()

    def _submit(self, lane: int, call: Call) -> None:
        self._writer.lanes.submit(lane, partial(self._guarded, call))

    def _guarded(self, call: Call) -> None:
        """One call of this part in a lane; where it fails, this part and those that lack rows are over."""
        if self.abandoned and self.complete:
            return
        try:
            call()
        except BaseException as failure:  # noqa: BLE001 (handed to the thread that submits or waits)
            self.abandoned = True
            self._writer.fail(failure)

    def _append(self, shard: _Shard, block: np.ndarray, kept: Sequence[RowPiece], done: Call) -> None:
        if not self.abandoned:
            shard.append(block, kept)
        done()

    def _finish(self, shard: _Shard, done: Call) -> None:
        shard.finish()
        done()

    def _seal(self) -> None:
        """Everything after the last shard: names durable, sidecar, record."""
        writer, content, shards = self._writer, self._content, [shard for _, shard in self._shards]
        if any(shard.published is None for shard in shards):  # a name was taken: the part is to be written again
            return writer.refuse(self)
        storage = writer.storage
        storage.sync()
        arrays = tuple(shard.stored_array() for shard in shards)
        name = f"{PARTS}/{part_name(content.key)}"
        sidecar = storage.create(f"{name}.safetensors", f"{name}_attempt_{writer.attempt}.safetensors")
        try:
            sidecar.write(Sidecar(content, arrays).to_bytes())
            with step("part.sidecar"):
                published = sidecar.publish()
            storage.sync(PARTS)
        except NameTaken:
            return writer.refuse(self)
        finally:
            sidecar.discard()
        record = {
            "batch": content.batch,
            "part": content.part,
            "parts_in_batch": content.parts_in_batch,
            "samples": len(content.sample_ids),
            "tokens": content.tokens,
            "rows": content.rows,
            "not_finite_rows": sum(shard.not_finite for shard in shards),
            "plan": content.plan,
            "attempt": writer.attempt,
            "sidecar": file_record(published, sidecar),
            "files": [
                {"hook": s.site.hook, "layer": s.site.layer, **file_record(s.published, s.file)}
                for s in shards
                if s.published
            ],
        }
        with step("part.record"):
            mine = writer.ledger.commit(record)
        return writer.closed(self, record if mine else writer.ledger.record(content.key))


def file_record(published: Published, file: PendingFile) -> dict[str, Any]:
    """What a commit record says of a file."""
    return {
        "path": published.name,
        "bytes": file.size,
        "crc32c": file.crc32c,
        "generation": published.generation,
    }


class _Shard:
    """One shard of one part; opened, written and published in one lane, a call at a time."""

    def __init__(self, writer: PartWriter, content: PartContent, site: Site) -> None:
        self.site = site
        self.published: Published | None = None
        self._not_finite = 0
        self._writer = writer
        self._content = content
        self._checksums: RunningChecksums | None = None
        self._file: PendingFile | None = None
        self._encoder: ShardEncoder | None = None
        self._summed: SummedRows | None = None

    @property
    def not_finite(self) -> int:
        """Rows with a value that is no finite number."""
        return self._summed.not_finite if self._summed else self._not_finite

    @property
    def file(self) -> PendingFile:
        assert self._file is not None
        return self._file

    def append(self, block: np.ndarray, kept: Sequence[RowPiece]) -> None:
        encoder = self._opened()
        for rows in row_pieces(block, kept):
            finite = self._write(encoder, rows.reshape(-1))
            if self._summed:  # which counts them too
                self._summed.add(rows)
            elif not finite:
                self._not_finite += int((~np.isfinite(rows).all(axis=1)).sum())

    def _write(self, encoder: ShardEncoder, values: np.ndarray) -> bool:
        """Writes values [n] and says whether all are finite, unless they are summed, which shows it.

        In pieces that stay in the cache while that is done.
        """
        assert self._checksums is not None
        finite, at = True, 0
        while at < len(values):
            piece = values[at : at + self._checksums.room // values.itemsize]
            finite = finite and (self._summed is not None or all_finite(piece))
            encoder.append(piece.view(np.uint8).data)
            self._checksums.advance(piece.nbytes, self.file.crc32c)
            at += len(piece)
        return finite

    def finish(self) -> None:
        self._opened().finish()
        try:
            with step("part.shard"):
                self.published = self.file.publish()
        except NameTaken:
            self.published = None
        self.file.discard()  # before the lane opens the next part's

    def stored_array(self) -> StoredArray:
        assert self.published is not None
        assert self._checksums is not None
        sums = self._summed.sums() if self._summed else None
        return StoredArray(self.site, self.published.name, self._opened().offset, tuple(self._checksums.values()), sums)

    def discard(self) -> None:
        if self._encoder is not None:
            self._encoder.abandon()
        if self._file is not None:
            self._file.discard()

    def _opened(self) -> ShardEncoder:
        if self._encoder is None:
            writer, content = self._writer, self._content
            suffix = SUFFIXES[writer.format]
            name = self.site.shard_name(
                content.batch, content.part, content.parts_in_batch, suffix, writer.one_file_per_layer
            )
            self._file = writer.storage.create(
                name, f"{name.removesuffix(f'.{suffix}')}_attempt_{writer.attempt}.{suffix}"
            )
            header = ShardHeader(
                content.rows,
                self.site.width,
                writer.dtype,
                self.site.hook,
                self.site.layer,
                content.sample_ids,
                content.row_offsets,
            )
            self._encoder = ENCODERS[writer.format](self._file, header)
            self._checksums = RunningChecksums(self._file.crc32c)
            if writer.keeps_sums and content.rows >= FEWEST_ROWS:
                self._summed = SummedRows(self.site.width, writer.value_bytes)
        return self._encoder


def row_pieces(block: np.ndarray, kept: Sequence[RowPiece]) -> Iterator[np.ndarray]:
    """The pieces of a block [rows, positions, width] as contiguous arrays [n, width], as few as there can be."""
    positions, width = block.shape[1:]
    flat = block.reshape(-1, width)
    start = end = 0
    for piece in kept:
        first = piece.row * positions + piece.first
        if first != end and end > start:
            yield flat[start:end]
        start, end = (start if first == end else first), first + piece.count
    if end > start:
        yield flat[start:end]
