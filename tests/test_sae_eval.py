"""`jax-extract sae eval`: metrics by NumPy, intervals by sample, what the model loses by Hugging Face with hooks,
matched seeds, and the front of a sweep.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import make_model, run_cli, run_here, write_jsonl

from jax_extract import SparseAutoencoder, load_model, open_activations, train_saes
from jax_extract.errors import UserError
from jax_extract.plotting.command import plot
from jax_extract.plotting.config import PlotConfig
from jax_extract.sae.evaluation.command import EVALUATION_FILE, sae_eval
from jax_extract.sae.evaluation.config import SaeEvalConfig
from jax_extract.sae.evaluation.intervals import Bootstrap
from jax_extract.sae.evaluation.pareto import front
from jax_extract.sae.evaluation.stability import agreement, bias_checks
from jax_extract.sae.sources import HeldOut
from jax_extract.terminal import Terminal

WIDTH, LAYER = 16, 1


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, act/ with layer 1 of a tiny model, and saes/, two seeds with a baseline each."""
    root = tmp_path_factory.mktemp("eval")
    inputs = write_jsonl(root / "in.jsonl", np.random.default_rng(0).integers(20, 40, 200).tolist())
    model = make_model(root / "model", layers=3, hidden=WIDTH)
    run_here(model, inputs, root / "act", layers_to_extract=(LAYER,), positions="all")
    options: dict[str, Any] = {"expansion_factor": 2, "k": 4, "batch_size": 256, "training_rows": 30 * 256}
    options |= {"seed": [0, 1], "baselines": "frozen_decoder", "learning_rate": 3e-3, "silent": True}
    train_saes(root / "act", root / "saes", **options)
    return root


@pytest.fixture(scope="module")
def found(place: Path) -> dict[str, Any]:
    return sae_eval(SaeEvalConfig((str(place / "saes"),), loss_samples=4, resamples=200), Terminal(silent=True))


def held_out(place: Path) -> list[int]:
    run = open_activations(place / "act")
    chosen = HeldOut(0.05, 0)(np.arange(len(run)))
    return np.flatnonzero(chosen).tolist()


def test_metrics_are_those_of_the_training_and_intervals_hold_them(place: Path, found: dict[str, Any]) -> None:
    """The training measured the same rows: all that were held out."""
    summary = json.loads((place / "saes" / "sae_training_summary.json").read_text())
    assert json.loads((place / "saes" / EVALUATION_FILE).read_text()) == found
    assert found["held_out"] and found["samples"] == len(held_out(place))
    for sae, said in zip(found["saes"], summary["saes"], strict=True):
        assert sae["name"] == said["name"] and sae["rows"] == said["metrics"]["rows"]
        for name, interval in sae["metrics"].items():
            assert interval["value"] == pytest.approx(said["metrics"][name], rel=1e-5)
            assert interval["low"] <= interval["value"] <= interval["high"]
        assert sae["metrics"]["mse"]["low"] < sae["metrics"]["mse"]["high"]
        assert sae["dead"] == pytest.approx(said["metrics"]["dead"])
        assert sum(sae["density"]["latents"]) == round(sae["d_sae"] * (1 - sae["dead"]))


