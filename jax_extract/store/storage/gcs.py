"""Durable, create-only objects in a Google Cloud Storage bucket.

In: names and bytes. Out: objects that are either whole or not there, and that took no name from another:
every create carries the precondition that its name is free. Our CRC32C is sent with the last byte for the
service to check, and the service's is compared with ours. Memory holds one chunk of a file, whatever its size.
"""

from __future__ import annotations

import contextlib
import errno
import io
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from http import HTTPStatus
from typing import Any, NoReturn
from urllib.parse import quote

import requests
from google.cloud.storage import Blob

from jax_extract.errors import UserError
from jax_extract.store.storage.failpoints import step
from jax_extract.store.storage.gcs_requests import SAFE, Answer, Damaged, Once, Patience, Requests, reason_of
from jax_extract.store.storage.gcs_upload import GRAIN, REJECTED, TAKEN, Upload, content_type, decoded_crc32c
from jax_extract.store.storage.verbs import BUCKET_SCHEME, Chunk, Entry, NameTaken, Published, checked_name, crc32c

_CHUNK = 8 << 20
_ONE_REQUEST = 1 << 20  # up to here content and metadata go in one request, which copies the content
_RECEIVED = 256 << 10  # read from a connection at once, and lost where it breaks
_READERS = 32
_TRIES = 3  # for content that arrives damaged, or whose upload the service loses

_PATIENCE = Patience()
_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_LONGEST_PREFIX = 700  # bytes; a whole name may have 1,024

_MISSING = HTTPStatus.NOT_FOUND


