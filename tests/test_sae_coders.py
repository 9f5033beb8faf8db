"""Transcoders and crosscoders: their steps against the same losses written plainly in torch, and from a run to folders.

Also rows that an iterator gives: each once, in their order, and a training that is gone on from.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sae_cases import D_IN, D_SAE, RATE, rows
from small_run import make_model, run_here, write_jsonl

from jax_extract import SparseAutoencoder, open_activations, train_saes
from jax_extract.errors import UserError
from jax_extract.sae.architecture import Architecture
from jax_extract.sae.folder import config_of, folded, with_threshold
from jax_extract.sae.gradients import Knobs, step_of
from jax_extract.sae.parameters import first_parameters
from jax_extract.sae.sources import HeldOut
from jax_extract.sae.sources_iterator import IteratorSource
from jax_extract.sae.step import FREE, Choice, Schedule, State, train_step

LAYERS, WIDTH = 3, 16
TANH: dict[str, Any] = {"sparsity_loss": "tanh", "ste_to_input": True, "bandwidth": 0.5}
CODERS = {
    "transcoder, standard": Architecture("standard", D_IN, 16, D_SAE, centred=False),
    "transcoder, batchtopk": Architecture("batchtopk", D_IN, 16, D_SAE, centred=False),
    "transcoder, jumprelu": Architecture("jumprelu", D_IN, D_IN, D_SAE, centred=False),
    "crosscoder, standard": Architecture("standard", 24, 24, D_SAE, centred=False, layers=LAYERS),
    "crosscoder, batchtopk": Architecture("batchtopk", 24, 24, D_SAE, centred=False, layers=LAYERS),
    "crosscoder, topk": Architecture("topk", 24, 24, D_SAE, k=5, centred=False, layers=LAYERS),
    "crosscoder, gated": Architecture("gated", 24, 24, D_SAE, centred=False, layers=LAYERS),
    "crosscoder, jumprelu": Architecture("jumprelu", 24, 24, D_SAE, centred=False, layers=LAYERS, **TANH),
}


def weights(architecture: Architecture) -> dict[str, np.ndarray]:
    """None as it begins, so that nothing is symmetric or zero."""
    random = np.random.default_rng(3)
    return {
        name: value + 0.05 * random.standard_normal(value.shape).astype(np.float32)
        for name, value in first_parameters(architecture, 0).items()
    }


def by_torch(
    a: Architecture, params: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray, k: float, factor: float
) -> Any:
    """The loss and its gradients in float64, by torch; of no dead latents."""
    import torch

    p = {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in params.items()}
    x, y = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    norms = p["W_dec"].reshape(a.d_sae, a.layers, -1).norm(dim=2).sum(dim=1)
    z, extra = x @ p["W_enc"], 0.0
    if a.name == "gated":
        gate = z + p["b_gate"]
        f = (gate > 0) * torch.relu(z * torch.exp(p["r_mag"]) + p["b_mag"])
        q = torch.relu(gate)
        extra = factor * (q * norms).sum(1).mean() + ((q @ p["W_dec"] + p["b_dec"] - y) ** 2).sum(1).mean()
    elif a.name == "standard":
        f = torch.relu(z + p["b_enc"])
        extra = factor * (f * norms).sum(1).mean()
    elif a.name == "jumprelu":
        f = jump_relu(z + p["b_enc"], p["threshold"], a)
        if a.sparsity_loss == "tanh":
            extra = factor * torch.tanh(a.tanh_scale * f * norms).sum(1).mean()
        else:
            extra = factor * steps(z + p["b_enc"], p["threshold"], a).sum(1).mean()
    else:
        pre = torch.relu(z + p["b_enc"])
        order = (pre * norms).detach()
        if a.name == "topk":
            least = order.topk(a.k, dim=1).values[:, -1:]
        else:
            least = order.flatten().topk(int(k * len(x))).values[-1]
        f = pre * (order >= least)
    loss = ((f @ p["W_dec"] + p["b_dec"] - y) ** 2).sum(1).mean() + extra
    loss.backward()
    return float(loss.detach()), {name: value.grad.numpy() for name, value in p.items()}


def jump_relu(pre: Any, threshold: Any, a: Architecture) -> Any:
    """pre where it is above the threshold, with the estimator of Rajamanoharan et al. 2024, eq. 11."""
    import torch

    class JumpReLU(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, pre: Any, threshold: Any) -> Any:
            ctx.save_for_backward(pre, threshold)
            return pre * (pre > threshold)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            pre, threshold = ctx.saved_tensors
            near = ((pre - threshold).abs() < a.bandwidth / 2).double() * (threshold / a.bandwidth)
            of_input = (pre > threshold) * gradient + (near * gradient if a.ste_to_input else 0)
            return of_input, -(near * gradient).sum(0)

    return JumpReLU.apply(pre, threshold)


def steps(pre: Any, threshold: Any, a: Architecture) -> Any:
    """1 where pre is above the threshold, with the estimator of eq. 12."""
    import torch

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, pre: Any, threshold: Any) -> Any:
            ctx.save_for_backward(pre, threshold)
            return (pre > threshold).double()

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            pre, threshold = ctx.saved_tensors
            near = ((pre - threshold).abs() < a.bandwidth / 2).double() / a.bandwidth
            return None, -(near * gradient).sum(0)

    return Step.apply(pre, threshold)


@pytest.mark.parametrize("architecture", CODERS.values(), ids=list(CODERS))
def test_losses_and_gradients_are_those_of_torch(architecture: Architecture) -> None:
    params, k, factor = weights(architecture), 6.0, 0.3
    if "threshold" in params:
        params["threshold"] = np.abs(params["threshold"]) + np.float32(0.1)
    [x] = rows(1)
    [y] = rows(1, seed=1)[:, :, : architecture.d_out] if architecture.is_transcoder else [x]
    loss, gradients = by_torch(architecture, params, x, y, k, factor)
    knobs = Knobs(jnp.float32(k), jnp.float32(factor))
    step = jax.jit(partial(step_of, architecture))
    made = step(params, jnp.asarray(x), jnp.asarray(y), knobs, jnp.zeros(D_SAE, bool), jnp.float32(0))
    assert float(made.loss) == pytest.approx(loss, rel=1e-5)
    for name, expected in gradients.items():
        assert np.linalg.norm(np.asarray(made.gradients[name]) - expected) <= 1e-5 * np.linalg.norm(expected), name


def test_a_crosscoder_sees_all_layers_each_in_its_own_scale() -> None:
    """A step on rows of three layers is the step of an SAE's loss on scaled rows that stand side by side."""
    architecture = CODERS["crosscoder, batchtopk"]
    [x] = rows(1)
    layers, scales = x.reshape(len(x), LAYERS, -1), np.array([0.5, 1.0, 2.0], np.float32)
    f, whole = jnp.float32, jnp.int32(FREE)
    choice = Choice(jnp.int32(0), jnp.int32(0), jnp.asarray(scales), f(6), f(0), f(RATE), whole, whole)
    _, measured, made = train_step(architecture, Schedule(10), State.start(weights(architecture)), choice, layers)
    side_by_side = (layers * scales[:, None]).reshape(len(x), -1)
    loss, gradients = by_torch(architecture, weights(architecture), side_by_side, side_by_side, 6, 0)
    assert float(measured.loss) == pytest.approx(loss, rel=1e-5)
    for name, expected in gradients.items():
        assert np.linalg.norm(np.asarray(made.gradients[name]) - expected) <= 1e-5 * np.linalg.norm(expected), name


