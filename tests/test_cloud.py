"""Whole runs into a bucket: written there directly, uploaded while they run, uploaded by a job afterwards."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import store_worker
from gcs_server import RunningServer
from small_run import environment, make_model, run_cli, run_here, shards, snapshot, whole_lines, write_jsonl

from jax_extract import UserError, open_activations
from jax_extract.cli import main
from jax_extract.store.ledger import COMMITS, Ledger
from jax_extract.store.storage.failpoints import VARIABLE
from jax_extract.store.storage.opening import open_storage
from jax_extract.store.storage.verbs import NameTaken
from jax_extract.store.survey import survey
from jax_extract.store.sweep import erase, sweep

LENGTHS = [33, 60, 40, 61, 35, 50, 47, 62, 63, 34, 41]
OPTIONS: dict[str, Any] = {"layers_to_extract": (10, 11), "batch_size": 4, "positions": "all"}
FLAGS = ["--layers_to_extract", 10, 11, "--batch_size", 4, "--positions", "all"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("input") / "in.jsonl", LENGTHS)


@pytest.fixture(scope="module")
def whole(model: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run on disk."""
    directory = tmp_path_factory.mktemp("whole") / "a"
    run_here(model, tasks, directory, **OPTIONS)
    return directory


@pytest.fixture
def server(bucket_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningServer]:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket_server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    bucket_server.forget_log()
    yield bucket_server
    bucket_server.forget_faults()


@pytest.fixture
def place(server: RunningServer) -> str:
    """A prefix of a new bucket."""
    name = f"cloud-{time.monotonic_ns()}"
    server.make_bucket(name)
    return f"gs://{name}/runs/one"


def _in_bucket(place: str) -> dict[str, bytes]:
    """Every shard that a record names, by its name."""
    storage = open_storage(place)
    return {
        file["path"]: storage.read(file["path"], generation=file["generation"])
        for record in Ledger.open(storage).committed().values()
        for file in record["files"]
    }


def _rows(place: str | Path) -> dict[str, bytes]:
    return {sample.sample_id: sample.get(11).tobytes() for sample in open_activations(place).samples()}


def test_a_run_written_into_a_bucket_through_faults_is_the_run_on_disk_byte_for_byte(
    server: RunningServer, model: Path, tasks: Path, whole: Path, place: str, tmp_path: Path
) -> None:
    server.fault("status", code=503, times=3)
    server.fault("reset_after", skip=20, times=2)
    words = ["--model_path", model, "--tasks_file", tasks, "--activations_dir", place, *FLAGS]
    first = run_cli(*words, cwd=tmp_path, env=environment())
    assert first.returncode == 0, first.stderr
    assert "extract" not in {path.name for path in tmp_path.iterdir()}
    assert _in_bucket(place) == shards(whole)
    assert _rows(place) == _rows(whole)
    assert main(["status", place]) == 0
    assert f"jax-extract inspect {place}" in first.stdout
    again = run_here(model, tasks, place, **OPTIONS)  # type: ignore[arg-type]
    assert again["total_samples"] == len(LENGTHS)
    assert _in_bucket(place) == shards(whole)


@pytest.mark.parametrize("at", ["gcs.finish:after:3", "gcs.write:before:3", "part.record:after:2"])
def test_a_command_killed_while_it_writes_into_a_bucket_is_resumed(
    server: RunningServer, model: Path, tasks: Path, whole: Path, place: str, tmp_path: Path, at: str
) -> None:
    words = ["--model_path", model, "--tasks_file", tasks, "--activations_dir", place, *FLAGS]
    killed = run_cli(*words, cwd=tmp_path, env={VARIABLE: at})
    assert killed.returncode == -9
    run_here(model, tasks, place, **OPTIONS)  # type: ignore[arg-type]
    assert main(["status", place]) == 0
    assert _rows(place) == _rows(whole)


def test_uploading_while_the_run_goes_on_leaves_the_same_run_in_both_places(
    server: RunningServer, model: Path, tasks: Path, whole: Path, place: str, tmp_path: Path
) -> None:
    run_here(model, tasks, tmp_path / "a", **OPTIONS, gcs_bucket=place, upload_to_cloud=True)
    assert shards(tmp_path / "a") == shards(whole) == _in_bucket(place)
    assert main(["status", place]) == main(["status", str(tmp_path / "a")]) == 0
    assert json.loads((tmp_path / "a/metadata.json").read_text())["total_samples"] == len(LENGTHS)


