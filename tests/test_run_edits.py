"""Many edits from a stored stream give what a whole run of each gives; so do gradients what torch's autograd gives.

Guarded: `run_edits` at every hook point, in compositions, of functions with operands of their own, with every kind of
metric; the gradient at every hook point of every family against torch, and against finite differences where rows are
long or an edit is made; and all of it on a mesh of 2 x 4 as on one device.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from edits_worker import ANSWERS, TEXTS, asked, doubled, edits_of
from test_edits import SOME, everything
from tiny_models import families, random_ids, row_errors, tiny_folder, tiny_model
from torch_hooks import TorchChange, changed

from jax_extract import Edit, Model, UserError, answer_log_probability, load_model, logit_difference
from models.ports import hook_width

GRADIENT_BOUND = 1e-4  # relative


@pytest.fixture(scope="module")
def model() -> Model:
    """For what does not depend on the architecture."""
    return load_model(tiny_folder("gemma2"), mesh_shape="1,1")


@pytest.mark.parametrize("name", SOME)
def test_every_edit_gives_what_a_whole_run_with_it_gives(name: str) -> None:
    """At every hook point, lowest ones at different depths, alone and together; two texts of different lengths."""
    model = load_model(tiny_folder(name), mesh_shape="1,1")
    sets = edits_of(model)
    effects = model.run_edits(TEXTS, sets, answer_log_probability(ANSWERS))
    assert effects.values.shape == (len(sets), len(TEXTS))
    plain = model.run(TEXTS, answers=ANSWERS)
    np.testing.assert_allclose(effects.without, [each.log_probability for each in plain.answers], atol=1e-4)
    np.testing.assert_allclose(effects.values, whole_runs(model, sets), atol=1e-4)
    assert (np.abs(effects.effects).max(axis=1) > 1e-3).all(), "each must act"


def whole_runs(model: Model, sets: Sequence[Edit | Sequence[Edit]]) -> np.ndarray:
    """[sets, texts], of one run in which every set has samples of its own: one program for all."""
    edits = [
        replace(edit, samples=(len(TEXTS) * number, len(TEXTS) * number + 1))
        for number, one in enumerate(sets)
        for edit in ([one] if isinstance(one, Edit) else one)
    ]
    answers = model.run(TEXTS * len(sets), edits=edits, answers=ANSWERS * len(sets)).answers
    return np.array([answer.log_probability for answer in answers]).reshape(len(sets), len(TEXTS))


def test_edits_of_the_attention_pattern_give_what_a_whole_run_gives_too(model: Model) -> None:
    added = np.full(hook_width(model.config, "attention_pattern"), 0.3, np.float32)
    sets = [
        Edit("attention_pattern", "add", layer=1, value=added),
        Edit("attention_pattern", "zero", layer=2, positions=[3, -1]),
    ]
    effects = model.run_edits(TEXTS, sets, answer_log_probability(ANSWERS))
    runs = [model.run(TEXTS, edits=one, answers=ANSWERS).answers for one in sets]
    np.testing.assert_allclose(effects.values, [[each.log_probability for each in run] for run in runs], atol=1e-4)
    assert (np.abs(effects.effects).max(axis=1) > 1e-3).all(), "each must act"


def test_edits_of_one_stream_act_in_the_order_of_the_forward(model: Model) -> None:
    """Behind a block is before the next one, whichever was given first, and on torch as on JAX."""
    vector = np.ones(model.config.hidden_size, np.float32)
    both = [Edit("residual_before", "add", layer=3, value=vector), Edit("after_block", "zero", layer=2)]
    metric = answer_log_probability(ANSWERS)
    expected = [each.log_probability for each in model.run(TEXTS, edits=both, answers=ANSWERS).answers]
    for one in (model, load_model(tiny_folder("gemma2"), backend="torch")):
        values = one.run_edits(TEXTS, [both, both[::-1]], metric).values
        np.testing.assert_allclose(values, [expected, expected], atol=1e-4)


def test_torch_changes_what_lies_behind_attention_apart_from_what_attention_adds(model: Model) -> None:
    vector = np.ones(model.config.hidden_size, np.float32)
    edits = [Edit("after_attention", "add", layer=2, value=vector), Edit("attention_out", "zero", layer=2, positions=3)]
    kept = {"attention_out": [2], "after_attention": [2], "after_block": [2]}
    ours, theirs = (
        one.run(TEXTS, capture=kept, edits=edits, logits="last")
        for one in (model, load_model(tiny_folder("gemma2"), backend="torch"))
    )
    for hook in kept:
        assert row_errors(ours.run.get(2, hook), theirs.run.get(2, hook)).max() <= 5e-5, hook
    np.testing.assert_allclose(ours.logits[0], theirs.logits[0], atol=1e-4)


def test_metrics_are_of_the_logits_behind_the_text(model: Model) -> None:
    """Also of texts that have no program in common."""
    sets, texts = edits_of(model)[:3], [TEXTS[0], TEXTS[1][:9]]
    logits = [[rows[-1] for rows in model.run(texts, edits=one, logits="last").logits] for one in sets]
    differences = model.run_edits(texts, sets, logit_difference([3, 5], "!"))
    expected = [[rows[3] - rows[0], more[5] - more[0]] for rows, more in logits]
    np.testing.assert_allclose(differences.values, expected, atol=1e-4)
    two = model.run_edits(texts, sets, first_two)
    assert two.values.shape == (3, 2, 2) and "3 edits of 2 texts" in repr(two)
    several = model.run_edits(texts, sets, lambda logits: {"first": logits[0], "second": logits[1]})
    np.testing.assert_allclose(several.effects["second"], two.effects[..., 1], atol=1e-5)
    assert "3 edits of 2 texts" in repr(several)
    np.testing.assert_allclose(two.values, np.array(logits)[:, :, :2], atol=1e-4)


def first_two(logits: Any) -> Any:
    return logits[:2]


def test_edits_of_several_layers_and_functions_compile_once(model: Model) -> None:
    """Other layers, operands and values of the same kinds of edits, in as many rows, run the program that is there."""
    text = random_ids([12])[0]
    random = np.random.default_rng(1)

    def run(layer: int) -> None:
        bias = random.standard_normal(model.config.hidden_size).astype(np.float32)
        sets = [
            Edit("after_block", "add", layer=layer, value=bias),
            Edit("ffn_out", doubled, layer=layer, value={"factor": float(layer), "bias": bias}),
            Edit("attention_out", "zero", layer=layer, positions=layer),
        ]
        model.run_edits(text, sets, logit_difference(1, 2))

    run(1)
    run(2)
    compiled: list[str] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        if "compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run(3)
        run(0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled, "it must be the same program"


@pytest.mark.parametrize(
    ("edits", "metric", "said"),
    [
        ([], logit_difference(1, 2), "there are no edits"),
        ([Edit("ffn_out", "zero", layer=1)], "loss", "a metric is"),
        ([Edit("ffn_out", "zero", layer=1)], logit_difference("!!", 1), "is 2 tokens"),
        ([Edit("ffn_out", "zero", layer=1)], logit_difference(9_999, 1), "token 9999 is none of the model's"),
        (
            [Edit("ffn_out", "zero", layer=1)],
            answer_log_probability(["a", "b", "c"]),
            "3 answers or tokens of the metric were given for 2 texts",
        ),
        ([Edit("ffn_out", "zero", layer=1, samples="2")], logit_difference(1, 2), "names sample '2'"),
        ([Edit("ffn_out", "zero", layer=1)], lambda _: None, "returns NoneType; return a number or an array"),
        ([Edit("ffn_out", "zero", layer=1)], lambda logits, _: logits[0], "must take the logits"),
        ([[Edit("ffn_out", "zero", layer=99)]], logit_difference(1, 2), "layer 99 does not exist"),
    ],
)
def test_mistakes_are_named(model: Model, edits: Any, metric: Any, said: str) -> None:
    with pytest.raises(UserError) as refusal:
        model.run_edits(TEXTS, edits, metric)
    assert said in str(refusal.value)


# ------------------------------------------------------------------------------------------- gradients


def torch_gradients(name: str, text: np.ndarray, answer: np.ndarray, sites: list[tuple[str, int | None]]) -> Any:
    """By autograd: the hooks pass the rows through and keep them with their gradient."""
    torch_model = tiny_model(name)
    kept: dict[Any, torch.Tensor] = {}

    def keep(site: Any) -> Any:
        def change(x: torch.Tensor) -> torch.Tensor:
            kept[site] = x if x.requires_grad else x.requires_grad_()
            kept[site].retain_grad()
            return kept[site]

        return change

    both = torch.from_numpy(np.concatenate([text, answer]).astype(np.int64))
    with changed(torch_model, [TorchChange(*site, keep(site)) for site in sites]):
        logits = torch_model(both[None], use_cache=False).logits[0].float()
    value = torch.log_softmax(logits[len(text) - 1 : -1], -1)[range(len(answer)), answer.tolist()].sum()
    value.backward()
    found = {}
    for site in sites:
        gradient = kept[site].grad
        assert gradient is not None
        found[site] = gradient.numpy().copy()
    for parameter in torch_model.parameters():
        parameter.grad = None
    return value.item(), found


# Every kind of block, norm and activation; others differ in numbers.
_OF_GRADIENTS = families(
    "qwen2_window gpt2 gpt_neox phi_variant gemma2", "qwen3 llama_biases gpt_neox_sequential gemma gemma3"
)


@pytest.mark.parametrize("name", _OF_GRADIENTS)
def test_gradients_at_every_hook_point_are_those_of_torch(name: str) -> None:
    """Several sites in one way back, two texts at once."""
    model = load_model(tiny_folder(name), mesh_shape="1,1")
    hooks = [hook for hook in model.hook_points if hook != "after_attention"]  # no module of Hugging Face's ends there
    capture = {hook: layers for hook, layers in everything(model).items() if hook in hooks}
    grad = model.gradient(TEXTS, capture, metric=answer_log_probability(ANSWERS))
    for i, (text, answer) in enumerate(zip(TEXTS, ANSWERS, strict=True)):
        sites = [(site.hook, site.layer) for site in grad.run.sites]
        value, expected = torch_gradients(name, text, answer, sites)
        assert abs(grad.values[i] - value) <= 1e-4
        for hook, layer in sites:
            got = grad.run.sample(str(i)).get(layer, hook)
            truth = expected[hook, layer][: len(text)]
            worst = np.linalg.norm(got - truth) / (np.linalg.norm(truth) or 1.0)
            assert worst <= GRADIENT_BOUND, f"gradient at {hook} of layer {layer} is off by {worst}"


def test_a_gradient_is_the_slope_of_the_metric_under_edits(model: Model) -> None:
    """Central differences of added vectors: at the stream between attention and the FFN too, and behind an edit."""
    [text] = random_ids([14], seed=4)
    width, layer = model.config.hidden_size, 2
    metric = logit_difference(7, 8)
    fixed = Edit("ffn_out", "zero", layer=1, positions=[3])
    there = np.random.default_rng(7).standard_normal(width)
    here = Edit("after_block", "replace", layer=[layer, -1], value=there, positions=[5])
    hooks = [hook for hook in ("after_block", "after_attention", "ffn_out") if hook in model.hook_points]
    grad = model.gradient(text, dict.fromkeys(hooks, layer), metric=metric, edits=[fixed])
    behind = model.gradient(text, {"after_block": [layer, -1]}, metric=metric, edits=[fixed, here])
    random = np.random.default_rng(6)
    for hook in hooks:
        for position in (5, 13):
            direction = random.standard_normal(width).astype(np.float32)
            step = 1e-2
            sets = [
                [fixed, Edit(hook, "add", layer=layer, value=direction, scale=scale, positions=position)]
                for scale in (step, -step)
            ]
            up, down = model.run_edits(text, sets, metric).values[:, 0]
            slope = (up - down) / (2 * step)
            expected = float(grad.run.sample("0").get(layer, hook)[position] @ direction)
            assert abs(slope - expected) <= 2e-2 * max(1.0, abs(expected)), (hook, position, slope, expected)
    for at in (layer, -1):  # where an edit is made, it is of what the edit leaves
        for position in (5, 13):
            direction = random.standard_normal(width).astype(np.float32)
            sets = [
                [fixed, here, Edit("after_block", "add", layer=at, value=direction, scale=scale, positions=position)]
                for scale in (1e-2, -1e-2)
            ]
            up, down = model.run_edits(text, sets, metric).values[:, 0]
            expected = float(behind.run[0].get(layer=at)[position] @ direction)
            assert abs((up - down) / 2e-2 - expected) <= 2e-2 * max(1.0, abs(expected)), (at, position)


def test_gradients_of_long_rows_remember_no_tokens_by_tokens_values() -> None:
    """Beyond 1,024 tokens queries are taken in blocks; it is the same gradient."""
    model = load_model(tiny_folder("long"), mesh_shape="1,1")
    [text, answer] = random_ids([1_100, 3], seed=9)
    grad = model.gradient(text, "after_block", "all", answer_log_probability(answer))
    value, expected = torch_gradients("long", text, answer, [("after_block", 0), ("after_block", 1)])
    assert abs(grad.values[0] - value) <= 1e-4
    for layer in (0, 1):
        got, truth = grad.run.sample("0").get(layer), expected["after_block", layer][: len(text)]
        assert np.linalg.norm(got - truth) <= GRADIENT_BOUND * np.linalg.norm(truth)


def test_a_function_that_gives_no_single_number_has_no_gradient(model: Model) -> None:
    for metric in (first_two, jnp.argmax):
        with pytest.raises(UserError, match="one number"):
            model.gradient(TEXTS, "after_block", 1, metric)


def test_a_function_of_logits_has_a_gradient(model: Model) -> None:
    grad = model.gradient(TEXTS, "after_block", 1, seven_less_eight)
    same = model.gradient(TEXTS, "after_block", 1, logit_difference(7, 8))
    for name in grad.run.sample_ids:
        assert row_errors(grad.run.sample(name).get(1), same.run.sample(name).get(1)).max() <= 1e-5


def seven_less_eight(logits: Any) -> Any:
    return jnp.take(logits, 7) - logits[8]


# ------------------------------------------------------------------------------------------- on a mesh


def test_a_mesh_gives_the_same(tmp_path: Path) -> None:
    """Eight devices, 2 x 4: rows, logits, answers, edits of one text and gradients are those of one device."""
    worker = Path(__file__).with_name("edits_worker.py")
    environment = {**__import__("os").environ, "JAX_NUM_CPU_DEVICES": "8"}
    out = tmp_path / "mesh.npz"
    subprocess.run(
        [sys.executable, str(worker), *map(str, [tiny_folder(SOME[0]), "2,4", out])], check=True, env=environment
    )
    on_mesh = np.load(out)
    expected = asked(load_model(tiny_folder(SOME[0]), mesh_shape="1,1"))
    assert set(on_mesh.files) == set(expected)
    for name, values in expected.items():
        if name.startswith("gradient"):
            assert np.linalg.norm(on_mesh[name] - values) <= GRADIENT_BOUND * np.linalg.norm(values), name
        elif name.startswith("rows"):
            assert row_errors(on_mesh[name], values).max() <= 1e-5, name
        else:
            np.testing.assert_allclose(on_mesh[name], values, atol=1e-4, err_msg=name)
