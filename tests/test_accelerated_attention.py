"""The kernels of accelerators mix what a plain softmax over visible keys mixes, and are chosen only where they can.

Guarded: splash attention, interpreted on CPU, against NumPy in float64: grouped heads, padding to whole tiles, a
sliding window, several samples a row; bfloat16 operands within their rounding; cuDNN attention, with XLA in cuDNN's
place; the whole GPU program as far as it goes without a GPU; and what is computed with instead where a kernel would be
wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_run import make_model, write_config

from jax_extract.config import ExtractConfig
from jax_extract.devices.mesh import make_mesh
from jax_extract.devices.sharding import named, parameter_specs
from jax_extract.extraction import jax_backend, prepare
from jax_extract.extraction.program import capture_function, slab_inputs
from jax_extract.inputs.planning.slabs import SlabShape
from models import self_attention
from models.accelerated_attention import attention_backend, cudnn_attention, splash_attention
from models.attention import causal_attention
from models.capture_plan import CapturePlan
from models.layers import Numerics
from models.positions import Positions
from models.qwen2_jax_with_hooks import PORT, Qwen2Config
from models.self_attention import AttentionRule, WithinRows

FLOAT32, BFLOAT16 = Numerics("float32"), Numerics("bfloat16")
GROUPS, PER_GROUP, WIDTH = 2, 2, 16


def random_heads(batch: int, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(tokens)
    shapes = [(batch, tokens, heads, WIDTH) for heads in (GROUPS * PER_GROUP, GROUPS, GROUPS)]
    query, key, value = (random.normal(size=shape).astype(np.float32) for shape in shapes)
    return query, key, value


def plain(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, visible: np.ndarray, soft_cap: float | None = None
) -> np.ndarray:
    """`visible` [b, t, s] -> [b, t, heads * h] in float64."""
    key, value = (np.repeat(x, PER_GROUP, axis=2).astype(np.float64) for x in (key, value))
    logits = np.einsum("bthw,bshw->bhts", query.astype(np.float64), key) * WIDTH**-0.5
    if soft_cap:
        logits = soft_cap * np.tanh(logits / soft_cap)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True)) * visible[:, None]
    mixed = np.einsum("bhts,bshw->bthw", weights / weights.sum(axis=-1, keepdims=True), value)
    return mixed.reshape(*query.shape[:2], -1)


def scaled(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> list[jax.Array]:
    """As attention takes them: queries scaled by the root of a head's width."""
    return [jnp.asarray(query * np.float32(WIDTH**-0.5)), jnp.asarray(key), jnp.asarray(value)]


def worst(got: object, truth: np.ndarray) -> float:
    distance = np.linalg.norm(np.asarray(got, np.float64) - truth, axis=-1)
    return float((distance / np.linalg.norm(truth, axis=-1)).max())


@pytest.mark.parametrize(("tokens", "window", "soft_cap", "numerics", "bound"), [
    (130, None, None, FLOAT32, 2e-6),
    (300, 70, None, FLOAT32, 2e-6),
    (130, None, 0.5, FLOAT32, 2e-6),
    (130, None, None, BFLOAT16, 2e-2),
])  # fmt: skip
def test_splash_attention_mixes_what_a_plain_softmax_mixes(
    tokens: int, window: int | None, soft_cap: float | None, numerics: Numerics, bound: float
) -> None:
    heads = random_heads(1, tokens)
    back = np.arange(tokens)[:, None] - np.arange(tokens)[None, :]
    visible = (back >= 0) & (back < (window or tokens))
    got = splash_attention(*scaled(*heads), numerics=numerics, window=window, soft_cap=soft_cap, interpret=True)
    assert got.shape == (1, tokens, GROUPS * PER_GROUP * WIDTH) and got.dtype == jnp.float32
    assert worst(got, plain(*heads, visible[None], soft_cap)) < bound


def test_samples_in_one_row_do_not_see_each_other_in_splash_attention() -> None:
    tokens = 200
    heads = random_heads(2, tokens)
    segments = np.stack([np.repeat([0, 1, 2], [50, 100, 50]), np.repeat([0, 1, 2], [1, 129, 70])]).astype(np.int32)
    visible = np.tri(tokens, dtype=bool)[None] & (segments[:, :, None] == segments[:, None, :])
    got = splash_attention(*scaled(*heads), numerics=FLOAT32, segments=jnp.asarray(segments), interpret=True)
    assert worst(got, plain(*heads, visible)) < 2e-6


@pytest.mark.parametrize("window", [None, 70])
def test_cudnn_is_asked_for_what_a_plain_softmax_mixes(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    ask = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *heads, implementation, **asked: ask(*heads, **asked, implementation="xla"),
    )
    tokens = 130
    heads = random_heads(2, tokens)
    back = np.arange(tokens)[:, None] - np.arange(tokens)[None, :]
    visible = (back >= 0) & (back < (window or tokens))
    got = cudnn_attention(*scaled(*heads), numerics=FLOAT32, window=window)
    assert got.shape == (2, tokens, GROUPS * PER_GROUP * WIDTH) and got.dtype == jnp.float32
    assert worst(got, plain(*heads, np.broadcast_to(visible, (2, tokens, tokens)))) < 2e-6


