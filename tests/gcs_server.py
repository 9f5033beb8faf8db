"""A small, strict Google Cloud Storage server that misbehaves on demand; for tests.

In: HTTP requests of the JSON API. Out: what the service would answer, or the fault that a test asked for.
It knows buckets, objects (look, read by ranges, list in pages, delete) and uploads (multipart, resumable);
it enforces preconditions everywhere, checks every checksum it is sent, and refuses what it does not know.

    python tests/gcs_server.py --port 0 --page 1000      prints the port it listens on

Beside the API, for tests:

    POST   /_faults   a fault, see `Fault`         DELETE /_faults   forgets them all, and ends every stall
    GET    /_log      every request so far         DELETE /_log      forgets them

`running()` starts it as a process of its own and gives a `RunningServer` with which to do that.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import http.client
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import google_crc32c

GRAIN = 256 << 10  # chunks of a resumable upload are multiples of it, but for the last
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")


@dataclass
class Fault:
    """What goes wrong, with which requests, and how often. A request meets one fault, the first that matches.

    Attributes:
      do: `status`: answers `code` and does nothing. `reset_before`: the connection breaks, nothing was done.
        `reset_after`: all is done, the answer is lost. `reset_middle`: half of a chunk is kept, or half of
        an object sent, then the connection ends. `stall`: no answer for `seconds`. `keep`: half of a chunk
        is kept, and the answer says so. `damage`: a byte is flipped on the way in, or on the way out.
        `damage_unseen`: the same, and the server does not compare checksums. `forget`: the upload is gone.
      kind: look, read, list, delete, multipart, start, chunk, finish, query, bucket; empty for any.
      name: what the object's name contains.
      skip: so many matching requests go well first.
      times: how often it goes wrong then.
      code, reason: of `status`.
      seconds: of `stall`.
    """

    do: str
    kind: str = ""
    name: str = ""
    skip: int = 0
    times: int = 1
    code: int = 503
    reason: str = "try again later"
    seconds: float = 30.0

    def hits(self, kind: str, name: str) -> bool:
        if (self.kind and self.kind != kind) or self.name not in name or self.times < 1:
            return False
        self.skip -= 1
        self.times -= self.skip < 0
        return self.skip < 0


@dataclass(frozen=True)
class Object:
    bucket: str
    name: str
    data: bytes
    content_type: str
    generation: int

    @property
    def crc32c(self) -> str:
        return base64.b64encode(google_crc32c.value(self.data).to_bytes(4, "big")).decode()

    @property
    def md5(self) -> str:
        return base64.b64encode(hashlib.md5(self.data).digest()).decode()

    def resource(self) -> dict[str, str]:
        return {
            "kind": "storage#object",
            "bucket": self.bucket,
            "name": self.name,
            "size": str(len(self.data)),
            "generation": str(self.generation),
            "metageneration": "1",
            "contentType": self.content_type,
            "crc32c": self.crc32c,
            "md5Hash": self.md5,
        }


@dataclass
class Upload:
    """A resumable upload under way."""

    bucket: str
    name: str
    content_type: str
    query: Mapping[str, str]
    checksums: Mapping[str, str]
    data: bytearray = field(default_factory=bytearray)
    finished: Object | None = None


class Refused(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Broken(Exception):
    """The connection is to break off now."""


class State:
    """Buckets, objects, uploads under way, faults and the log."""

    def __init__(self, page: int) -> None:
        self.page = page
        self.lock = threading.RLock()
        self.buckets: set[str] = set()
        self.objects: dict[tuple[str, str], Object] = {}
        self.uploads: dict[str, Upload] = {}
        self.faults: list[Fault] = []
        self.log: list[dict[str, Any]] = []
        self.stalls_end = threading.Event()
        self._generation = time.time_ns() // 1000

    def require_bucket(self, bucket: str) -> None:
        if bucket not in self.buckets:
            raise Refused(404, "The specified bucket does not exist.")

    def find(self, bucket: str, name: str, query: Mapping[str, str]) -> Object:
        self.require_bucket(bucket)
        found = self.objects.get((bucket, name))
        if found is None or query.get("generation", str(found.generation)) != str(found.generation):
            raise Refused(404, f"No such object: {bucket}/{name}")
        self.require_generation(bucket, name, query)
        return found

    def require_generation(self, bucket: str, name: str, query: Mapping[str, str]) -> None:
        """The precondition `ifGenerationMatch`; 0 means that there is no object."""
        there = self.objects.get((bucket, name))
        if query.get("ifGenerationMatch", "") not in ("", str(there.generation if there else 0)):
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")

    def store(
        self,
        bucket: str,
        name: str,
        data: bytes,
        content_type: str,
        query: Mapping[str, str],
        checksums: Mapping[str, str],
        unseen: bool,
    ) -> Object:
        self._generation += 1
        made = Object(bucket, name, data, content_type, self._generation)
        for kind, value in (("crc32c", made.crc32c), ("md5", made.md5)):
            if not unseen and checksums.get(kind, value) != value:
                raise Refused(400, f"Provided {kind} {checksums[kind]!r} doesn't match calculated {kind} {value!r}.")
        self.require_generation(bucket, name, query)
        self.objects[bucket, name] = made
        return made


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_DELETE = do_GET

    # ----------------------------------------------------------------------------- one request

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = url.path
        if path in ("/_faults", "/_log"):
            return self._control(path)
        bucket, name, self.kind = self._target(path)
        entry: dict[str, Any] = {"method": self.command, "path": self.path, "kind": self.kind, "name": name}
        entry["range"] = self.headers.get("Range") or self.headers.get("Content-Range")
        with self.state.lock:
            self.state.log.append(entry)
            self.fault = next((fault for fault in self.state.faults if fault.hits(self.kind, name)), None)
        try:
            entry["status"] = self._answer_of(bucket, name)
        except Broken:
            self._break_off()

    def _answer_of(self, bucket: str, name: str) -> int:
        do = self.fault.do if self.fault else ""
        try:
            if do == "reset_before":
                raise Broken
            if self.fault and do == "stall":
                self.state.stalls_end.wait(self.fault.seconds)
            if self.fault and do == "status":
                raise Refused(self.fault.code, self.fault.reason)
            with self.state.lock:
                code, headers, body = self._act(bucket, name)
        except Refused as refused:
            error = {"error": {"code": refused.code, "message": refused.reason}}
            code, headers, body = refused.code, {}, json.dumps(error).encode()
        if do == "reset_after":
            raise Broken
        if do == "damage" and self.kind == "read":
            body = _damaged(body)
        self._send(code, headers, body, half=do == "reset_middle")
        return code

    def _send(self, code: int, headers: Mapping[str, str], body: bytes, half: bool = False) -> None:
        self.send_response(code, HTTPStatus(code).phrase if code != 499 else "Client Closed Request")
        for key, value in {"Content-Type": "application/json", **headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if half else body)
        self.close_connection |= half

    def _break_off(self) -> None:
        """Ends the connection as a crash would: with a reset, not with a goodbye."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def _control(self, path: str) -> None:
        state, answer = self.state, b"{}"
        with state.lock:
            if path == "/_log" and self.command == "GET":
                answer = json.dumps(state.log).encode()
            elif path == "/_log":
                state.log.clear()
            elif self.command == "POST":
                state.faults.append(Fault(**json.loads(self.body)))
            elif self.command == "GET":
                answer = json.dumps([asdict(fault) for fault in state.faults]).encode()
            else:
                state.faults.clear()
                state.stalls_end.set()
                state.stalls_end = threading.Event()
        self._send(200, {}, answer)

    # ----------------------------------------------------------------------------- what is asked for

    def _target(self, path: str) -> tuple[str, str, str]:
        """Bucket, object name and kind of the request."""
        match = re.fullmatch(r"(/upload|/download)?/storage/v1/b(?:/([^/]+)(?:/o(?:/(.+))?)?)?", path)
        if not match:
            return "", "", "unknown"
        bucket, name = unquote(match[2] or ""), unquote(match[3] or "")
        if match[1] == "/upload":
            return self._upload_target(bucket)
        if not bucket or path.endswith(f"/b/{bucket}"):
            return bucket, "", "bucket"
        if not name:
            return bucket, "", "list" if self.command == "GET" else "unknown"
        media = self.query.get("alt") == "media"
        return bucket, name, {"GET": "read" if media else "look", "DELETE": "delete"}.get(self.command, "unknown")

    def _upload_target(self, bucket: str) -> tuple[str, str, str]:
        kind = self.query.get("uploadType")
        if self.command == "PUT" and kind == "resumable":
            upload = self.state.uploads.get(self.query.get("upload_id", ""))
            asked = _CONTENT_RANGE.fullmatch(self.headers.get("Content-Range", ""))
            if asked and asked[1] is None and asked[3] == "*":
                return bucket, upload.name if upload else "", "query"
            return bucket, upload.name if upload else "", "finish" if asked and asked[3] != "*" else "chunk"
        if self.command == "POST" and kind == "resumable":
            return bucket, self.query.get("name") or str(json.loads(self.body or b"{}").get("name", "")), "start"
        if self.command == "POST" and kind == "multipart":
            metadata, _, _ = self._parts()
            return bucket, str(metadata.get("name", "")), "multipart"
        return bucket, "", "unknown"

    def _act(self, bucket: str, name: str) -> tuple[int, dict[str, str], bytes]:
        if self.kind == "unknown":
            raise Refused(501, f"{self.command} {self.path} is not known to this server")
        return getattr(self, f"_{self.kind}")(bucket, name)

    def _bucket(self, bucket: str, name: str) -> tuple[int, dict[str, str], bytes]:
        if self.command == "POST":
            bucket = json.loads(self.body)["name"]
            if bucket in self.state.buckets:
                raise Refused(409, "The bucket you tried to create already exists.")
            self.state.buckets.add(bucket)
        self.state.require_bucket(bucket)
        return 200, {}, json.dumps({"kind": "storage#bucket", "name": bucket, "id": bucket}).encode()

    def _look(self, bucket: str, name: str) -> tuple[int, dict[str, str], bytes]:
        return 200, {}, json.dumps(self.state.find(bucket, name, self.query).resource()).encode()

    def _read(self, bucket: str, name: str) -> tuple[int, dict[str, str], bytes]:
        found = self.state.find(bucket, name, self.query)
        headers = {
            "Content-Type": found.content_type,
            "x-goog-generation": str(found.generation),
            "x-goog-hash": f"crc32c={found.crc32c},md5={found.md5}",
            "x-goog-stored-content-length": str(len(found.data)),
        }
        if "Range" not in self.headers:
            return 200, headers, found.data
        match = _RANGE.fullmatch(self.headers["Range"])
        if not match:
            raise Refused(400, "this server knows ranges from an offset only")
        start, size = int(match[1]), len(found.data)
        stop = min(int(match[2]) + 1 if match[2] else size, size)
        if start >= size:
            raise Refused(416, "The requested range cannot be satisfied.")
        return 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}, found.data[start:stop]

    def _list(self, bucket: str, name: str) -> tuple[int, dict[str, str], bytes]:
        self.state.require_bucket(bucket)
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        after = base64.urlsafe_b64decode(self.query.get("pageToken", "")).decode()
        limit = min(int(self.query.get("maxResults", self.state.page)), self.state.page)
        items: list[dict[str, str]] = []
        prefixes: list[str] = []
        answer: dict[str, Any] = {"kind": "storage#objects"}
        last = ""
        for key in sorted(key for place, key in self.state.objects if place == bucket and key.startswith(prefix)):
            child, found, _ = key.removeprefix(prefix).partition(delimiter) if delimiter else (key, "", "")
            shown = prefix + child + found if found else key
            if shown <= after or shown in prefixes:
                continue
            if len(items) + len(prefixes) == limit:
                answer["nextPageToken"] = base64.urlsafe_b64encode(last.encode()).decode()
                break
            if found:
                prefixes.append(shown)
            else:
                items.append(self.state.objects[bucket, key].resource())
            last = shown
        return 200, {}, json.dumps({**answer, "items": items, "prefixes": prefixes}).encode()

    def _delete(self, bucket: str, name: str) -> tuple[int, dict[str, str], bytes]:
        found = self.state.find(bucket, name, self.query)
        del self.state.objects[found.bucket, found.name]
        return 204, {}, b""

    # ----------------------------------------------------------------------------- uploads

    def _checksums(self) -> dict[str, str]:
        pairs = (pair.strip().partition("=") for pair in self.headers.get("x-goog-hash", "").split(",") if pair)
        return {kind: value for kind, _, value in pairs}

    def _arrived(self, data: bytes) -> bytes:
        return _damaged(data) if self.fault and self.fault.do.startswith("damage") else data

    @property
    def _unseen(self) -> bool:
        return self.fault is not None and self.fault.do == "damage_unseen"

    def _parts(self) -> tuple[dict[str, Any], str, bytes]:
        """Metadata, content type and content of a multipart/related body."""
        match = re.search(r'boundary="?([^";]+)"?', self.headers.get("Content-Type", ""))
        if not match:
            raise Refused(400, "no boundary")
        sections = self.body.split(b"--" + match[1].encode())
        head, content = (section.removeprefix(b"\r\n").removesuffix(b"\r\n") for section in sections[1:3])
        kind, _, data = content.partition(b"\r\n\r\n")
        return json.loads(head.partition(b"\r\n\r\n")[2]), kind.decode().partition(": ")[2], data

    def _multipart(self, bucket: str, name: str) -> tuple[int, dict[str, str], bytes]:
        self.state.require_bucket(bucket)
        metadata, content_type, data = self._parts()
        checksums = {
            key: metadata[field] for key, field in (("crc32c", "crc32c"), ("md5", "md5Hash")) if field in metadata
        }
        made = self.state.store(
            bucket,
            name,
            self._arrived(data),
            content_type,
            self.query,
            {**checksums, **self._checksums()},
            self._unseen,
        )
        return 200, {}, json.dumps(made.resource()).encode()

    def _start(self, bucket: str, name: str) -> tuple[int, dict[str, str], bytes]:
        self.state.require_bucket(bucket)
        self.state.require_generation(bucket, name, self.query)
        identity = uuid.uuid4().hex
        content_type = self.headers.get("x-upload-content-type", "application/octet-stream")
        self.state.uploads[identity] = Upload(bucket, name, content_type, self.query, self._checksums())
        place = f"/upload/storage/v1/b/{quote(bucket)}/o?uploadType=resumable&upload_id={identity}"
        return 200, {"Location": f"http://{self.headers['Host']}{place}"}, b""

    def _query(self, bucket: str, name: str) -> tuple[int, dict[str, str], bytes]:
        return self._progress(self._upload())

    def _upload(self) -> Upload:
        identity = self.query.get("upload_id", "")
        if self.fault and self.fault.do == "forget":
            self.state.uploads.pop(identity, None)
        upload = self.state.uploads.get(identity)
        if upload is None:
            raise Refused(410, "The upload is gone.")
        return upload

    def _progress(self, upload: Upload) -> tuple[int, dict[str, str], bytes]:
        if upload.finished is not None:
            return 200, {}, json.dumps(upload.finished.resource()).encode()
        return 308, {"Range": f"bytes=0-{len(upload.data) - 1}"} if upload.data else {}, b""

    def _chunk(self, bucket: str, name: str) -> tuple[int, dict[str, str], bytes]:
        upload = self._upload()
        match = _CONTENT_RANGE.fullmatch(self.headers.get("Content-Range", ""))
        if not match:
            raise Refused(400, "Invalid Content-Range.")
        if upload.finished is not None:
            return self._progress(upload)
        start, stop = (int(match[1]), int(match[2]) + 1) if match[1] else (len(upload.data), len(upload.data))
        total = None if match[3] == "*" else int(match[3])
        if stop - start != len(self.body) or (total is not None and stop > total):
            raise Refused(400, "The Content-Range does not fit the body.")
        if total is None and (stop - start) % GRAIN:
            raise Refused(400, f"A chunk that is not the last must be a multiple of {GRAIN} bytes.")
        if start > len(upload.data):
            raise Refused(400, f"The offset {start} exceeds the {len(upload.data)} bytes that are there.")
        data = self._arrived(self.body)[len(upload.data) - start :]
        if self.fault and self.fault.do in ("keep", "reset_middle"):
            upload.data += data[: len(data) // 2 // GRAIN * GRAIN]
            if self.fault.do == "reset_middle":
                raise Broken
            return self._progress(upload)
        upload.data += data
        if total is not None and len(upload.data) == total:
            self._complete(upload)
        return self._progress(upload)

    _finish = _chunk

    def _complete(self, upload: Upload) -> None:
        checksums = {**upload.checksums, **self._checksums()}
        content = bytes(upload.data)
        try:
            upload.finished = self.state.store(
                upload.bucket, upload.name, content, upload.content_type, upload.query, checksums, self._unseen
            )
        except Refused:
            del self.state.uploads[self.query["upload_id"]]
            raise


def _damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else data


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that went away; a request that fails here gets no answer, which a test sees


@dataclass(frozen=True)
class RunningServer:
    """The server process as a test sees it."""

    port: int

    @property
    def url(self) -> str:
        """For STORAGE_EMULATOR_HOST."""
        return f"http://127.0.0.1:{self.port}"

    def make_bucket(self, name: str) -> None:
        self._ask("POST", "/storage/v1/b", {"name": name})

    def fault(self, do: str, **which: Any) -> None:
        """See `Fault`."""
        self._ask("POST", "/_faults", asdict(Fault(do, **which)))

    def forget_faults(self) -> None:
        self._ask("DELETE", "/_faults")

    def forget_log(self) -> None:
        self._ask("DELETE", "/_log")

    def log(self, kind: str = "", name: str = "") -> list[dict[str, Any]]:
        """Requests so far: method, path, kind, name, range, status."""
        said = self._ask("GET", "/_log")
        return [entry for entry in said if kind in ("", entry["kind"]) and name in entry["name"]]

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            said = json.loads(response.read() or b"null")
        assert response.status == HTTPStatus.OK, said
        return said


@contextlib.contextmanager
def running(page: int = 1000) -> Iterator[RunningServer]:
    with subprocess.Popen(
        [sys.executable, __file__, "--page", str(page)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        try:
            yield RunningServer(int(process.stdout.readline()))
        finally:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0: any that is free; it is printed")
    parser.add_argument("--page", type=int, default=1000, help="objects in one page of a listing")
    options = parser.parse_args()
    handler = type("BoundHandler", (Handler,), {"state": State(options.page)})
    with _Server(("127.0.0.1", options.port), handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
