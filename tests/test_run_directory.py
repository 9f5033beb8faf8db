"""The run directory: documented names and metadata, the reader's promises, damage told and not read over."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import run_here, shards, snapshot, texts, whole_lines, write_jsonl

import jax_extract
from jax_extract import UserError, load_shard, open_activations
from jax_extract.cli import main
from jax_extract.extraction import prepare
from jax_extract.store.storage.verbs import crc32c
from jax_extract.terminal import bytes_text
from jax_extract.upkeep import status

LENGTHS = [33, 60, 40, 61, 35, 50, 47, 62, 63, 34, 48, 64, 49, 36, 51, 37, 38, 52, 39, 53]  # one slab shape
LAYERS = (10, 11)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("input") / "texts.jsonl", LENGTHS)


@pytest.fixture(scope="module")
def last(model: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one row a sample, as the document has it."""
    directory = tmp_path_factory.mktemp("last") / "activations"
    run_here(model, tasks, directory, layers_to_extract=LAYERS)
    return directory


@pytest.fixture(scope="module")
def all_formats(model: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of every position, one a shard format, otherwise equal."""
    root = tmp_path_factory.mktemp("all")
    for name in ("pickle", "npz", "safetensors"):
        run_here(model, tasks, root / name, layers_to_extract=LAYERS, positions="all", shard_format=name)
    return {name: root / name for name in ("pickle", "npz", "safetensors")}


@pytest.fixture
def damaged(all_formats: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a run, to be damaged."""

    def copy(name: str = "pickle") -> Path:
        for path in all_formats[name].rglob("*"):
            target = tmp_path / path.relative_to(all_formats[name])
            if path.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        return tmp_path

    return copy


def _record(directory: Path, name: str = "000001_001") -> tuple[Path, dict[str, Any]]:
    path = directory / "_run" / "commits" / f"{name}.json"
    return path, json.loads(path.read_text())


def test_file_names_and_count_are_those_of_the_document(last: Path) -> None:
    expected = {f"layer_{layer}_batch_{batch:06d}.pkl" for layer in LAYERS for batch in (1, 2, 3)}
    assert {path.name for path in last.iterdir()} == expected | {"metadata.json", "_run"}


def test_a_default_pickle_shard_is_a_batch_of_rows_in_float32(last: Path) -> None:
    shard = load_shard(last / "layer_10_batch_000001.pkl")
    assert shard["activations"].shape == (8, 32)
    assert shard["activations"].dtype == np.float32


def test_metadata_has_the_keys_of_the_document(last: Path) -> None:
    metadata = json.loads((last / "metadata.json").read_text())
    documented = ["model_name", "layers_extracted", "hidden_dim", "num_layers_extracted", "total_samples", "batches"]
    assert [key for key in metadata if key in documented] == documented
    assert metadata["layers_extracted"] == list(LAYERS)
    assert (metadata["hidden_dim"], metadata["num_layers_extracted"], metadata["total_samples"]) == (32, 2, 20)
    assert [batch["samples"] for batch in metadata["batches"]] == [8, 8, 4]
    assert {name for batch in metadata["batches"] for name in batch["files"]} == set(shards(last))


def test_other_hook_points_are_named_in_the_file_names(model: Path, tasks: Path, tmp_path: Path) -> None:
    hooks = ("ffn_hidden", "embeddings", "final_norm", "after_block", "blocks.2.hook_attn_out")
    run_here(model, tasks, tmp_path / "a", layers_to_extract=(11,), hook_points=hooks, n_samples=3)
    assert set(shards(tmp_path / "a")) == {
        "layer_11_batch_000001.pkl",
        "layer_11_ffn_hidden_batch_000001.pkl",
        "layer_2_attention_out_batch_000001.pkl",
        "embeddings_batch_000001.pkl",
        "final_norm_batch_000001.pkl",
    }
    run = open_activations(tmp_path / "a")
    assert run.sample("s0001").get(11, "ffn_hidden").shape == (1, 48)
    assert run.sample("s0001").get(hook="final_norm").shape == (1, 32)


def test_only_a_batch_of_several_parts_has_part_in_its_file_names(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_of = prepare.Job.plan_settings
    monkeypatch.setattr(
        prepare.Job,
        "plan_settings",
        lambda *words, **named: dataclasses.replace(settings_of(*words, **named), max_shard_bytes=5 * 64 * 128),
    )
    tasks = write_jsonl(tmp_path / "in.jsonl", [64] * 12 + [33])
    run_here(model, tasks, tmp_path / "a", layers_to_extract=(10,), positions="all", batch_size=4)
    names = set(shards(tmp_path / "a"))
    assert names == {f"layer_10_batch_{batch:06d}.pkl" for batch in (1, 2, 3, 4)}
    monkeypatch.setattr(
        prepare.Job,
        "plan_settings",
        lambda *words, **named: dataclasses.replace(settings_of(*words, **named), max_shard_bytes=2 * 64 * 128),
    )
    metadata = run_here(model, tasks, tmp_path / "b", layers_to_extract=(10,), positions="all", batch_size=4)
    parts = {f"layer_10_batch_{batch:06d}_part_{part:03d}.pkl" for batch in (1, 2, 3) for part in (1, 2)}
    assert set(shards(tmp_path / "b")) == parts | {"layer_10_batch_000004.pkl"}
    assert [batch["parts"] for batch in metadata["batches"]] == [2, 2, 2, 1]
    whole, cut = open_activations(tmp_path / "a"), open_activations(tmp_path / "b")
    assert cut.sample_ids == whole.sample_ids
    for sample in cut.samples():
        assert sample.get(10).tobytes() == whole.sample(sample.sample_id).get(10).tobytes()


def test_samples_come_in_the_order_of_the_input_with_their_tokens_and_positions(all_formats: dict[str, Path]) -> None:
    run = open_activations(all_formats["pickle"])
    named = texts(LENGTHS)
    assert run.sample_ids == list(named)
    assert len(run) == 20
    letters = {}
    for index, sample in enumerate(run.samples()):
        assert (sample.sample_index, sample.truncated_tokens) == (index, 0)
        assert sample.meta == {"line": index + 1}
        assert sample.token_ids.dtype == np.int32
        assert sample.positions.tolist() == list(range(LENGTHS[index]))
        assert sample.get(layer=10).shape == (LENGTHS[index], 32)
        letters.update(zip(named[sample.sample_id], sample.token_ids.tolist(), strict=True))
        assert [letters[letter] for letter in named[sample.sample_id]] == sample.token_ids.tolist()


def test_the_last_position_is_the_last_row_of_all_positions(last: Path, all_formats: dict[str, Path]) -> None:
    everything = open_activations(all_formats["pickle"])
    for sample in open_activations(last).samples():
        assert sample.positions.tolist() == [len(sample.token_ids) - 1]
        np.testing.assert_array_equal(sample.get(10)[0], everything.sample(sample.sample_id).get(10)[-1])


def test_truncation_is_counted_in_the_sample_and_in_the_run(model: Path, tasks: Path, tmp_path: Path) -> None:
    run_here(model, tasks, tmp_path / "a", layers_to_extract=(10,), max_seq_length=40, n_samples=4)
    run = open_activations(tmp_path / "a")
    assert [sample.truncated_tokens for sample in run.samples()] == [0, 20, 0, 21]
    plan = json.loads((tmp_path / "a/_run/plan/000000.json").read_text())
    assert plan["input"]["truncated_samples"] == 2


def test_all_formats_read_back_to_the_same_rows(all_formats: dict[str, Path]) -> None:
    runs = {name: open_activations(path) for name, path in all_formats.items()}
    for sample in runs["pickle"].samples():
        for layer in LAYERS:
            rows = {name: run.sample(sample.sample_id).get(layer).tobytes() for name, run in runs.items()}
            assert len(set(rows.values())) == 1
    for name, path in all_formats.items():
        suffix = {"pickle": "pkl"}.get(name, name)
        for batch in runs[name].batches(11):
            shard = load_shard(path / f"layer_11_batch_{batch.batch:06d}.{suffix}")
            np.testing.assert_array_equal(batch.activations, shard["activations"])
            assert list(batch.sample_ids) == shard["sample_ids"].tolist()
            np.testing.assert_array_equal(batch.row_offsets, shard["row_offsets"])
            assert len(batch.positions) == len(batch.activations)


@pytest.mark.parametrize("capture_dtype", ["float32", "bfloat16"])
def test_a_run_in_memory_has_the_very_rows_of_the_run_on_disk(
    model: Path, tasks: Path, tmp_path: Path, capture_dtype: str
) -> None:
    options: dict[str, Any] = {"positions": "every:5", "capture_dtype": capture_dtype, "batch_size": 4}
    run_here(model, tasks, tmp_path / "a", layers_to_extract=LAYERS, **options)
    on_disk = open_activations(tmp_path / "a")
    in_memory = jax_extract.extract(str(model), texts(LENGTHS), layers=LAYERS, **options)
    assert in_memory.sample_ids == on_disk.sample_ids
    assert (in_memory.layers, in_memory.hook_points) == (on_disk.layers, on_disk.hook_points)
    for sample in in_memory.samples():
        other = on_disk.sample(sample.sample_id)
        np.testing.assert_array_equal(sample.positions, other.positions)
        np.testing.assert_array_equal(sample.token_ids, other.token_ids)
        for layer in LAYERS:
            assert sample.get(layer).dtype == other.get(layer).dtype
            assert sample.get(layer).tobytes() == other.get(layer).tobytes()


def test_what_a_run_does_not_hold_is_told_with_what_it_holds(last: Path) -> None:
    run = open_activations(last)
    with pytest.raises(UserError, match=r"no sample 's00013'; the nearest is 's0013'"):
        run.sample("s00013")
    with pytest.raises(UserError, match=r"no layer 9 of 'after_block'; it holds the layers \[10, 11\]"):
        run.sample("s0001").get(layer=9)
    with pytest.raises(UserError, match=r"no 'ffn_out'; it holds: after_block"):
        run.sample("s0001").get(layer=10, hook="ffn_out")
    with pytest.raises(UserError, match="no layer 4"):
        next(run.batches(4))


def test_an_unfinished_run_is_read_as_far_as_it_is_committed(damaged: Callable[..., Path]) -> None:
    directory = damaged()
    _, record = _record(directory, "000003_001")
    (directory / "_run/commits/000003_001.json").unlink()
    run = open_activations(directory)
    assert len(run) == 16
    assert run.metadata["total_samples"] == 16
    assert [batch.batch for batch in run.batches(10)] == [1, 2]
    assert record["samples"] == 4
    assert run.sample_ids == sorted(run.sample_ids)


@pytest.mark.parametrize("shard_format", ["pickle", "npz", "safetensors"])
def test_a_changed_byte_is_found_when_its_rows_are_read_and_the_file_is_named(
    damaged: Callable[[str], Path], shard_format: str
) -> None:
    directory = damaged(shard_format)
    name = next(n for n in shards(directory) if n.startswith("layer_10_batch_000002"))
    content = bytearray((directory / name).read_bytes())
    content[len(content) // 2] ^= 1
    (directory / name).write_bytes(content)
    run = open_activations(directory)
    batches = run.batches(10)
    assert next(batches).batch == 1
    with pytest.raises(UserError, match=f"{name}.*damaged"):
        next(batches)
    assert [batch.batch for batch in run.batches(11)] == [1, 2, 3]


def test_a_cut_shard_is_found_and_named(damaged: Callable[..., Path]) -> None:
    directory = damaged()
    path = directory / "layer_11_batch_000001.pkl"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"layer_11_batch_000001\.pkl.*cut short"):
        list(open_activations(directory).batches(11))
    path.unlink()
    with pytest.raises(UserError, match=r"layer_11_batch_000001\.pkl of .* cannot be read"):
        list(open_activations(directory).batches(11))


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_sidecar_is_found_and_named(damaged: Callable[..., Path], damage: str) -> None:
    directory = damaged()
    path = directory / "_run/parts/000001_001.safetensors"
    content = bytearray(path.read_bytes())
    content[-20] ^= 255
    path.unlink()
    if damage != "gone":
        path.write_bytes(content if damage == "changed" else content[:300])
    with pytest.raises(UserError, match=r"000001_001\.safetensors"):
        open_activations(directory).sample("s0001")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "_run/../../secret"])
