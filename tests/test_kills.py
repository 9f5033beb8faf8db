"""Never lost, never twice: killed at every step there is between a row in memory and a part that is there.

The steps are listed by an undisturbed run. Each is then met by SIGKILL, before and after it, and the same
command is given again. Rows are made up, so a run takes milliseconds; see store_worker.py.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from gcs_server import RunningServer
from store_worker import Case, StoreWorker, extract

from jax_extract.store.ledger import COMMITS, PARTS, RUN_FILE, Ledger, Record
from jax_extract.store.reader import open_activations
from jax_extract.store.sidecar import Sidecar
from jax_extract.store.storage.opening import open_storage
from jax_extract.store.storage.verbs import Storage
from jax_extract.store.survey import survey
from jax_extract.store.sweep import sweep

KILLED = -signal.SIGKILL
SMALL = Case()
LARGE = Case(lengths=(11, 12), widths=(48_000,))  # more than a buffer of 4 MiB, in one part
CHUNKED = Case(lengths=(3, 2), widths=(50_000, 16))  # several chunks of 256 KiB an object, in one part
IN_A_DIRECTORY = "local.create local.write local.fsync local.link local.sync_folder local.replace".split()
OF_A_PART = "part.shard part.sidecar part.record".split()
IN_A_BUCKET = "gcs.create gcs.upload_chunk gcs.finish gcs.write gcs.replace".split()
OF_AN_UPLOAD = "upload.shard upload.record".split()
AFTER_AN_UPLOAD = "upload.note upload.delete_local".split()

Contents = dict[tuple[int, int], dict[str, Any]]


class Workers:
    """As many workers as cores are worth it, for checks that need one each."""

    def __init__(self, **environment: str) -> None:
        self._all = [StoreWorker(**environment) for _ in range(2)]
        self._idle: SimpleQueue[StoreWorker] = SimpleQueue()
        for worker in self._all:
            self._idle.put(worker)

    @property
    def one(self) -> StoreWorker:
        return self._all[0]

    def each(self, root: Path, points: Sequence[str], check: Callable[[StoreWorker, str, Path], None]) -> None:
        """Checks every point in a directory of its own, several at once."""

        def one(point: str) -> None:
            worker = self._idle.get()
            place = root / point.replace(":", "_")
            try:
                check(worker, point, place)
            except BaseException as error:
                raise AssertionError(f"killed at {point}: {error}") from error
            finally:
                self._idle.put(worker)
            shutil.rmtree(place, ignore_errors=True)

        with ThreadPoolExecutor(len(self._all)) as pool:
            for _ in pool.map(one, points):
                pass
        print(f"\n{len(points)} kill points in {root.name}")  # with -s: the count that docs/never_lost.md gives

    def close(self) -> None:
        for worker in self._all:
            worker.close()


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    started = Workers()
    yield started
    started.close()


@pytest.fixture(scope="module")
def cloud_workers(bucket_server: RunningServer) -> Iterator[Workers]:
    started = Workers(STORAGE_EMULATOR_HOST=bucket_server.url, NO_PROXY="127.0.0.1")
    yield started
    started.close()


@pytest.fixture
def bucket(bucket_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket_server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    name = f"kills-{time.monotonic_ns()}"
    bucket_server.make_bucket(name)
    return f"gs://{name}"


# ------------------------------------------------------------------------------ what must be true


def before_and_after(steps: Sequence[str]) -> list[str]:
    """Failpoints around steps `NAME:NUMBER`."""
    return [":".join((name, when, number)) for name, number in map(_split, steps) for when in ("before", "after")]


def _split(step: str) -> tuple[str, str]:
    name, _, number = step.rpartition(":")
    return name, number


def names_of(steps: Sequence[str]) -> set[str]:
    return {_split(step)[0] for step in steps}


def contents(ledger: Ledger, records: dict[tuple[int, int], Record]) -> Contents:
    """What the records lead to, whatever the files are called."""
    found: Contents = {}
    for key, record in records.items():
        sidecar = Sidecar.read(ledger.storage, record["sidecar"]["path"], record["sidecar"]["crc32c"])
        assert [array.path for array in sidecar.arrays] == [file["path"] for file in record["files"]]
        content = sidecar.content
        found[key] = {
            "samples": content.sample_ids,
            "tokens": [ids.tobytes() for ids in content.token_ids],
            "positions": [positions.tobytes() for positions in content.positions],
            "counts": [record[name] for name in ("samples", "tokens", "rows", "not_finite_rows", "plan")],
            "shards": [
                (array.site.hook, array.site.layer, ledger.storage.read(array.path), array.offset, array.blocks)
                for array in sidecar.arrays
            ],
        }
    return found


def undisturbed(worker: StoreWorker, place: Path, case: Case) -> tuple[Contents, list[str]]:
    """Contents of a run that nobody killed, checked against the rows it was given, and its steps."""
    steps = worker.steps("extract", place, place.with_suffix(".steps"), case=case)
    run = open_activations(place)
    (window,) = case.windows()
    assert run.sample_ids == [f"s{i}" for i in range(len(case.lengths))]
    for sample in (sample for part in window.parts for sample in part.table):
        for site in case.sites:
            stored = run.sample(sample.sample_id).get(site.layer)
            assert stored.tobytes() == case.rows(sample, site).tobytes()
    ledger = Ledger.open(open_storage(place))
    return contents(ledger, ledger.committed()), steps


def require_no_half_part(place: Path | str, expected: Contents) -> None:
    """Just killed: whatever has a record is whole."""
    storage = open_storage(place)
    if storage.exists(RUN_FILE):
        ledger = Ledger.open(storage)
        found = survey(ledger)
        assert not found.torn
        there = contents(ledger, dict(found.committed))
        assert there == {key: expected[key] for key in there}


def require_whole(place: Path | str, expected: Contents) -> None:
    """The undisturbed run's contents, each sample once; after a sweep, nothing else."""
    ledger = Ledger.open(open_storage(place))
    found = survey(ledger)
    assert found.complete
    assert not found.torn
    assert contents(ledger, dict(found.committed)) == expected
    sweep(ledger, found)
    found = survey(ledger)
    assert not found.orphans
    assert contents(ledger, dict(found.committed)) == expected
    assert json.loads(ledger.storage.read("metadata.json"))["total_samples"] == sum(found.planned.values())
    assert files_of(ledger.storage) == files_of_the_run(ledger)