def test_a_new_machine_goes_on_from_the_bucket_when_the_local_directory_is_gone(
    server: RunningServer, model: Path, tasks: Path, whole: Path, place: str, tmp_path: Path
) -> None:
    options = {"gcs_bucket": place, "upload_to_cloud": True, "delete_local": True}
    words = ["--model_path", model, "--tasks_file", tasks, "--activations_dir", tmp_path / "a", *FLAGS]
    words += ["--gcs_bucket", place, "--upload_to_cloud", True, "--delete_local", True]
    killed = run_cli(*words, cwd=tmp_path, env={VARIABLE: "upload.record:after:2"})
    assert killed.returncode == -9
    there = set(Ledger.open(open_storage(place)).committed())
    assert 2 <= len(there) < 4
    shutil.rmtree(tmp_path / "a")
    metadata = run_here(model, tasks, tmp_path / "a", **OPTIONS, **options)
    assert len(metadata["sessions"]) == 1
    assert metadata["sessions"][0]["parts"] == 3 - len(there)
    assert _rows(place) == _rows(whole)
    assert not shards(tmp_path / "a")
    assert _rows(tmp_path / "a").items() <= _rows(whole).items()  # of its shards, which are in the bucket


def test_a_part_that_the_bucket_has_lost_is_computed_again_by_the_same_command(
    model: Path, tasks: Path, tmp_path: Path, place: str, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upload: dict[str, Any] = {"gcs_bucket": place, "upload_to_cloud": True, "delete_local": True}
    run_here(model, tasks, tmp_path / "a", **OPTIONS, **upload)
    assert main(["status", str(tmp_path / "a")]) == 0
    out = whole_lines(capsys.readouterr().out)
    assert f"elsewhere  3 parts, uploaded and deleted here: jax-extract status {place} looks at them" in out
    assert "what is elsewhere was not looked at" in out
    open_storage(place).delete("layer_11_batch_000002.pkl")
    assert main(["sweep", place, "--damaged"]) == 0
    run_here(model, tasks, tmp_path / "a", **OPTIONS, **upload)
    assert main(["status", place]) == 0
    assert _rows(place) == _rows(whole)
    assert "nothing to do" not in capsys.readouterr().out


@pytest.mark.parametrize("there", ["another run", "a damaged record"])
def test_a_sweep_of_a_directory_does_not_judge_what_is_wrong_in_the_bucket(
    model: Path, tasks: Path, tmp_path: Path, place: str, there: str, capsys: pytest.CaptureFixture[str]
) -> None:
    upload: dict[str, Any] = {"gcs_bucket": place, "upload_to_cloud": True, "delete_local": True}
    run_here(model, tasks, tmp_path / "a", **OPTIONS, **upload)
    bucket = open_storage(place)
    if there == "another run":
        run = json.loads(bucket.read("_run/run.json"))
        bucket.replace("_run/run.json", json.dumps({**run, "run_id": "0" * 32}).encode())
    else:
        bucket.replace("_run/commits/000002_001.json", b"{")
    before = snapshot(tmp_path / "a")
    code = main(["sweep", str(tmp_path / "a"), "--damaged"])
    said = capsys.readouterr()
    assert code == (2 if there == "another run" else 0), said
    assert ("holds another run" in said.err) == (there == "another run")
    after = snapshot(tmp_path / "a")
    assert {name for name in before if after.get(name) != before[name]} <= {"metadata.json"}


def test_what_was_committed_locally_before_a_kill_is_uploaded_first(
    server: RunningServer, model: Path, tasks: Path, whole: Path, place: str, tmp_path: Path
) -> None:
    words = ["--model_path", model, "--tasks_file", tasks, "--activations_dir", tmp_path / "a", *FLAGS]
    words += ["--gcs_bucket", place, "--upload_to_cloud", True]
    killed = run_cli(*words, cwd=tmp_path, env={VARIABLE: "upload.shard:before:1"})
    assert killed.returncode == -9
    local = len(list((tmp_path / "a/_run/commits").iterdir()))
    assert local >= 1
    assert not Ledger.open(open_storage(place)).committed()
    metadata = run_here(model, tasks, tmp_path / "a", **OPTIONS, gcs_bucket=place, upload_to_cloud=True)
    assert metadata["sessions"][0]["parts"] == 3 - local  # none was computed again
    assert _in_bucket(place) == shards(whole) == shards(tmp_path / "a")


def test_the_upload_job_is_repeated_until_it_says_that_all_is_there(
    server: RunningServer,
    model: Path,
    tasks: Path,
    whole: Path,
    place: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(whole, tmp_path / "a")
    last = tmp_path / "a/_run/commits/000003_001.json"
    record = last.read_text()
    last.unlink()
    assert main(["upload", str(tmp_path / "a"), place]) == 1
    assert "1 part of the run still to be computed" in whole_lines(capsys.readouterr().out)
    last.write_text(record)
    server.fault("status", code=403, kind="start")
    assert main(["upload", str(tmp_path / "a"), place, "--delete_local"]) == 2
    assert "is not permitted" in capsys.readouterr().err
    assert main(["upload", str(tmp_path / "a"), place, "--delete_local"]) == 0
    assert "all is there: 3 parts" in capsys.readouterr().out
    assert _in_bucket(place) == shards(whole)
    server.forget_log()
    assert main(["upload", str(tmp_path / "a"), place]) == 0
    assert not [entry for entry in server.log() if "layer_" in entry["name"] and entry["kind"] in ("start", "chunk")]
    assert json.loads(open_storage(place).read("metadata.json"))["total_samples"] == len(LENGTHS)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


LOCAL_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard changed": (lambda d: _flip(d / "layer_11_batch_000002.pkl"), r"layer_11_batch_000002\.pkl is damaged"),
    "shard gone": (lambda d: (d / "layer_11_batch_000002.pkl").unlink(), r"layer_11_batch_000002\.pkl is missing"),
    "sidecar changed": (
        lambda d: _flip(d / "_run/parts/000002_001.safetensors"),
        r"000002_001\.safetensors is damaged",
    ),
    "record": (lambda d: (d / "_run/commits/000002_001.json").write_text("{"), r"commit record .* is damaged"),
}


@pytest.mark.parametrize("what", LOCAL_DAMAGE)
def test_an_upload_goes_on_past_a_damaged_part_names_it_and_leaves_nothing_half(
    server: RunningServer,
    model: Path,
    tasks: Path,
    whole: Path,
    place: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    directory = tmp_path / "a"
    shutil.copytree(whole, directory)
    damage, sentence = LOCAL_DAMAGE[what]
    damage(directory)
    assert main(["upload", str(directory), place]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: all else is in {place}, but {directory} holds 1 damaged part: 000002_001 (")
    assert re.search(sentence, error), error
    assert set(Ledger.open(open_storage(place)).committed()) == {(1, 1), (3, 1)}
    kept = {name: data for name, data in shards(whole).items() if "000002" not in name}
    assert _in_bucket(place) == kept
    assert json.loads(open_storage(place).read("metadata.json"))["total_samples"] == len(LENGTHS) - 4

    command = re.search(r"jax-extract (sweep \S+ --damaged)", error)
    assert command and main(command[1].split()) == 0
    run_here(model, tasks, directory, **OPTIONS)
    assert main(["upload", str(directory), place]) == 0
    assert _in_bucket(place) == shards(whole) == shards(directory)


def test_what_the_bucket_has_lost_is_named_with_the_command_that_gives_it_up_there(
    server: RunningServer, whole: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["upload", str(whole), place]) == 0
    storage = open_storage(place)
    storage.delete("layer_10_batch_000001.pkl")
    storage.replace("_run/commits/000003_001.json", b"{")
    capsys.readouterr()
    assert main(["upload", str(whole), place]) == 2
    error = capsys.readouterr().err
    assert f"{place} holds 2 damaged parts: 000001_001, 000003_001 (layer_10_batch_000001.pkl is missing)" in error
    assert main(["sweep", place, "--damaged"]) == 0
    assert main(["upload", str(whole), place]) == 0
    assert _in_bucket(place) == shards(whole)


def test_a_verification_goes_along_where_it_speaks_of_every_part_that_is_there(
    server: RunningServer, whole: Path, place: str, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "a")
    run_id, storage = json.loads((whole / "_run/run.json").read_text())["run_id"], open_storage(place)

    def there(**changes: Any) -> str | None:
        """The date of what is in the bucket after an upload."""
        said = {"run_id": run_id, "date": "2026-01-01", "verdict": "verified", "read": {"parts": 3}, **changes}
        (tmp_path / "a/verification.json").write_text(json.dumps(said))
        assert main(["upload", str(tmp_path / "a"), place]) == 0
        return json.loads(storage.read("verification.json"))["date"] if storage.exists("verification.json") else None

    assert there(run_id="another") is None
    assert there(read={"parts": 2}) is None
    assert there(verdict="damaged") is None
    assert there(read=[]) is None
    assert there() == "2026-01-01"
    assert there(date="2026-02-01") == "2026-02-01"
    assert there(date="2025-12-01") == "2026-02-01"


# ------------------------------------------------------------------------------ tidying up in a bucket


def _stores(place: str) -> Ledger:
    """A run of made-up rows, of 8 records and 16 shards, and 12 orphans."""
    case = store_worker.Case(lengths=(20,) * 8, widths=(4, 4))
    store_worker.extract(place, case)
    storage = open_storage(place)
    for number in range(12):
        storage.write(f"layer_0_batch_{900 + number:06d}.pkl", b"mine")
    return Ledger.open(storage)


def _deletions_at_once(server: RunningServer, count: int, delete: Callable[[], object]) -> list[str]:
    """Names of the objects whose deletion was asked for while none was answered yet; then lets it go on to its end."""
    server.forget_log()
    server.fault("stall", kind="delete", times=count)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(delete)
        until = time.monotonic() + 20
        while len(server.log("delete")) < count and not done.done() and time.monotonic() < until:
            time.sleep(0.01)
        asked = [entry["name"] for entry in server.log("delete")]
        server.forget_faults()
        done.result()
    return asked


def test_a_sweep_of_a_bucket_takes_its_objects_side_by_side(server: RunningServer, place: str) -> None:
    ledger = _stores(place)
    found = survey(ledger)
    assert len(found.orphans) == 12
    asked = _deletions_at_once(server, 12, lambda: sweep(ledger, found))
    assert {name.removeprefix("runs/one/") for name in asked} == set(found.orphans)
    assert not survey(ledger).orphans
    assert survey(ledger).complete


def test_an_erasure_of_a_bucket_takes_records_side_by_side_and_no_shard_before_the_last_of_them(
    server: RunningServer, place: str
) -> None:
    ledger = _stores(place)
    records = {f"runs/one/{COMMITS}/{name}" for name in ledger.names(COMMITS)}
    assert len(records) == 8
    asked = _deletions_at_once(server, len(records), lambda: erase(ledger.storage))
    assert set(asked) == records
    names = [entry["name"] for entry in server.log("delete")]
    plan = next(i for i, name in enumerate(names) if "_run/plan/" in name)
    assert len([name for name in names[:plan] if "layer_" in name]) == 16
    assert names[-1] == "runs/one/_run/run.json"
    orphans = {f"layer_0_batch_{900 + number:06d}.pkl" for number in range(12)}
    assert set(ledger.storage.entries()) == orphans  # of batches that the plan does not name


def test_a_deletion_that_is_refused_ends_the_sweep_of_a_bucket_in_one_sentence(
    server: RunningServer, place: str
) -> None:
    ledger = _stores(place)
    server.fault("status", code=403, kind="delete", times=100)
    with pytest.raises(UserError, match="is not permitted"):
        sweep(ledger, survey(ledger))
    assert len(survey(ledger).orphans) == 12


def test_a_prefix_that_holds_another_run_is_refused(
    server: RunningServer, model: Path, tasks: Path, whole: Path, place: str, tmp_path: Path
) -> None:
    run_here(model, tasks, place, **{**OPTIONS, "positions": "last"})  # type: ignore[arg-type]
    before = _in_bucket(place)
    with pytest.raises(UserError, match=r"holds another run.*positions was"):
        run_here(model, tasks, tmp_path / "a", **OPTIONS, gcs_bucket=place, upload_to_cloud=True)
    assert main(["upload", str(whole), place]) == 2
    assert _in_bucket(place) == before


def test_a_local_run_of_another_model_is_not_uploaded_nor_deleted_by_a_command_that_is_refused(
    server: RunningServer, model: Path, tasks: Path, whole: Path, place: str, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "a")
    other = make_model(tmp_path / "other", seed=1)
    options = {"gcs_bucket": place, "upload_to_cloud": True, "delete_local": True}
    with pytest.raises(UserError, match=r"holds another run: --model_path is another model"):
        run_here(other, tasks, tmp_path / "a", **OPTIONS, **options)
    other_inputs = write_jsonl(tmp_path / "other.jsonl", LENGTHS, seed=9)
    with pytest.raises(UserError, match="holds a run over other inputs"):
        run_here(model, other_inputs, tmp_path / "a", **OPTIONS, **options)
    assert shards(tmp_path / "a") == shards(whole)
    assert not open_storage(place).entries("_run")


def test_a_run_that_was_copied_to_another_prefix_is_read_there(
    server: RunningServer, whole: Path, place: str, tmp_path: Path
) -> None:
    assert main(["upload", str(whole), place]) == 0
    source, target = open_storage(place), open_storage(f"{place}-copied")
    for folder in ("", "_run", "_run/plan", "_run/parts", "_run/commits", "_run/sessions"):
        for name in source.entries(folder):
            path = f"{folder}/{name}".lstrip("/")
            target.write(path, source.read(path))  # which gives it a generation of its own
    assert _rows(f"{place}-copied") == _rows(whole)
    assert main(["status", f"{place}-copied"]) == 0


def test_a_part_that_another_process_committed_in_a_shared_spool_is_uploaded_by_whoever_finds_it(
    server: RunningServer, model: Path, tasks: Path, whole: Path, place: str, tmp_path: Path
) -> None:
    """A worker that shares the local directory may commit there and die before it uploads."""
    from jax_extract.extraction.place import Place, copy_run

    run_here(model, tasks, tmp_path / "a", **OPTIONS)
    with pytest.MonkeyPatch.context() as patched:  # as if it had committed after this process looked
        patched.setattr(Place, "bring_over", lambda self: copy_run(Ledger.open(self.spool), self.storage))
        patched.setattr(Place, "committed", lambda *_: {})
        run_here(model, tasks, tmp_path / "a", **OPTIONS, gcs_bucket=place, upload_to_cloud=True)
    assert _rows(place) == _rows(whole)


def test_a_part_whose_name_was_taken_on_the_way_is_written_again_within_the_same_command(
    server: RunningServer, model: Path, tasks: Path, whole: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jax_extract.store.storage import gcs

    publish, taken = gcs.BucketFile.publish, []

    def publish_late(self: Any) -> Any:
        if not taken:
            taken.append(True)
            raise NameTaken
        return publish(self)

    monkeypatch.setattr(gcs.BucketFile, "publish", publish_late)
    metadata = run_here(model, tasks, place, **OPTIONS)  # type: ignore[arg-type]
    assert taken
    assert metadata["total_samples"] == len(LENGTHS)
    assert _rows(place) == _rows(whole)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--upload_to_cloud", "True"], "needs a bucket; add --gcs_bucket"),
        (["--gcs_bucket", "gs://b/p"], "alone uploads nothing; add --upload_to_cloud True"),
        (["--gcs_bucket", "s3://b/p", "--upload_to_cloud", "True"], "is no bucket; write gs://bucket/prefix"),
        (["--delete_local"], "goes with --gcs_bucket and --upload_to_cloud True"),
        (["--activations_dir", "gs://B!/x"], "names no bucket"),
        (["--activations_dir", "s3://bucket/x"], "is neither a directory nor a bucket; write gs://bucket/prefix"),
        (["--activations_dir", "GS://bucket/x"], "is neither a directory nor a bucket; write gs://bucket/prefix"),
        (["--worker_id", "3", "--num_workers", "3"], "--worker_id 3 must be from 0 to 2"),
        (["--worker_id", "0"], "--worker_id and --num_workers belong together"),
        (["--process_id", "0", "--num_processes", "2"], "give all three, or none"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_before_anything_is_opened(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("text\n")
    assert main(["extract", "--model_path", "nowhere", "--tasks_file", "in.txt", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