class Bucket:
    """A prefix of a bucket as a `Storage`."""

    def __init__(
        self, url: str, bucket: str, prefix: str, patience: Patience = _PATIENCE, buffer_bytes: int = _CHUNK
    ) -> None:
        assert buffer_bytes % GRAIN == 0
        self.buffer_bytes = buffer_bytes
        self.requests = Requests(bucket, patience)
        self._url = url
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._lock = threading.Lock()
        self._losses: Counter[str] = Counter()

    @classmethod
    def parse(cls, url: str, patience: Patience = _PATIENCE, buffer_bytes: int = _CHUNK) -> Bucket:
        """The place that `gs://bucket/prefix` names; UserError where it is none. Nothing is asked yet."""
        bucket, _, prefix = url.removeprefix(BUCKET_SCHEME).partition("/")
        prefix = prefix.rstrip("/")
        if not _BUCKET_NAME.fullmatch(bucket):
            raise UserError(f"{url!r} names no bucket; write gs://bucket/prefix, the bucket in 3 or more small letters")
        parts = prefix.split("/") if prefix else []
        if {"", ".", ".."} & set(parts) or not prefix.isprintable() or len(prefix.encode()) > _LONGEST_PREFIX:
            raise UserError(f"{url[:80]!r} is no usable place; write gs://bucket/prefix, as in gs://my-bucket/runs/1")
        return cls(url, bucket, prefix, patience, buffer_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).parse, (self._url, self.requests.patience, self.buffer_bytes)

    def __str__(self) -> str:
        return self._url

    def where(self, name: str) -> str:
        return f"{BUCKET_SCHEME}{self._bucket}/{self._key(name)}"

    def require_usable(self) -> None:
        """Lists, and begins an upload that is never finished: it shows the permission and leaves no object."""
        hurried = self.requests.hurried()
        list(self._pages("", hurried, most=1))
        Upload(hurried, self.blob("_run/permission-to-write"))

    def make(self, *folders: str) -> None:
        pass

    def require_plain(self, folder: str) -> None:
        pass

    def sync(self, folder: str = "") -> None:
        pass

    def free_bytes(self) -> int | None:
        return None

    # ----------------------------------------------------------------------------- writing

    def create(self, name: str, own: str) -> BucketFile:
        return BucketFile(self, name, own)

    def write(self, name: str, data: bytes) -> None:
        with step("gcs.write"):
            try:
                self.put(name, memoryview(data), crc32c(data))
            except FileExistsError:
                # Where an answer was lost, what is there is our own.
                if self.read(name) != data:
                    raise

    def replace(self, name: str, data: bytes) -> None:
        with step("gcs.replace"):
            self.put(name, memoryview(data), crc32c(data), only_if_free=False)

    def delete(self, name: str) -> None:
        with step("gcs.delete"):
            self.remove(name)

    def remove(self, name: str, generation: int | None = None) -> None:
        """Removes an object if it is there, and, where a generation is given, still that one."""

        def attempt(once: Once) -> None:
            self.blob(name).delete(if_generation_match=generation, **once)

        with contextlib.suppress(Answer):
            self.requests.within(f"deleting {self.where(name)}", attempt, (_MISSING, TAKEN))

    def put(self, name: str, data: memoryview, checksum: int, only_if_free: bool = True) -> Entry:
        """Creates an object from what is in memory; again where it arrives damaged.

        Raises:
          FileExistsError: the name is taken.
        """
        why = "its checksum there is another"
        for _ in range(_TRIES):
            try:
                if len(data) <= _ONE_REQUEST:
                    entry = self._put_at_once(name, data, only_if_free)
                else:
                    entry = self.upload(name, only_if_free).finish(data, len(data), checksum)
            except Answer as answer:
                if answer.status == TAKEN:
                    raise FileExistsError(errno.EEXIST, "the name is taken", self.where(name)) from None
                why = str(answer)
                continue
            if (entry.size, entry.crc32c) == (len(data), checksum):
                return entry
            self.remove(name, entry.generation)
        raise self._never_whole(name, why)

    def _put_at_once(self, name: str, data: memoryview, only_if_free: bool) -> Entry:
        def attempt(once: Once) -> Entry:
            blob = self.blob(name)
            blob.upload_from_file(
                io.BytesIO(data),
                size=len(data),
                content_type=content_type(name),
                if_generation_match=0 if only_if_free else None,
                checksum="crc32c",
                **once,
            )
            return _entry(blob)

        return self.requests.within(f"writing {self.where(name)}", attempt, (TAKEN, REJECTED))

    def upload(self, name: str, only_if_free: bool = True) -> Upload:
        """Starts a resumable upload; FileExistsError where the name is known to be taken already."""
        return Upload(self.requests, self.blob(name), only_if_free)

    def lose(self, name: str, why: str) -> NoReturn:
        """For content that is gone from memory and did not arrive: it is to be written again, but not forever."""
        with self._lock:
            self._losses[name] += 1
            losses = self._losses[name]
        if losses < _TRIES:
            raise NameTaken(f"the upload of {self.where(name)} was lost ({why})")
        raise self._never_whole(name, why)

    def _never_whole(self, name: str, why: str) -> UserError:
        return UserError(
            f"{self.where(name)} did not arrive whole in {_TRIES} uploads ({why}); {SAFE}, and if it comes again, "
            "on another machine, as this one's memory or network may be faulty"
        )

    # ----------------------------------------------------------------------------- reading

    def read(self, name: str, offset: int = 0, size: int | None = None, generation: int | None = None) -> bytes:
        if size == 0:
            return b""

        def attempt(once: Once) -> bytes:
            nonlocal generation
            with self._media(name, offset, size, generation, once) as response:
                if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    return b""
                data = response.raw.read()
                if response.status_code == HTTPStatus.OK and _stated_crc32c(response) not in (None, crc32c(data)):
                    raise Damaged("it was damaged on the way")
                return data

        with self._missing_is_told(name):
            try:
                return self.requests.within(f"reading {self.where(name)}", attempt, (_MISSING,))
            except Answer:
                if generation is None:
                    raise
                generation = None  # copied or restored since; whoever names a generation knows the checksum too
                return self.requests.within(f"reading {self.where(name)}", attempt, (_MISSING,))

    def read_into(self, name: str, offset: int, buffer: memoryview, generation: int | None = None) -> int:
        got = 0

        def attempt(once: Once) -> int:
            nonlocal got, generation
            with self._media(name, offset + got, len(buffer) - got, generation, once) as response:
                if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    return got
                if generation is None and (said := response.headers.get("x-goog-generation")):
                    generation = int(said)  # a repetition goes on in the same content
                while got < len(buffer) and (n := response.raw.readinto(buffer[got : got + _RECEIVED])):
                    got += n
            return got

        if not buffer:
            return 0
        with self._missing_is_told(name):
            try:
                return self.requests.within(f"reading {self.where(name)}", attempt, (_MISSING,))
            except Answer:
                if generation is None:
                    raise
                got, generation = 0, None
                return self.requests.within(f"reading {self.where(name)}", attempt, (_MISSING,))

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        with ThreadPoolExecutor(_READERS, thread_name_prefix="jax_extract-reader") as pool:
            asked = {name: pool.submit(self.read, name) for name in names}
            try:
                return {name: data.result() for name, data in asked.items()}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def exists(self, name: str) -> bool:
        return self.look(name) is not None

    def look(self, name: str) -> Entry | None:
        """What is there under a name."""

        def attempt(once: Once) -> Entry:
            blob = self.blob(name)
            blob.reload(**once)
            return _entry(blob)

        try:
            return self.requests.within(f"looking for {self.where(name)}", attempt, (_MISSING,))
        except Answer:
            return None

    def written_at(self, name: str) -> datetime | None:
        def attempt(once: Once) -> datetime | None:
            blob = self.blob(name)
            blob.reload(**once)
            return blob.time_created

        try:
            return self.requests.within(f"looking for {self.where(name)}", attempt, (_MISSING,))
        except Answer:
            return None

    def entries(self, folder: str = "") -> dict[str, Entry]:
        found = {name: entry for page in self._pages(folder, self.requests) for name, entry in page.items()}
        return dict(sorted(found.items()))

    def names(self, folder: str = "") -> list[str]:
        return list(self.entries(folder))

    def _pages(self, folder: str, to: Requests, most: int | None = None) -> Iterator[dict[str, Entry]]:
        prefix = f"{self._key(folder)}/" if checked_name(folder, self) else self._prefix
        token: str | None = None

        def attempt(once: Once) -> tuple[dict[str, Entry], str | None]:
            listing = to.client.list_blobs(
                self._bucket,
                prefix=prefix,
                delimiter="/",
                page_token=token,
                max_results=most,
                fields="items(name,size,crc32c,generation),nextPageToken",
                **once,
            )
            blobs = next(listing.pages, ())
            names = ((str(blob.name).removeprefix(prefix), blob) for blob in blobs)
            return {name: _entry(blob) for name, blob in names if name}, listing.next_page_token

        while True:
            page, token = to.within(f"listing {BUCKET_SCHEME}{self._bucket}/{prefix}", attempt)
            yield page
            if not token or most:
                return

    @contextlib.contextmanager
    def _missing_is_told(self, name: str) -> Iterator[None]:
        try:
            yield
        except Answer:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", self.where(name)) from None

    def _media(self, name: str, offset: int, size: int | None, generation: int | None, once: Once) -> requests.Response:
        """An object's content on its way; only what is asked for."""
        query = {"alt": "media", **({} if generation is None else {"generation": str(generation)})}
        ranged = offset > 0 or size is not None
        last = "" if size is None else str(offset + size - 1)
        response = self.requests.session.get(
            f"{self.requests.client.api_endpoint}/storage/v1/b/{self._bucket}/o/{quote(self._key(name), safe='')}",
            params=query,
            headers={"Accept-Encoding": "identity", **({"Range": f"bytes={offset}-{last}"} if ranged else {})},
            timeout=once["timeout"],
            stream=True,
            allow_redirects=False,
        )
        wanted = HTTPStatus.PARTIAL_CONTENT if ranged else HTTPStatus.OK
        if response.status_code not in (wanted, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE):
            with response:
                raise Answer(response.status_code, reason_of(response))
        return response

    def blob(self, name: str) -> Blob:
        return self.requests.client.bucket(self._bucket).blob(self._key(name))

    def _key(self, name: str) -> str:
        return self._prefix + checked_name(name, self)