@pytest.mark.parametrize("architecture", CODERS.values(), ids=list(CODERS))
def test_what_is_stored_takes_rows_as_they_are_and_saelens_agrees(architecture: Architecture, tmp_path: Path) -> None:
    """Scales of layers are folded in, so that the same latents are chosen; and SAELens loads what it has a name for."""
    from jax_extract.sae.folder import write

    if architecture.is_transcoder and architecture.name not in ("standard", "jumprelu", "batchtopk"):
        pytest.skip("SAELens has no name for it")
    params = weights(architecture)
    scale_in = np.array([0.5, 1.5, 0.25]) if architecture.layers > 1 else np.array([0.37])
    scale_out = scale_in if architecture.layers > 1 else np.array([2.5])
    of_in, of_out = (
        np.repeat(scale_in, D_IN // len(scale_in)),
        np.repeat(scale_out, architecture.d_out // len(scale_out)),
    )
    [scaled] = rows(1)
    norms = np.linalg.norm(params["W_dec"].reshape(D_SAE, architecture.layers, -1), axis=2).sum(axis=1)
    pre = scaled @ params["W_enc"] + params.get("b_enc", 0)
    threshold = float(np.quantile(pre * norms, 0.9))
    tensors = folded(architecture, params, scale_in, scale_out)
    f = np.maximum(pre, 0)
    if architecture.name == "batchtopk":
        tensors = with_threshold(tensors, threshold / scale_out.mean())
        f = f * (pre * norms > threshold)
    elif architecture.name == "topk":
        f = f * (pre * norms >= np.sort(pre * norms, axis=1)[:, -5:-4])
    elif architecture.name == "jumprelu":
        f = f * (pre > np.maximum(params["threshold"], 0))
    elif architecture.name == "gated":
        magnitude = scaled @ params["W_enc"] * np.exp(params["r_mag"]) + params["b_mag"]
        f = np.maximum(magnitude, 0) * (scaled @ params["W_enc"] + params["b_gate"] > 0)
    expected = (f @ params["W_dec"] + params["b_dec"]) / of_out
    (tmp_path / "sae").mkdir()
    write(tmp_path / "sae", config_of(architecture, {"model_name": None, "hook_name": None}), tensors)
    sae = SparseAutoencoder.open(tmp_path / "sae")
    x = (scaled / of_in).astype(np.float32)
    assert np.linalg.norm(np.asarray(sae(x)) - expected) <= 1e-5 * np.linalg.norm(expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from sae_lens import SAE

        theirs = SAE.load_from_disk(str(tmp_path / "sae"))
        got = theirs.decode(theirs.encode(torch.from_numpy(x))).detach().numpy()
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)


# ------------------------------------------------------------------------------------------ from a run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hook points at two layers."""
    root = tmp_path_factory.mktemp("run")
    inputs = write_jsonl(root / "in.jsonl", np.random.default_rng(0).integers(20, 60, 120).tolist())
    model = make_model(root / "model", layers=3, hidden=WIDTH)
    hooks = ("after_attention", "ffn_out", "ffn_hidden")
    run_here(model, inputs, root / "act", layers_to_extract=(0, 2), hook_points=hooks, positions="all")
    return root / "act"


SMALL: dict[str, Any] = {
    "expansion_factor": 4,
    "k": 4,
    "batch_size": 256,
    "training_rows": 30 * 256,
    "learning_rate": 3e-3,
    "baselines": "none",
    "silent": True,
}


def test_transcoders_of_a_run_map_one_hook_point_to_the_other(run: Path, tmp_path: Path) -> None:
    saes = train_saes(run, tmp_path / "saes", hook="after_attention", target_hook="ffn_out", **SMALL)
    assert list(saes) == [f"layer_{i}_after_attention_to_ffn_out_batchtopk_d64_k4_seed0" for i in (0, 2)]
    held_out, opened = HeldOut(0.05, 0), open_activations(run)
    chosen = [i for i in range(len(opened)) if held_out(np.array([i]))[0]]
    summary = json.loads((tmp_path / "saes" / "sae_training_summary.json").read_text())
    for layer, sae, said in zip((0, 2), saes.values(), summary["saes"], strict=True):
        assert sae.config["architecture"] == "jumprelu_transcoder"
        assert sae.metadata["hook_name"] == f"blocks.{layer}.hook_resid_mid"
        assert sae.metadata["hook_name_out"] == f"blocks.{layer}.hook_mlp_out"
        x, y = (
            np.concatenate([opened[i].get(layer, hook)[1:] for i in chosen]).astype(np.float64)
            for hook in ("after_attention", "ffn_out")
        )
        error = ((np.asarray(sae(x)) - y) ** 2).sum()
        expected = 1 - error / ((y - y.mean(axis=0)) ** 2).sum()
        assert said["metrics"]["explained_variance"] == pytest.approx(expected, abs=1e-4)
        assert said["target_hook_point"] == "ffn_out" and expected > 0.2


def test_a_crosscoder_of_a_run_has_all_layers(run: Path, tmp_path: Path) -> None:
    [(name, sae)] = train_saes(run, tmp_path / "saes", hook="ffn_out", crosscoder=True, **SMALL).items()
    assert name == "layers_0_2_ffn_out_crosscoder_batchtopk_d64_k4_seed0"
    [said] = json.loads((tmp_path / "saes" / "sae_training_summary.json").read_text())["saes"]
    assert said["layer"] == [0, 2] and len(said["input_scale"]) == 2 and (sae.d_in, sae.d_sae) == (2 * WIDTH, 64)
    opened = open_activations(run)
    both = np.stack([opened.get(layer, "ffn_out") for layer in (0, 2)], axis=1)
    np.testing.assert_array_equal(sae.encode(both[:50]), sae.encode(both[:50].reshape(50, -1)))
    for value in said["metrics"]["explained_variance_by_layer"]:
        assert value > 0.2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hook": "after_attention", "target_hook": "ffn_hidden"}, "give those of one width"),
        ({"hook": "after_attention", "target_hook": "query"}, "this run holds no 'query'"),
        ({"hook": "ffn_out", "target_hook": "ffn_out", "crosscoder": True}, "so leave one out"),
        ({"hook": "ffn_out", "layers": 2, "crosscoder": True}, "--crosscoder is of several layers, and there is one"),
        (
            {"hook": "after_attention", "target_hook": "ffn_out", "architecture": "gated"},
            "SAELens has no transcoder of the architecture 'gated'",
        ),
    ],
)
def test_mistakes_are_told(options: dict[str, Any], said: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        train_saes(run, tmp_path / "saes", **{**SMALL, **options})
    assert said in str(refusal.value)
    assert not (tmp_path / "saes").exists()


# --------------------------------------------------------------------------------------- from an iterator


def numbered(count: int) -> Iterator[np.ndarray]:
    """Batches of odd lengths, of which row i says i."""
    for start in range(0, count, 37):
        numbers = np.arange(start, min(start + 37, count), dtype=np.float32)
        yield np.stack([numbers, np.ones_like(numbers)], axis=1)


def test_every_row_of_an_iterator_comes_once_in_its_order_or_is_held_out() -> None:
    source = IteratorSource(numbered(80_000), 100, HeldOut(0.05, 0), 70_000)
    aside = source.some(True, 1 << 20)[0][:, 0, 0].astype(int)
    reader = source.reader()
    got = np.concatenate([reader.read() for _ in range(700)])[:, 0, 0].astype(int)
    rest = [i for i in range(80_000) if i not in set(aside.tolist())]
    assert len(aside) > 2_000 and got.tolist() == rest[:70_000]
    state = reader.get_state()
    following = reader.read()
    other = IteratorSource(numbered(80_000), 100, HeldOut(0.05, 0), 70_000).reader()
    other.set_state(state)
    np.testing.assert_array_equal(other.read(), following)


def test_batches_come_as_data_loaders_give_them_and_all_of_one_shape() -> None:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(torch.ones(3_000, 5)), batch_size=50)  # gives lists of one tensor
    assert IteratorSource(loader, 100, HeldOut(0.05, 0), 2_000).reader().read().shape == (100, 1, 5)
    mixed = [np.ones((10, 5), np.float32), np.ones((10, 6), np.float32)]
    with pytest.raises(UserError, match=r"has rows of \[1, 6\], and those before of \[1, 5\]"):
        IteratorSource(mixed, 100, HeldOut(0.05, 0), 2_000)


