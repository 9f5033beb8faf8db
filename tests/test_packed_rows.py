"""A row may hold hundreds of samples, one behind the other, and each is computed and kept as if it were alone.

Guarded: where tokens lie in their samples, and what is kept of them, against NumPy, with few samples a row and with
many; every hook point of a row of 200 samples against Hugging Face, one sample at a time; splash attention, interpreted
on CPU, of rows with other numbers of samples, with a window and a soft cap; how many pairs it computes, as its own mask
has them; what is told to the plan; and captures that travel: every device has them all, and the same bytes.
"""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask, splash_attention_mask_info
from small_run import run_cli
from test_accelerated_attention import plain, random_heads, scaled, worst
from test_parity import assert_parity, captured_in_one_slab
from tiny_models import random_ids, reference, tiny_folder, tiny_model

from jax_extract.devices.platform import platform_defaults
from jax_extract.extraction import jax_backend
from jax_extract.extraction.backend import holds_several_a_row
from jax_extract.extraction.program import MOST_TRAVELLING_BYTES, rows_travel
from jax_extract.inputs.planning.slabs import PlanSettings
from jax_extract.weights.open_model import OpenModel
from models import accelerated_attention, packing
from models.accelerated_attention import attention_block, computed_pairs, kernel_attention, seen_pairs
from models.capture_plan import CapturePlan
from models.layers import Numerics
from models.packing import Packing
from models.positions import Positions
from models.qwen2_jax_with_hooks import PORT, Qwen2Config


def random_lengths(rows: int, samples: int, tokens: int) -> np.ndarray:
    """int32 [rows, samples]: other numbers of samples in each row; the first is full and has as many as may be."""
    random = np.random.default_rng(samples)
    lengths = np.zeros((rows, samples), np.int32)
    for row, counts in enumerate(lengths):
        number = samples if row == 0 else int(random.integers(1, samples + 1))
        end = tokens if row == 0 else int(random.integers(number, tokens + 1))
        cuts = np.sort(random.choice(np.arange(1, end), number - 1, replace=False))
        counts[:number] = np.diff([0, *cuts, end])
    return lengths


def spans(counts: np.ndarray) -> list[slice]:
    """Columns of each sample of a row."""
    ends = itertools.accumulate(map(int, counts[counts > 0]), initial=0)
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


@pytest.mark.parametrize(("samples", "tokens"), [(16, 30), (90, 200)])
def test_a_token_knows_its_place_in_its_sample(samples: int, tokens: int) -> None:
    lengths = random_lengths(3, samples, tokens)
    places = np.asarray(jax.jit(lambda given: Packing(given, tokens).positions)(lengths))
    for row, counts in enumerate(lengths):
        wanted = [np.arange(n) for n in counts] + [np.zeros(tokens - counts.sum(), int)]
        np.testing.assert_array_equal(places[row], np.concatenate(wanted))


@pytest.mark.parametrize("text", ["last", "from:3", "first:3", "every:4", "at:0,2,9"])
def test_what_is_kept_of_many_samples_is_what_is_kept_of_each(text: str) -> None:
    positions, tokens = Positions.parse(text), 200
    lengths = random_lengths(3, 90, tokens)
    values = np.arange(3 * tokens, dtype=np.float32).reshape(3, tokens, 1)

    def kept(x: Any, given: Any) -> Any:
        packing = Packing(given, tokens)
        return positions.select(x, packing, positions.columns(packing))

    rows = np.asarray(jax.jit(kept)(values, lengths))
    assert rows.shape == (3, positions.slots(tokens, 90), 1)
    for row, counts in enumerate(lengths):
        wanted = [values[row, span][positions.of(span.stop - span.start)] for span in spans(counts)]
        np.testing.assert_array_equal(rows[row, : sum(map(len, wanted))], np.concatenate(wanted))