def files_of(storage: Storage) -> set[str]:
    folders = ("", "_run", COMMITS, PARTS, "_run/plan", "_run/sessions", "_run/uploaded")
    return {str(Path(folder, name)) for folder in folders for name in storage.entries(folder)}


def files_of_the_run(ledger: Ledger) -> set[str]:
    """Every file that a complete run has a use for."""
    records = ledger.committed().values()
    named = {file["path"] for record in records for file in (record["sidecar"], *record["files"])}
    for folder in (COMMITS, "_run/plan", "_run/sessions", "_run/uploaded"):
        named |= {f"{folder}/{name}" for name in ledger.names(folder)}
    return named | {RUN_FILE, "_run/config.yaml", "metadata.json"}


# ------------------------------------------------------------------------------ writing into a directory


@pytest.mark.parametrize(
    ("case", "only", "every"),
    [
        pytest.param(SMALL, "", 1, id="pickle"),
        pytest.param(Case(shard_format="npz"), "", 6, id="npz"),
        pytest.param(Case(shard_format="safetensors"), "", 6, id="safetensors"),
        pytest.param(Case(unnamed=False), "", 6, id="no-unnamed-files"),
        pytest.param(LARGE, "local.write", 1, id="several-buffers"),
    ],
)
def test_killed_at_any_step_and_given_again_a_command_ends_in_the_undisturbed_run(
    workers: Workers, tmp_path: Path, case: Case, only: str, every: int
) -> None:
    expected, steps = undisturbed(workers.one, tmp_path / "whole", case)
    assert names_of(steps) == {*IN_A_DIRECTORY, *OF_A_PART}
    assert len(expected) == (1 if case is LARGE else 3)
    points = [point for point in before_and_after(steps) if point.startswith(only)][::every]
    if case is LARGE:  # run.json, configuration, plan, session, metadata; sidecar, record; the shard twice
        assert len(points) == 2 * (5 + 2 + 2)

    def check(worker: StoreWorker, point: str, place: Path) -> None:
        assert worker.run("extract", place, point, case) == KILLED
        require_no_half_part(place, expected)
        assert worker.run("extract", place, case=case) == 0
        assert not [name for name in files_of(open_storage(place)) if "_attempt_" in name]  # all was adopted
        require_whole(place, expected)

    workers.each(tmp_path, points, check)


