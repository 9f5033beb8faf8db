"""One resumable upload to Google Cloud Storage, chunk by chunk.

In: chunks, then the last one with the size and the CRC32C of all of them. Out: an object, or an `Answer`
that says why not. Done here and not by the client library: there an upload is lost when the service keeps
a part of a chunk, as it may, and every chunk brings retries and time-outs of its own.
"""

from __future__ import annotations

import base64
import errno
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from google.cloud.storage import Blob

from jax_extract.store.storage.gcs_requests import Answer, Once, Requests, reason_of
from jax_extract.store.storage.verbs import BUCKET_SCHEME, Entry

GRAIN = 256 << 10  # chunks must be multiples of it; also what is passed to a connection at once

TAKEN = HTTPStatus.PRECONDITION_FAILED
REJECTED = HTTPStatus.BAD_REQUEST  # what a checksum that does not match gives
_LOST = (HTTPStatus.NOT_FOUND, HTTPStatus.GONE)


class Upload:
    """One resumable upload. After a request that failed the service is asked how much of it has arrived.

    Raises (every method):
      Answer: the name is taken (412), the upload is gone (404, 410), or the content was rejected (400).
    """

    def __init__(self, requests: Requests, blob: Blob, only_if_free: bool = True) -> None:
        self._requests = requests
        self._where = f"{BUCKET_SCHEME}{blob.bucket.name}/{blob.name}"
        self._there = 0  # bytes that have arrived
        self._entry: Entry | None = None  # the object, once it is there

        def attempt(once: Once) -> str:
            address = blob.create_resumable_upload_session(
                content_type=content_type(str(blob.name)),
                if_generation_match=0 if only_if_free else None,
                **once,
            )
            return str(address)

        try:
            self._address = requests.within(f"starting the upload of {self._where}", attempt, (TAKEN,))
        except Answer:
            raise FileExistsError(errno.EEXIST, "the name is taken", self._where) from None

    def send(self, data: memoryview) -> None:
        """The next bytes, whole chunks of them; they are the service's when this returns."""
        self._send(data, "*", {})

    def finish(self, data: memoryview, size: int, checksum: int) -> Entry:
        """The last bytes, and what all of them together are."""
        self._send(data, str(size), {"x-goog-hash": f"crc32c={encoded_crc32c(checksum)}"})
        assert self._entry is not None
        return self._entry

    def _send(self, data: memoryview, total: str, headers: dict[str, str]) -> None:
        start, stop = self._there, self._there + len(data)
        last = total != "*"
        unsure = False

        def attempt(once: Once) -> None:
            """A step ahead, however small: then the time counts anew."""
            nonlocal unsure
            before = self._there
            if unsure:
                self._ask(memoryview(b""), {"Content-Range": "bytes */*"}, once)
            if self._entry is None and self._there == before:
                span = f"{before}-{stop - 1}" if before < stop else "*"
                unsure = True
                self._ask(data[before - start :], {"Content-Range": f"bytes {span}/{total}", **headers}, once)
            unsure = False
            if self._entry is None and self._there == before:
                raise Answer(HTTPStatus.SERVICE_UNAVAILABLE, "nothing of a chunk was kept")
            if not before <= self._there <= stop:
                raise Answer(HTTPStatus.GONE, "the service forgot what it had confirmed")

        expected = (*_LOST, TAKEN, REJECTED) if last else _LOST
        while self._entry is None and (last or self._there < stop):
            self._requests.within(f"uploading {self._where}", attempt, expected)

    def _ask(self, data: memoryview, headers: dict[str, str], once: Once) -> None:
        """Sends bytes, or none to ask only, and takes in what the service says of the upload."""
        body: Any = _Pieces(data) if data else None
        response = self._requests.session.put(
            self._address, data=body, headers=headers, timeout=once["timeout"], allow_redirects=False
        )
        if response.status_code in (HTTPStatus.OK, HTTPStatus.CREATED):
            said = response.json()
            self._entry = Entry(int(said["size"]), decoded_crc32c(said.get("crc32c")), int(said["generation"]))
        elif response.status_code == HTTPStatus.PERMANENT_REDIRECT:  # here: go on
            kept = response.headers.get("Range")  # bytes=0-LAST, or none of them
            self._there = int(kept.rpartition("-")[2]) + 1 if kept else 0
        else:
            raise Answer(response.status_code, reason_of(response))


class _Pieces:
    """A body that is sent without a copy, piece by piece: a time-out is for one piece, not for a whole chunk."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[memoryview]:
        return (self._data[at : at + GRAIN] for at in range(0, len(self._data), GRAIN))


def decoded_crc32c(text: str | None) -> int | None:
    """The service's spelling of a CRC32C, base64 of four bytes, as a number."""
    return int.from_bytes(base64.b64decode(text), "big") if text else None


def encoded_crc32c(value: int) -> str:
    return base64.b64encode(value.to_bytes(4, "big")).decode()


def content_type(name: str) -> str:
    return "application/json" if name.endswith(".json") else "application/octet-stream"
