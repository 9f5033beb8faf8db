"""Nothing above the deepest layer asked for is computed or read, and there is never a head.

Guarded: which tensors are read from disk, by the notebook call and by the command; how many blocks the
parameters have and the compiled program runs; and that `residual_before` of a layer, the output of the
block below it, does not run the layer itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from tiny_models import random_ids, text_of, tiny_folder

from jax_extract import extract
from jax_extract.config import ExtractConfig
from jax_extract.devices.sharding import parameter_specs
from jax_extract.extraction import jax_backend
from jax_extract.extraction.capture import capture_plan
from jax_extract.extraction.command import extract_to_directory
from jax_extract.extraction.program import capture_function
from jax_extract.terminal import Terminal
from jax_extract.weights.folder import SafetensorsCheckpoint
from jax_extract.weights.load import Weights
from jax_extract.weights.open_model import OpenModel
from models.layers import Numerics

FAMILY = "qwen2_window"  # five layers
TEXTS = [text_of(ids) for ids in random_ids([1, 20])]

# hook points, layers, blocks that must run, whether the final norm is needed
CASES = [
    (("after_block",), (0,), 1, False),
    (("after_block",), (1, 2), 3, False),
    (("residual_before",), (3,), 3, False),
    (("residual_before",), (0,), 0, False),
    (("embeddings",), (4,), 0, False),
    (("residual_before", "ffn_gate"), (2,), 3, False),
    (("blocks.1.hook_resid_post", "blocks.3.hook_resid_pre"), None, 3, False),
    (("after_block",), (4,), 5, False),
    (("final_norm",), (1,), 5, True),
]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors read since."""
    names: list[str] = []
    original = SafetensorsCheckpoint.read

    def recorded(self: SafetensorsCheckpoint, name: str, rows: slice = slice(None)) -> np.ndarray:
        names.append(name)
        return original(self, name, rows)

    monkeypatch.setattr(SafetensorsCheckpoint, "read", recorded)
    return names


def assert_only(names: list[str], blocks: int) -> None:
    layers = {int(match[1]) for name in names if (match := re.search(r"\.layers\.(\d+)\.", name))}
    assert layers == set(range(blocks))
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names


@pytest.mark.parametrize(("hooks", "layers", "blocks", "norm"), CASES)
def test_no_tensor_of_a_higher_layer_is_read(
    hooks: tuple[str, ...], layers: tuple[int, ...] | None, blocks: int, norm: bool, read: list[str]
) -> None:
    extract(str(tiny_folder(FAMILY)), TEXTS, layers=layers, hook_points=hooks, positions="all")
    assert_only(read, blocks)
    assert not norm or "model.norm.weight" in read


def test_the_command_reads_no_tensor_of_a_higher_layer(read: list[str], tmp_path: Path) -> None:
    lines = "".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(TEXTS))
    (tmp_path / "texts.jsonl").write_text(lines)
    config = ExtractConfig(
        model_path=str(tiny_folder(FAMILY)),
        tasks_file=str(tmp_path / "texts.jsonl"),
        layers_to_extract=(1,),
        activations_dir=str(tmp_path / "run"),
    )
    extract_to_directory(config, Terminal(silent=True))
    assert_only(read, 2)


def _equations(jaxpr: Jaxpr) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: isinstance(v, Jaxpr | ClosedJaxpr)
        ):
            if isinstance(value, Jaxpr | ClosedJaxpr):
                yield from _equations(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


@pytest.mark.parametrize(("hooks", "layers", "blocks", "norm"), CASES)
def test_the_program_holds_and_runs_the_blocks_needed_and_no_head(
    hooks: tuple[str, ...], layers: tuple[int, ...] | None, blocks: int, norm: bool
) -> None:
    model = OpenModel.open(str(tiny_folder(FAMILY)))
    plan = capture_plan(model, layers, hooks, "all", "float32")
    assert plan.blocks_needed(model.config.num_hidden_layers) == blocks
    mesh = jax_backend.open_mesh("1,1")
    weights = Weights(model.checkpoint, model.port, model.config, blocks)
    params = weights.load(mesh, "float32")
    assert set(params) == {"embedding", "blocks", "final_norm"}
    assert {value.shape[0] for value in jax.tree.leaves(params["blocks"])} == {blocks}
    function = capture_function(model.port, model.config, plan, mesh, Numerics(), parameter_specs(params, mesh))
    tokens, lengths = jax.ShapeDtypeStruct((2, 24), np.int32), jax.ShapeDtypeStruct((2, 1), np.int32)
    equations = list(_equations(jax.make_jaxpr(function)(params, tokens, lengths, ()).jaxpr))
    scans = [
        e for e in _outside_scan(equations) if e.primitive.name == "scan"
    ]  # that of the blocks; attention has its own
    assert [e.params["length"] for e in scans] == [blocks] * (blocks > 0)
    products = [e for e in equations if e.primitive.name == "dot_general"]
    assert bool(products) == (blocks > 0)
    assert all(model.config.vocab_size not in e.outvars[0].aval.shape for e in products)
    assert norm == any(e.primitive.name == "rsqrt" for e in _outside_scan(equations))


def _outside_scan(equations: list[Any]) -> list[Any]:
    inside = {
        id(inner)
        for equation in equations
        if equation.primitive.name == "scan"
        for inner in _equations(equation.params["jaxpr"].jaxpr)
    }
    return [equation for equation in equations if id(equation) not in inside]


def test_residual_before_is_after_block_of_the_layer_below_and_the_embeddings_at_the_bottom() -> None:
    def rows(hook: str, layer: int) -> np.ndarray:
        run = extract(str(tiny_folder(FAMILY)), TEXTS, layers=(layer,), hook_points=(hook,), positions="all")
        return run.sample("1").get(layer, hook)

    for layer in (1, 4):  # without a window and with one
        np.testing.assert_array_equal(rows("residual_before", layer), rows("after_block", layer - 1))
    np.testing.assert_array_equal(rows("residual_before", 0), rows("embeddings", 0))
