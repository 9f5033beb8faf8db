"""A run goes on only while config.json of its model means what it meant when the run was begun."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from small_run import make_model, run_here, write_config, write_jsonl

from jax_extract import UserError
from jax_extract.extraction.model_fields import model_fields, refuse_changed_meaning
from jax_extract.inputs.tokenize import tokenizer_digest
from jax_extract.weights.adapter import CheckpointBesideAdapter
from jax_extract.weights.open_model import OpenModel
from models.registry import port_for

_SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-6}


class _Checkpoint:
    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config


def _model(model_type: str, **fields: Any) -> OpenModel:
    """Of a config.json alone."""
    config = {"model_type": model_type, **_SIZES, **fields}
    checkpoint: Any = _Checkpoint(config)
    return OpenModel(checkpoint, port_for(config), port_for(config).config(config))


def _drop_fields(place: Path, *names: str) -> None:
    run = json.loads((place / "_run/run.json").read_text())
    for name in names:
        del run["description"][name]
    (place / "_run/run.json").write_text(json.dumps(run))


def test_a_run_is_not_resumed_under_an_edited_config_that_means_other_rows(tmp_path: Path) -> None:
    model, place = make_model(tmp_path / "model", layers=2), tmp_path / "run"
    tasks = write_jsonl(tmp_path / "in.jsonl", [5, 9])

    def run(**changes: Any) -> None:
        write_config(model, num_hidden_layers=2, **changes)
        run_here(model, tasks, place, layers_to_extract=(1,), batch_size=4)

    run()
    run(use_cache=False, temperature=0.7, max_window_layers=1)  # nothing that a row depends on
    with pytest.raises(UserError, match=r"rotary.theta was 10000.0, is now 1000000.0; .* --activations_dir"):
        run(rope_theta=1e6)
    with pytest.raises(UserError, match=r"rms_norm_eps was 1e-06, is now 1e-05"):
        run(rms_norm_eps=1e-5)
    _drop_fields(place, "model_fields", "kept", "input_fingerprint")  # as the version before began runs
    run()
    with pytest.raises(UserError, match=r"rope_scaling and rope_parameters meant .*: choose another --activations_dir"):
        run(rope_scaling={"rope_type": "linear", "factor": 2.0}, rope_parameters={"rope_theta": 5.0})


def test_fields_that_no_port_understands_are_compared_as_they_stand() -> None:
    fields = model_fields(_model("llama", sliding_window=None, temperature=1), 128)
    assert fields["config.json"]["sliding_window"] == "null"
    assert "temperature" not in fields["config.json"]
    assert fields["understood"]["rotary.theta"] == 1e4


@pytest.mark.parametrize(
    ("model", "longest", "named"),
    [
        (_model("mistral"), 4_096, None),
        (_model("mistral"), 5_000, "without sliding_window layers"),
        (_model("mistral", sliding_window=None), 5_000, None),
        (_model("qwen2", use_sliding_window=True, max_window_layers=0), 5_000, "sliding_window"),
        (_model("qwen2", use_sliding_window=True, sliding_window=16), 100, "max_window_layers"),
        (_model("qwen2", use_sliding_window=False, sliding_window=16), 100, None),
        (_model("gpt_neox", rope_theta=5e4), 9, "rope_theta"),
        (_model("gpt_neox", rope_theta=1e4, rotary_emb_base=1e4), 9, None),
        (_model("gpt_neox", rotary_emb_base=5e4), 9, None),
        (_model("gpt_neox", rope_parameters={"rope_theta": 5e4, "rope_type": "default"}), 9, None),
        (_model("llama", rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=5e5), 9, None),
        (_model("gemma3_text", rope_scaling={"rope_type": "linear", "factor": 8.0}), 9, None),
        (_model("gpt2"), 9, None),
    ],
)
def test_an_older_run_is_refused_where_its_config_meant_other_rows_and_nowhere_else(
    model: OpenModel, longest: int, named: str | None
) -> None:
    if named is None:
        refuse_changed_meaning(model, longest, "place")
        return
    with pytest.raises(UserError, match=named):
        refuse_changed_meaning(model, longest, "place")


def test_an_older_run_goes_on_with_the_tokens_of_the_base_model_whatever_its_adapter_brings(tmp_path: Path) -> None:
    base = OpenModel.open(str(make_model(tmp_path / "base", layers=1)))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    safetensors.numpy.save_file({"a": np.ones(1, np.float32)}, tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "adapter/chat_template.jinja").write_text("own")
    adapted = CheckpointBesideAdapter(base.checkpoint, tmp_path / "adapter", "adapter", 256)
    model = dataclasses.replace(base, checkpoint=adapted)
    assert model.tokenizer_notes == ("the chat template is the adapter's own",)
    older = dataclasses.replace(model, tokens_of_base=True)
    assert tokenizer_digest(older.tokenizer) == tokenizer_digest(base.tokenizer) != tokenizer_digest(model.tokenizer)
    assert older.tokenizer_notes == ()
