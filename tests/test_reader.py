"""Reading a run: names as others write them, shards on their own, parts whose shards are in a bucket by now."""

from __future__ import annotations

from typing import Any

import pytest

from jax_extract import UserError
from jax_extract.store.differences import differences, input_differences
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
        ("blocks.3.hook_out", "blocks.{i}.hook_resid_post"),
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
        ({"weights": "sha256:c"}, "--model_path is another model (other weights)"),
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
