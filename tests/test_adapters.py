"""A merged adapter gives the logits that PEFT gives; what cannot be merged is refused by name.

Guarded: LoRA by alpha, rank, root of the rank and patterns; DoRA; matrices that are stored turned, embeddings, heads
that were tied, biases, modules saved whole; adapters of another model, with unknown keys, of another kind. The truth is
the torch model with the adapter as PEFT applies it, unmerged.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_run import run_here, snapshot
from test_generation import write_texts
from tiny_models import random_ids, row_errors, tiny_folder, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from jax_extract import open_activations
from jax_extract.errors import UserError
from jax_extract.extraction import jax_backend
from jax_extract.terminal import Terminal
from jax_extract.verification.command import verify
from jax_extract.weights.load import Weights
from jax_extract.weights.open_model import OpenModel
from models.capture_plan import CapturePlan
from models.decoder import Decoder
from models.layers import Numerics
from models.packing import Packing
from models.positions import Positions

BOUND = 1e-5  # of a row of logits, relative
_LLAMA = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
_GPT2 = ["c_attn", "c_proj", "c_fc"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": _LLAMA, "r": 4, "lora_alpha": 13}),
    "rslora": ("qwen2", {"target_modules": _LLAMA, "r": 9, "lora_alpha": 5, "use_rslora": True}),
    "patterns": (
        "qwen3",
        {
            "target_modules": _LLAMA,
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7},
            "alpha_pattern": {"v_proj": 3, r"layers\.\d+\.self_attn.o_proj": 20},
        },
    ),
    "dora": ("llama", {"target_modules": _LLAMA, "r": 4, "lora_alpha": 11, "use_dora": True}),
    "dora and rslora": ("mistral", {"target_modules": _LLAMA, "r": 4, "use_dora": True, "use_rslora": True}),
    "turned": ("gpt2", {"target_modules": _GPT2, "r": 3, "lora_alpha": 6, "fan_in_fan_out": True}),
    "turned dora": ("gpt2", {"target_modules": _GPT2, "r": 3, "fan_in_fan_out": True, "use_dora": True}),
    "fused qkv": ("gpt_neox", {"target_modules": ["query_key_value", "dense_h_to_4h"], "r": 3}),
    "phi": ("phi", {"target_modules": ["q_proj", "dense", "fc1", "fc2"], "r": 3}),
    "gemma": ("gemma2", {"target_modules": _LLAMA, "r": 3}),
    "a model with pictures": ("gemma3_with_pictures", {"target_modules": r".*language_model.*(q|o|up)_proj", "r": 3}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "r": 3}),
    "embedding of a tied model": ("qwen2_tied", {"target_modules": ["embed_tokens"], "r": 3}),
    "embedding with dora": ("llama", {"target_modules": ["embed_tokens"], "r": 3, "use_dora": True}),
    "head": ("llama", {"target_modules": ["lm_head"], "r": 3}),
    "head of a tied model, whole": ("qwen2_tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding whole": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "biases": ("llama_biases", {"target_modules": ["q_proj", "up_proj"], "bias": "all"}),
    "biases, and a head saved whole": (
        "phi",
        {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["lm_head"]},
    ),
    "a bias of its own": ("llama_biases", {"target_modules": ["q_proj", "up_proj"], "lora_bias": True}),
}


def make_adapter(folder: Path, base: Path, **options: Any) -> Any:
    """A random adapter saved by PEFT; the adapted torch model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on what these configurations mean for training
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, value in adapted.named_parameters():
                if "lora_magnitude" in name:
                    value.mul_(torch.empty_like(value).uniform_(0.5, 1.5, generator=random))
                elif value.requires_grad or (options.get("bias") == "all" and name.endswith("bias")):
                    value.add_(
                        torch.empty_like(value).normal_(0, 0.1, generator=random)
                    )  # as large as training makes it
        adapted.save_pretrained(folder)
    return adapted


def our_logits(base: Path, adapter: Path, token_ids: np.ndarray) -> np.ndarray:
    """float32 [tokens, vocab]"""
    model = OpenModel.open(str(base), adapter=str(adapter))
    layers = model.config.num_hidden_layers
    weights = Weights(model.checkpoint, model.port, model.config, layers, head=True)
    params = weights.load(jax_backend.open_mesh("1,1"), "float32")
    rows = Packing(jnp.full((1, 1), len(token_ids), jnp.int32), len(token_ids))
    plan = CapturePlan((("final_norm", ()),), Positions("all"))
    decoder = Decoder(model.port, model.config, Numerics())
    normed = decoder.capture(params, jnp.asarray(token_ids)[None], rows, plan)["final_norm"][0]
    return np.asarray(decoder.logits(params, normed)[0])


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(case: str, tmp_path: Path) -> None:
    family, options = CASES[case]
    base = tiny_folder(family)
    adapted = make_adapter(tmp_path, base, **options)
    (token_ids,) = random_ids((60,), seed=4)
    with torch.inference_mode():
        whole = torch.from_numpy(token_ids.astype(np.int64))[None]
        truth = adapted(whole, use_cache=False).logits[0].numpy()
        plain = tiny_model(family)(whole, use_cache=False).logits[0].numpy()
    errors = row_errors(our_logits(base, tmp_path, token_ids), truth)
    print(f"{case}: {errors.max():.1e}")
    assert errors.max() <= BOUND
    assert row_errors(plain, truth).max() > 100 * BOUND, "the adapter changes nothing"


