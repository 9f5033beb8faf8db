"""The torch backend writes the rows that the JAX backend writes, and runs architectures that no port computes.

Guarded: every family, every hook point at every layer, all kinds of positions; a family without a port; files of torch;
devices and options that are not there. The truth of a family without a port is its own `output_hidden_states`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from small_run import run_here, shards
from test_generation import write_texts
from test_parity import SHORT_FAMILIES, assert_parity, print_worst
from tiny_models import random_ids, reference, row_errors, run_rows, save, tiny_folder, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig

from jax_extract import extract, load_shard, open_activations
from jax_extract.errors import UserError
from jax_extract.pytorch.backend import TorchBackend
from jax_extract.terminal import Terminal
from jax_extract.upkeep.status import SweepConfig, sweep_command
from jax_extract.verification.command import verify
from models.positions import Positions

LENGTHS = (1, 3, 40, 90)


def texts_of(lengths: tuple[int, ...] = LENGTHS) -> list[str]:
    return ["".join(chr(33 + i) for i in ids) for ids in random_ids(lengths)]


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family without a port, whose positions begin at 2 and whose blocks lie in a module of their own."""
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=48,
        ffn_dim=70,
        num_hidden_layers=4,
        num_attention_heads=6,
        vocab_size=131,
        max_position_embeddings=512,
        word_embed_proj_dim=48,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0.0, 0.2)
    folder = tmp_path_factory.mktemp("opt")
    save(model, folder)
    return folder


@pytest.mark.parametrize("family", SHORT_FAMILIES)
def test_torch_gives_the_rows_that_hugging_face_and_jax_compute(family: str) -> None:
    """Within the bounds within which JAX gives them: see test_parity.py."""
    options: dict[str, Any] = {"layers": range(tiny_model(family).config.get_text_config().num_hidden_layers)}
    options |= {"hook_points": ("*",), "positions": "all", "batch_size": 3}
    run = extract(str(tiny_folder(family)), texts_of(), backend="torch", **options)
    worst = [
        assert_parity(run_rows(run, str(i)), reference(tiny_model(family), ids), f"{family}, text {i}")
        for i, ids in enumerate(random_ids(LENGTHS))
    ]
    print_worst(family, worst)


@pytest.fixture(scope="module")
def whole() -> Any:
    return extract(str(tiny_folder("qwen2_window")), texts_of(), backend="torch", layers=(1, 3), positions="all")


@pytest.mark.parametrize("positions", ["last", "from:3", "mean", "mean_from:3", "first:5", "every:7", "at:0,2,30"])
def test_positions_are_selected_as_jax_selects_them(positions: str, whole: Any) -> None:
    """From rows of every token, as test_positions.py holds JAX to."""
    folder = str(tiny_folder("qwen2_window"))
    run = extract(folder, texts_of(), backend="torch", layers=(1, 3), positions=positions)
    for i, length in enumerate(LENGTHS):
        sample, every = run.sample(str(i)), whole.sample(str(i))
        chosen = Positions.parse(positions)
        kept = chosen.of(length)
        np.testing.assert_array_equal(sample.positions, kept)
        for layer in (1, 3):
            rows = every.get(layer)[chosen.begins :] if chosen.kind == "mean" else every.get(layer)[kept]
            if chosen.kind == "mean" and len(rows):
                rows = rows.mean(axis=0, keepdims=True)
            assert row_errors(sample.get(layer), rows).max(initial=0.0) <= 1e-5


def test_the_input_of_the_block_behind_the_last_that_runs_is_the_output_of_that_one() -> None:
    run = extract(
        str(tiny_folder("llama")),
        texts_of(),
        backend="torch",
        layers=(2,),
        hook_points=("residual_before",),
        positions="all",
    )
    other = extract(str(tiny_folder("llama")), texts_of(), backend="torch", layers=(1,), positions="all")
    for i in range(len(LENGTHS)):
        np.testing.assert_array_equal(run.sample(str(i)).get(2, "residual_before"), other.sample(str(i)).get(1))


def test_an_architecture_without_a_port_is_extracted_by_its_hooks(opt: Path) -> None:
    prompts = random_ids(LENGTHS)
    run = extract(
        str(opt), texts_of(), backend="torch", layers=range(4), hook_points=("*",), positions="all", batch_size=4
    )
    assert run.hook_points == ["embeddings", "residual_before", "after_block", "final_norm"]
    model = AutoModelForCausalLM.from_pretrained(opt)
    for i, ids in enumerate(prompts):
        with torch.inference_mode():
            states = model(torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True).hidden_states
        truth = [state[0].numpy() for state in states]  # the last one is behind the final norm
        rows = run_rows(run, str(i))
        assert row_errors(rows["embeddings", None], truth[0]).max() <= 1e-5
        for layer in range(4):
            assert row_errors(rows["residual_before", layer], truth[layer]).max() <= 1e-5
        for layer in range(3):
            assert row_errors(rows["after_block", layer], truth[layer + 1]).max() <= 1e-5
        assert row_errors(rows["final_norm", None], truth[4]).max() <= 1e-5


