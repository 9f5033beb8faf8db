"""Defects seen in systems that do this job, each named, each shown not to be here."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import run_cli, run_here, texts, write_jsonl

from jax_extract import UserError, load_shard, open_activations
from jax_extract.store.storage.failpoints import VARIABLE
from jax_extract.store.storage.local import Directory, LocalFile
from jax_extract.store.storage.opening import open_storage
from jax_extract.store.storage.verbs import Published

LENGTHS = [33, 60, 40, 61, 35, 50, 47, 62, 63, 34, 41]  # the last batch of 4 is partial
OPTIONS: dict[str, Any] = {"layers_to_extract": (10, 11), "batch_size": 4, "positions": "all"}
FLAGS = ["--layers_to_extract", 10, 11, "--batch_size", 4, "--positions", "all"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("input") / "in.jsonl", LENGTHS)


@pytest.fixture(scope="module")
def whole(model: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    directory = tmp_path_factory.mktemp("whole") / "a"
    run_here(model, tasks, directory, **OPTIONS)
    return directory


def _rows(directory: Path, layer: int = 11) -> dict[str, bytes]:
    return {sample.sample_id: sample.get(layer).tobytes() for sample in open_activations(directory).samples()}


def _command(model: Path, tasks: Path, directory: Path) -> list[object]:
    return ["--model_path", model, "--tasks_file", tasks, "--activations_dir", directory, *FLAGS]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_checkpoint_that_counts_samples_still_in_memory(
    model: Path, tasks: Path, whole: Path, tmp_path: Path, moment: str
) -> None:
    """Defect: the checkpoint records the end of a batch whose samples are in memory; a crash loses them silently."""
    words = _command(model, tasks, tmp_path / "a")
    killed = run_cli(*words, cwd=tmp_path, env={VARIABLE: f"part.record:{moment}:2"})
    assert killed.returncode == -9
    counted = [json.loads(path.read_text()) for path in (tmp_path / "a/_run/commits").iterdir()]
    on_disk = {path.name: path.stat().st_size for path in (tmp_path / "a").iterdir()}
    assert all(on_disk[file["path"]] == file["bytes"] for record in counted for file in record["files"])
    assert len(_rows(tmp_path / "a")) == sum(record["samples"] for record in counted)
    run_here(model, tasks, tmp_path / "a", **OPTIONS)
    assert _rows(tmp_path / "a") == _rows(whole)


class _Unreliable(Directory):
    """Stands for a bucket whose uploads fail after the first few."""

    published = 0

    def create(self, name: str, own: str) -> LocalFile:
        return _UnreliableFile(self, name, own)


class _UnreliableFile(LocalFile):
    def publish(self) -> Published:
        _Unreliable.published += 1
        if _Unreliable.published > 4:
            raise UserError("the upload failed (503 Service Unavailable); run the same command again to go on")
        return super().publish()


def test_an_upload_failure_that_lets_the_run_go_on(
    model: Path, tasks: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect: a failed upload returns None, and the run goes on as if it had been uploaded."""
    bucket = tmp_path / "bucket"
    unreliable = {"now": True}

    def place(text: str, flag: str = "") -> Directory:
        if not str(text).startswith("gs://"):
            return open_storage(text, flag)  # type: ignore[return-value]
        return (_Unreliable if unreliable["now"] else Directory)(bucket)

    monkeypatch.setattr("jax_extract.extraction.place.open_storage", place)
    options = {**OPTIONS, "gcs_bucket": "gs://bucket/a", "upload_to_cloud": True}
    with pytest.raises(UserError, match="503 Service Unavailable"):
        run_here(model, tasks, tmp_path / "a", **options)
    unreliable["now"] = False
    metadata = run_here(model, tasks, tmp_path / "a", **options)
    assert metadata["total_samples"] == len(LENGTHS)
    assert _rows(bucket) == _rows(whole)


def test_pads_stored_without_token_ids_or_mask(whole: Path) -> None:
    """Defect: padded rows are stored, and nothing says which token a row belongs to."""
    run = open_activations(whole)
    for sample_id, text in texts(LENGTHS).items():
        sample = run.sample(sample_id)
        assert len(sample.token_ids) == len(text) == len(sample.get(10))  # one token is one byte here
        np.testing.assert_array_equal(sample.positions, np.arange(len(text)))
    rows = sum(len(load_shard(path)["activations"]) for path in whole.glob("layer_10_batch_*.pkl"))
    assert rows == sum(LENGTHS)


