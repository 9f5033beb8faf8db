"""What a hostile or damaged file can do: nothing but be refused, in one sentence.

Guarded: shards that are pickles made to harm, runs whose records, sidecars or run.json were changed, records
of another run, and what `--overwrite` and a closed pipe may not do.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy._core import numeric
from small_run import make_model, run_here, started, write_jsonl

from jax_extract.errors import UserError
from jax_extract.store.formats import load_shard
from jax_extract.store.ledger import COMMITS, RUN_FILE
from jax_extract.store.reader import open_activations
from jax_extract.store.storage.local import require_open_files
from jax_extract.store.storage.verbs import crc32c


class Call:
    """Pickles as a call of `function` with `arguments`, and a state to set if there is one."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


def shard_with(activations: Any) -> dict[str, Any]:
    named = {"layer": 1, "hook": "after_block", "dtype": "float32"}
    return {"activations": activations, **named, "sample_ids": np.array(["a"]), "row_offsets": np.array([0, 1])}


@pytest.mark.parametrize(
    "activations",
    [
        np.empty((1, 1), object),
        Call(numeric._frombuffer, bytearray(8), np.dtype("O"), (1, 1), "C"),
        Call(
            numeric._frombuffer,
            bytearray(b"A" * 8),
            Call(np.dtype, "O", False, True, state=(3, "|", None, None, None, -1, -1, 0)),
            (1, 1),
            "C",
        ),
        Call(
            numeric._frombuffer,
            bytearray(8),
            Call(np.dtype, "f8", False, True, state=(3, "<", None, ("a",), {"a": (np.dtype("O"), 0)}, -1, -1, 0)),
            (1, 1),
            "C",
        ),
        Call(numeric._frombuffer, bytearray(4), np.dtype("f4"), (-1, 1), "C"),
        Call(np.ndarray, (1, 1), "O"),
        Call(np.ndarray, (1, 1), "O", bytearray(8)),
        Call(np.ndarray, (1, 1), np.dtype("O"), bytearray(8)),
        Call(np.ndarray, (1, 1), "f4", bytearray(8), 4),
        Call(np.ndarray, (1 << 40, 1), "f4", bytearray(4)),
        Call(np.ndarray, (1, 1), "f4", bytearray(4), state=(1, (1, 1), "O", False, b"A" * 8)),
    ],
    ids=[
        *("objects", "object buffer", "object type", "changed type", "negative shape", "constructor"),
        *("objects by text", "objects by type", "offset", "beyond its bytes", "changed array"),
    ],
)
def test_no_pickle_makes_an_array_of_pointers(tmp_path: Path, activations: Any) -> None:
    path = tmp_path / "layer_1_batch_000001.pkl"
    path.write_bytes(pickle.dumps(shard_with(activations), protocol=5))
    with pytest.raises(UserError, match=r"layer_1_batch_000001\.pkl"):
        load_shard(path)


@pytest.mark.parametrize("offsets", [[0, 2], [1, 1], [0, 5, 1], [0.0, 1.0]])
def test_a_shard_whose_offsets_do_not_fit_its_rows_is_refused(tmp_path: Path, offsets: list[float]) -> None:
    path = tmp_path / "layer_1_batch_000001.pkl"
    shard = {**shard_with(np.ones((1, 2), np.float32)), "row_offsets": np.array(offsets)}
    path.write_bytes(pickle.dumps(shard, protocol=5))
    with pytest.raises(UserError, match="damaged"):
        load_shard(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    make_model(folder / "model")
    write_jsonl(folder / "in.jsonl", [5, 9, 3])
    run_here(folder / "model", folder / "in.jsonl", folder / "a", layers_to_extract=(10,))
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def again(folder: Path, **options: Any) -> Any:
    return run_here(folder / "model", folder / "in.jsonl", folder / "a", layers_to_extract=(10,), **options)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value)))


RUN_DAMAGE: dict[str, Callable[[Any], Any]] = {
    "no identity": lambda run: {k: v for k, v in run.items() if k != "identity"},
    "identity a list": lambda run: {**run, "identity": []},
    "sites a string": lambda run: {**run, "identity": {**run["identity"], "sites": "x"}},
    "width a word": lambda run: {
        **run,
        "identity": {**run["identity"], "sites": [{"hook": "after_block", "layer": 10, "width": "x"}]},
    },
    "no description": lambda run: {k: v for k, v in run.items() if k != "description"},
}
RECORD_DAMAGE: dict[str, Callable[[Any], Any]] = {
    "no batch": lambda record: {k: v for k, v in record.items() if k != "batch"},
    "files a string": lambda record: {**record, "files": "x"},
    "samples a word": lambda record: {**record, "samples": "many"},
    "rows negative": lambda record: {**record, "rows": -1},
    "sidecar a number": lambda record: {**record, "sidecar": 7},
    "another run": lambda record: {**record, "run": "0" * 32},
}


@pytest.mark.parametrize("damage", RUN_DAMAGE)
def test_a_changed_run_json_is_told(copied: Path, damage: str) -> None:
    edit(copied / "a" / RUN_FILE, RUN_DAMAGE[damage])
    with pytest.raises(UserError):
        open_activations(copied / "a")