@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("llama", _LLAMA),
        ("gpt2", _GPT2),
        ("gpt_neox", ["dense"]),
        ("gemma3_with_pictures", r".*language_model.*q_proj"),
    ],
)
def test_a_run_with_an_adapter_holds_its_rows_and_can_be_verified(
    family: str, modules: list[str] | str, tmp_path: Path
) -> None:
    base, adapter = tiny_folder(family), tmp_path / "adapter"
    adapted = make_adapter(adapter, base, target_modules=modules, r=4)
    (token_ids,) = random_ids((30,), seed=6)
    inputs = write_texts(tmp_path / "t.jsonl", [token_ids])
    options = {"positions": "all", "layers_to_extract": (1,), "shard_format": "safetensors"}
    run_here(base, inputs, tmp_path / "run", adapter=str(adapter), **options)
    rows = open_activations(tmp_path / "run").sample("s0").get(1)
    with torch.inference_mode():
        whole = torch.from_numpy(token_ids.astype(np.int64))[None]
        truth = adapted(whole, use_cache=False, output_hidden_states=True).hidden_states[2][0].numpy()
    assert row_errors(rows, truth).max() <= 1e-5
    verdict = verify(str(tmp_path / "run"), terminal=Terminal(silent=True))
    assert verdict.verdict == "verified", verdict
    assert verdict.reference["name"].startswith("Hugging Face")
    with pytest.raises(UserError, match=r"another model|of another"):
        run_here(base, inputs, tmp_path / "run", **options)  # the same directory without the adapter