def test_the_program_of_a_gpu_is_lowered_with_a_call_of_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What JAX asks a GPU for before it lowers is answered here."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_300)
    config = Qwen2Config.qwen2_5_0_5b()
    plan = CapturePlan((("after_block", (0, 1)),), Positions.parse("all"))
    numerics = Numerics("bfloat16", attention_backend("gpu", BFLOAT16, head_width=config.head_dim).name)
    mesh = make_mesh((1, 1), jax.devices()[:1])
    structure = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: PORT.structure(config, 2, "bfloat16"))))
    specs = parameter_specs(structure, mesh)
    params = jax.tree.map(
        lambda value, spec: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=named(mesh, spec)), structure, specs
    )
    traced = capture_function(PORT, config, plan, mesh, numerics, specs).trace(
        params, *slab_inputs(mesh, SlabShape(256, 2, 1)), ()
    )
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in lowered and "CAUSAL" in lowered


def test_a_kernel_is_chosen_where_it_computes_the_same_and_what_stands_in_for_it_is_explained() -> None:
    assert attention_backend("tpu", BFLOAT16, head_width=64).name == "splash"
    assert attention_backend("tpu", BFLOAT16, head_width=64, samples_a_row=9).name == "splash"
    assert attention_backend("tpu", BFLOAT16, head_width=256, soft_cap=50.0).name == "splash"
    assert attention_backend("gpu", BFLOAT16, head_width=64).name == "cudnn"
    for reason, choice in {
        "no kernel for cpu": attention_backend("cpu", BFLOAT16, head_width=64),
        "rounds products of float32": attention_backend("tpu", FLOAT32, head_width=64),
        "cudnn kernel rounds": attention_backend("gpu", FLOAT32, head_width=64),
        "logits are capped": attention_backend("gpu", BFLOAT16, head_width=64, soft_cap=50.0),
        "several samples": attention_backend("gpu", BFLOAT16, head_width=64, samples_a_row=2),
        "10 wide": attention_backend("tpu", BFLOAT16, head_width=10),
        "256 wide": attention_backend("cuda", BFLOAT16, head_width=256),
    }.items():
        assert choice.name == "blockwise" and reason in choice.reason


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax_backend, "platform_of", lambda _: "gpu")


@pytest.mark.usefixtures("on_a_gpu")
def test_a_packed_run_that_goes_on_elsewhere_does_not_use_a_kernel_that_mixes_samples(tmp_path: Path) -> None:
    config = ExtractConfig(model_path=str(make_model(tmp_path / "model")), tasks_file="in.jsonl", dtype="bfloat16")
    job = prepare.Job.open(config)
    begun = {packed: job.plan_settings(config, {"packed": packed}) for packed in (True, False)}
    assert _backend(job.under(begun[True])).numerics.attention == "blockwise"
    assert _backend(job.under(begun[False])).numerics.attention == "cudnn"


def _backend(job: prepare.Job) -> jax_backend.JaxBackend:
    assert isinstance(job.backend, jax_backend.JaxBackend)
    return job.backend


def test_each_layer_gets_the_kernel_of_its_own_window(monkeypatch: pytest.MonkeyPatch) -> None:
    windows, tokens = (0, 5, 40, 5), 90
    asked: set[int | None] = set()

    def kernel(query: Any, key: Any, value: Any, *, positions: Any, window: int | None, **given: Any) -> Any:
        asked.add(window)
        reach = positions if window is None else jnp.minimum(positions, window - 1)
        return causal_attention(query, key, value, reach=reach, **given)

    monkeypatch.setattr(self_attention, "kernel_attention", kernel)
    heads = random_heads(1, tokens)
    rows = WithinRows(jnp.arange(tokens, dtype=jnp.int32)[None])
    for layer, window in enumerate(windows):
        mixed, _ = rows.attend(
            AttentionRule(windows=windows), jnp.int32(layer), *map(jnp.asarray, heads), Numerics("float32", "splash")
        )
        back = np.arange(tokens)[:, None] - np.arange(tokens)[None, :]
        assert worst(mixed, plain(*heads, ((back >= 0) & (back < (window or tokens)))[None])) < 2e-6
    assert asked == {None, 5, 40}


@pytest.mark.parametrize("deepest", [4, 6])
@pytest.mark.usefixtures("on_a_gpu")
def test_layers_with_and_without_a_window_are_both_computed_by_the_kernel(
    tmp_path: Path, deepest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_300)
    model = make_model(tmp_path / "model")
    write_config(model, use_sliding_window=True, sliding_window=9, max_window_layers=6)
    config = ExtractConfig(model_path=str(model), tasks_file="in.jsonl", dtype="bfloat16", layers_to_extract=(deepest,))
    job = prepare.Job.open(config)
    job = job.under(job.plan_settings(config, {"packed": False}))
    backend = _backend(job)
    assert backend.numerics.attention == "cudnn"
    shapes = backend.weights(job.model, job.plan).shapes(backend.mesh, "bfloat16")
    specs = jax.tree.map(lambda parameter: parameter.sharding.spec, shapes)
    function = capture_function(job.model.port, job.model.config, job.plan, backend.mesh, backend.numerics, specs)
    traced = function.trace(shapes, *slab_inputs(backend.mesh, SlabShape(64, 2, 1)), ())
    assert "cudnn" in traced.lower(lowering_platforms=("cuda",)).as_text()
