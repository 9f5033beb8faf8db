"""Never lost, never twice: a run killed anywhere and resumed gives the files of an undisturbed run."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from small_run import (
    committed_ids,
    make_model,
    run_cli,
    run_here,
    shards,
    snapshot,
    started,
    texts,
    write_jsonl,
)

from jax_extract import UserError, load_shard, open_activations
from jax_extract.cli import main
from jax_extract.extraction import jax_backend
from jax_extract.extraction.prepare import Job
from jax_extract.store.storage.local import Directory

BIG = [100] * 300
SMALL = [33, 60, 40, 61, 35, 50, 47, 62, 63, 34]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), hidden=64)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "in.jsonl", SMALL)


@pytest.fixture
def finished(model: Path, tasks: Path, tmp_path: Path) -> Path:
    """A finished run of three batches."""
    run_here(model, tasks, tmp_path / "a", layers_to_extract=(10, 11), batch_size=4)
    return tmp_path / "a"


def _rows(directory: Path, layer: int = 11) -> dict[str, bytes]:
    return {sample.sample_id: sample.get(layer).tobytes() for sample in open_activations(directory).samples()}


def _words(model: Path, tasks: Path, directory: Path, *more: object) -> list[str]:
    words = ["--model_path", model, "--tasks_file", tasks, "--activations_dir", directory]
    return [str(word) for word in (*words, "--layers_to_extract", 10, 11, "--batch_size", 4, *more)]


def _kill_when_committed(words: list[str], directory: Path, records: int) -> int:
    """Starts a command, kills it as soon as so many parts are committed; returns how many were then."""
    commits = directory / "_run" / "commits"
    with started(*words) as process:
        try:
            until = time.monotonic() + 60
            while not (commits.is_dir() and len(list(commits.iterdir())) >= records):
                assert process.poll() is None, "the run ended before it could be killed"
                assert time.monotonic() < until
                time.sleep(0.005)
        finally:
            process.kill()
    return len(list(commits.iterdir()))


def test_a_killed_run_resumed_gives_the_files_of_an_undisturbed_run_byte_for_byte(model: Path, tmp_path: Path) -> None:
    tasks = write_jsonl(tmp_path / "big.jsonl", BIG)
    layers = tuple(range(12))
    run_here(model, tasks, tmp_path / "whole", layers_to_extract=layers, batch_size=4, positions="all")
    words = ["--model_path", model, "--tasks_file", tasks, "--activations_dir", tmp_path / "killed"]
    words = [str(w) for w in (*words, "--layers_to_extract", *layers, "--batch_size", 4, "--positions", "all")]
    first = _kill_when_committed(words, tmp_path / "killed", 2)
    second = _kill_when_committed(words, tmp_path / "killed", first + 5)
    assert 2 <= first < second < 75
    again = run_cli(*words, cwd=tmp_path, fresh=True)
    assert again.returncode == 0, again.stderr
    assert f"{4 * second} samples committed already" in again.stdout
    whole, killed = shards(tmp_path / "whole"), shards(tmp_path / "killed")
    assert set(killed) >= set(whole)  # an orphan of the killed attempt may lie beside them
    named = {n for batch in open_activations(tmp_path / "killed").metadata["batches"] for n in batch["files"]}
    assert len(named) == len(whole) == 75 * 12
    assert {n.split("_attempt_")[0].removesuffix(".pkl"): killed[n] for n in named} == {
        n.removesuffix(".pkl"): content for n, content in whole.items()
    }
    assert _rows(tmp_path / "killed") == _rows(tmp_path / "whole")
    assert open_activations(tmp_path / "killed").sample_ids == list(texts(BIG))
    assert len(list((tmp_path / "killed/_run/commits").iterdir())) == 75
    assert not list((tmp_path / "killed").glob(".writing-*"))


def test_a_run_begun_before_there_was_a_plan_for_the_whole_mesh_goes_on_as_it_was_begun(
    model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = Job.plan_settings
    monkeypatch.setattr(jax_backend, "LONGEST_SUM", 5)
    with monkeypatch.context() as before:  # the settings that such runs have
        as_before = {"version": 1, "samples_a_row": 0, "attention_block": 1}
        before.setattr(Job, "plan_settings", lambda *given: dataclasses.replace(now(*given), **as_before))
        for name in ("whole", "begun"):
            run_here(model, tasks, tmp_path / name, layers_to_extract=(10, 11), batch_size=4, positions="all")
    run = json.loads((tmp_path / "begun/_run/run.json").read_text())
    assert "version" not in run["identity"]["plan_settings"]
    assert run["numerics"]["accumulation"] == "float32"
    for lost in (tmp_path / "begun/_run/commits").glob("*0002*.json"):
        lost.unlink()
    assert main(["extract", *_words(model, tasks, tmp_path / "begun", "--positions", "all")]) == 0
    assert _rows(tmp_path / "begun") == _rows(tmp_path / "whole")
    assert json.loads((tmp_path / "begun/_run/run.json").read_text())["identity"] == run["identity"]
    run_here(model, tasks, tmp_path / "new", layers_to_extract=(10, 11), batch_size=4, positions="all")
    new = json.loads((tmp_path / "new/_run/run.json").read_text())
    assert new["numerics"]["accumulation"] == "float32, 5 terms at most"


def test_a_finished_run_started_again_does_nothing_and_says_so(
    model: Path, tasks: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(finished)
    assert main(["extract", *_words(model, tasks, finished)]) == 0
    captured = capsys.readouterr()
    assert "everything was committed already; nothing to do" in captured.out
    assert "10 samples committed already" in captured.out
    after = snapshot(finished)
    changed = {name for name in after if before.get(name) != after[name]}
    assert all(name.startswith("_run/sessions/") or name == "metadata.json" for name in changed)
    assert set(before) <= set(after)
    assert committed_ids(finished, 10) == sorted(texts(SMALL))


@pytest.mark.parametrize("devices", [(1, 2), (2, 1)])
def test_resuming_on_another_number_of_devices_keeps_the_batches_and_the_rows(
    model: Path, tasks: Path, tmp_path: Path, devices: tuple[int, int]
) -> None:
    directory = tmp_path / "a"
    words = _words(model, tasks, directory, "--positions", "all")
    start = run_cli(*words, cwd=tmp_path, env={"JAX_NUM_CPU_DEVICES": str(devices[0])})
    assert start.returncode == 0, start.stderr
    before = shards(directory)
    batches = [b["samples"] for b in json.loads((directory / "metadata.json").read_text())["batches"]]
    assert batches == ([4, 4, 2] if devices[0] == 1 else [8, 2])
    for path in sorted((directory / "_run/commits").iterdir())[1:]:  # as if killed after the first part
        for file in json.loads(path.read_text())["files"]:
            (directory / file["path"]).unlink()
        (directory / "_run/parts" / f"{path.stem}.safetensors").unlink()
        path.unlink()
    end = run_cli(*words, cwd=tmp_path, env={"JAX_NUM_CPU_DEVICES": str(devices[1])})
    assert end.returncode == 0, end.stderr
    assert shards(directory) == before
    assert committed_ids(directory, 10) == sorted(texts(SMALL))


def test_a_resume_reads_each_record_at_its_start_and_at_its_end_and_no_more(
    model: Path, tasks: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (finished / "_run/commits/000003_001.json").unlink()
    times: Counter[str] = Counter()
    read_many = Directory.read_many

    def counted(self: Directory, names: Iterable[str]) -> dict[str, bytes]:
        names = list(names)
        times.update(name for name in names if name.startswith("_run/commits/"))
        return read_many(self, names)

    monkeypatch.setattr(Directory, "read_many", counted)
    run_here(model, tasks, finished, layers_to_extract=(10, 11), batch_size=4)
    assert times.pop("_run/commits/000003_001.json") == 1  # for metadata.json
    assert set(times.values()) == {2}


def test_a_note_of_an_upload_does_not_outlive_its_record(model: Path, tasks: Path, finished: Path) -> None:
    note, record = (finished / f"_run/{folder}/000003_001.json" for folder in ("uploaded", "commits"))
    note.write_text(json.dumps({"to": "gs://some-bucket/where"}))
    record.unlink()  # as a kill between the two deletions leaves them
    run_here(model, tasks, finished, layers_to_extract=(10, 11), batch_size=4)
    assert record.exists()
    assert not note.exists()


def test_shards_that_were_uploaded_and_are_still_here_are_read_here(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _rows(finished)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")  # whoever asks the bucket fails
    (finished / "_run/uploaded/000001_001.json").write_text(json.dumps({"to": "gs://some-bucket/where"}))
    assert _rows(finished) == before


OTHER_RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"layers_to_extract": (9, 10)}, "--layers_to_extract"),
    "positions": ({"positions": "all"}, "--positions"),
    "format": ({"shard_format": "npz"}, "--shard_format"),
    "capture_dtype": ({"capture_dtype": "float16"}, "--capture_dtype"),
    "hook_points": ({"hook_points": ("ffn_out",)}, "--hook_points"),
    "batch_size": ({"batch_size": 2}, "--batch_size"),
    "max_seq_length": ({"max_seq_length": 50}, "--max_seq_length"),
}


@pytest.mark.parametrize("kind", OTHER_RUNS)
def test_a_directory_of_another_run_is_refused_with_the_difference_named(
    model: Path, tasks: Path, finished: Path, kind: str
) -> None:
    options, key = OTHER_RUNS[kind]
    before = snapshot(finished)
    with pytest.raises(UserError, match=f"holds another run: .*{key} was .*, is now ") as refused:
        run_here(model, tasks, finished, **{"layers_to_extract": (10, 11), "batch_size": 4, **options})
    assert "--overwrite" in str(refused.value)
    assert snapshot(finished) == before


def test_other_weights_are_refused_with_exit_code_2_and_nothing_changed(
    tasks: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_model(tmp_path / "other", hidden=64, seed=1)
    before = snapshot(finished)
    assert main(["extract", *_words(other, tasks, finished)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "--model_path is another model, or --adapter another adapter (other weights)" in error
    assert snapshot(finished) == before


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_other_inputs_are_refused_and_nothing_changed(
    model: Path, finished: Path, tmp_path: Path, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if state == "unfinished":
        (finished / "_run/commits/000003_001.json").unlink()
    other = write_jsonl(tmp_path / "other.jsonl", SMALL, seed=5)
    before = snapshot(finished)
    monkeypatch.setattr("jax_extract.weights.load.Weights.load", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match="holds a run over other inputs"):
        run_here(model, other, finished, layers_to_extract=(10, 11), batch_size=4)
    assert snapshot(finished) == before


def test_another_dtype_is_refused_unless_the_change_is_allowed(model: Path, tasks: Path, finished: Path) -> None:
    whole = _rows(finished)
    (finished / "_run/commits/000003_001.json").unlink()
    before = snapshot(finished)
    options: dict[str, Any] = {"layers_to_extract": (10, 11), "batch_size": 4, "dtype": "bfloat16"}
    with pytest.raises(UserError, match="would change the arithmetic: --dtype was float32, is now bfloat16"):
        run_here(model, tasks, finished, **options)
    assert snapshot(finished) == before
    run_here(model, tasks, finished, **options, allow_numeric_change=True)
    mixed = _rows(finished)
    assert list(mixed) == list(whole)
    assert {key for key in whole if whole[key] != mixed[key]} == set(_batch_ids(finished, 3))


def _batch_ids(directory: Path, batch: int) -> list[str]:
    return [i for b in open_activations(directory).batches(10) if b.batch == batch for i in b.sample_ids]


def test_overwrite_starts_anew_and_removes_only_the_files_of_the_run(model: Path, tasks: Path, finished: Path) -> None:
    strangers = ["notes.txt", "layer_10_batch_000001.txt", "my_layer_10_batch_000001.pkl", "_run/notes.txt"]
    for name in strangers:
        (finished / name).write_text("keep me")
    metadata = run_here(model, tasks, finished, layers_to_extract=(9,), batch_size=8, overwrite=True)
    assert metadata["layers_extracted"] == [9]
    assert {p.name for p in finished.iterdir() if "_batch_" in p.name} - set(strangers) == {
        "layer_9_batch_000001.pkl",
        "layer_9_batch_000002.pkl",
    }
    assert all((finished / name).read_text() == "keep me" for name in strangers)
    assert [len(list((finished / "_run" / f).iterdir())) for f in ("commits", "parts", "sessions")] == [2, 2, 1]


def test_overwrite_with_a_mistake_in_the_command_keeps_the_old_run(model: Path, finished: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n')
    before = snapshot(finished)
    with pytest.raises(UserError, match="repeats the id 'a'"):
        run_here(model, bad, finished, overwrite=True)
    assert snapshot(finished) == before


def test_an_orphan_shard_of_equal_content_is_adopted(model: Path, tasks: Path, finished: Path) -> None:
    before, record = shards(finished), finished / "_run/commits/000002_001.json"
    written = {name: (finished / name).stat().st_ino for name in before}
    record.unlink()
    run_here(model, tasks, finished, layers_to_extract=(10, 11), batch_size=4)
    assert shards(finished) == before
    assert {name: (finished / name).stat().st_ino for name in before} == written
    assert [file["path"] for file in json.loads(record.read_text())["files"]] == [
        "layer_10_batch_000002.pkl",
        "layer_11_batch_000002.pkl",
    ]


def test_an_orphan_shard_of_other_content_is_left_and_the_attempt_takes_its_own_name(
    model: Path, tasks: Path, finished: Path
) -> None:
    rows = _rows(finished)
    orphan, record = finished / "layer_11_batch_000002.pkl", finished / "_run/commits/000002_001.json"
    whole = orphan.read_bytes()
    record.unlink()
    orphan.write_bytes(b"another attempt")
    run_here(model, tasks, finished, layers_to_extract=(10, 11), batch_size=4)
    committed = json.loads(record.read_text())
    own = f"layer_11_batch_000002_attempt_{committed['attempt']}.pkl"
    assert [file["path"] for file in committed["files"]] == ["layer_10_batch_000002.pkl", own]
    assert orphan.read_bytes() == b"another attempt"
    assert (finished / own).read_bytes() == whole
    assert load_shard(finished / own)["layer"] == 11
    assert _rows(finished) == rows
    run_here(model, tasks, finished, layers_to_extract=(9,), overwrite=True)
    assert not (finished / own).exists()