def test_rows_of_a_partial_last_batch_assigned_to_the_wrong_sample(model: Path, tasks: Path, whole: Path) -> None:
    """Defect: the padding of the last, partial batch shifts rows to other samples."""
    run = open_activations(whole)
    *_, last = run.batches(11)
    assert len(last.sample_ids) == len(LENGTHS) % 4
    bounds = zip(last.sample_ids, last.row_offsets, last.row_offsets[1:], strict=False)
    spans = {sample_id: last.activations[start:stop] for sample_id, start, stop in bounds}
    every = texts(LENGTHS)
    for sample_id, rows in spans.items():
        alone = tasks.with_name(f"{sample_id}.jsonl")
        alone.write_text(json.dumps({"id": sample_id, "text": every[sample_id]}) + "\n")
        run_here(model, alone, alone.with_suffix(".run"), **OPTIONS)
        np.testing.assert_allclose(
            open_activations(alone.with_suffix(".run")).sample(sample_id).get(11), rows, 1e-4, 1e-4
        )


def test_a_resume_that_skips_approximately(model: Path, tasks: Path, whole: Path, tmp_path: Path) -> None:
    """Defect: resume skips about as many samples as were done, so that some are lost and some are there twice."""
    shutil.copytree(whole, tmp_path / "a")
    for name in ("000001_001", "000003_001"):  # the first and the partial last one, not the one between
        (tmp_path / f"a/_run/commits/{name}.json").unlink()
    run_here(model, tasks, tmp_path / "a", **OPTIONS)
    stored = Counter(
        str(sample_id)
        for record in sorted((tmp_path / "a/_run/commits").iterdir())
        for file in json.loads(record.read_text())["files"]
        if file["layer"] == 10
        for sample_id in load_shard(tmp_path / "a" / file["path"])["sample_ids"]
    )
    assert stored == dict.fromkeys(texts(LENGTHS), 1)
    assert _rows(tmp_path / "a") == _rows(whole)


@pytest.mark.parametrize("at", ["part.shard:after:1", "part.sidecar:after:1", "part.record:after:3"])
def test_a_crash_between_data_file_and_metadata_that_makes_resume_impossible(
    model: Path, tasks: Path, whole: Path, tmp_path: Path, at: str
) -> None:
    """Defect: data without metadata, or metadata without data, and neither reading nor resuming works any more."""
    words = _command(model, tasks, tmp_path / "a")
    assert run_cli(*words, cwd=tmp_path, env={VARIABLE: at}).returncode == -9
    assert not (tmp_path / "a/metadata.json").exists()
    assert len(open_activations(tmp_path / "a")) < len(LENGTHS) or "record" in at
    run_here(model, tasks, tmp_path / "a", **OPTIONS)
    assert json.loads((tmp_path / "a/metadata.json").read_text())["total_samples"] == len(LENGTHS)
    assert _rows(tmp_path / "a") == _rows(whole)


def test_stopping_early_at_the_last_listed_hook_instead_of_the_deepest(
    model: Path, tasks: Path, tmp_path: Path
) -> None:
    """Defect: the forward stops at the hook that is listed last, and deeper ones listed before it are never filled."""
    deepest_first = ("blocks.9.hook_resid_post", "blocks.11.hook_mlp_out", "blocks.3.hook_resid_post")
    run_here(model, tasks, tmp_path / "a", batch_size=4, hook_points=deepest_first)
    run_here(
        model,
        tasks,
        tmp_path / "b",
        batch_size=4,
        layers_to_extract=tuple(range(12)),
        hook_points=("after_block", "ffn_out"),
    )
    some, every = open_activations(tmp_path / "a"), open_activations(tmp_path / "b")
    for sample_id in every.sample_ids:
        for hook, layer in (("after_block", 9), ("ffn_out", 11), ("after_block", 3)):
            expected = every.sample(sample_id).get(layer, hook)
            assert np.abs(expected).max() > 0
            np.testing.assert_array_equal(some.sample(sample_id).get(layer, hook), expected)