def test_a_torch_run_is_resumed_read_and_verified_like_any_other(opt: Path, tmp_path: Path) -> None:
    for model in (tiny_folder("gpt2"), opt):
        place = tmp_path / model.name
        inputs = write_texts(tmp_path / "t.jsonl", random_ids((5, 30, 60)))
        options = {"backend": "torch", "layers_to_extract": (0, 2), "positions": "all", "shard_format": "safetensors"}
        run_here(model, inputs, place, **options)
        before = shards(place)
        run_here(model, inputs, place, **options)  # nothing is left to do
        assert shards(place) == before
    verdict = verify(str(tmp_path / tiny_folder("gpt2").name), terminal=Terminal(silent=True))
    assert verdict.verdict == "verified" and verdict.samples, verdict
    of_opt = verify(str(tmp_path / opt.name), terminal=Terminal(silent=True))
    assert of_opt.verdict == "verified" and of_opt.samples and "no port computes this model" in of_opt.notes[0]
    with pytest.raises(UserError, match=r"would change the arithmetic: backend"):
        run_here(tiny_folder("gpt2"), inputs, tmp_path / tiny_folder("gpt2").name, **{**options, "backend": "jax"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_file_of_torch_is_what_torch_loads_and_one_a_layer(dtype: str, tmp_path: Path) -> None:
    inputs = write_texts(tmp_path / "t.jsonl", random_ids((5, 30, 60, 7, 9)))
    options: dict[str, Any] = {"positions": "mean", "hook_points": ("after_block", "final_norm"), "batch_size": 2}
    options |= {"layers_to_extract": (0, 1, 2, 3), "capture_dtype": dtype}
    run_here(tiny_folder("llama"), inputs, tmp_path / "run", shard_format="pt", one_file_per_layer=True, **options)
    run_here(tiny_folder("llama"), inputs, tmp_path / "other", shard_format="safetensors", **options)
    names = [*(f"layer_{i}.pt" for i in range(4)), "final_hidden_states.pt"]
    assert sorted(path.name for path in (tmp_path / "run").glob("*.pt")) == sorted(names)
    runs = [open_activations(tmp_path / name) for name in ("run", "other")]
    for name in names:
        loaded = torch.load(tmp_path / "run" / name, weights_only=True)
        mapped = torch.load(tmp_path / "run" / name, weights_only=True, mmap=True)
        shard = load_shard(tmp_path / "run" / name)
        assert loaded["activations"].dtype == getattr(torch, dtype)
        torch.testing.assert_close(loaded["activations"], mapped["activations"], rtol=0, atol=0)
        np.testing.assert_array_equal(loaded["activations"].float().numpy(), shard["activations"].astype(np.float32))
        assert loaded["sample_ids"] == list(shard["sample_ids"])
        np.testing.assert_array_equal(loaded["row_offsets"].numpy(), shard["row_offsets"])
        assert loaded["hook"] == shard["hook"] and loaded["layer"] == shard["layer"]
    for i in range(5):
        for layer in range(4):
            ours, theirs = (run.sample(f"s{i}").get(layer) for run in runs)
            np.testing.assert_array_equal(ours, theirs)


def test_a_family_without_a_port_that_computes_with_the_number_of_its_blocks_keeps_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
    heads = {
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
    }
    config = AutoConfig.for_model("minicpm3", vocab_size=131, scale_depth=1.4, v_head_dim=8, **sizes, **heads)
    model = AutoModelForCausalLM.from_config(config).eval()
    save(model, tmp_path)
    run = extract(str(tmp_path), texts_of(), backend="torch", layers=(0, 1), positions="all")
    for i, ids in enumerate(random_ids(LENGTHS)):
        with torch.inference_mode():
            states = model(torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True).hidden_states
        for layer in (0, 1):
            assert row_errors(run_rows(run, str(i))["after_block", layer], states[layer + 1][0].numpy()).max() <= 1e-5


def test_what_is_no_decoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "albert", "hidden_size": 8}')
    save_file({"w": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"a 'albert' model is no causal language model"):
        extract(str(tmp_path), ["!"], backend="torch")


def test_final_states_of_another_width_are_no_hook_point(tmp_path: Path) -> None:
    config = OPTConfig(hidden_size=48, ffn_dim=70, num_hidden_layers=2, num_attention_heads=6, vocab_size=131)
    config.word_embed_proj_dim = 24
    save(AutoModelForCausalLM.from_config(config), tmp_path)
    assert extract(str(tmp_path), ["!"], backend="torch", hook_points=("*",)).hook_points == [
        "embeddings",
        "residual_before",
        "after_block",
    ]
    with pytest.raises(UserError, match="final_norm"):
        extract(str(tmp_path), ["!"], backend="torch", hook_points=("final_norm",))


def test_one_file_a_layer_is_padded_no_more_than_many(tmp_path: Path) -> None:
    inputs = write_texts(tmp_path / "t.jsonl", random_ids([120, *[9] * 40]))
    options: dict[str, Any] = {"backend": "torch", "layers_to_extract": (0,), "positions": "mean", "batch_size": 8}
    wastes = [
        run_here(tiny_folder("llama"), inputs, tmp_path / str(one), one_file_per_layer=one, **options)["padding_waste"]
        for one in (False, True)
    ]
    assert wastes[1] <= wastes[0] < 0.7


def test_a_first_cpu_is_the_cpu() -> None:
    backend = TorchBackend.open("cpu:0", None)
    assert (backend.device, backend.device_kind, backend.dtype) == ("cpu", "cpu", "float32")


def test_a_run_of_one_file_a_layer_is_swept_of_nothing_that_a_damaged_record_had(tmp_path: Path) -> None:
    inputs, place = write_texts(tmp_path / "t.jsonl", random_ids((5, 30))), tmp_path / "run"
    options: dict[str, Any] = {"positions": "mean", "layers_to_extract": (0, 2), "shard_format": "pt"}
    run_here(tiny_folder("llama"), inputs, place, one_file_per_layer=True, **options)
    (place / "_run" / "commits" / "000001_001.json").write_text("{")
    assert sweep_command(SweepConfig(str(place))) in (0, 1)
    assert sorted(path.name for path in place.glob("*.pt")) == ["layer_0.pt", "layer_2.pt"]


def test_an_ordinary_run_does_not_speak_of_files_a_layer(tmp_path: Path) -> None:
    """Else runs that were begun before would be other runs."""
    inputs = write_texts(tmp_path / "t.jsonl", random_ids((5,)))
    run_here(tiny_folder("llama"), inputs, tmp_path / "run", layers_to_extract=(0,))
    assert "one_file_per_layer" not in json.loads((tmp_path / "run" / "_run" / "run.json").read_text())["identity"]


def test_a_stream_that_would_not_fit_one_file_a_layer_is_refused(tmp_path: Path) -> None:
    inputs = write_texts(tmp_path / "t.jsonl", random_ids((5,)))
    options: dict[str, Any] = {"dataset": str(inputs), "shard_format": "pt", "one_file_per_layer": True}
    for n_samples, said in ((None, "an input of unknown length"), (100_000, "100,000")):
        with pytest.raises(UserError, match=f"takes at most 65,536 samples, not {said}"):
            run_here(tiny_folder("llama"), None, tmp_path / "run", n_samples=n_samples, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backend": "torch", "device": "cuda"}, r"--device 'cuda' was asked for and torch finds 0 CUDA devices"),
        ({"backend": "torch", "device": ""}, r"--device '' is no device"),
        ({"backend": "torch", "device": "tpu9"}, r"--device 'tpu9' is no device; give cpu, cuda or cuda:N"),
        ({"backend": "torch", "mesh_shape": "1,1"}, r"--mesh_shape is of --backend jax"),
        ({"backend": "torch", "max_new_tokens": 4}, r"--max_new_tokens is of --backend jax"),
        ({"device": "cuda"}, r"--device cuda is of --backend torch"),
        (
            {"one_file_per_layer": True, "positions": "all"},
            r"--one_file_per_layer is for positions last, mean and mean_from:k",
        ),
    ],
)
def test_what_is_not_there_is_told_in_one_sentence(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    inputs = write_texts(tmp_path / "t.jsonl", random_ids((5,)))
    with pytest.raises(UserError, match=said):
        run_here(tiny_folder("llama"), inputs, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_an_architecture_without_a_port_is_refused_by_jax(opt: Path) -> None:
    with pytest.raises(UserError, match=r"unsupported architecture 'opt'"):
        extract(str(opt), ["!"])


def test_a_hook_point_that_nobody_knows_of_it_is_refused(opt: Path) -> None:
    with pytest.raises(UserError, match=r"ffn_up.*no port computes it"):
        extract(str(opt), ["!"], backend="torch", hook_points=("ffn_up",))