@pytest.mark.parametrize("family", ["llama", "qwen2_tied"])
def test_an_adapter_of_a_resized_vocabulary_gives_the_logits_of_peft(family: str, tmp_path: Path) -> None:
    """As tokens are added before a training: PEFT saves the embeddings, and the head, beside the matrices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(tiny_folder(family), dtype=torch.float32)
        model.resize_token_embeddings(140)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2)).eval()
        with torch.no_grad():
            for name, value in adapted.named_parameters():
                if "lora_B" in name or "embed_tokens" in name:
                    value.add_(torch.full_like(value, 0.1))
        adapted.save_pretrained(tmp_path)
    token_ids = np.array([3, 139, 5, 138, 7], np.int32)
    with torch.inference_mode():
        truth = adapted(torch.from_numpy(token_ids.astype(np.int64))[None], use_cache=False).logits[0].numpy()
    assert row_errors(our_logits(tiny_folder(family), tmp_path, token_ids), truth).max() <= BOUND


def test_an_adapter_of_a_classifier_leaves_its_head_out(tmp_path: Path) -> None:
    base = tiny_folder("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.float32)
        adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], r=2)).eval()
        with torch.no_grad():
            for name, value in adapted.named_parameters():
                if "lora_B" in name:
                    value.normal_(0, 0.3)
        adapted.save_pretrained(tmp_path)
    assert any("score" in name for name in safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors"))
    (token_ids,) = random_ids((20,), seed=1)
    with torch.inference_mode():
        whole = torch.from_numpy(token_ids.astype(np.int64))[None]
        hidden = adapted.base_model.model.model(whole, use_cache=False).last_hidden_state[0]
        truth = (hidden @ tiny_model("llama").lm_head.weight.T).numpy()
    assert row_errors(our_logits(base, tmp_path, token_ids), truth).max() <= BOUND


# -------------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    make_adapter(folder, tiny_folder("llama"), target_modules=["q_proj", "v_proj"], r=4)
    return folder


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "IA3"}, r"of kind 'IA3'; only 'LORA'"),
        ({"peft_type": None}, r"of kind None"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights 'pissa', which changes the base"),
        ({"trainable_token_indices": [1]}, r"'trainable_token_indices', which cannot be merged"),
        ({"layer_replication": [[0, 2]]}, r"'layer_replication'"),
        ({"made_up": 3}, r"'made_up', which cannot be merged here; merge it with PEFT"),
        ({"r": 5}, r"has rank 4 where adapter_config.json says 5"),
        ({"rank_pattern": [1]}, r"rank_pattern that is no mapping"),
        ({"rank_pattern": {"(.*)*!": 4}}, r"rank_pattern '\(\.\*\)\*!'; understood are names of modules"),
        ({"alpha_pattern": {"q_proj": "16"}}, r"alpha_pattern of 'q_proj' '16'; expected a positive number"),
        ({"lora_alpha": None}, r"lora_alpha None; expected a positive number"),
        ({"r": float("inf")}, r"r inf; expected a positive number"),
        ({"use_dora": True}, r"lacks a magnitude vector where adapter_config.json has use_dora True"),
        ({"use_dora": "no"}, r"has use_dora 'no'; expected true or false"),
    ],
)
def test_settings_that_cannot_be_merged_are_named(
    settings: dict[str, Any], said: str, lora: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(lora, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    with pytest.raises(UserError, match=said):
        OpenModel.open(str(tiny_folder("llama")), adapter=str(folder))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("another model", r"adapts .*, which .* does not have|has factors of shapes .* another model's adapter"),
        ("unknown key", r"holds 'base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight'"),
        ("half of a pair", r"lacks lora_B of model.layers.0.self_attn.q_proj; the adapter is incomplete"),
        ("vocabulary", r"of a model with another vocabulary"),
        ("no dimension", r"has factors of shapes \(54, 4\) and \(\) and the model's matrix is \(54, 54\)"),
        ("unasked magnitude", r"has a magnitude vector where adapter_config.json has use_dora False"),
        ("nothing", r"holds nothing that changes this model"),
        ("magnitude", r"lora_magnitude_vector of .* has shape \(1,\) where \(54,\) is expected"),
        ("no weights", r"there is no adapter_model.safetensors"),
        ("no folder", r"was not found; give its folder"),
        ("cut", r"truncated or damaged"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(change: str, said: str, lora: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(lora, tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    base = tiny_folder("llama")
    if change == "another model":
        base = tiny_folder("llama_llama3_rope")
    elif change == "unknown key":
        tensors[f"{first}C.weight"] = tensors[f"{first}A.weight"]
    elif change == "half of a pair":
        del tensors[f"{first}B.weight"]
    elif change == "magnitude":
        tensors[f"{first}magnitude_vector"] = np.ones(1, np.float32)
    elif change == "unasked magnitude":
        tensors[f"{first}magnitude_vector"] = np.ones(54, np.float32)
    elif change == "no dimension":
        tensors[f"{first}A.weight"] = np.array(1, np.float32)
    elif change == "nothing":
        tensors = {}
    elif change == "vocabulary":
        tensors["base_model.model.model.embed_tokens.weight"] = np.zeros((140, 53), np.float32)
    safetensors.numpy.save_file(tensors, path)
    if change == "no weights":
        path.unlink()
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif change == "no folder":
        folder = tmp_path / "nowhere"
    with pytest.raises(UserError, match=said):
        OpenModel.open(str(base), adapter=str(folder))


def test_an_adapter_of_the_hub_is_kept_with_its_commit(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo_id: str, revision: str | None, *_: str) -> tuple[Path, str]:
        asked.append((repo_id, revision))
        return lora, "5f0b02c75b57"

    monkeypatch.setattr("jax_extract.weights.hub.download", download)
    model = OpenModel.open(str(tiny_folder("llama")), adapter="owner/name")
    assert model.checkpoint.adapter == "owner/name@5f0b02c75b57"
    OpenModel.open(str(tiny_folder("llama")), adapter=model.checkpoint.adapter)
    assert asked == [("owner/name", None), ("owner/name", "5f0b02c75b57")]


def test_an_adapter_given_as_the_model_is_told(lora: Path) -> None:
    with pytest.raises(UserError, match=r"holds an adapter; give it as --adapter"):
        OpenModel.open(str(lora))


def test_nothing_is_written_before_an_adapter_is_refused(lora: Path, tmp_path: Path) -> None:
    inputs = write_texts(tmp_path / "t.jsonl", random_ids((5,)))
    before = snapshot(tmp_path)
    with pytest.raises(UserError):
        run_here(tiny_folder("qwen3"), inputs, tmp_path / "run", adapter=str(lora))
    assert {k: v for k, v in snapshot(tmp_path).items() if k in before} == before
    assert not any((tmp_path / "run").rglob("*.pkl"))


def test_the_saved_adapter_is_the_one_that_peft_loads(tmp_path: Path) -> None:
    """The truth of this file is what PEFT saves, not only what it holds in memory."""
    adapted = make_adapter(tmp_path, tiny_folder("llama"), target_modules=["q_proj"], r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder("llama")), tmp_path).eval()
    whole = torch.arange(20)[None]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(whole).logits, adapted(whole).logits)