class BucketFile:
    """A file being written in a `Bucket`; a `PendingFile`.

    While all of it fits into one chunk, nothing is sent before `publish`, and it can be sent again under
    another name. What has been sent is gone from memory.
    """

    def __init__(self, bucket: Bucket, name: str, own: str) -> None:
        self._bucket = bucket
        self._name = name
        self._own = own
        self._target = name
        self._buffer = bytearray()
        self._filled = 0
        self._upload: Upload | None = None
        self._lost: Answer | None = None
        self.size = 0
        self.crc32c = 0

    def write(self, data: Chunk) -> int:
        view = memoryview(data)
        if view and not self._buffer:
            self._buffer = bytearray(self._bucket.buffer_bytes)
        while view and not self._lost:
            if self._filled == len(self._buffer):
                self._send_chunk()
            piece = view[: len(self._buffer) - self._filled]
            # A bytearray itself would copy the piece once more.
            memoryview(self._buffer)[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            view = view[len(piece) :]
        self.crc32c = crc32c(data, self.crc32c)
        self.size += len(data)
        return len(data)

    def publish(self) -> Published:
        with step("gcs.finish"):
            return self._publish_at_once() if self._upload is None else self._publish_rest(self._upload)

    def discard(self) -> None:
        # An upload that is not finished is no object; the service forgets it by itself.
        self._buffer = bytearray()
        self._upload = None

    @property
    def _waiting(self) -> memoryview:
        return memoryview(self._buffer)[: self._filled]

    def _send_chunk(self) -> None:
        if self._upload is None:
            self._upload = self._begin()
        try:
            with step("gcs.upload_chunk"):
                self._upload.send(self._waiting)
        except Answer as answer:
            self._lost = answer  # told by publish, whose caller knows what to do
        self._filled = 0

    def _begin(self) -> Upload:
        bucket = self._bucket
        if bucket.exists(self._name):
            self._target = self._own
        with step("gcs.create"):
            with contextlib.suppress(FileExistsError):
                return bucket.upload(self._target)
            self._target = self._own
            with contextlib.suppress(FileExistsError):
                return bucket.upload(self._own)
            bucket.remove(self._own)  # this process's, from a time when it gave the whole part up
            return bucket.upload(self._own)

    def _publish_at_once(self) -> Published:
        for name in (self._name, self._own):
            try:
                return Published(name, self._bucket.put(name, self._waiting, self.crc32c).generation)
            except FileExistsError:
                if there := self._equal(name):
                    return there
        raise self._own_is_taken()

    def _publish_rest(self, upload: Upload) -> Published:
        bucket = self._bucket
        if self._lost:
            bucket.lose(self._name, str(self._lost))
        try:
            entry = upload.finish(self._waiting, self.size, self.crc32c)
        except Answer as answer:
            if there := self._equal(self._target):  # of another worker, or ours, whose answer was lost
                return there
            if answer.status != TAKEN:
                bucket.lose(self._name, str(answer))
            if self._target == self._own:
                raise self._own_is_taken() from None
            raise NameTaken(bucket.where(self._name)) from None
        if not self._is(entry):
            bucket.remove(self._target, entry.generation)
            bucket.lose(self._name, "its checksum there was another")
        if self._target == self._own and (there := self._equal(self._name)):
            bucket.remove(self._own, entry.generation)
            return there
        return Published(self._target, entry.generation)

    def _equal(self, name: str) -> Published | None:
        """What has a name, if it is the same content."""
        entry = self._bucket.look(name)
        return Published(name, entry.generation) if entry and self._is(entry) else None

    def _is(self, entry: Entry) -> bool:
        return (entry.size, entry.crc32c) == (self.size, self.crc32c)

    def _own_is_taken(self) -> UserError:
        return UserError(
            f"{self._bucket.where(self._own)} holds something else, though only this process uses that name; "
            f"remove it with jax-extract sweep {self._bucket}, and run the same command again to go on"
        )


def _entry(blob: Blob) -> Entry:
    return Entry(int(blob.size or 0), decoded_crc32c(blob.crc32c), blob.generation)


def _stated_crc32c(response: requests.Response) -> int | None:
    stated = re.search(r"crc32c=([^,\s]+)", response.headers.get("x-goog-hash", ""))
    return decoded_crc32c(stated[1]) if stated else None
