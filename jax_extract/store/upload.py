"""Bringing committed parts of a local run into a bucket, exactly once.

In: a local ledger and the bucket's. Out: the same shards and records there. A part's record is written in
the bucket after its last byte, as everywhere; what is there already is adopted; so an upload can be broken
off and repeated at any point. Local shards are deleted only when the bucket's record names them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from jax_extract.errors import UserError
from jax_extract.store.differences import differences
from jax_extract.store.lanes import Countdown, Lanes
from jax_extract.store.ledger import PARTS, UPLOADED, Key, Ledger, Record, part_name, to_json
from jax_extract.store.parts import ShardName
from jax_extract.store.sidecar import Sidecar
from jax_extract.store.storage.failpoints import step
from jax_extract.store.storage.opening import open_storage
from jax_extract.store.storage.verbs import BUCKET_SCHEME, NameTaken, Published, Storage, crc32c
from jax_extract.store.survey import survey

_LANES = 16  # an upload waits for the network, not for a processor
_CHUNK = 8 << 20
_LOOK_SECONDS = 0.5  # whether an upload has failed, by one who waits for its bytes


def open_copy(source: Ledger, target: Ledger) -> Ledger:
    """The ledger in the bucket, if it is a copy of the local one; UserError where it is another run."""
    if target.run["run_id"] != source.run["run_id"]:
        changed = differences(source.run["identity"], target.run["identity"]) or "it was started on its own"
        raise UserError(
            f"{target.storage} holds another run than {source.storage}: {changed}; choose another prefix in the bucket"
        )
    return target


def open_noted(source: Ledger, place: str) -> Ledger:
    """The bucket that a note beside the records names, if it holds the same run; the note may be anybody's."""
    if not place.startswith(BUCKET_SCHEME):
        raise UserError(
            f"{source.storage.where(UPLOADED)} says that shards were uploaded to {place[:80]!r}, which is no bucket; "
            "restore that folder from a copy"
        )
    try:
        there = Ledger.open(open_storage(place))
        if there.run["run_id"] != source.run["run_id"]:
            raise UserError(f"{place} holds another run; give the bucket itself if that is the one you want")
    except UserError as error:
        raise UserError(f"shards of {source.storage} were uploaded to {place} and deleted here, but: {error}") from None
    return there


class _NotAsCommitted(Exception):
    """A file that a record names is not on the disk as the record says."""


