"""Every rope type rotates as transformers rotates, for each sample by itself.

Guarded: frequencies and scales of every model type with rotations, in all spellings, with keys missing and odd; samples
beyond the original length, padded and packed beside others; answers that grow across it; how long a sample may be. A
rotation that does not depend on lengths never asks for them, so that nothing is compiled for it.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import Array
from test_generation import write_texts
from test_parity import assert_parity, captured_in_one_slab
from tiny_models import random_ids, reference, save
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from jax_extract.config import ExtractConfig
from jax_extract.errors import UserError
from jax_extract.extraction.capture import sequence_limit
from jax_extract.generation.command import infer
from jax_extract.pytorch.loading import forget_lengths
from jax_extract.terminal import Terminal
from models.hf_config import rotary
from models.layers import Rotary
from models.packing import Packing, sample_lengths
from models.ports import same_rotations_to
from models.registry import PORTS

ORIGINAL = 32
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": ORIGINAL,
    "bos_token_id": None,
    "eos_token_id": None,
}
# What else each type needs, and how many frequencies a head of it has.
TYPES: dict[str, tuple[dict[str, Any], int]] = {
    "qwen2": ({}, 6),
    "qwen3": ({"head_dim": 10}, 5),
    "llama": ({}, 6),
    "mistral": ({"sliding_window": 21}, 6),
    "gpt_neox": ({"rotary_pct": 0.5}, 3),
    "phi": ({"partial_rotary_factor": 0.5}, 3),
    "gemma": ({"head_dim": 10}, 5),
    "gemma2": ({"head_dim": 10, "sliding_window": 21}, 5),
    "gemma3_text": ({"head_dim": 10, "sliding_window": 21, "sliding_window_pattern": 2}, 5),
}
KINDS = ("yarn", "dynamic", "longrope")


def scaling(kind: str, frequencies: int) -> dict[str, Any]:
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
    if kind == "dynamic":
        return {"rope_type": "dynamic", "factor": 3.0}
    short, long = [1 + i / 8 for i in range(frequencies)], [2.0 + i for i in range(frequencies)]
    factors = {"short_factor": short, "long_factor": long, "factor": 6.0}
    return {"rope_type": "longrope", **factors, "original_max_position_embeddings": ORIGINAL}


def config_of(model_type: str, kind: str) -> dict[str, Any]:
    more, frequencies = TYPES[model_type]
    config = {"model_type": model_type, **SIZES, **more, "rope_scaling": scaling(kind, frequencies)}
    if model_type == "gpt_neox":
        del config["num_key_value_heads"]
        return {**config, "rotary_emb_base": 1e4}
    return {**config, "rope_theta": 1e4} | ({} if model_type == "phi" else {"rms_norm_eps": 1e-5})


def theirs(config: dict[str, Any], length: int) -> tuple[np.ndarray, float]:
    """Frequencies and scale of transformers' own module after it has seen so many positions."""
    module = AutoModel.from_config(AutoConfig.for_model(**copy.deepcopy(config))).rotary_emb
    layer_type = ("full_attention",) if config["model_type"] == "gemma3_text" else ()
    module(torch.zeros(1), torch.arange(length)[None], *layer_type)
    prefix = "full_attention_" if layer_type else ""
    return getattr(module, f"{prefix}inv_freq").numpy(), float(getattr(module, f"{prefix}attention_scaling"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_rotates_as_transformers_does(model_type: str, kind: str) -> None:
    config = config_of(model_type, kind)
    ours = PORTS[model_type].config(config).rotaries[0]
    assert ours.kind == kind
    for length in (ORIGINAL, 100):
        frequencies, scale = theirs(config, length)
        got = ours.inverse_frequencies(2 * len(frequencies), length)
        # A theta that a length made is no round number: float32 powers of it differ in their last places.
        np.testing.assert_allclose(got, frequencies, rtol=4e-7 if kind == "dynamic" else 1.5e-7)
        assert ours.attention_scale == pytest.approx(scale, rel=1e-12)


LONG = {"short_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0], "long_factor": [2.0, 2.5, 3.0, 4.0, 5.0, 6.0]}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 16}},
        {"rope_scaling": {"type": "yarn", "factor": 16.0, "finetuned": True}, "rope_theta": 5e5},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 40,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "rope_theta": 1e6,
            }
        },
        {"rope_parameters": {"rope_type": "yarn", "factor": 8, "mscale": 1.0, "beta_fast": 16, "beta_slow": 2}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 8, "attention_factor": 1.25, "truncate": False}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 8, "truncate": None, "beta_fast": None}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 0.5}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 20},
        {"rope_scaling": {"type": "dynamic", "factor": 2}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}},
        {"rope_scaling": {"type": "longrope", **LONG, "original_max_position_embeddings": 8}},
        {"rope_scaling": {"type": "longrope", **LONG, "factor": 4.0}, "original_max_position_embeddings": 8},
        {"rope_scaling": {"type": "longrope", **LONG, "attention_factor": 1.5}},
        {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"type": "default", "factor": 2.0, "mrope_section": [2, 2, 2]}},
    ],
    ids=str,
)
def test_missing_and_odd_keys_mean_what_transformers_means(rope: dict[str, Any]) -> None:
    config = {"model_type": "llama", **SIZES, **rope}
    ours = rotary(config, width=12)
    for length in (8, 100):
        frequencies, scale = theirs(config, length)
        np.testing.assert_allclose(ours.inverse_frequencies(12, length), frequencies, rtol=4e-7)
        assert ours.attention_scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"type": "yarn"}, r"rope type 'yarn' in config.json lacks factor"),
        ({"type": "dynamic", "factor": None}, r"lacks 'factor'|has factor null"),
        ({"type": "longrope", "short_factor": [1.0] * 6}, r"rope type 'longrope' in config.json lacks long_factor"),
        ({"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.0] * 5}, r"must be a list of 6 numbers"),
        ({"type": "longrope", "short_factor": [0.0] * 6, "long_factor": [1.0] * 6}, r"it must be a positive number"),
        ({"type": "yarn", "factor": 4.0, "attention_factor": "2"}, r"has attention_factor '2'; it must be a positive"),
        ({"type": "yarn", "factor": 4.0, "rope_theta": 1.0}, r"needs a rope_theta above 1"),
        ({"type": "proportional"}, r"unsupported rope type 'proportional' in config.json; supported: default, linear"),
    ],
)
def test_what_no_port_can_rotate_is_told(rope: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        rotary({**SIZES, "rope_scaling": rope}, width=12)


def saved(model_type: str, kind: str, folder: Path) -> Any:
    """The torch model in float32, after it was written into a folder with its config.json as a user has it."""
    config = config_of(model_type, kind)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**copy.deepcopy(config)), attn_implementation="eager"
    ).eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.uniform_(0.5, 1.5, generator=random)
            else:
                value.normal_(0.0, 1.0 if "embed" in name else value.shape[1] ** -0.5, generator=random)
    save(model, folder)
    (folder / "config.json").write_text(json.dumps(config))
    return model


