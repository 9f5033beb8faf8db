"""An intervention changes what Hugging Face with an equivalent forward hook changes, and nothing else.

Guarded: replace, add, zero and patch at hook points of every kind, with a traced layer index, through
`port.forward` as the analyses call it: every hook point of every layer afterwards, on two texts in one
padded batch; and that one compiled program serves every layer and every intervention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import Array
from tiny_models import Rows, random_ids, reference, row_errors, tiny_folder, tiny_model

from jax_extract.extraction import jax_backend
from jax_extract.extraction.capture import capture_plan
from jax_extract.weights.load import Weights
from jax_extract.weights.open_model import OpenModel
from models.hooks import HOOK_POINTS, Intervention, Taps
from models.layers import Numerics
from models.packing import Packing
from models.ports import hook_width
from models.self_attention import WithinRows

FAMILY = "qwen2_window"
LENGTHS = (21, 40)
PATCHED = (3, 17)  # token positions of `patch`

CASES = [
    ("embeddings", "add"),
    ("residual_before", "replace"),
    ("attention_out", "zero"),
    ("ffn_gate", "add"),
    ("ffn_up", "replace"),
    ("ffn_hidden", "patch"),
    ("ffn_out", "zero"),
    ("after_block", "patch"),
    ("after_block", "add"),
    ("after_block", "zero"),
    ("after_attention", "replace"),
    ("after_attention", "add"),
]


class Tapped:
    """Everything captured while interventions are made; jitted once, traces counted.

    All of them are in the program; those that a call does not ask for are at no layer, where they change nothing.
    """

    def __init__(self, cases: Sequence[tuple[str, str]]) -> None:
        model = OpenModel.open(str(tiny_folder(FAMILY)))
        self.layers = model.config.num_hidden_layers
        self.width = {hook: hook_width(model.config, HOOK_POINTS[hook].width) for hook, _ in cases}
        self.traces = 0
        self.plan = capture_plan(model, range(self.layers), ("*",), "all", "float32")
        widths = {name: hook_width(model.config, HOOK_POINTS[name].width) for name, _ in self.plan.layers}
        weights = Weights(model.checkpoint, model.port, model.config, self.layers)
        self._cases = cases
        self._params = weights.load(jax_backend.open_mesh("1,1"), "float32")

        def run(params: Any, tokens: Array, lengths: Array, made: Any) -> dict[str, Array]:
            self.traces += 1
            packing = Packing(lengths[:, None], tokens.shape[1])
            taps = Taps.start(self.plan, self.layers, packing, widths, made)
            attention = WithinRows(packing.positions)
            filled, _ = model.port.forward(
                model.config, params, tokens, taps, attention, Numerics(), lambda prefix, shards: shards
            )
            return filled.buffers

        self._run = jax.jit(run)

    def __call__(self, texts: list[np.ndarray], case: tuple[str, str], layer: int, value: Any = None) -> list[Rows]:
        tokens = np.zeros((len(LENGTHS), 48), np.int32)
        for row, text in zip(tokens, texts, strict=False):
            row[: len(text)] = text
        lengths = np.array([*map(len, texts), *[1] * (len(LENGTHS) - len(texts))], np.int32)
        made = tuple(self._intervention(*each, layer if each == case else -1, value) for each in self._cases)
        buffers = self._run(self._params, tokens, lengths, made)
        arrays = {name: np.asarray(buffer) for name, buffer in buffers.items()}
        return [
            {(name, at): arrays[name][self.plan.slot(name, at), i, : len(text)] for name, at in self.plan.sites()}
            for i, text in enumerate(texts)
        ]

    def _intervention(self, hook: str, change: str, layer: int, value: np.ndarray | None) -> Intervention:
        value = np.zeros(self.width[hook], np.float32) if layer < 0 or value is None else value
        mask = jnp.zeros((1, 48, 1), bool).at[:, np.array(PATCHED)].set(True) if change == "patch" else None
        given = None if change == "zero" else jnp.asarray(value)
        return Intervention(hook, change, jnp.int32(layer), given, mask)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tapped() -> Iterator[Tapped]:
    """At every layer's hook points."""
    program = Tapped([case for case in CASES if HOOK_POINTS[case[0]].per_layer])
    yield program
    assert program.traces == 1, "another layer must not compile anew, nor another intervention"


@pytest.fixture(scope="module")
def tapped_below() -> Tapped:
    """At the embeddings, which are of no layer."""
    return Tapped([case for case in CASES if not HOOK_POINTS[case[0]].per_layer])


