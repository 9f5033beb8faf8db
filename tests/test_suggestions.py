"""What was probably meant is suggested where it is near, and nothing where nothing is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from jax_extract import cli, extract
from jax_extract.config import ExtractConfig, from_mapping
from jax_extract.errors import UserError
from jax_extract.inputs.arc_encoders import grid_encoder
from jax_extract.inputs.benchmarks import benchmark_named
from models.hooks import HOOK_POINTS, resolve_hook_points
from models.registry import port_for

FAR = ["banana", "x", "zzz", "logits", "apple", "42"]  # of hook points, `apple` and `logits` share letters with some
ASKED: Mapping[str, tuple[Callable[[str], object], str, str]] = {
    "hook point": (lambda name: resolve_hook_points([name]), "after_blok", "'after_block'"),
    "hook point by alias": (
        lambda name: resolve_hook_points([f"blocks.3.{name}"]),
        "hook_resid_pots",
        "hook_resid_post",
    ),
    "option of a file": (lambda name: from_mapping({name: 1}, ExtractConfig(), "a"), "batchsize", "'batch_size'"),
    "flag": (lambda name: cli._refuse_unknown_flags([f"--{name}"], ExtractConfig, "p"), "layres", "--layers?"),
    "grid encoder": (grid_encoder, "leters", "'letters'"),
    "benchmark": (benchmark_named, "mrcp", "mrpc?"),
    "model type": (lambda name: port_for({"model_type": name}), "qwen22", "'qwen2'"),
}


def _said(ask: Callable[[str], object], word: str) -> str:
    with pytest.raises(UserError) as refusal:
        ask(word)
    return str(refusal.value)


@pytest.mark.parametrize("what", ASKED)
def test_a_word_with_a_slip_gets_the_one_that_was_meant(what: str) -> None:
    ask, slip, meant = ASKED[what]
    said = _said(ask, slip)
    assert meant in said and ("nearest" in said or "did you mean" in said)


@pytest.mark.parametrize("what", ASKED)
@pytest.mark.parametrize("word", FAR)
def test_a_word_that_is_near_nothing_gets_no_suggestion(what: str, word: str) -> None:
    said = _said(ASKED[what][0], word)
    assert word in said
    assert "nearest" not in said and "did you mean" not in said


@pytest.mark.parametrize("name", ["layer_12", "down_proj", "hidden_states"])
def test_a_name_of_another_tool_that_means_no_hook_point_here_gets_the_list_alone(name: str) -> None:
    assert f"unknown hook point {name!r}; the hook points are: {', '.join(HOOK_POINTS)}" in _said(
        lambda word: resolve_hook_points([word]), name
    )


def test_samples_are_suggested_likewise(model: Path) -> None:
    run = extract(str(model), {"task0013": "a text"}, layers=11)
    assert "the nearest is 'task0013'" in _said(run.sample, "task00013")
    assert _said(run.sample, "banana") == "this run holds no sample 'banana'"
