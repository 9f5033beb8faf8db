"""The layout of parameters is chosen from counts, and never changes a row.

Guarded: the counts against figures worked out by hand; what is chosen for models that fit a chip whole, that do not,
and that fit no way; that tensor sharding says why it is not offered; on a 2x4 mesh, that every layout gives
byte-identical captures and stores what it says; and that an extraction does what was decided, and can explain it.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from small_run import ROOT, environment, make_model, shards, whole_lines, write_jsonl

from jax_extract.config import ExtractConfig
from jax_extract.devices.chips import CHIPS
from jax_extract.devices.planner import (
    SHARE_OF_PEAK,
    TENSOR,
    ModelCounts,
    Request,
    choose_layout,
    layout_cost,
    tensor_wins_below,
)
from jax_extract.devices.platform import device_kind
from jax_extract.devices.sharding import Layout, parameter_specs
from jax_extract.extraction import jax_backend
from jax_extract.extraction.command import extract_to_directory
from jax_extract.terminal import Terminal
from models.qwen2_jax_with_hooks import PORT, Qwen2Config

V5E = CHIPS["TPU v5 lite"]


def counts_of(config: Qwen2Config, blocks: int) -> ModelCounts:
    structure = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: PORT.structure(config, blocks, "bfloat16"))))
    return ModelCounts.of(structure, config, blocks)


def request(config: Qwen2Config, *, rows: int = 8, model: int = 8) -> Request:
    counts = counts_of(config, config.num_hidden_layers)
    captures = 14 * rows * 2_048 * config.hidden_size * 2
    return Request(counts, V5E, 64 // model, model, rows, 2_048, captures)


def test_parameters_and_products_are_counted_as_by_hand() -> None:
    counts = counts_of(Qwen2Config.qwen2_5_0_5b(), 24)
    block = 896 * (896 + 2 * 128) + 896 * 896 + 3 * 896 * 4_864
    vectors = 24 * (2 * 896 + 896 + 2 * 128) + 896
    assert (counts.block_values, counts.other_values, counts.vector_values) == (block, 151_936 * 896, vectors)
    assert counts.product_flops(100) == 2 * 100 * 24 * block
    assert counts.attention_flops(3, 4) == 24 * 3 * 2 * 2 * 896 * (1 + 2 + 3 + 4)


def test_traffic_and_seconds_are_counted_as_by_hand() -> None:
    asked = request(Qwen2Config.qwen2_5_0_5b())
    counts = asked.counts
    matrices = 2 * (24 * counts.block_values + counts.other_values)
    for layout, arriving, links in (
        (Layout.REPLICATED, 0, 1),
        (Layout.GATHERED, 7 / 8, 1),
        (Layout.GATHERED_BOTH, 63 / 64, 2),
    ):
        cost = layout_cost(layout, asked)
        assert cost.moved == pytest.approx(matrices * arriving)
        assert cost.moving_seconds + cost.waiting_seconds == pytest.approx(matrices * arriving / (links * 50e9))
        assert cost.compute_seconds == pytest.approx(counts.flops(8, 2_048) / (SHARE_OF_PEAK * 197e12))
    assert tensor_wins_below(counts, 8) == pytest.approx(2 * counts.block_values / (4 * 8 * 896 * 4))


def test_what_fits_whole_is_replicated_and_what_does_not_is_gathered() -> None:
    small = choose_layout(request(Qwen2Config.qwen2_5_0_5b()))
    assert small.layout is Layout.REPLICATED and "fit whole" in small.reason and small.cost.moved == 0
    large = choose_layout(request(Qwen2Config.qwen2_5_7b()))
    assert large.layout is Layout.GATHERED and "hides behind computing" in large.reason
    assert not next(cost for cost in large.costs if cost.name == "replicated").fits
    # Without a model axis there is `data` to cut over.
    assert choose_layout(request(Qwen2Config.qwen2_5_7b(), model=1)).layout is Layout.GATHERED_BOTH


def test_matrices_that_do_not_divide_are_counted_as_they_are_stored() -> None:
    """A vocabulary with one more token, as fine-tuned models have it: 7 places of `model` and 49 of both."""
    config = replace(Qwen2Config.qwen2_5_7b(), vocab_size=152_065)
    counts = counts_of(config, 24)
    asked = Request(counts, V5E, 8, 8, 8, 2_048, 0)
    mesh = AbstractMesh((8, 8), ("data", "model"))
    structure = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: PORT.structure(config, 24, "bfloat16"))))
    for layout in Layout:
        specs = jax.tree.leaves(parameter_specs(structure, mesh, layout), is_leaf=lambda v: isinstance(v, P))
        kept = sum(
            value.size
            * 2
            / math.prod(8 for entry in spec if entry for _ in ([entry] if entry in ("model",) else entry))
            for value, spec in zip(jax.tree.leaves(structure), specs, strict=True)
        )
        assert layout_cost(layout, asked).stored == pytest.approx(kept), layout
    embedding = 2 * 152_065 * 3_584
    blocks = 2 * 24 * counts.block_values
    assert layout_cost(Layout.GATHERED, asked).moved == pytest.approx(blocks * 7 / 8)
    assert layout_cost(Layout.GATHERED, asked).stored > embedding


def test_a_model_that_is_too_large_for_one_axis_is_cut_over_both() -> None:
    config = replace(
        Qwen2Config.qwen2_5_14b(), num_hidden_layers=240
    )  # 72 billion parameters in bfloat16, 8 ways: 18 GB
    decision = choose_layout(request(config, rows=1))
    assert decision.layout is Layout.GATHERED_BOTH
    none = choose_layout(request(config, rows=64))
    assert none.layout is Layout.GATHERED_BOTH and "none fits" in none.reason and not none.cost.fits


def test_tensor_sharding_is_counted_and_says_why_it_is_not_offered() -> None:
    for config, words in (
        (Qwen2Config.qwen2_5_0_5b(), "14 heads and 2 key/value heads"),
        (Qwen2Config.llama2_7b(), "rows"),
    ):
        decision = choose_layout(request(config))
        tensor = next(cost for cost in decision.costs if cost.name == TENSOR)
        assert tensor.refused and words in tensor.refused and "activations would cross devices" in tensor.refused
    asked = request(Qwen2Config.qwen2_5_7b())
    below = tensor_wins_below(asked.counts, 8)
    assert 500 < below < 2_000  # tokens a device; slabs have up to 16,384


# ------------------------------------------------------------------------------------- carried out

WORKER = """
import json, sys
import jax, numpy as np
from flax import nnx
from jax_extract.devices.mesh import make_mesh
from jax_extract.devices.sharding import Layout, named, parameter_specs
from jax_extract.extraction.program import capture_function, slab_inputs
from jax_extract.inputs.planning.slabs import SlabShape
from models.capture_plan import CapturePlan
from models.layers import Numerics, Rotary
from models.positions import Positions
from models.qwen2_jax_with_hooks import PORT, Qwen2Config

