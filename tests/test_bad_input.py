"""A mistake is one sentence with exit code 2, told before a weight is loaded or a file is made."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from small_run import (
    make_model,
    random_weights,
    run_cli,
    run_here,
    shards,
    texts,
    write_arc,
    write_config,
    write_jsonl,
    write_weights,
)

from jax_extract import cli, open_activations
from jax_extract.errors import UserError
from jax_extract.extraction.program import CaptureProgram
from jax_extract.store.storage.local import Directory
from jax_extract.weights.load import Weights

Refused = Callable[..., str]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", layers=2)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "in.jsonl", [40] * 6)


@pytest.fixture
def refused(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """Runs the command with some options changed, checks how it ends, and returns the sentence."""
    write_config(model, num_hidden_layers=2)
    monkeypatch.setattr(Weights, "load", lambda *_: pytest.fail("weights were loaded"))

    def run(*flags: object, leaves_nothing: bool = True, **options: object) -> str:
        named = {"model_path": model, "tasks_file": tasks, "activations_dir": tmp_path / "out", **options}
        words = [str(word) for name, value in named.items() if value is not None for word in (f"--{name}", value)]
        try:
            code: Any = cli.main(["extract", *words, *map(str, flags)])
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        assert code == 2
        _check_sentence(captured.err)
        if leaves_nothing:
            assert not (tmp_path / "out").exists()
        return captured.err

    return run


def _check_sentence(stderr: str) -> None:
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert stderr.endswith("\n")
    assert "Traceback" not in stderr
    assert len(stderr) < 600


# ----------------------------------------------------------------------------------------- the model


def test_a_missing_model_is_named(refused: Refused, tmp_path: Path) -> None:
    assert "/nowhere/model" in refused(model_path=tmp_path / "nowhere/model")
    assert "--model_path" in refused(model_path=None)
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in refused(model_path=tmp_path / "empty")


def test_truncated_weights_are_named(refused: Refused, model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors" in refused()
    file.write_bytes(b"")
    assert "model.safetensors" in refused()
    file.unlink()
    assert "no *.safetensors file" in refused()


def test_a_missing_a_misshapen_and_an_unknown_tensor_are_named(refused: Refused, model: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    weights = random_weights(layers=2)
    write_weights(model, {key: value for key, value in weights.items() if key != name})
    assert f"lack '{name}'" in refused()
    write_weights(model, {**weights, name: weights[name][:-1]})
    sentence = refused()
    assert name in sentence
    assert "(15, 32)" in sentence
    assert "(16, 32)" in sentence
    write_weights(model, {**weights, "model.layers.0.self_attn.lora.weight": weights[name]})
    assert "model.layers.0.self_attn.lora.weight" in refused()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "bert"}, "'bert'"),
        ({"model_type": "qwen22"}, "the nearest is 'qwen2'"),
        ({"model_type": None, "architectures": None}, "'model_type'"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "'proportional'"),
        ({"embedding_multiplier": 3}, "embedding_multiplier 3"),
        ({"hidden_act": "mish"}, "'mish'"),
        ({"hidden_size": None}, "means (256, 4096)"),  # what transformers takes for it
        ({"num_attention_heads": "many"}, "many"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"hidden_size": 64}, "has shape"),
        ({"num_hidden_layers": 3}, "model.layers.2."),
    ],
)
def test_a_configuration_that_is_not_understood_is_named(
    refused: Refused, model: Path, changes: dict[str, Any], named: str
) -> None:
    write_config(model, **{"num_hidden_layers": 2, **changes})
    assert named in refused()


def test_a_damaged_config_json_is_named_with_its_line(refused: Refused, model: Path) -> None:
    (model / "config.json").write_text('{\n "model_type": "qwen2",\n oops\n}')
    assert "config.json, line 3" in refused()


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_a_missing_or_damaged_tokenizer_is_named(refused: Refused, model: Path, content: str | None) -> None:
    (model / "tokenizer.json").unlink()
    if content is not None:
        (model / "tokenizer.json").write_text(content)
    assert "tokenizer" in refused()


def test_a_folder_without_any_tokenizer_file_is_told(refused: Refused, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    assert "tokenizer" in refused()


def test_a_tokenizer_of_another_model_whose_ids_the_embedding_lacks_is_told(refused: Refused, model: Path) -> None:
    write_config(model, num_hidden_layers=2, vocab_size=50)
    weights = random_weights(layers=2)
    write_weights(model, {**weights, "model.embed_tokens.weight": weights["model.embed_tokens.weight"][:50]})
    assert "tokenizer" in refused()


def test_an_unknown_tokenizer_class_is_named(refused: Refused, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "NoSuchTokenizer"}))
    assert "tokenizer" in refused()


def test_a_missing_chat_template_is_told(refused: Refused) -> None:
    assert "--chat_template" in refused("--chat_template", "True")


def test_a_hub_model_that_cannot_be_reached_is_told_within_20_seconds(tmp_path: Path, tasks: Path) -> None:
    started = time.monotonic()
    words = ["--model_path", "nobody/no-such-model", "--tasks_file", tasks]
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    done = run_cli(*words, cwd=tmp_path, env=unreachable, fresh=True)
    assert done.returncode == 2
    _check_sentence(done.stderr)
    assert "nobody/no-such-model" in done.stderr
    assert time.monotonic() - started < 20
    assert not (tmp_path / "activations").exists()


# ----------------------------------------------------------------------------------------- the input


def test_a_missing_input_is_named(refused: Refused, tmp_path: Path) -> None:
    assert "nowhere.json" in refused(tasks_file=tmp_path / "nowhere.json")
    assert "--tasks_file" in refused(tasks_file=None)


def test_malformed_input_is_named_with_its_line(refused: Refused, tmp_path: Path) -> None:
    lines = tmp_path / "bad.jsonl"
    lines.write_text('{"text": "fine"}\n{"text": "fine"}\n{"text": \n')
    assert "bad.jsonl, line 3" in refused(tasks_file=lines)
    arc = write_arc(tmp_path / "bad.json")
    arc.write_text('{\n"task": [,]}\n')
    sentence = refused(tasks_file=arc)
    assert "bad.json" in sentence
    assert "line 2" in sentence


def test_duplicate_ids_are_named(refused: Refused, tmp_path: Path) -> None:
    lines = tmp_path / "twice.jsonl"
    lines.write_text('{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n')
    assert "'a'" in refused(tasks_file=lines)


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_an_input_without_a_token_is_told(refused: Refused, tmp_path: Path, content: str) -> None:
    lines = tmp_path / "empty.jsonl"
    lines.write_text(content)
    assert "empty.jsonl" in refused(tasks_file=lines)


# ----------------------------------------------------------------------------------------- the flags


def test_a_layer_that_the_model_lacks_is_named_with_those_it_has(refused: Refused) -> None:
    assert "layer 2 does not exist; the model has layers 0 to 1" in refused("--layers_to_extract", 0, 2)
    assert "layer -3 does not exist" in refused("--layers_to_extract", -3)
    assert "layer 7 " in refused(hook_points="blocks.7.hook_resid_post")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("after_blok", "'after_block'"),
        ("blocks.{i}.hook_resid_pots", "'blocks.{i}.hook_resid_post'"),
        ("blocks.1.mlp.hook_pree", "'blocks.{i}.mlp.hook_pre'"),
    ],
)
def test_an_unknown_hook_point_is_named_with_the_nearest_name(refused: Refused, name: str, nearest: str) -> None:
    sentence = refused(hook_points=name)
    assert repr(name) in sentence
    assert f"nearest name is {nearest}" in sentence


def test_a_mesh_that_does_not_fit_and_a_malformed_one_are_named(refused: Refused) -> None:
    assert "mesh shape 8,8 has 64 places but there is 1 cpu device" in refused(mesh_shape="8,8")
    assert "'8;8'" in refused(mesh_shape="8;8")
    assert "'0,1'" in refused(mesh_shape="0,1")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("max_seq_length", "2000"),
        ("max_seq_length", "0"),
        ("batch_size", "0"),
        ("batch_size", "many"),
        ("slab_tokens", "-1"),
        ("positions", "middle"),
        ("positions", "first:0"),
        ("dtype", "float8"),
        ("capture_dtype", "int8"),
        ("shard_format", "parquet"),
        ("grid_encoder", "roman"),
        ("gcs_bucket", "gs://bucket"),
        ("overwrite", "perhaps"),
        ("n_samples", "0"),
    ],
)
def test_a_wrong_value_is_named_with_its_flag(refused: Refused, flag: str, value: str) -> None:
    sentence = refused(**{flag: value})
    assert flag in sentence or flag.partition("_")[2] in sentence
    assert value in sentence or flag == "gcs_bucket"


def test_an_unknown_flag_is_named_with_the_nearest(refused: Refused) -> None:
    sentence = refused("--batchsize", 4)
    assert "--batchsize" in sentence
    assert "--batch_size" in sentence


def test_a_bad_yaml_file_is_named(refused: Refused, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    assert "run.yaml" in refused("--config", config)
    for content, named in (
        ("batch_size: [1\n", "run.yaml"),
        ("- 1\n", "run.yaml"),
        ("batchsize: 3\n", "'batchsize'; the nearest is 'batch_size'"),
        ("batch_size: many\n", "batch_size"),
        ("hook_points: after_block\n", "hook_points"),
    ):
        config.write_text(content)
        assert named in refused("--config", config)
    assert "--config needs a YAML file" in refused("--config")


def test_a_file_in_the_way_of_the_directory_is_named(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert f"{tmp_path / 'file'}" in refused(activations_dir=tmp_path / "file")
    assert f"{tmp_path / 'file'}" in refused(activations_dir=tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "x"


# ------------------------------------------------------------------------------------------ the disk


def test_too_little_space_is_told_at_the_start(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Directory, "free_bytes", lambda _: 1_000)
    sentence = refused(positions="all")
    assert "1 kB free" in sentence
    assert "61.4 kB" in sentence  # 6 samples of 40 tokens, 2 layers, 32 float32 values


def test_a_disk_that_fills_in_the_middle_keeps_what_is_committed_and_the_run_goes_on_later(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    # Names of 5,000 letters make the third batch's shards too large for the limit.
    named = texts([64] * 16)
    ids = {key: key + "x" * 5_000 * (i // 4 == 2) for i, key in enumerate(named)}
    tasks = tmp_path / "in.jsonl"
    tasks.write_text("".join(json.dumps({"id": ids[key], "text": text}) + "\n" for key, text in named.items()))
    run_here(model, tasks, tmp_path / "whole", layers_to_extract=(10, 11), positions="all", batch_size=4)
    words = ["--model_path", model, "--tasks_file", tasks, "--activations_dir", tmp_path / "a", "--batch_size", 4]
    words += ["--layers_to_extract", 10, 11, "--positions", "all"]
    start = run_cli(*words, cwd=tmp_path, largest_file=60_000)
    assert start.returncode == 2, start.stderr
    _check_sentence(start.stderr[start.stderr.index("error: ") :])
    assert f"no space left for {tmp_path / 'a'}" in start.stderr
    assert "what is committed is safe" in start.stderr
    assert "Traceback" not in start.stderr
    there = {path.stem for path in (tmp_path / "a/_run/commits").iterdir()}
    assert there - {"000004_001"} == {"000001_001", "000002_001"}  # the fourth, if its rows were there in time
    committed = [key for i, key in enumerate(named) if f"{i // 4 + 1:06d}_001" in there]
    assert sorted(open_activations(tmp_path / "a").sample_ids) == sorted(committed)
    assert len(shards(tmp_path / "a")) == 2 * len(there)
    assert not list((tmp_path / "a").glob(".writing-*"))
    again = run_cli(*words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"{len(committed)} samples committed already" in again.stdout
    assert shards(tmp_path / "a") == shards(tmp_path / "whole")
    assert sorted(open_activations(tmp_path / "a").sample_ids) == sorted(ids.values())


def test_a_device_without_enough_memory_is_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tasks = make_model(tmp_path / "model"), write_jsonl(tmp_path / "in.jsonl", [20, 30])

    def exhausted(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.")

    monkeypatch.setattr(CaptureProgram, "run", exhausted)
    with pytest.raises(UserError, match=r"17179869184 bytes more.*--slab_tokens") as refused:
        run_here(model, tasks, tmp_path / "a")
    assert "\n" not in str(refused.value)
    monkeypatch.undo()
    assert run_here(model, tasks, tmp_path / "a")["total_samples"] == 2
