"""What a caller of a loaded model may write: layers in words, TransformerLens names, token ids of any library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_folder

from jax_extract import Edit, Model, UserError, answer_log_probability, load_model, logit_difference
from models.hooks import BY_NAME_ONLY, HOOK_POINTS

TOKENS = [5, 9, 2, 7]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(str(tiny_folder("qwen2")))


def sites(run: Any) -> set[tuple[str, int | None]]:
    return {(site.hook, site.layer) for site in run.sites}


@pytest.mark.parametrize("capture", ["all", "*", {"*": "all"}, {"*": "0--1"}])
def test_everything_is_every_hook_point_at_every_layer(model: Model, capture: Any) -> None:
    layers = range(model.config.num_hidden_layers)
    points = [HOOK_POINTS[name] for name in model.hook_points if name not in BY_NAME_ONLY]
    assert sites(model.run(TOKENS, capture=capture).run) == {
        (point.name, layer) for point in points for layer in (layers if point.per_layer else (None,))
    }


@pytest.mark.parametrize(
    ("said", "layers"),
    [(-1, [3]), ("-1", [3]), ("0-1", [0, 1]), ("0,2", [0, 2]), ([0, "1-2"], [0, 1, 2]), (range(2), [0, 1])],
)
def test_layers_are_written_as_in_flags_wherever_they_are_asked_for(model: Model, said: Any, layers: list[int]) -> None:
    out = model.run(TOKENS, capture={"ffn_out": said})
    assert sites(out.run) == {("ffn_out", layer) for layer in layers}
    words, numbers = (
        model.run(TOKENS, edits=[Edit("ffn_out", "zero", layer=which)], logits="last").logits[0]
        for which in (said, layers)
    )
    np.testing.assert_array_equal(words, numbers)
    last = model.run(TOKENS, capture={"ffn_out": "all"}).run
    np.testing.assert_array_equal(last.get("ffn_out", layer=-1), last.get("ffn_out", layer=3))


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        (
            lambda m: m.run(TOKENS, capture={"ffn_out": "first"}),
            "in capture= 'first' names no layer",
        ),
        (lambda m: m.run(TOKENS, capture={"ffn_out": "1-7"}), "layer 4 does not exist; the model has layers 0 to 3"),
        (lambda m: m.run(TOKENS, capture={"ffn_out": []}), "capture names no layer of 'ffn_out'"),
        (lambda m: m.run(TOKENS, capture={"*": None}), "say which layers of"),
        (lambda m: m.run(TOKENS, capture={"blocks.1.hook_mlp_out": [2]}), "names layer 1 of 'ffn_out' by its name"),
        (lambda m: m.run(TOKENS, capture=[5]), "capture names hook points"),
        (lambda m: m.run(TOKENS, capture={"ffn_out": 1}, positions=[0]), "positions of capture are words"),
        (lambda m: m.run(TOKENS, logits=0.5), "logits are asked for at whole numbers"),
        (lambda m: m.run(b"ab", logits="last"), "texts are a list of strings"),
        (lambda m: m.run(TOKENS, logits="last", edits=5), "edits are a list of Edit"),
        (lambda m: m.run({"x": TOKENS}, answers={"y": [1]}), "answers are given for"),
        (lambda m: m.run(TOKENS, answers=5), "answers are a list"),
        (
            lambda m: m.run_edits(TOKENS, [Edit("ffn_out", "zero", layer=1)], logit_difference(3.0, 1)),
            "answers or tokens of the metric are a list",
        ),
        (lambda m: m.run(TOKENS, logits="last", add_special_tokens="yes"), "must be True, False or None"),
        (lambda m: m.generate(TOKENS, max_new_tokens="3"), "must be a whole number of at least 1"),
        (lambda m: m.generate(TOKENS, temperature="a"), "--temperature 'a' must be a number"),
        (lambda m: m.generate(TOKENS, temperature=1.0, top_k=2.5), "--top_k 2.5 must be a whole number"),
        (lambda m: m.run(TOKENS, capture={"ffn_out": 1}).run.get([1]), "neither a layer nor a hook point"),
        (lambda m: m.logits_of("ab"), "rows are an array"),
        (lambda m: Edit("ffn_out", "zero", layer="deep"), "layer of the edit at 'ffn_out': 'deep' names no layer"),
        (lambda m: Edit("ffn_out", "zero", layer=[]), "names no layer"),
        (
            lambda m: m.run(TOKENS, edits=[Edit("ffn_out", "zero", layer="1-7")], logits="last"),
            "layer 4 does not exist",
        ),
        (lambda m: m.run(TOKENS, capture={"ffn_out": 1}).run["blocks.1.hook_mlp_out"], r"run\.get\('blocks.1.hook_mlp"),
        (lambda m: m.run(TOKENS, capture={"ffn_out": 1}).run.get("ffn_out", layer=-1), "holds no layer 3"),
    ],
)
def test_what_names_nothing_is_told(model: Model, refused: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        refused(model)


@pytest.mark.parametrize(
    ("name", "hook", "layer"),
    [
        ("blocks.1.hook_out", "after_block", 1),
        ("blocks.1.hook_in", "residual_before", 1),
        ("embed.hook_out", "embeddings", None),
        ("ln_final.hook_out", "final_norm", None),
    ],
)
def test_names_of_transformer_lens_3_are_understood(model: Model, name: str, hook: str, layer: int | None) -> None:
    run = model.run(TOKENS, capture=name).run
    assert sites(run) == {(hook, layer)}
    np.testing.assert_array_equal(run.get(name), run.get(hook, layer=layer))


@pytest.mark.parametrize(
    "texts",
    [
        torch.tensor(TOKENS),
        torch.tensor([TOKENS]),
        np.array([TOKENS]),
        [torch.tensor(TOKENS)],
        [np.array(TOKENS)],
        list(np.array(TOKENS)),
        {"input_ids": torch.tensor([[*TOKENS, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0]])},
        {"input_ids": [0, *TOKENS], "attention_mask": [0, 1, 1, 1, 1]},
    ],
)
def test_token_ids_come_as_lists_arrays_tensors_or_from_a_tokenizer(model: Model, texts: Any) -> None:
    run = model.run(texts, capture={"after_block": 0}).run
    assert len(run) == 1 and run[0].token_ids.tolist() == TOKENS


def test_answers_and_tokens_come_by_the_ids_of_their_texts(model: Model) -> None:
    texts, answers = {"x": [5, 9, 2], "y": [7, 1]}, {"y": [3], "x": [4, 8]}
    expected = [answer.log_probability for answer in model.run(texts, answers=[[4, 8], [3]]).answers]
    assert [answer.log_probability for answer in model.run(texts, answers=answers).answers] == expected
    edit = Edit("ffn_out", "zero", layer=1)
    measured = model.run_edits(texts, [edit], answer_log_probability(answers))
    np.testing.assert_allclose(measured.without, expected, atol=1e-5)
    by_id, by_place = (
        model.run_edits(texts, [edit], logit_difference(first, torch.tensor(5))).values
        for first in ({"y": 2, "x": 1}, torch.tensor([1, 2]))
    )
    np.testing.assert_array_equal(by_id, by_place)