LENGTHS = (3, 33, ORIGINAL, 100, 40)


@pytest.mark.parametrize(
    ("model_type", "kind", "packed"),
    [("qwen2", "yarn", False), ("llama", "dynamic", True), ("gemma3_text", "longrope", True)],
)
def test_rows_are_those_of_the_sample_alone(model_type: str, kind: str, packed: bool, tmp_path: Path) -> None:
    model = saved(model_type, kind, tmp_path)
    sequences = random_ids(LENGTHS)
    for rows, sequence in zip(captured_in_one_slab(tmp_path, sequences, packed=packed), sequences, strict=True):
        forget_lengths(model)
        assert_parity(rows, reference(model, sequence), f"{model_type} {kind}, {len(sequence)} tokens")


def test_an_answer_that_grows_beyond_the_original_length_is_that_of_transformers(tmp_path: Path) -> None:
    model = saved("llama", "dynamic", tmp_path)
    prompts, new = random_ids((30, ORIGINAL, 50)), 12
    infer(
        ExtractConfig(
            model_path=str(tmp_path),
            tasks_file=str(write_texts(tmp_path / "t.jsonl", prompts)),
            activations_dir=str(tmp_path / "run"),
            max_new_tokens=new,
            max_seq_length=96,
        ),
        extracts=False,
        terminal=Terminal(silent=True),
    )
    answers = [json.loads(line)["token_ids"] for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    for prompt, answer in zip(prompts, answers, strict=True):
        forget_lengths(model)
        given = torch.from_numpy(prompt.astype(np.int64))[None]
        options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        wanted = model.generate(given, attention_mask=torch.ones_like(given), **options)[0, len(prompt) :]
        assert answer == wanted[: len(answer)].tolist()


class _Places:
    """Of one sample; nobody may ask how long it is."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.positions = jnp.arange(longest, dtype=jnp.int32)[None]

    @property
    def sample_lengths(self) -> Array:
        raise AssertionError("lengths were asked for")


def test_only_what_depends_on_lengths_asks_for_them() -> None:
    for kind in ("default", "linear", "llama3", "yarn"):
        traced(Rotary(1e4, kind, original_max_positions=ORIGINAL), 100)
    dynamic = Rotary(1e4, "dynamic", 3.0, original_max_positions=ORIGINAL)
    traced(dynamic, ORIGINAL)
    with pytest.raises(AssertionError, match="lengths were asked for"):
        traced(dynamic, ORIGINAL + 1)


def traced(rotations: Rotary, longest: int) -> None:
    jax.eval_shape(lambda: rotations.tables(_Places(longest), 8))


def test_the_length_of_each_tokens_sample_is_found_from_positions() -> None:
    lengths = [[3, 2, 0], [1, 1, 1], [8, 0, 0], [0, 0, 0], [1, 6, 1], [4, 0, 3]]
    wanted = [[n for n in row for _ in range(n)] + [1] * (8 - sum(row)) for row in lengths]
    found = jax.jit(lambda given: sample_lengths(Packing(given, 8).positions))(np.array(lengths, np.int32))
    np.testing.assert_array_equal(found, wanted)


def test_a_sample_may_be_as_long_as_the_scaling_is_for() -> None:
    def limit(wanted: int | None, most: int, **rope: Any) -> int:
        config = {"model_type": "qwen2", **SIZES, "rms_norm_eps": 1e-6, "max_position_embeddings": most}
        return sequence_limit(wanted, PORTS["qwen2"].config({**config, "rope_scaling": rope or None}))

    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
    assert limit(None, 32_768, **yarn) == 8_192
    assert limit(131_072, 32_768, **yarn) == 131_072
    with pytest.raises(UserError, match=r"--max_seq_length 131073 is more than the 131072 positions"):
        limit(131_073, 32_768, **yarn)
    assert limit(None, 1_000, type="dynamic", factor=4.0) == 1_000
    assert limit(4_000, 1_000, type="dynamic", factor=4.0) == 4_000
    with pytest.raises(UserError, match=r"more than the 1000 positions"):
        limit(1_001, 1_000)


def test_only_dynamic_and_longrope_depend_on_lengths() -> None:
    found = {kind: same_rotations_to(PORTS["llama"].config(config_of("llama", kind))) for kind in KINDS}
    assert found == {"yarn": None, "dynamic": ORIGINAL, "longrope": ORIGINAL}