def test_the_model_loses_what_hugging_faces_loses_under_such_a_hook(place: Path, found: dict[str, Any]) -> None:
    """Rows but the first are replaced; cross-entropy and KL over every token that is predicted."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32).eval()
    run = open_activations(place / "act")
    of_run = {sample.sample_id: sample for sample in run.samples()}
    chosen = [run[i] for i in held_out(place)][:4]
    assert found["model"]["samples"] == 4
    name = found["saes"][0]["name"]
    sae = SparseAutoencoder.open(place / "saes" / name)
    rows = np.concatenate([of_run[sample.sample_id].get(LAYER)[1:] for sample in chosen])
    mean = torch.tensor(rows.astype(np.float64).mean(axis=0), dtype=torch.float32)

    def put(kind: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            changed = hidden.clone()
            given = hidden[0, 1:]
            if kind == "sae":
                changed[0, 1:] = torch.tensor(np.array(sae(given.numpy())))
            elif kind != "clean":
                changed[0, 1:] = mean if kind == "mean" else 0
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    sums: dict[str, list[float]] = {}
    for kind in ("clean", "sae", "zero", "mean"):
        handle = model.model.layers[LAYER].register_forward_hook(put(kind))
        missed = divergence = tokens = 0.0
        for sample in chosen:
            ids = torch.tensor(sample.token_ids[None].astype(np.int64))
            with torch.no_grad():
                found_here = torch.log_softmax(model(ids).logits[0].double(), dim=1)[:-1]
                handle.remove()
                expected = torch.log_softmax(model(ids).logits[0].double(), dim=1)[:-1]
                handle = model.model.layers[LAYER].register_forward_hook(put(kind))
            missed -= float(found_here.gather(1, ids[0, 1:, None]).sum())
            divergence += float((expected.exp() * (expected - found_here)).sum())
            tokens += len(found_here)
        handle.remove()
        sums[kind] = [missed / tokens, divergence / tokens]
    splice = found["saes"][0]["spliced"]
    assert found["model"]["cross_entropy"]["value"] == pytest.approx(sums["clean"][0], rel=1e-5)
    assert splice["cross_entropy"]["value"] == pytest.approx(sums["sae"][0], rel=1e-5)
    assert splice["kl"]["value"] == pytest.approx(sums["sae"][1], rel=1e-3, abs=1e-6)
    assert splice["zero_cross_entropy"] == pytest.approx(sums["zero"][0], rel=1e-5)
    assert splice["mean_cross_entropy"] == pytest.approx(sums["mean"][0], rel=1e-5)
    assert splice["added_cross_entropy"]["value"] == pytest.approx(sums["sae"][0] - sums["clean"][0], abs=1e-5)
    for kind in ("zero", "mean"):
        recovered = (sums[kind][0] - sums["sae"][0]) / (sums[kind][0] - sums["clean"][0])
        assert splice[f"recovered_of_{kind}"]["value"] == pytest.approx(recovered, abs=2e-2)


def test_seeds_are_compared_and_the_front_leaves_baselines_out(found: dict[str, Any]) -> None:
    pairs = {pair["baseline"]: pair for pair in found["stability"]}
    assert set(pairs) == {None, "frozen_decoder"}
    assert pairs[None]["saes"] == [f"layer_1_batchtopk_d32_k4_seed{seed}" for seed in (0, 1)]
    assert pairs[None]["matched_cosine"] <= pairs[None]["mean_max_cosine"] + 1e-6
    assert 1 <= len(found["pareto_front"]) <= 2 and not any("frozen" in name for name in found["pareto_front"])


def test_an_sae_that_says_nothing_of_itself_is_measured_where_its_hook_name_says(place: Path, tmp_path: Path) -> None:
    """As SAELens writes them."""
    folder = tmp_path / "stranger"
    shutil.copytree(place / "saes" / "layer_1_batchtopk_d32_k4_seed0", folder)
    config = json.loads((folder / "cfg.json").read_text())
    del config["metadata"]["jax_extract"]
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="do not say what they were trained on; name a run with --activations"):
        sae_eval(SaeEvalConfig((str(folder),)), Terminal(silent=True))
    options = SaeEvalConfig((str(folder),), activations=str(place / "act"), loss_samples=0, rows=500)
    said = sae_eval(options, Terminal(silent=True))
    assert (
        not said["held_out"] and said["model"] is None and said["saes"][0]["metrics"]["explained_variance"]["value"] > 0
    )
    config["metadata"]["hook_name"] = "blocks.2.hook_resid_post"
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="this run holds no layer 2"):
        sae_eval(options, Terminal(silent=True))


def test_mistakes_are_told(place: Path, tmp_path: Path) -> None:
    def refused(said: str, *flags: object) -> None:
        done = run_cli("sae", "eval", *flags, script=None, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr

    refused("holds no sae_training_summary.json and no cfg.json", tmp_path)
    refused("--confidence 2.0 must be a share", place / "saes", "--confidence", 2)
    refused("--rows 0 must be from 1", place / "saes", "--rows", 0)
    other = make_model(tmp_path / "other", layers=3, hidden=24)
    run_here(other, write_jsonl(tmp_path / "in.jsonl", [20, 30]), tmp_path / "act", layers_to_extract=(LAYER,))
    refused("is of rows of 16 values, and this run has 24", place / "saes", "--activations", tmp_path / "act")


def test_pictures_of_a_sweep_are_drawn(place: Path, found: dict[str, Any], tmp_path: Path) -> None:
    done = run_cli("plot", place / "saes", "--output_dir", tmp_path / "plots", script=None, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        f"{name}.{suffix}" for name in ("density", "pareto") for suffix in ("png", "svg")
    ]
    drawn = (tmp_path / "plots" / "pareto.svg").read_text()
    assert "Explained variance against active latents" in drawn


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "is damaged"), ('{"saes": []}', "names no SAE"), ('{"saes": [{}]}', "is damaged"), ("[]", "is damaged")],
)
def test_a_damaged_summary_is_told_by_name(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "sae_training_summary.json").write_text(content)
    with pytest.raises(UserError, match=said):
        sae_eval(SaeEvalConfig((str(tmp_path),)), Terminal(silent=True))
    with pytest.raises(UserError, match="is damaged"):
        plot(PlotConfig(str(tmp_path)), Terminal(silent=True))
    (tmp_path / EVALUATION_FILE).write_text(content)
    with pytest.raises(UserError, match=rf"{EVALUATION_FILE} is damaged"):
        plot(PlotConfig(str(tmp_path)), Terminal(silent=True))


# ------------------------------------------------------------------------------------------ the parts of it


def test_intervals_are_of_samples_and_not_of_rows() -> None:
    """Two texts of many equal rows say as much as two numbers do."""
    sums = np.array([0.0, 100.0])
    [interval] = Bootstrap.of(2, 4_000, 0.95, 0).intervals(lambda times: (times @ sums / 200)[:, None])
    assert (interval.value, interval.low, interval.high) == (0.5, 0.0, 1.0)
    many = np.random.default_rng(0).normal(3, 1, 2_000)
    [interval] = Bootstrap.of(2_000, 4_000, 0.95, 0).intervals(lambda times: (times @ many / 2_000)[:, None])
    error = 1.96 * many.std() / np.sqrt(2_000)
    assert interval.high - interval.low == pytest.approx(2 * error, rel=0.1)


def test_directions_that_are_the_same_in_another_order_agree() -> None:
    random = np.random.default_rng(0)
    decoder = random.standard_normal((40, 30))
    same = agreement(decoder, 2 * decoder[random.permutation(40)])
    assert same["mean_max_cosine"] == pytest.approx(1, abs=1e-5) and same["shared"] == 1
    assert same["matched_cosine"] == pytest.approx(1, abs=1e-5)
    other = agreement(decoder, random.standard_normal((40, 30)))
    assert other["matched_cosine"] < other["mean_max_cosine"] < 0.7 and other["shared"] < 0.1
    halved = agreement(decoder, np.concatenate([decoder[:20], random.standard_normal((20, 30))]))
    assert halved["shared"] == pytest.approx(0.5, abs=0.05)


def test_a_bias_at_the_mean_explains_all_that_a_bias_can() -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((500, 8)) + 3
    mean, square = rows.mean(axis=0), float(((rows - rows.mean(axis=0)) ** 2).sum(axis=1).mean())
    decoder = np.eye(8)
    at_mean = bias_checks(decoder, mean, mean, square)
    assert at_mean["explained_variance"] == pytest.approx(0) and at_mean["cosine_with_mean"] == pytest.approx(1)
    away = bias_checks(decoder, np.zeros(8), mean, square)
    assert away["explained_variance"] == pytest.approx(-(mean**2).sum() / square) and away["norm_ratio"] < 1e-9


def test_the_front_is_what_nothing_beats() -> None:
    points = [(10, 0.5), (20, 0.7), (15, 0.4), (20, 0.6), (30, 0.7), (40, 0.9)]
    assert front(points) == [0, 1, 5]
    assert front([]) == []


def test_losses_of_rows_are_those_of_their_logits(place: Path) -> None:
    model = load_model(place / "model")
    rows, other = np.random.default_rng(0).standard_normal((2, 5, WIDTH)).astype(np.float32)
    tokens = np.array([1, 2, 3, 4, 5])
    found, expected = (np.asarray(model.logits_of(each), np.float64) for each in (rows, other))
    p, q = (each - np.log(np.exp(each).sum(axis=1, keepdims=True)) for each in (expected, found))
    missed, divergence = model.next_token_losses(rows, tokens, other)
    np.testing.assert_allclose(missed, -q[np.arange(5), tokens], rtol=1e-4)
    np.testing.assert_allclose(divergence, (np.exp(p) * (p - q)).sum(axis=1), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(model.next_token_losses(rows, tokens)[1], 0, atol=1e-6)
    with pytest.raises(UserError, match="do not belong together"):
        model.next_token_losses(rows[:, :3], tokens)