class Uploader:
    """Uploads parts side by side, several shards at once.

    Attributes:
      uploaded: keys of the parts that this uploader has brought over.

    A part that is not on the disk as it was committed ends the upload; or, where `leave_out` is given, is left out
    and told to it, with what is wrong, and the others go on.
    """

    def __init__(
        self,
        source: Ledger,
        target: Ledger,
        attempt: str,
        delete_local: bool = False,
        on_failure: Callable[[BaseException], None] = lambda _: None,
        on_bytes: Callable[[int], None] = lambda _: None,
        leave_out: Callable[[Key, str], None] | None = None,
    ) -> None:
        self._source = source
        self._target = target
        self._attempt = attempt
        self._delete_local = delete_local
        self._on_bytes = on_bytes
        self._leave_out = leave_out
        self._left_out: set[Key] = set()
        self._lanes = Lanes(_LANES + 1, on_failure)  # the last one seals
        self._next_lane = 0
        self._on_the_way: dict[Key, int] = {}  # bytes of parts that are begun, or submitted and not there yet
        self._shrunk = threading.Condition()
        self._given_up: BaseException | None = None
        self._there = target.storage.entries()  # what an upload that was broken off has left
        self.buffer_bytes = upload_buffer_bytes(target.storage)
        self.uploaded: list[Key] = []

    def submit(self, record: Mapping[str, Any]) -> None:
        """Queues a part that is committed locally; returns at once, raises what failed before."""
        files = [dict(file) for file in record["files"]]
        with self._shrunk:
            self._on_the_way[_key(record)] = sum(file["bytes"] for file in record["files"])
        countdown = Countdown(len(files), lambda: self._lanes.submit(_LANES, partial(self._seal, dict(record), files)))
        for file in files:
            self._lanes.submit(self._next_lane, partial(self._upload, dict(record), file, countdown))
            self._next_lane = (self._next_lane + 1) % _LANES

    def wait(self, seconds: float | None = None) -> bool:
        return self._lanes.wait(seconds)

    def expect(self, most: int, key: Key, nbytes: int) -> None:
        """Waits until a part of `nbytes` makes no more than `most` that are on their way, or is alone.

        Called before its first byte is written; it is on its way from then on. Raises what failed.
        """
        with self._shrunk:
            while self._on_the_way and sum(self._on_the_way.values()) + nbytes > most:
                if self._given_up is not None:
                    raise self._given_up
                self._shrunk.wait(_LOOK_SECONDS)
                self._lanes.require_sound()
            self._on_the_way[key] = nbytes

    def give_up(self, failure: BaseException) -> None:
        """What was expected does not come any more: ends every wait for it."""
        with self._shrunk:
            self._given_up = self._given_up or failure
            self._shrunk.notify_all()

    def forget(self, key: Key) -> None:
        """An expected part does not come, or has arrived."""
        with self._shrunk:
            self._on_the_way.pop(key, None)
            self._shrunk.notify_all()

    def close(self) -> None:
        """Waits until all is in the bucket; raises what failed. With `delete_local`, no shard it has is left here."""
        self._lanes.close()
        if self._delete_local:
            self._release_rest()

    def cancel(self) -> None:
        self._lanes.cancel()

    def _upload(self, record: Record, file: dict[str, Any], done: Callable[[], None]) -> None:
        if _key(record) in self._left_out:
            return
        try:
            published = self._copy(file)
        except _NotAsCommitted as wrong:
            self._refuse(record, str(wrong))
            return
        file.update(path=published.name, generation=published.generation)
        done()

    def _refuse(self, record: Record, wrong: str) -> None:
        """Of a part that is not here as it was committed: no record of it is written."""
        key, place = _key(record), self._source.storage
        if self._target.is_committed(key):  # another process has brought the part over and deleted it here
            pass
        elif self._leave_out is None:
            raise UserError(
                f"{wrong} in {place}, and its part was not uploaded; restore it from a copy, or give the part up with "
                f"jax-extract sweep {place} --damaged and give the same command again"
            )
        else:
            self._left_out.add(key)
            self._leave_out(key, wrong)
        self.forget(key)

    def _copy(self, file: Mapping[str, Any]) -> Published:
        """One shard, in chunks; what lies on the disk must be what was committed."""
        name = str(file["path"])
        there = self._there.get(name)
        if there and (there.size, there.crc32c) == (file["bytes"], file["crc32c"]):
            self._on_bytes(there.size)
            return Published(name, there.generation)
        while True:
            pending = self._target.storage.create(name, _own_name(name, self._attempt))
            try:
                while chunk := self._read(name, pending.size, _CHUNK):
                    pending.write(chunk)
                    self._on_bytes(len(chunk))
                _require_committed(file, pending.size, pending.crc32c)
                with step("upload.shard"):
                    return pending.publish()
            except NameTaken:
                continue
            finally:
                pending.discard()

    def _read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        try:
            return self._source.storage.read(name, offset, size)
        except FileNotFoundError:
            raise _NotAsCommitted(f"{name} is missing") from None
        except OSError as error:
            raise _NotAsCommitted(f"{name} cannot be read ({error.strerror or error})") from None

    def _seal(self, record: Record, files: list[dict[str, Any]]) -> None:
        """Sidecar and record of a part whose shards are all there."""
        key = _key(record)
        local = record["sidecar"]
        try:
            data = self._read(local["path"])
            _require_committed(local, len(data), crc32c(data))
        except _NotAsCommitted as wrong:
            self._refuse(record, str(wrong))
            return
        renamed = {str(old["path"]): str(new["path"]) for old, new in zip(record["files"], files, strict=True)}
        if any(old != new for old, new in renamed.items()):
            sidecar = Sidecar.read(self._source.storage, local["path"], local["crc32c"])
            arrays = tuple(dataclasses.replace(array, path=renamed[array.path]) for array in sidecar.arrays)
            data = dataclasses.replace(sidecar, arrays=arrays).to_bytes()
        published = self._put(f"{PARTS}/{part_name(key)}.safetensors", data)
        entry = {"path": published.name, "bytes": len(data), "crc32c": crc32c(data), "generation": published.generation}
        copied = {name: value for name, value in record.items() if name not in ("run", "uploaded_to")}
        with step("upload.record"):
            if not self._target.commit({**copied, "sidecar": entry, "files": files}):
                self._target.record(key)  # another's, and as good: of this run
        if self._delete_local:
            self._release(key, record)
        self.uploaded.append(key)
        self.forget(key)

    def _put(self, name: str, data: bytes) -> Published:
        while True:
            pending = self._target.storage.create(name, _own_name(name, self._attempt))
            try:
                pending.write(data)
                return pending.publish()
            except NameTaken:
                continue
            finally:
                pending.discard()

    def _release(self, key: Key, record: Record) -> None:
        """Says where the shards are from now on, durably, and deletes them here."""
        storage = self._source.storage
        note = to_json({"to": str(self._target.storage)})
        name = f"{UPLOADED}/{part_name(key)}.json"
        with contextlib.suppress(FileExistsError), step("upload.note"):
            storage.write(name, note)
        for file in record["files"]:
            if ShardName.parse(str(file["path"])):  # a record that was tampered with names no other file
                with step("upload.delete_local"):
                    storage.delete(file["path"])

    def _release_rest(self) -> None:
        """Releases what an earlier upload brought over and did not come to delete."""
        here = self._source.storage.entries()
        left = {
            key: record
            for key, record in self._source.records()[0].items()
            if any(file["path"] in here for file in record["files"])
        }
        there = survey(self._target).committed if left else {}
        for key, record in left.items():
            if key in there:
                self._release(key, record)


def _key(record: Mapping[str, Any]) -> Key:
    return record["batch"], record["part"]


def _require_committed(file: Mapping[str, Any], size: int, checksum: int) -> None:
    if (size, checksum) != (file["bytes"], file["crc32c"]):
        raise _NotAsCommitted(f"{file['path']} is damaged on the disk")


def upload_buffer_bytes(storage: Storage) -> int:
    """What an `Uploader` into this storage may hold in memory."""
    return _LANES * (storage.buffer_bytes + _CHUNK)


def _own_name(name: str, attempt: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(f"{path.stem.partition('_attempt_')[0]}_attempt_{attempt}{path.suffix}"))