# 8 places divide the embedding and d_model; 4, not 8, divide gate_up; neither divides qkv.
config = Qwen2Config(64, 24, 18, 3, 3, 1, 6, Rotary(1e4))
plan = CapturePlan((("after_block", (0, 2)), ("ffn_gate", (1,))), Positions.parse("all"))
structure = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: PORT.structure(config, 3, "float32"))))
random = np.random.default_rng(0)
values = jax.tree.map(lambda s: random.normal(0, 0.3, s.shape).astype(np.float32), structure)
mesh = make_mesh((2, 4))
shape = SlabShape(16, 1, 1)
tokens, lengths = (jax.device_put(v, s.sharding) for v, s in zip(
    (random.integers(0, 64, (8, 16)).astype(np.int32), np.full((8, 1), 16, np.int32)), slab_inputs(mesh, shape)))
facts = {}
for layout in Layout:
    specs = parameter_specs(structure, mesh, layout)
    params = jax.tree.map(lambda v, s: jax.device_put(v, named(mesh, s)), values, specs)
    rows = capture_function(PORT, config, plan, mesh, Numerics(), specs)(params, tokens, lengths, ())
    facts[layout.value] = {
        "rows": {hook: np.asarray(array).tobytes().hex() for hook, array in rows.items()},
        "pieces": {jax.tree_util.keystr(path): v.size // v.addressable_shards[0].data.size
                   for path, v in jax.tree_util.tree_leaves_with_path(params)},
    }
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def carried_out() -> dict[str, Any]:
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WORKER],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4_000:]
    return json.loads(done.stdout)