def test_an_iterator_that_ends_says_so_and_a_list_begins_anew() -> None:
    held_out = HeldOut(0.05, 0)
    with pytest.raises(UserError, match=r"the iterator ended after [\d,]+ rows, and training_rows asks for 9,000"):
        reader = IteratorSource(numbered(5_000), 100, held_out, 9_000).reader()
        for _ in range(90):
            reader.read()
    batches = list(numbered(5_000))
    source = IteratorSource(batches, 100, held_out, 9_000)
    aside = set(source.some(True, 1 << 20)[0][:, 0, 0].tolist())
    reader = source.reader()
    got = np.concatenate([reader.read() for _ in range(90)])[:, 0, 0]
    once = 5_000 - len(aside)
    assert not aside & set(got.tolist()) and got[:5].tolist() == got[once : once + 5].tolist()


def test_saes_are_trained_on_tensors_of_an_iterator_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr("jax_extract.sae.sources_iterator._FIRST", 2_000)
    directions = np.random.default_rng(1).standard_normal((30, WIDTH))

    def batches(many: int = 60, broken: int | None = None) -> Iterator[Any]:
        random = np.random.default_rng(0)
        for number in range(many):
            if number == broken:
                raise OSError("the connection is lost")
            there = np.maximum(random.standard_normal((200, 30)) - 1, 0)
            yield torch.tensor(there @ directions, dtype=torch.bfloat16)

    options = {**SMALL, "save_steps": 10}
    [whole] = train_saes(batches(), tmp_path / "whole", **options).values()
    with pytest.raises(OSError, match="the connection is lost"):
        train_saes(batches(broken=35), tmp_path / "cut", **options)
    assert (tmp_path / "cut" / "checkpoint-20").is_dir()
    [gone_on] = train_saes(batches(), tmp_path / "cut", **options).values()
    np.testing.assert_array_equal(whole.params["W_dec"], gone_on.params["W_dec"])
    with pytest.raises(UserError, match="training_rows is not given"):
        train_saes(batches(), tmp_path / "other", k=4, batch_size=256)
    with pytest.raises(UserError, match="gives its rows in another order the second time"):
        train_saes(Shuffling(list(batches(20))), tmp_path / "other", **options)


class Shuffling(list[Any]):
    """A list that begins elsewhere the second time."""

    times = 0

    def __iter__(self) -> Iterator[Any]:
        self.times += 1
        return reversed(list(super().__iter__())) if self.times > 1 else super().__iter__()