def test_killed_again_while_it_resumes_a_command_still_ends_in_the_undisturbed_run(
    workers: Workers, tmp_path: Path
) -> None:
    expected, steps = undisturbed(workers.one, tmp_path / "whole", SMALL)
    points = before_and_after(steps)
    kills: list[int] = []

    def check(worker: StoreWorker, point: str, place: Path) -> None:
        chance = random.Random(point)
        assert worker.run("extract", place, point, SMALL) == KILLED
        again = 1
        # A point that a resumed run does not come to lets it end; most are come to.
        while worker.run("extract", place, chance.choice(points[: len(points) // 2]), SMALL) == KILLED and again < 5:
            require_no_half_part(place, expected)
            again += 1
        kills.append(again)
        assert worker.run("extract", place, case=SMALL) == 0
        require_whole(place, expected)

    workers.each(tmp_path, random.Random(1).sample(points, 16), check)
    assert sum(again > 1 for again in kills) >= 8


def test_everything_that_a_record_names_is_on_the_disk_before_the_record_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill leaves the page cache alone; a power cut does not."""
    log: list[tuple[str, str]] = []  # what was done, and to which file or folder
    lock = threading.Lock()
    fsync, link = os.fsync, os.link

    def place_of(fd: int) -> str:
        return str(Path(f"/proc/self/fd/{fd}").readlink()) if Path(f"/proc/self/fd/{fd}").is_dir() else _inode(fd)

    def logged_fsync(fd: int) -> None:
        fsync(fd)
        with lock:
            log.append(("fsync", place_of(fd)))

    def logged_link(source: str, target: Path, **words: Any) -> None:
        link(source, target, **words)
        with lock:
            log.append(("link", str(target)))

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "link", logged_link)
    place = tmp_path / "run"
    extract(str(place), SMALL)
    when = {event: i for i, event in reversed(list(enumerate(log)))}  # the first time
    records = Ledger.open(open_storage(place)).committed()
    assert len(records) == 3
    for (batch, part), record in records.items():
        seen = when["link", str(place / COMMITS / f"{batch:06d}_{part:03d}.json")]
        for file in (record["sidecar"], *record["files"]):
            path = place / file["path"]
            written, named = when["fsync", _inode(path)], when["link", str(path)]
            assert written < named < seen
            assert any(event == ("fsync", str(path.parent)) for event in log[named:seen]), path


def _inode(file: int | Path) -> str:
    return f"inode {(os.fstat(file) if isinstance(file, int) else file.stat()).st_ino}"


# ------------------------------------------------------------------------------ tidying up


@pytest.fixture
def untidy(workers: Workers, tmp_path: Path) -> tuple[Path, Contents]:
    """A run with a torn part, with what killed attempts leave behind, and with files of somebody else."""
    expected, _ = undisturbed(workers.one, tmp_path / "whole", SMALL)
    place = tmp_path / "untidy"
    assert workers.one.run("extract", place, "part.record:before:2", SMALL) == KILLED
    (committed,) = Ledger.open(open_storage(place)).committed().values()
    (place / committed["files"][0]["path"]).unlink()
    unnamed, attempt = "0123456789abcdef" * 2, "attempt_0123456789ab"
    for name in (
        f".writing-{unnamed}",
        f"metadata.json.{unnamed}",
        f"_run/config.yaml.{unnamed}",
        f"layer_1_batch_000002_{attempt}.pkl",
        f"_run/parts/000002_001_{attempt}.safetensors",
    ):
        (place / name).write_bytes(b"half of it")
    for name in STRANGERS:
        (place / name).write_bytes(b"mine")
    return place, expected


STRANGERS = ("notes.txt", "layer_7_batch_000001.pkl", "layer_0_batch_000001.npz", "_run/notes.txt", "_run/parts/a.txt")


@pytest.mark.parametrize("torn", [True, False])
def test_a_sweep_killed_at_any_step_takes_nothing_that_counts_and_the_next_one_takes_the_rest(
    workers: Workers, untidy: tuple[Path, Contents], tmp_path: Path, torn: bool
) -> None:
    template, expected = untidy
    if not torn:  # nothing to give up then
        for path in (template / COMMITS).iterdir():
            path.unlink()

    def copy(place: Path) -> None:
        shutil.copytree(template, place)

    copy(tmp_path / "listed")
    steps = workers.one.steps("sweep", tmp_path / "listed", tmp_path / "sweep.steps", torn=torn)
    assert {"local.delete", "sweep.orphan"} | ({"sweep.record"} if torn else set()) <= names_of(steps)

    def check(worker: StoreWorker, point: str, place: Path) -> None:
        copy(place)
        assert worker.run("sweep", place, point, torn=torn) == KILLED
        assert worker.run("sweep", place, torn=torn) == 0
        found = survey(Ledger.open(open_storage(place)))
        assert not found.torn
        assert not found.orphans
        assert worker.run("extract", place, case=SMALL) == 0
        assert all((place / name).read_bytes() == b"mine" for name in STRANGERS)
        for name in STRANGERS:
            (place / name).unlink()
        require_whole(place, expected)

    workers.each(tmp_path, before_and_after(steps)[:: 1 if torn else 3], check)


@pytest.mark.parametrize("again", ["erase", "extract"])
def test_a_run_whose_removal_was_killed_is_removed_or_completed_by_the_next_command(
    workers: Workers, untidy: tuple[Path, Contents], tmp_path: Path, again: str
) -> None:
    template, expected = untidy
    assert workers.one.run("sweep", template, torn=True) == 0
    assert workers.one.run("extract", template, case=SMALL) == 0
    shutil.copytree(template, tmp_path / "listed")
    steps = workers.one.steps("erase", tmp_path / "listed", tmp_path / "erase.steps")
    assert files_of(open_storage(tmp_path / "listed")) == {*STRANGERS, "_run/config.yaml"} - {"_run/parts/a.txt"}

    def check(worker: StoreWorker, point: str, place: Path) -> None:
        shutil.copytree(template, place)
        assert worker.run("erase", place, point) == KILLED
        if (place / RUN_FILE).exists():
            if again == "erase":
                assert worker.run("erase", place) == 0
            else:
                require_no_half_part(place, expected)
        if again == "erase":
            assert files_of(open_storage(place)) == files_of(open_storage(tmp_path / "listed"))
        assert worker.run("extract", place, case=SMALL) == 0
        for name in STRANGERS:
            (place / name).unlink(missing_ok=True)
        require_whole(place, expected)

    workers.each(tmp_path, before_and_after(steps)[:: 2 if again == "erase" else 5], check)


# ------------------------------------------------------------------------------ into a bucket


def test_killed_at_any_step_a_run_written_into_a_bucket_ends_in_the_undisturbed_run(
    workers: Workers, cloud_workers: Workers, bucket: str, tmp_path: Path
) -> None:
    expected, _ = undisturbed(workers.one, tmp_path / "whole", CHUNKED)
    steps = cloud_workers.one.steps("extract", f"{bucket}/whole", tmp_path / "steps", case=CHUNKED)
    assert names_of(steps) == {*IN_A_BUCKET, *OF_A_PART}
    require_whole(f"{bucket}/whole", expected)

    def check(worker: StoreWorker, point: str, place: Path) -> None:
        there = f"{bucket}/{place.name}"
        assert worker.run("extract", there, point, CHUNKED) == KILLED
        require_no_half_part(there, expected)
        assert worker.run("extract", there, case=CHUNKED) == 0
        require_whole(there, expected)

    cloud_workers.each(tmp_path, before_and_after(steps), check)


@pytest.mark.parametrize("delete_local", [False, True])
def test_an_upload_killed_at_any_step_and_repeated_brings_everything_over_once(
    workers: Workers, cloud_workers: Workers, bucket: str, tmp_path: Path, delete_local: bool
) -> None:
    expected, _ = undisturbed(workers.one, tmp_path / "whole", SMALL)
    shards = {path.name for path in (tmp_path / "whole").glob("layer_*")}

    def words(place: Path) -> dict[str, Any]:
        return {"bucket": f"{bucket}/{place.name}", "delete_local": delete_local}

    def copy(place: Path) -> None:
        shutil.copytree(tmp_path / "whole", place)

    copy(tmp_path / "listed")
    steps = cloud_workers.one.steps("upload", tmp_path / "listed", tmp_path / "steps", **words(tmp_path / "listed"))
    more = AFTER_AN_UPLOAD if delete_local else []
    assert {*OF_AN_UPLOAD, *more, "gcs.finish", "gcs.write", "gcs.replace"} <= names_of(steps)

    def check(worker: StoreWorker, point: str, place: Path) -> None:
        copy(place)
        assert worker.run("upload", place, point, **words(place)) == KILLED
        require_no_half_part(words(place)["bucket"], expected)
        for record in Ledger.open(open_storage(place)).committed().values():  # each shard is somewhere
            for file in record["files"]:
                assert (place / file["path"]).exists() or record.get("uploaded_to") == words(place)["bucket"]
        assert worker.run("upload", place, **words(place)) == 0
        require_whole(words(place)["bucket"], expected)
        assert survey(Ledger.open(open_storage(place))).complete
        assert {path.name for path in place.glob("layer_*")} == (set() if delete_local else shards)

    points = before_and_after(steps)
    cloud_workers.each(tmp_path, _some(points, OF_AN_UPLOAD + AFTER_AN_UPLOAD, 1 if delete_local else 3), check)


def test_a_run_uploaded_as_it_goes_and_killed_at_any_step_ends_whole_in_the_bucket_and_gone_from_the_disk(
    workers: Workers, cloud_workers: Workers, bucket: str, tmp_path: Path
) -> None:
    expected, _ = undisturbed(workers.one, tmp_path / "whole", SMALL)

    def words(place: Path) -> dict[str, Any]:
        return {"spool": str(place), "delete_local": True, "case": SMALL}

    whole = tmp_path / "listed"
    steps = cloud_workers.one.steps("extract", f"{bucket}/{whole.name}", tmp_path / "steps", **words(whole))
    uploading = [*OF_AN_UPLOAD, *AFTER_AN_UPLOAD]
    assert {*OF_A_PART, *uploading, "gcs.finish", "gcs.write", "gcs.replace"} <= names_of(steps)
    require_whole(f"{bucket}/{whole.name}", expected)

    def check(worker: StoreWorker, point: str, place: Path) -> None:
        there = f"{bucket}/{place.name}"
        assert worker.run("extract", there, point, **words(place)) == KILLED
        require_no_half_part(there, expected)
        assert not (place / RUN_FILE).exists() or not survey(Ledger.open(open_storage(place))).torn
        assert worker.run("extract", there, **words(place)) == 0
        require_whole(there, expected)
        assert not {path.name for path in place.glob("layer_*")}

    cloud_workers.each(tmp_path, _some(before_and_after(steps), uploading, 3), check)


def _some(points: Sequence[str], of: Sequence[str], every: int) -> list[str]:
    """Every so many of the points that matter here, and a few of those that other tests go through."""
    here = [point for point in points if point.split(":")[0] in of]
    return here[::every] + [point for point in points if point not in here][:: 7 * every]