def hooked_reference(hook: str, change: str, layer: int, value: np.ndarray | None, text: np.ndarray) -> Rows:
    """`reference` of the torch model in which a forward (pre-)hook makes the same change."""
    model = tiny_model(FAMILY)
    block = model.base_model.layers[layer]
    before = {"residual_before": block, "ffn_hidden": block.mlp.down_proj}
    after = {
        "embeddings": model.base_model.embed_tokens,
        "attention_out": block.self_attn,
        "ffn_gate": block.mlp.gate_proj,
        "ffn_up": block.mlp.up_proj,
        "ffn_out": block.mlp,
        "after_block": block,
    }

    def changed(x: torch.Tensor) -> torch.Tensor:
        if change == "zero":
            return torch.zeros_like(x)
        new = torch.from_numpy(value).expand_as(x)
        if change == "add":
            return x + new
        if change == "replace":
            return new.clone()
        x = x.clone()
        x[:, PATCHED] = new[:, PATCHED]
        return x

    def pre(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return changed(args[0]), *args[1:]

    def post(module: Any, args: Any, result: Any) -> Any:
        return (changed(result[0]), *result[1:]) if isinstance(result, tuple) else changed(result)

    register: Callable[[], Any] = (
        (lambda: before[hook].register_forward_pre_hook(pre))
        if hook in before
        else lambda: after[hook].register_forward_hook(post)
    )
    handle = register()
    try:
        return reference(model, text)
    finally:
        handle.remove()


@pytest.mark.parametrize(("hook", "change"), [case for case in CASES if case[0] != "after_attention"])
def test_an_intervention_is_hugging_faces_with_the_same_hook_and_compiles_once(
    hook: str, change: str, request: pytest.FixtureRequest
) -> None:
    tapped: Tapped = request.getfixturevalue("tapped" if HOOK_POINTS[hook].per_layer else "tapped_below")
    texts = random_ids(LENGTHS)
    value = None
    if change != "zero":
        value = np.random.default_rng(2).standard_normal(tapped.width[hook]).astype(np.float32)
    plain = [reference(tiny_model(FAMILY), text) for text in texts]
    for layer in (1, 3) if HOOK_POINTS[hook].per_layer else (0,):
        got = tapped(texts, (hook, change), layer, value)
        for i, text in enumerate(texts):
            truth = hooked_reference(hook, change, layer, value, text)
            assert row_errors(truth["final_norm", None], plain[i]["final_norm", None]).max() > 1e-3, "it must act"
            for (name, at), rows in truth.items():
                limit = 1e-5 if HOOK_POINTS[name].residual_stream else 5e-5
                worst = row_errors(got[i][name, at], rows).max()
                assert worst <= limit, f"{change} {hook} of layer {layer}: {name} of layer {at} off by {worst}"
    assert tapped.traces == 1, "another layer must not compile anew"


@pytest.mark.parametrize("change", ["replace", "add"])
def test_after_attention_changes_the_residual_stream_and_what_the_ffn_sees(change: str, tapped: Tapped) -> None:
    """No module of Hugging Face's ends here: the value that attention must add is worked out instead."""
    [text] = random_ids([21])
    value = np.random.default_rng(2).standard_normal(tapped.width["after_attention"]).astype(np.float32)
    model = tiny_model(FAMILY)
    plain = reference(model, text)
    for layer in (0, 4):
        [got] = tapped([text], ("after_attention", change), layer, value)

        def post(module: Any, args: Any, result: Any, layer: int = layer) -> Any:
            wanted = torch.from_numpy(value - plain["residual_before", layer])[None]
            return (wanted if change == "replace" else result[0] + torch.from_numpy(value), *result[1:])

        handle = model.base_model.layers[layer].self_attn.register_forward_hook(post)
        truth = reference(model, text)
        handle.remove()
        truth["attention_out", layer] = plain["attention_out", layer]  # the hook point itself comes before
        for (name, at), rows in truth.items():
            limit = 1e-5 if HOOK_POINTS[name].residual_stream else 5e-5
            assert row_errors(got[name, at], rows).max() <= limit, (layer, name, at)


def test_interventions_at_no_layer_change_nothing(tapped: Tapped) -> None:
    [text] = random_ids([21])
    [got] = tapped([text], ("after_block", "zero"), -1)
    for (name, at), rows in reference(tiny_model(FAMILY), text).items():
        assert row_errors(got[name, at], rows).max() <= (1e-5 if HOOK_POINTS[name].residual_stream else 5e-5)