def test_a_record_that_leads_out_of_the_directory_is_refused(damaged: Callable[..., Path], name: str) -> None:
    directory = damaged()
    path, record = _record(directory)
    record["sidecar"]["path"] = name
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"leads out of"):
        open_activations(directory).sample("s0001")


def test_a_sidecar_that_leads_out_of_the_directory_is_refused(damaged: Callable[..., Path]) -> None:
    directory = damaged()
    sidecar = directory / "_run/parts/000001_001.safetensors"
    good, bad = b"layer_10_batch_000001.pkl", b"../../../../../etc/passwd"
    assert len(good) == len(bad)
    sidecar.write_bytes(sidecar.read_bytes().replace(good, bad))
    path, record = _record(directory)
    record["sidecar"]["crc32c"] = crc32c(sidecar.read_bytes())
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"leads out of"):
        list(open_activations(directory).batches(10))


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_damaged_record_is_found_and_named(damaged: Callable[..., Path], content: str) -> None:
    directory = damaged()
    (directory / "_run/commits/000001_001.json").write_text(content)
    with pytest.raises(UserError, match=r"000001_001\.json"):
        open_activations(directory)


def test_a_directory_without_a_run_and_one_of_another_format_version_are_refused(
    damaged: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(UserError, match="holds no run"):
        open_activations(tmp_path_factory.mktemp("empty"))
    directory = damaged()
    run = json.loads((directory / "_run/run.json").read_text())
    (directory / "_run/run.json").write_text(json.dumps({**run, "format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        open_activations(directory)


def _listed(out: str) -> set[str]:
    """The files that a sweep says it removes; each has its bytes at the end of its line."""
    return {line.split()[0] for line in out.splitlines() if line.startswith("  ") and line.endswith((" kB", " bytes"))}


def test_a_sweep_of_torn_parts_says_and_takes_everything_of_theirs_in_one_call(
    damaged: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = damaged()
    (directory / "layer_11_batch_000001.pkl").unlink()
    (directory / "layer_10_batch_000009_attempt_0123456789ab.pkl").write_bytes(b"left by a kill")
    before = snapshot(directory)
    doomed = {
        "layer_10_batch_000001.pkl",
        "layer_10_batch_000009_attempt_0123456789ab.pkl",
        "_run/parts/000001_001.safetensors",
        "_run/commits/000001_001.json",
    }
    assert main(["status", str(directory)]) == 1
    assert f"jax-extract sweep {directory} --damaged" in capsys.readouterr().out
    said = f"4 files, {bytes_text(sum(len(before[name]) for name in doomed))}, 1 part of the run among them"
    assert main(["sweep", str(directory), "--torn", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert _listed(out) == doomed
    assert f"{said}, would be removed" in out
    assert snapshot(directory) == before
    assert main(["sweep", str(directory), "--torn"]) == 0
    out = capsys.readouterr().out
    assert _listed(out) == doomed
    assert "part 000001_001: layer_11_batch_000001.pkl is missing" in out
    assert f"{said}, removed" in out
    after = snapshot(directory)
    assert set(before) - set(after) == doomed
    assert all(after[name] == before[name] for name in after if name != "metadata.json")
    assert main(["sweep", str(directory)]) == 0
    assert "0 files" in capsys.readouterr().out


def test_a_record_that_was_tampered_with_gives_up_no_file_of_another_part_or_of_somebody_else(
    damaged: Callable[..., Path],
) -> None:
    directory = damaged()
    outside = directory.parent / "outside.pkl"
    strangers = [outside, *(directory / name for name in ("notes.txt", "layer_7_batch_000001.pkl", "_run/run.txt"))]
    for stranger in strangers:
        stranger.write_text("mine")
    path, record = _record(directory)
    named = ["../outside.pkl", str(outside), "notes.txt", "layer_7_batch_000001.pkl", "_run/run.txt", "_run/run.json"]
    named += ["layer_10_batch_000002.pkl", "_run/commits/000002_001.json", "./layer_11_batch_000002.pkl"]
    record["files"] = [{**record["files"][0], "path": name} for name in named]
    path.write_text(json.dumps(record))
    before = snapshot(directory)
    assert main(["sweep", str(directory), "--damaged"]) == 0
    own = {"layer_10_batch_000001.pkl", "layer_11_batch_000001.pkl", "_run/parts/000001_001.safetensors"}
    assert set(before) - set(snapshot(directory)) == own | {"_run/commits/000001_001.json"}
    assert all(stranger.read_text() == "mine" for stranger in strangers)
    assert len(open_activations(directory)) == 12


def test_a_sweep_leaves_the_files_of_a_part_whose_record_may_come_back_from_a_copy(
    damaged: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = damaged()
    path, _ = _record(directory)
    record = path.read_text()
    path.write_text("{")
    before = snapshot(directory)
    assert main(["sweep", str(directory)]) == 1
    out = capsys.readouterr().out
    assert "0 files" in out
    assert "left as it is: 1 torn part; restore what is wrong from a copy, or give up with" in out
    assert snapshot(directory) == before
    path.write_text(record)
    assert main(["status", str(directory)]) == 0
    said = whole_lines(capsys.readouterr().out)
    assert f"complete, by names and sizes; jax-extract verify {directory} reads the bytes too" in said
    path.write_text("{")
    assert main(["sweep", str(directory), "--torn"]) == 0
    assert not list(directory.glob("layer_*_batch_000001*"))


def test_metadata_can_be_derived_anew_from_the_records(damaged: Callable[..., Path]) -> None:
    directory = damaged()
    written = json.loads((directory / "metadata.json").read_text())
    (directory / "metadata.json").unlink()
    assert json.loads(json.dumps(open_activations(directory).metadata)) == written


def test_reading_takes_transformer_lens_names_and_needs_no_layer_where_there_is_one(
    model: Path, tasks: Path, tmp_path: Path
) -> None:
    run_here(model, tasks, tmp_path / "one", layers_to_extract=(10,), hook_points=("ffn_out",))
    sample = next(open_activations(tmp_path / "one").samples())
    rows = sample.get(10, "ffn_out").tobytes()
    assert sample.get(hook="ffn_out").tobytes() == rows
    assert sample.get(hook="blocks.10.hook_mlp_out").tobytes() == rows
    assert sample.get(10, "blocks.{i}.hook_mlp_out").tobytes() == rows
    run_here(model, tasks, tmp_path / "two", layers_to_extract=(9, 10))
    with pytest.raises(UserError, match=r"say which layer .* get\(layer=9\)"):
        next(open_activations(tmp_path / "two").samples()).get()
    with pytest.raises(UserError, match="sample ids are strings"):
        open_activations(tmp_path / "two").sample(0)  # type: ignore[arg-type]


def test_positions_that_no_sample_reaches_are_refused_before_anything_is_written(
    model: Path, tasks: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no sample is long enough for positions at:1000"):
        run_here(model, tasks, tmp_path / "a", layers_to_extract=(10,), positions="at:1000")
    assert not (tmp_path / "a").exists()


def test_a_sweep_refuses_folders_that_are_links_and_a_run_json_of_another_run(
    damaged: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = damaged()
    run = json.loads((directory / "_run/run.json").read_text())
    (directory / "_run/run.json").write_text(json.dumps({**run, "run_id": "0" * 32}))
    before = snapshot(directory)
    assert main(["sweep", str(directory), "--damaged"]) == 2
    assert "is of another run than its _run/run.json" in capsys.readouterr().err
    assert snapshot(directory) == before
    (directory / "_run/run.json").write_text(json.dumps(run))
    (directory / "_run/parts").rename(tmp_path_factory.mktemp("elsewhere") / "parts")
    (directory / "_run/parts").symlink_to("/not/mounted")
    before = {path.name for path in directory.glob("**/*")}
    assert main(["sweep", str(directory), "--damaged"]) == 2
    assert "is a link" in capsys.readouterr().err
    assert {path.name for path in directory.glob("**/*")} == before


def test_a_record_that_names_fewer_files_than_its_sidecar_is_given_up_whole(damaged: Callable[..., Path]) -> None:
    directory = damaged()
    path, record = _record(directory)
    path.write_text(json.dumps({**record, "files": record["files"][:1]}))
    assert main(["sweep", str(directory), "--damaged"]) == 0
    assert not path.exists()
    assert main(["status", str(directory)]) == 1  # not complete: it is computed again


def test_a_part_that_is_committed_while_a_sweep_reads_keeps_its_files(
    damaged: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = damaged()
    path, record = _record(directory)
    path.unlink()
    reading = status.flawed_parts

    def meanwhile(*words: Any) -> Any:
        found = reading(*words)
        path.write_text(json.dumps(record))
        return found

    monkeypatch.setattr(status, "flawed_parts", meanwhile)
    assert main(["sweep", str(directory), "--damaged"]) == 0
    assert main(["status", str(directory)]) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"files": []},
        {"files": {}},
        {"plan": None},
        {"sidecar": {"path": "x", "bytes": 1, "crc32c": 1, "generation": []}},
        {"sidecar": {"path": "x", "bytes": 1, "crc32c": 1, "generation": 1.5}},
    ],
)
def test_a_record_of_another_form_is_told_in_one_sentence(damaged: Callable[..., Path], change: dict[str, Any]) -> None:
    directory = damaged()
    path, record = _record(directory)
    path.write_text(json.dumps({**record, **change}))
    with pytest.raises(UserError, match=r"commit record .* is damaged"):
        open_activations(directory)
    assert main(["status", str(directory)]) == 1


def test_a_plan_and_a_run_of_another_form_are_told_in_one_sentence(
    damaged: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = damaged()
    path = next((directory / "_run/plan").iterdir())
    plan = path.read_text()
    path.write_text(plan.replace('"batch": 1', '"batch": "one"', 1))
    assert main(["status", str(directory)]) == 2
    assert "the plan in" in capsys.readouterr().err
    path.write_text(plan)
    run = (directory / "_run/run.json").read_text()
    (directory / "_run/run.json").write_text(run.replace('"layer"', '"stratum"'))
    assert main(["status", str(directory)]) == 2
    assert "is damaged" in capsys.readouterr().err
