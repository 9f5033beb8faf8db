"""`--backend torch` computes what transformers computes, whether or not a port refuses it.

Guarded: variants of ported types with all hook points of the port; tensors that a port does not know; adapters through
PEFT; rotations that depend on a sample's length, beside others; architectures of all sorts. The truth is transformers'
own model on each sample alone, unpadded. `verify` compares such rows too.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_run import run_here
from test_generation import write_texts
from tiny_models import random_ids, row_errors, save
from transformers import AutoConfig, AutoModelForCausalLM

from jax_extract import extract, open_activations
from jax_extract.errors import UserError
from jax_extract.pytorch.loading import forget_lengths
from jax_extract.pytorch.program import rotated_alike
from jax_extract.terminal import Terminal
from jax_extract.verification.command import verify
from models.hooks import GATED

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LENGTHS = (1, 90, 3, 70, 32)  # some beyond 32, where rotations may change; a shorter one behind a longer one
WAY_OUT = r"; --backend torch computes it as transformers does"


def model_of(model_type: str, folder: Path, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields)).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.normal_(0.0, 0.2)
    save(model, folder)
    return model


def states_of(model: Any, ids: np.ndarray) -> list[np.ndarray]:
    """The stream before each block, then the final states."""
    forget_lengths(model)
    with torch.inference_mode():
        given = torch.from_numpy(ids.astype(np.int64))[None]
        states = model(given, output_hidden_states=True, use_cache=False).hidden_states
    return [state[0].float().numpy() for state in states]


def extracted(folder: Path, place: Path, **options: Any) -> Any:
    inputs = write_texts(folder / "t.jsonl", random_ids(LENGTHS))
    wanted: dict[str, Any] = {"positions": "all", "layers_to_extract": (0, 1), "hook_points": ("*",), "batch_size": 5}
    run_here(folder, inputs, place, **{"backend": "torch", "max_seq_length": 96, **wanted, **options})
    return open_activations(place)


def assert_states(run: Any, model: Any) -> None:
    for i, ids in enumerate(random_ids(LENGTHS)):
        states, sample = states_of(model, ids), run.sample(f"s{i}")
        for layer in (0, 1):
            assert row_errors(sample.get(layer, "residual_before"), states[layer]).max() <= 1e-5
        assert row_errors(sample.get(0, "after_block"), states[1]).max() <= 1e-5
        assert row_errors(sample.get(None, "final_norm"), states[-1]).max() <= 1e-5


def assert_verified(place: Path, *, ported: bool = False) -> None:
    verdict = verify(str(place), terminal=Terminal(silent=True))
    assert verdict.verdict == "verified" and len(verdict.samples) == len(LENGTHS), verdict
    assert any("no port computes this model" in note for note in verdict.notes) is not ported


def test_a_variant_of_a_ported_type_has_the_ports_hook_points(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path, **{**SIZES, "max_position_embeddings": 128}, hidden_act="quick_gelu")
    with pytest.raises(UserError, match=r"hidden_act 'quick_gelu'.*" + WAY_OUT):
        extract(str(tmp_path), ["!"])
    run = extracted(tmp_path, tmp_path / "run")
    assert run.hook_points == [hook for hook in GATED if hook != "attention_pattern"]
    assert_states(run, model)
    sample = run.sample("s1")
    gate, up, hidden = (sample.get(1, hook) for hook in ("ffn_gate", "ffn_up", "ffn_hidden"))
    np.testing.assert_allclose(gate / (1 + np.exp(-1.702 * gate)) * up, hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        sample.get(1, "after_attention") + sample.get(1, "ffn_out"), sample.get(1, "after_block"), rtol=1e-4, atol=1e-5
    )
    assert_verified(tmp_path / "run")


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_a_row_is_rotated_as_its_sample_alone_is_whatever_the_batch(model_type: str, tmp_path: Path) -> None:
    """Of a port, and of a model without one."""
    if model_type == "llama":
        rope: dict[str, Any] = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4}
        fields = {**SIZES, "rope_parameters": rope}
    else:
        rope = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0 + i for i in range(6)]}
        rope |= {"rope_theta": 1e4, "original_max_position_embeddings": 32}
        fields = {**SIZES, "max_position_embeddings": 96, "original_max_position_embeddings": 32}
        fields |= {"rope_parameters": rope, "pad_token_id": 0}
    model = model_of(model_type, tmp_path, **fields)
    assert_states(extracted(tmp_path, tmp_path / "run"), model)
    assert_verified(tmp_path / "run", ported=model_type == "llama")


def test_rows_are_computed_together_where_they_are_rotated_alike() -> None:
    def groups(*lengths: int, columns: int = 64, same_to: int | None = 32) -> list[tuple[list[int], int]]:
        return [(rows.tolist(), most) for rows, most in rotated_alike(np.array(lengths), columns, same_to)]

    assert groups(3, 50, same_to=None) == [([0, 1], 64)]
    assert groups(3, 32, columns=32) == [([0, 1], 32)]
    assert groups(3, 50, 32, 64, 50, 0) == [([0, 2, 5], 32), ([1, 4], 50), ([3], 64)]
    assert groups(40, 40) == [([0, 1], 40)]
    assert groups(0, 0) == [([0, 1], 1)]


def test_a_tensor_that_a_port_does_not_know_is_left_to_transformers(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path, **{**SIZES, "max_position_embeddings": 128})
    tensors = load_file(tmp_path / "model.safetensors")
    more = {**tensors, "model.layers.0.self_attn.q_proj.bias": torch.ones(48)}
    save_file(more, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"q_proj.bias', which the llama port does not compute with.*" + WAY_OUT):
        extract(str(tmp_path), ["!"])
    assert_states(extracted(tmp_path, tmp_path / "run"), model)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack 'model.layers.1.mlp.up_proj.weight'; the checkpoint is incomplete"):
        extract(str(tmp_path), ["!"], backend="torch")


@pytest.mark.parametrize(("model_type", "kind"), [("olmo", LoraConfig), ("llama", LoHaConfig)])
def test_an_adapter_that_is_not_merged_here_is_merged_by_peft(model_type: str, kind: Any, tmp_path: Path) -> None:
    model = model_of(model_type, tmp_path, **{**SIZES, "max_position_embeddings": 128})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, kind(r=4, target_modules=["q_proj"])).eval()
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora" in name or "hada" in name:
                value.normal_(0.0, 0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    adapter = {"adapter": str(tmp_path / "adapter")}
    assert_states(extracted(tmp_path, tmp_path / "run", **adapter), adapted)
    assert_verified(tmp_path / "run")
    with pytest.raises(UserError, match=WAY_OUT):
        extracted(tmp_path, tmp_path / "other", backend="jax", **adapter)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("bloom", {"hidden_size": 48, "n_layer": 2, "n_head": 4, "vocab_size": 131}),
        ("gptj", {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 131, "n_positions": 128, "rotary_dim": 8}),
        ("mixtral", {**SIZES, "num_local_experts": 4, "max_position_embeddings": 128}),
        ("cohere2", {**SIZES, "sliding_window": 20, "max_position_embeddings": 128}),
        ("gemma3_text", {**SIZES, "head_dim": 12, "max_position_embeddings": 128, "use_bidirectional_attention": True}),
    ],
)
def test_architectures_of_all_sorts_give_transformers_rows(
    model_type: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = model_of(model_type, tmp_path, **fields)
    assert_states(extracted(tmp_path, tmp_path / "run"), model)


def test_a_state_space_model_with_an_infinite_limit_is_read(tmp_path: Path) -> None:
    """Its hidden states are counted otherwise; the final ones are not."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 12, "n_groups": 1}
    model = model_of("mamba2", tmp_path, vocab_size=131, **sizes)
    assert json.loads((tmp_path / "config.json").read_text())["time_step_limit"][1] == {"__float__": "Infinity"}
    run = extracted(tmp_path, tmp_path / "run")
    for i, ids in enumerate(random_ids(LENGTHS)):
        assert row_errors(run.sample(f"s{i}").get(None, "final_norm"), states_of(model, ids)[-1]).max() <= 1e-5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "bert"}, r"this 'bert' model is an encoder \(is_decoder is false\)"),
        ({"rope_parameters": {"rope_type": "foo"}}, r"unsupported rope type 'foo' in config.json"),
        ({"num_attention_heads": 0}, r"num_attention_heads 0; it must be a whole number"),
    ],
)
def test_what_transformers_does_not_compute_is_refused_by_both(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model_of("llama", tmp_path, **SIZES)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=said):
        extract(str(tmp_path), ["!"], backend="torch")
    with pytest.raises(UserError) as refused:
        extract(str(tmp_path), ["!"])
    assert "--backend torch" not in str(refused.value)