def test_every_layout_gives_byte_identical_rows(carried_out: dict[str, Any]) -> None:
    rows = [facts["rows"] for facts in carried_out.values()]
    assert len(rows) == len(Layout) and rows[0] == rows[1] == rows[2]
    assert jnp.any(jnp.frombuffer(bytes.fromhex(rows[0]["after_block"]), jnp.float32) != 0)


def test_every_layout_stores_the_pieces_that_divide(carried_out: dict[str, Any]) -> None:
    def pieces(layout: Layout) -> dict[str, int]:
        found = carried_out[layout.value]["pieces"]
        return {name: found[f"['{name}']"] if name == "embedding" else found[f"['blocks']['{name}']"] for name in names}

    names = ("embedding", "attention_output", "gate_up", "qkv", "attention_norm")
    assert set(pieces(Layout.REPLICATED).values()) == {1}
    assert pieces(Layout.GATHERED) == dict(zip(names, (4, 4, 4, 1, 1), strict=True))
    assert pieces(Layout.GATHERED_BOTH) == dict(zip(names, (8, 8, 4, 1, 1), strict=True))


# ----------------------------------------------------------------------------------------- in an extraction

EXTRACTION = """
import sys
from pathlib import Path
from jax_extract.devices.chips import Chip
from jax_extract.extraction import jax_backend
from jax_extract.weights.load import Weights
from small_run import run_here

model, tasks, out = map(Path, sys.argv[1:])
laid_out, load = [], Weights.load

def noted(self, mesh, dtype, layout):
    laid_out.append(layout.value)
    return load(self, mesh, dtype, layout)

Weights.load = noted
asked = {"positions": "all", "batch_size": 2, "mesh_shape": "2,4", "layers_to_extract": (5, 11)}
run_here(model, tasks, out / "unknown", **asked)
for name, memory in {"large": 16e9, "small": 1e5}.items():
    jax_backend.CHIPS = {"cpu": Chip("made up", 197e12, memory, 819e9, 50e9)}
    run_here(model, tasks, out / name, **asked)
print(*laid_out)
"""


def test_an_extraction_stores_parameters_as_was_decided_and_writes_the_same_shards(tmp_path: Path) -> None:
    model, tasks = make_model(tmp_path / "model"), write_jsonl(tmp_path / "in.jsonl", range(20, 60))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", EXTRACTION, str(model), str(tasks), str(tmp_path)],
        env=environment({"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4_000:]
    assert done.stdout.split() == ["replicated", "replicated", "gathered_both"]
    assert len(shards(tmp_path / "unknown")) > 2
    assert shards(tmp_path / "unknown") == shards(tmp_path / "large") == shards(tmp_path / "small")


def told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> str:
    """What an extraction with --explain says, from the layout on."""
    model, tasks = make_model(tmp_path / "model"), write_jsonl(tmp_path / "in.jsonl", [20, 30])
    config = ExtractConfig(
        model_path=str(model), tasks_file=str(tasks), activations_dir=str(tmp_path / "out"), explain=True
    )
    extract_to_directory(config, Terminal())
    return whole_lines(capsys.readouterr().out).partition("\nlayout")[2]


def test_an_extraction_explains_its_layout(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax_backend, "CHIPS", {device_kind(): V5E})
    said = told(capsys, tmp_path)
    assert "replicated: the parameters fit whole, and nothing has to move" in said
    assert "stored" in said and "at 50.0% of the peak" in said


def test_an_extraction_on_devices_of_which_nothing_is_known_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = told(capsys, tmp_path)
    assert (
        "replicated: the devices of a process share one copy" in said
        and f"this is {device_kind()} " in said
        and "jax-extract compile --explain" in said
    )