@pytest.mark.parametrize("damage", RECORD_DAMAGE)
def test_a_changed_or_foreign_record_is_told(copied: Path, damage: str) -> None:
    edit(copied / "a" / COMMITS / "000001_001.json", RECORD_DAMAGE[damage])
    with pytest.raises(UserError, match="000001_001"):
        open_activations(copied / "a")


def test_a_sidecar_that_promises_rows_the_file_lacks_is_told(copied: Path) -> None:
    path = copied / "a/_run/parts/000001_001.safetensors"
    data = path.read_bytes()
    changed = data.replace(b'\\"offset\\": ', b'\\"offset\\":9', 1)
    assert changed != data
    path.write_bytes(changed)
    edit(
        copied / "a" / COMMITS / "000001_001.json",
        lambda record: {**record, "sidecar": {**record["sidecar"], "crc32c": crc32c(changed)}},
    )
    with pytest.raises(UserError, match="does not fit"):
        next(open_activations(copied / "a").batches(10))


def test_a_stray_file_among_the_records_is_ignored(copied: Path) -> None:
    (copied / "a" / COMMITS / ".DS_Store").write_bytes(b"\0\1")
    assert len(open_activations(copied / "a")) == 3
    again(copied)


def test_a_finished_run_that_lost_a_shard_is_not_called_finished(copied: Path) -> None:
    (copied / "a/layer_10_batch_000001.pkl").unlink()
    with pytest.raises(UserError, match=r"layer_10_batch_000001\.pkl is missing"):
        again(copied)
    (copied / "a" / COMMITS / "000001_001.json").unlink()
    again(copied)
    assert open_activations(copied / "a").sample("s0000").get(10).shape == (1, 32)


def test_overwrite_leaves_files_that_only_look_like_shards(copied: Path) -> None:
    strangers = [copied / "a" / name for name in ("layer_7_batch_000001.pkl", "layer_10_batch_000099.pkl")]
    for stranger in strangers:
        stranger.write_text("mine")
    again(copied, overwrite=True)
    assert all(stranger.read_text() == "mine" for stranger in strangers)


def test_overwrite_does_not_follow_links_out_of_the_directory(copied: Path) -> None:
    outside = copied / "outside"
    shutil.move(copied / "a/_run/sessions", outside)
    (copied / "a/_run/sessions").symlink_to(outside)
    with pytest.raises(UserError, match="is a link"):
        again(copied, overwrite=True)
    assert list(outside.iterdir())


def test_a_run_started_anew_by_another_process_ends_this_one(copied: Path) -> None:
    from jax_extract.store.ledger import Ledger
    from jax_extract.store.storage.local import Directory

    ledger = Ledger.open(Directory(copied / "a"))
    again(copied, overwrite=True, positions="mean")
    with pytest.raises(UserError, match=r"started .* anew"):
        ledger.commit({"batch": 9, "part": 1})


def test_rows_that_are_not_finite_are_reported(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import safetensors.numpy

    from jax_extract.config import ExtractConfig
    from jax_extract.extraction.command import extract_to_directory

    weights = safetensors.numpy.load_file(copied / "model/model.safetensors")
    weights["model.embed_tokens.weight"][:] *= np.float32(1e38)
    safetensors.numpy.save_file(weights, copied / "model/model.safetensors")
    metadata = extract_to_directory(
        ExtractConfig(
            model_path=str(copied / "model"),
            tasks_file=str(copied / "in.jsonl"),
            activations_dir=str(copied / "b"),
            layers_to_extract=(10,),
            capture_dtype="float16",
        )
    )
    assert metadata["not_finite_rows"] == 3
    assert "3 rows hold infinite or undefined values" in capsys.readouterr().out


def test_an_extraction_whose_reader_goes_away_is_done_all_the_same(copied: Path) -> None:
    words = ["extract", "--model_path", copied / "model", "--tasks_file", copied / "in.jsonl"]
    words += ["--activations_dir", copied / "c", "--layers_to_extract", 10]
    with started(*words, script=None) as process:
        process.stdout.close()
        process.stderr.read()
        assert process.wait() == 0
    assert len(open_activations(copied / "c")) == 3


def test_more_sites_than_the_system_lets_be_open_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 100))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    with pytest.raises(UserError, match="ulimit -n 364"):
        require_open_files(300)


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": -1.0},
        {"rope_theta": 0},
        {"rope_theta": float("inf")},
        {"rope_scaling": {"type": "linear", "factor": None}},
        {"rope_scaling": {"type": "linear", "factor": "abc"}},
        {"num_hidden_layers": 4.7},
        {"num_hidden_layers": float("inf")},
        {"max_position_embeddings": 0},
        {"num_attention_heads": "4"},
        {"intermediate_size": 10**19},
        {"tie_word_embeddings": "false"},
    ],
    ids=str,
)
def test_configuration_values_that_mean_nothing_are_refused(change: dict[str, Any]) -> None:
    from models.qwen2_jax_with_hooks import Qwen2Config

    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "vocab_size": 99, "rms_norm_eps": 1e-6, "max_position_embeddings": 64}
    Qwen2Config.from_hf(config)
    with pytest.raises(UserError, match=r"config\.json"):
        Qwen2Config.from_hf({**config, **change})
