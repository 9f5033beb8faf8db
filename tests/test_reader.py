"""Reading a run: names as others write them, shards on their own, parts whose shards are in a bucket by now."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gcs_server import RunningServer
from small_run import whole_lines

from jax_extract import Run, UserError, load_shard, open_activations
from jax_extract.cli import main
from jax_extract.store.differences import differences, input_differences
from jax_extract.store.formats import SUFFIXES
from jax_extract.store.ledger import Ledger
from jax_extract.store.parts import PartContent, Site
from jax_extract.store.storage.local import Directory
from jax_extract.store.storage.opening import open_storage
from jax_extract.store.upload import Uploader
from jax_extract.store.writer import PartWriter, RowPiece
from models.hooks import resolve_hook_points


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("resid_pre", "residual_before"),
        ("resid_mid", "after_attention"),
        ("resid_post", "after_block"),
        ("hook_resid_post", "after_block"),
        ("residual_after", "after_block"),
        ("attn_out", "attention_out"),
        ("mlp_out", "ffn_out"),
        ("mlp.hook_post", "ffn_hidden"),
        ("ln_final", "final_norm"),
        ("blocks.3.resid_post", "blocks.{i}.hook_resid_post"),
        ("blocks.3.hook_resid_psot", "blocks.{i}.hook_resid_post"),
    ],
)
def test_a_name_that_is_nearly_transformer_lenss_leads_to_the_hook_point_it_means(name: str, meant: str) -> None:
    with pytest.raises(UserError, match="unknown hook point") as error:
        resolve_hook_points([name])
    assert f"{name!r}; the nearest name is {meant!r}; the hook points are" in str(error.value)


SITES = [{"hook": "after_block", "layer": layer, "width": 32} for layer in (10, 11)]
IDENTITY: dict[str, Any] = {
    "model_type": "qwen2",
    "sites": SITES,
    "hook_points": ["after_block"],
    "positions": "last",
    "weights": "sha256:a",
    "tokenizer_hash": "sha256:b",
    "chat_template": False,
    "plan_settings": {"rows": 4, "samples_per_batch": 8, "max_length": 64, "positions": "last", "bytes_per_row": 128},
}


def _changed(**changes: Any) -> dict[str, Any]:
    return {**IDENTITY, **changes, "plan_settings": {**IDENTITY["plan_settings"], **changes.get("plan_settings", {})}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"positions": "all", "plan_settings": {"positions": "all"}}, "--positions was last, is now all"),
        ({"plan_settings": {"rows": 2, "samples_per_batch": 4}}, "--batch_size was 4, is now 2"),
        (
            {"chat_template": True, "plan_settings": {"max_length": 32}},
            "--chat_template was False, is now True; --max_seq_length was 64, is now 32",
        ),
        (
            {"sites": [{**SITES[0], "layer": 9}, SITES[0]], "weights": "sha256:c"},
            "--layers_to_extract was 10 11, is now 9 10",
        ),
        (
            {"sites": [{**site, "hook": "ffn_up", "width": 48} for site in SITES], "hook_points": ["ffn_up"]},
            "--hook_points was after_block, is now ffn_up",
        ),
        ({"weights": "sha256:c"}, "--model_path is another model, or --adapter another adapter (other weights)"),
        (
            {"sites": [{**site, "width": 64} for site in SITES], "weights": "sha256:c", "model_type": "llama"},
            "--model_path is another model (other architecture, weights)",
        ),
        ({"plan_settings": {"samples_per_batch": 16}}, "plan_settings.samples_per_batch was 8, is now 16"),
        ({"sites": [{**site, "width": 64} for site in SITES], "plan_settings": {"bytes_per_row": 256}}, "sites was"),
        ({}, ""),
    ],
)
def test_what_makes_another_run_is_told_by_the_flags_that_decide_it(changes: dict[str, Any], told: str) -> None:
    said = differences(IDENTITY, _changed(**changes))
    assert said.startswith(told) if told == "sites was" else said == told


def test_other_inputs_are_told_as_far_as_the_plan_has_counted_them() -> None:
    counts = {"samples": 48, "tokens": 3_120, "truncated_samples": 0, "empty_samples": 0, "dataset_hash": "a"}
    plan = {"window": 1, "input": counts}
    fewer = {**plan, "input": {**counts, "samples": 40, "tokens": 2_790, "dataset_hash": "b"}}
    assert input_differences(plan, fewer) == "48 samples, now 40; 3120 tokens, now 2790"
    other = {**plan, "input": {**counts, "dataset_hash": "b"}}
    assert input_differences(plan, other) == "as many samples and tokens, but other texts or ids"
    assert input_differences(plan, {**plan, "parts": []}) == "the same texts, but window 1 of its plan differs"


# ------------------------------------------------------------------------------------- one shard on its own


@pytest.fixture
def place(bucket_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A prefix of a new bucket."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket_server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    name = f"reader-{time.monotonic_ns()}"
    bucket_server.make_bucket(name)
    yield f"gs://{name}/runs/one"
    bucket_server.forget_faults()


def write_run(root: Path, shard_format: str = "pickle", parts: int = 2) -> Path:
    """A run of two layers and parts of three samples, without a model."""
    directory = Directory(root)
    directory.make()
    sites = [Site("after_block", layer, 4) for layer in (3, 4)]
    identity = {
        "sites": [vars(site) for site in sites],
        "hook_points": ["after_block"],
        "capture_dtype": "float32",
        "positions": "all",
        "shard_format": shard_format,
        "model_type": "qwen2",
    }
    description = {"model_name": "m", "hidden_dim": 4, "num_hidden_layers": 9}
    run = {"identity": identity, "numerics": {"dtype": "float32"}, "description": description}
    ledger = Ledger.start(directory, run)
    writer = PartWriter(ledger, sites, shard_format, "float32", "abc")
    for batch in range(1, parts + 1):
        lengths = (2, 1, 3)
        positions = tuple(np.arange(n, dtype=np.int32) for n in lengths)
        part = writer.begin(
            PartContent(
                batch=batch,
                part=1,
                parts_in_batch=1,
                sample_indices=np.arange(3) + 3 * batch,
                sample_ids=tuple(f"b{batch}s{i}" for i in range(3)),
                token_ids=positions,
                positions=positions,
                full_lengths=np.array(lengths, np.int64),
                meta=({},) * 3,
                plan="p",
            )
        )
        values = np.random.default_rng(batch).normal(size=(3, 3, 4)).astype(np.float32)
        pieces = [RowPiece(row, 0, length) for row, length in enumerate(lengths)]
        part.append({site.key: values + (site.layer or 0) for site in sites}, pieces, lambda: None)
        part.commit()
    writer.close()
    return root


def bucket_copy(root: Path, place: str, delete_local: bool = False) -> None:
    """The run brought into a bucket, with its shards deleted here where that is wanted."""
    source = Ledger.open(Directory(root))
    target = Ledger.start(open_storage(place), source.run)
    uploader = Uploader(source, target, "fed", delete_local)
    for record in source.committed().values():
        uploader.submit(record)
    uploader.close()


SHARD = "layer_3_batch_000002"


@pytest.mark.parametrize("shard_format", list(SUFFIXES))
def test_a_shard_in_a_bucket_is_read_and_inspected_as_the_file_is(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str], shard_format: str
) -> None:
    bucket_copy(write_run(tmp_path / "a", shard_format), place)
    name = f"{SHARD}.{SUFFIXES[shard_format]}"
    here, there = load_shard(tmp_path / "a" / name), load_shard(f"{place}/{name}")
    assert here["sample_ids"].tolist() == there["sample_ids"].tolist() == ["b2s0", "b2s1", "b2s2"]
    np.testing.assert_array_equal(here["activations"], there["activations"])
    said = []
    for where in (str(tmp_path / "a"), place):
        assert main(["inspect", f"{where}/{name}"]) == 0
        said.append(capsys.readouterr().out.partition("stored as float32\n")[2])
    assert said[0] == said[1]
    assert re.match(r"  of run [0-9a-f]{12}, and matches the checksum of its record\n", said[0])


def test_a_pickle_in_a_bucket_runs_nothing_and_a_missing_object_is_told(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace"
    call = type("Call", (), {"__reduce__": lambda _: (Path.touch, (trace,))})()
    open_storage(place).write(f"{SHARD}.pkl", pickle.dumps({"activations": call}))
    assert main(["inspect", f"{place}/{SHARD}.pkl"]) == 2
    assert "holds plain arrays and nothing else" in capsys.readouterr().err
    assert not trace.exists()
    assert main(["inspect", f"{place}/layer_9_batch_000001.pkl"]) == 2
    assert f"shard {place}/layer_9_batch_000001.pkl does not exist" in capsys.readouterr().err


def test_a_shard_that_is_not_what_its_run_committed_is_told_with_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_run(tmp_path / "a") / f"{SHARD}.pkl"
    monkeypatch.chdir(shard.parent)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert main(["inspect", shard.name]) == 1  # by its name alone, as from its folder
    assert "DAMAGED: it does not match the checksum of its record" in whole_lines(capsys.readouterr().out)
    orphan = shard.with_name(f"{SHARD}_attempt_0123456789ab.pkl")
    shard.rename(orphan)
    assert main(["inspect", str(orphan)]) == 1
    assert "no record names it" in whole_lines(capsys.readouterr().out)
    alone = tmp_path / orphan.name
    orphan.rename(alone)
    assert main(["inspect", str(alone)]) == 0
    assert "no run lies beside it" in capsys.readouterr().out


def test_inspect_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "--help"])
    assert not ended.value.code
    assert "gs://bucket/prefix, or one shard" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ([], ["a", "b"], ["--wrong"]):
        assert main(["inspect", *words]) == 2
        assert "jax-extract inspect --help lists the flags" in capsys.readouterr().err


# ------------------------------------------------------------- shards that were uploaded and deleted here


def _rows(run: Run) -> dict[str, bytes]:
    return {sample.sample_id: sample.get(4).tobytes() for sample in run.samples()}


def test_a_run_whose_shards_were_uploaded_and_deleted_here_is_read_from_the_bucket(
    tmp_path: Path, place: str, bucket_server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _rows(open_activations(write_run(tmp_path / "a", parts=3)))
    bucket_copy(tmp_path / "a", place, delete_local=True)
    assert not list((tmp_path / "a").glob("layer_*"))
    bucket_server.forget_log()
    run = open_activations(tmp_path / "a")
    assert len([entry for entry in bucket_server.log() if entry["name"].endswith("_run/run.json")]) <= 2  # opened once
    assert _rows(run) == before
    assert _rows(pickle.loads(pickle.dumps(run))) == before  # as worker processes get it
    batch = next(iter(run.shuffled(3, rows=9, epochs=1)))
    assert batch.activations.shape == (9, 4)
    assert main(["inspect", str(tmp_path / "a")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"3 parts uploaded and deleted here; read from {place}" in said
    assert "18 rows a layer (positions all)" in said and "after_block 4 4 " in said


def test_parts_that_are_still_here_are_read_here(tmp_path: Path, place: str, bucket_server: RunningServer) -> None:
    before = _rows(open_activations(write_run(tmp_path / "a")))
    bucket_copy(tmp_path / "a", place, delete_local=True)
    write_run(tmp_path / "b", parts=3)
    for path in (tmp_path / "b/_run/commits").iterdir():  # as if the run had gone on without the bucket
        run_id = json.loads((tmp_path / "a/_run/run.json").read_text())["run_id"]
        record = {**json.loads(path.read_text()), "run": run_id}
        if not (tmp_path / "a/_run/commits" / path.name).exists():
            (tmp_path / "a/_run/commits" / path.name).write_text(json.dumps(record))
            for file in (record["sidecar"], *record["files"]):
                shutil.copy(tmp_path / "b" / file["path"], tmp_path / "a" / file["path"])
    bucket_server.forget_log()
    rows = _rows(open_activations(tmp_path / "a"))
    assert {name: row for name, row in rows.items() if name in before} == before
    assert set(rows) - set(before) == {"b3s0", "b3s1", "b3s2"}
    assert not [entry for entry in bucket_server.log() if "000003" in entry["name"]]


def _note(root: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    for path in (root / "_run/uploaded").iterdir():
        path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize(
    ("note", "told"),
    [
        ("/etc", r"_run/uploaded says that shards were uploaded to '/etc', which is no bucket"),
        ("https://elsewhere", "which is no bucket"),
        ("gs://../x", r"were uploaded to gs://\.\./x and deleted here, but: .*names no bucket"),
        (7, "which is no bucket"),
        (None, "damaged"),
    ],
)
def test_a_note_that_names_no_bucket_is_refused_before_anything_is_asked(
    tmp_path: Path, place: str, bucket_server: RunningServer, note: Any, told: str
) -> None:
    bucket_copy(write_run(tmp_path / "a"), place, delete_local=True)
    _note(tmp_path / "a", lambda _: {} if note is None else {"to": note})
    bucket_server.forget_log()
    with pytest.raises(UserError, match=told):
        open_activations(tmp_path / "a")
    assert not bucket_server.log()


def test_a_bucket_with_another_run_or_without_the_part_is_told_before_anything_is_read(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket_copy(write_run(tmp_path / "a"), place, delete_local=True)
    bucket_copy(write_run(tmp_path / "b"), f"{place}-other")
    _note(tmp_path / "a", lambda _: {"to": f"{place}-other"})
    with pytest.raises(UserError, match=f"uploaded to {place}-other and deleted here, but: .*holds another run"):
        open_activations(tmp_path / "a")
    _note(tmp_path / "a", lambda _: {"to": f"{place}-nothing"})
    assert main(["inspect", str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert f"were uploaded to {place}-nothing and deleted here, but: {place}-nothing holds no run" in error
    _note(tmp_path / "a", lambda _: {"to": place})
    open_storage(place).delete("_run/commits/000002_001.json")
    with pytest.raises(UserError, match=f"part 000002_001 of .* was uploaded to {place}, which holds no record of it"):
        open_activations(tmp_path / "a")