@pytest.mark.parametrize("owned_at_once", [0, packing._OWNED_AT_ONCE])
def test_means_leave_out_the_first_tokens_of_each_sample_and_samples_without_others(
    owned_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First tokens are a million times as large, so that a sum which had them in it would be nothing but them."""
    monkeypatch.setattr(packing, "_OWNED_AT_ONCE", owned_at_once)
    positions, tokens = Positions.parse("mean_from:3"), 700
    lengths = random_lengths(2, 90, tokens)
    lengths[1, :6] = [3, 400, 1, 2, 40, 4]
    lengths[1, 6:] = 0
    values = np.random.default_rng(0).normal(size=(2, tokens, 7)).astype(np.float32)
    for row, counts in enumerate(lengths):
        for span in spans(counts):
            values[row, span][:3] *= 1e6

    def kept(x: Any, given: Any) -> Any:
        packing = Packing(given, tokens)
        return positions.select(x, packing, positions.columns(packing))

    rows = np.asarray(jax.jit(kept)(values, lengths))
    for row, counts in enumerate(lengths):
        long = [span for span in spans(counts) if span.stop - span.start > 3]
        assert len(long) < (counts > 0).sum(), "some give no row"
        wanted = [values[row, span][3:].astype(np.float64).mean(axis=0) for span in long]
        np.testing.assert_allclose(rows[row, : len(wanted)], wanted, atol=2e-6)


def test_sums_over_many_samples_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_OWNED_AT_ONCE", 0)
    samples, tokens = 90, 700  # in the first row some span blocks of 128, and in the second one fills many
    lengths = random_lengths(2, samples, tokens)
    lengths[1] = [3, 600, 40, *[0] * (samples - 3)]
    values = np.random.default_rng(0).normal(size=(2, tokens, 7)).astype(np.float32)
    found = np.asarray(jax.jit(lambda x, given: Packing(given, tokens).sums(x))(values, lengths))
    for row, counts in enumerate(lengths):
        wanted = [values[row, span].astype(np.float64).sum(axis=0) for span in spans(counts)]
        np.testing.assert_allclose(found[row, : len(wanted)], wanted, atol=2e-5)
        assert not found[row, len(wanted) :].any()


def test_sums_over_very_many_samples_take_less_memory_than_who_owns_which_column() -> None:
    lengths, values = (jax.ShapeDtypeStruct(shape, kind) for shape, kind in (
        ((1, 1_365), jnp.int32), ((1, 16_384, 64), jnp.float32)
    ))  # fmt: skip
    compiled = jax.jit(lambda x, given: Packing(given, 16_384).sums(x)).lower(values, lengths).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1_365 * 16_384 * 4 / 4


def test_every_hook_point_of_a_row_of_200_samples_is_what_hugging_face_computes_of_each_alone() -> None:
    sequences = random_ids(np.random.default_rng(0).integers(1, 11, 200))
    got = captured_in_one_slab(tiny_folder("long"), sequences, packed=True)
    for rows, sequence in zip(got, sequences, strict=True):
        assert_parity(rows, reference(tiny_model("long"), sequence), f"a sample of {len(sequence)} tokens")


def test_splash_attention_of_rows_with_other_numbers_of_samples_mixes_what_a_plain_softmax_mixes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interpreted = partial(accelerated_attention.splash_attention, interpret=True)
    monkeypatch.setattr(accelerated_attention, "splash_attention", interpreted)
    monkeypatch.setattr(accelerated_attention, "LARGEST_BLOCK", 128)
    tokens, window, soft_cap = 250, 70, 0.5  # the second of its blocks of 128 is padded
    lengths = np.array([[120, 9, 1, 1, 100, 19], [3, 200, 0, 0, 0, 0]], np.int32)
    positions = Packing(jnp.asarray(lengths), tokens).positions
    heads, numerics = random_heads(2, tokens), Numerics("float32", "splash")
    got = kernel_attention(*scaled(*heads), positions=positions, window=window, numerics=numerics, soft_cap=soft_cap)
    back = np.arange(tokens)[:, None] - np.arange(tokens)[None, :]
    visible = (back >= 0) & (back <= np.minimum(positions, window - 1)[:, :, None])
    assert worst(got, plain(*heads, visible, soft_cap)) < 2e-6


@pytest.mark.parametrize("window", [None, 100, 700])
@pytest.mark.parametrize("tokens", [128, 640, 2_000, 2_048])
def test_the_pairs_that_are_counted_are_those_of_the_blocks_that_the_kernel_does_not_skip(
    tokens: int, window: int | None
) -> None:
    block, padded = attention_block(tokens), -(-tokens // 128) * 128
    assert padded % block == 0
    masks = splash_attention_mask
    mask = (
        masks.CausalMask((padded, padded)) if window is None else masks.LocalMask((padded, padded), (window - 1, 0), 0)
    )
    info, _ = splash_attention_mask_info.process_mask(masks.MultiHeadMask([mask]), (block, block), shrink_grid=False)
    assert info.block_mask is not None
    assert computed_pairs(tokens, block, window) == np.count_nonzero(info.block_mask) * block * block


@pytest.mark.parametrize("window", [None, 3])
def test_the_pairs_that_are_seen_are_counted_one_by_one(window: int | None) -> None:
    lengths = np.array([[5, 1, 3], [2, 0, 0]])
    seen = sum(min(t + 1, window or t + 1) for length in lengths.flat for t in range(length))
    assert seen_pairs(lengths, window) == seen
    assert computed_pairs(9, 1, window) == seen_pairs(np.array([9]), window), "blocks of one pair are the mask itself"


def test_a_backend_says_what_a_pair_costs_where_attention_computes_pairs_of_two_samples() -> None:
    config = Qwen2Config.qwen2_5_0_5b()
    model = OpenModel(cast("Any", None), PORT, config)
    plan = CapturePlan((("after_block", (3,)),), Positions.parse("last"))
    here = jax_backend.JaxBackend.open("1,1", "bfloat16")
    assert here.pair_cost(model, plan) == 0 and here.attention_block == 1
    there = dataclasses.replace(here, numerics=Numerics("bfloat16", "splash"))
    d, ff, keys = 896, 4_864, 128
    of_a_token = d * (d + 2 * keys) + d * d + 3 * d * ff  # q, k, v; o; gate, up, down
    assert there.pair_cost(model, plan) == pytest.approx(2 * d / of_a_token), "a product for the logit, one for the mix"
    assert there.attention_block == attention_block(8_192) == 512
    assert there.pair_cost(model, CapturePlan((("embeddings", ()),), Positions.parse("last"))) == 0


@pytest.mark.parametrize(("name", "samples_a_row"), [("cpu", 0), ("tpu", 0), ("gpu", 1), ("cuda", 1)])
def test_a_row_holds_one_sample_where_attention_cannot_tell_two_apart(
    name: str, samples_a_row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: name)
    found = platform_defaults()
    assert found.samples_a_row == samples_a_row
    assert found.packed == (name == "cpu")


def test_plans_of_before_hold_several_samples_a_row_only_where_they_are_packed() -> None:
    before = PlanSettings(8, 8, 4_096, 16, 512, Positions.parse("last"), 4)
    now = dataclasses.replace(before, version=2)
    assert not holds_several_a_row(before) and holds_several_a_row(now)
    assert holds_several_a_row(dataclasses.replace(before, packed=True))
    assert not holds_several_a_row(dataclasses.replace(before, packed=True, rows=1))
    assert not holds_several_a_row(dataclasses.replace(now, samples_a_row=1))


@pytest.mark.parametrize(("text", "travel"), [
    ("last", True), ("mean", True), ("mean_from:1", True), ("first:4", True), ("at:0,7", True),
    ("every:8", False), ("from:1", False), ("all", False),
])  # fmt: skip
def test_rows_travel_where_they_are_few(text: str, travel: bool) -> None:
    assert rows_travel(Positions.parse(text), MOST_TRAVELLING_BYTES) == travel
    assert not rows_travel(Positions.parse(text), MOST_TRAVELLING_BYTES + 1)


TRAVELLING = """
import sys
import jax, numpy as np
from jax_extract.devices import compilation_cache
from jax_extract.devices.mesh import make_mesh
from jax_extract.extraction.capture import capture_plan
from jax_extract.extraction.program import CaptureProgram
from jax_extract.inputs.planning.slabs import SlabShape
from jax_extract.weights.load import Weights
from jax_extract.weights.open_model import OpenModel
from models.layers import Numerics

compilation_cache.start()
model, mesh, shape = OpenModel.open(sys.argv[1]), make_mesh((2, 2)), SlabShape(24, 2, 4)
plan = capture_plan(model, (0,), ("residual_before", "after_block"), "last", "float32")
params = Weights(model.checkpoint, model.port, model.config, 1).load(mesh, "float32")
random = np.random.default_rng(0)
tokens = random.integers(0, 90, (8, shape.length)).astype(np.int32)
lengths = random.integers(1, 7, (8, shape.samples)).astype(np.int32)
found = []
for travel in (False, True):
    program = CaptureProgram(model.port, model.config, params, plan, mesh, Numerics(), travel)
    captured = program.run(tokens, lengths)
    copies = {str(shard.data.tobytes()) for shard in captured["after_block"].addressable_shards}
    blocks = program.on_host(captured)
    assert sum(values.nbytes for block in blocks for values in block.values()) <= program.bytes_on_host(shape)
    found.append([{site: values.tobytes() for site, values in block.items()} for block in blocks])
    print(len(captured["after_block"].addressable_shards), len(copies), len(blocks))
assert found[0] == found[1]
"""


def test_captures_that_travel_are_the_same_bytes_and_on_every_device(tmp_path: Path) -> None:
    env = {"JAX_NUM_CPU_DEVICES": "4"}
    done = run_cli(str(tiny_folder("qwen2_tied")), cwd=tmp_path, env=env, script=None, code=TRAVELLING)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["4 4 4", "4 1 4"]
