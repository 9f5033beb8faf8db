"""`jax-extract sae train`: from a run to folders of SAEs, through kills, on meshes, and what it refuses.

Guarded: that what is trained on and what is held out share no sample; that rows of large norm and first tokens are left
out; that a killed training goes on to the bits of an undisturbed one, whichever step it was killed at; that several
devices come to the same losses; mistakes in one sentence, before anything is written.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import Told, make_model, run_cli, run_here, write_jsonl

from jax_extract import train_saes
from jax_extract.errors import UserError
from jax_extract.sae.autoencoder import SparseAutoencoder
from jax_extract.sae.command import sae_train
from jax_extract.sae.config import SaeTrainConfig
from jax_extract.sae.rows import Rows, Scales
from jax_extract.sae.saved import SUMMARY_FILE
from jax_extract.sae.sources import HeldOut
from jax_extract.sae.sources_array import ArraySource
from jax_extract.sae.sources_run import RunSource
from jax_extract.store.reader import Run, open_activations
from jax_extract.terminal import Terminal
from jax_extract.training.checkpoints import saved_steps

WIDTH, BATCH = 32, 256
SMALL: dict[str, Any] = {
    "layers": "1,3",
    "d_sae": (48,),
    "k": (4.0,),
    "batch_size": BATCH,
    "training_rows": 40 * BATCH,
    "save_steps": 7,
    "eval_steps": 20,
    "logging_steps": 10,
    "learning_rate": (3e-3,),
    "dead_after_rows": 10 * BATCH,
}
NAMES = [
    f"layer_{layer}_batchtopk_d48_k4_seed0{kind}"
    for layer in (1, 3)
    for kind in ("", "_frozen_decoder", "_frozen_random")
]


@pytest.fixture(scope="module")
def activations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 1 and 3 of a tiny model, all positions of 200 texts."""
    root = tmp_path_factory.mktemp("run")
    lengths = np.random.default_rng(0).integers(20, 60, 200).tolist()
    inputs = write_jsonl(root / "in.jsonl", lengths)
    model = make_model(root / "model", layers=4, hidden=WIDTH)
    run_here(model, inputs, root / "act", layers_to_extract=(1, 3), positions="all", shard_format="safetensors")
    return root / "act"


def trained(activations: Path, output: Path, **options: Any) -> dict[str, Any]:
    config = SaeTrainConfig(str(activations), str(output), **{**SMALL, **options})
    return sae_train(config, Terminal(silent=True))


@pytest.fixture(scope="module")
def whole(activations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("saes") / "whole"
    trained(activations, output)
    return output


def test_every_sae_of_a_sweep_has_a_folder_and_a_line_in_the_summary(whole: Path) -> None:
    said = json.loads((whole / SUMMARY_FILE).read_text())
    assert [sae["name"] for sae in said["saes"]] == NAMES
    assert saved_steps(whole) == [7, 14, 21, 28, 35]
    for sae in said["saes"]:
        for folder in (whole / sae["name"], whole / "checkpoint-14" / sae["name"]):
            opened = SparseAutoencoder.open(folder)
            assert (opened.d_in, opened.d_sae) == (WIDTH, 48)
            about = opened.metadata["jax_extract"]["trained_on"]
            assert about["rows"] == 40 * BATCH and about["positions"] == "from:1"
            assert opened.metadata["hook_name"] == f"blocks.{sae['layer']}.hook_resid_post"
    learned = {sae["name"]: sae["metrics"]["explained_variance"] for sae in said["saes"]}
    for layer in (1, 3):
        name = f"layer_{layer}_batchtopk_d48_k4_seed0"
        assert learned[name] > 0.2
        assert learned[name] > learned[f"{name}_frozen_decoder"]
        assert learned[name] > learned[f"{name}_frozen_random"]


def test_metrics_are_those_of_the_stored_sae_on_held_out_rows(activations: Path, whole: Path) -> None:
    """By NumPy in float64, from the folder and the run."""
    run, held_out = open_activations(activations), HeldOut(0.05, 0)
    samples = np.arange(len(run))
    chosen = samples[held_out(samples)]
    assert 0 < len(chosen) < 40
    for sae in json.loads((whole / SUMMARY_FILE).read_text())["saes"]:
        rows = np.concatenate([run[int(i)].get(layer=sae["layer"])[1:] for i in chosen]).astype(np.float64)
        opened = SparseAutoencoder.open(whole / sae["name"])
        out = np.asarray(opened(rows), np.float64)
        metrics = sae["metrics"]
        error = ((rows - out) ** 2).sum()
        assert metrics["rows"] == len(rows)
        expected = 1 - error / ((rows - rows.mean(axis=0)) ** 2).sum()
        assert metrics["explained_variance"] == pytest.approx(expected, abs=1e-5)
        assert metrics["mse"] == pytest.approx(error / rows.size, rel=1e-4)
        f = np.asarray(opened.encode(rows))
        assert metrics["l0"] == pytest.approx((f > 0).sum() / len(rows), abs=0.02)
        assert metrics["l2_ratio"] == pytest.approx(
            (np.linalg.norm(out, axis=1) / np.linalg.norm(rows, axis=1)).mean(), rel=1e-4
        )
        assert metrics["reconstruction_bias"] == pytest.approx((rows * out).sum() / (out**2).sum(), rel=1e-4)


def test_the_threshold_gives_the_mean_number_of_latents_that_was_asked_for(whole: Path) -> None:
    for sae in json.loads((whole / SUMMARY_FILE).read_text())["saes"]:
        assert sae["metrics"]["l0"] == pytest.approx(4, rel=0.25)  # of other rows than those it was calibrated on


def test_killed_anywhere_it_goes_on_to_the_same_weights_bit_by_bit(
    activations: Path, whole: Path, tmp_path: Path
) -> None:
    flags: list[object] = ["sae", "train", "--activations", activations, "--output_dir", tmp_path / "killed"]
    for name, value in SMALL.items():
        flags += [f"--{name}", *(value if isinstance(value, tuple) else (value,))]
    for failpoint, saved in (
        ("training.step:after:18", [7, 14]),
        ("folder.rename:before:1", [7, 14]),
        ("folder.rename:after:2", [7, 14, 21, 28]),
        ("folder.rename:after:3", [7, 14, 21, 28, 35]),  # the last checkpoint and two of the final folders
    ):
        done = run_cli(*flags, script=None, cwd=tmp_path, env={"JAX_EXTRACT_FAILPOINT": failpoint})
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert saved_steps(tmp_path / "killed") == saved
        assert not (tmp_path / "killed" / "trainer_state.json").exists()
    done = run_cli(*flags, script=None, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        for file in ("cfg.json", "sae_weights.safetensors"):
            assert (tmp_path / "killed" / name / file).read_bytes() == (whole / name / file).read_bytes(), (name, file)
    states = [json.loads((place / "trainer_state.json").read_text()) for place in (tmp_path / "killed", whole)]
    assert states[0]["log_history"] == states[1]["log_history"]


def test_what_is_there_is_not_trained_again_and_another_sweep_is_refused(activations: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")}
    trained(activations, whole)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")} == before
    with pytest.raises(UserError, match=r"holds a sweep .*; give another --output_dir, or start anew"):
        trained(activations, whole, k=(5.0,))
    with pytest.raises(UserError, match="holds SAEs with batch_size 256, and 128 was asked for"):
        trained(activations, whole, batch_size=128, training_rows=40 * 128)


def test_overwriting_removes_what_was_trained_and_nothing_else(activations: Path, whole: Path, tmp_path: Path) -> None:
    output = shutil.copytree(whole, tmp_path / "saes")
    (output / "notes.txt").write_text("mine")
    trained(activations, output, overwrite=True, training_rows=8 * BATCH, baselines=("none",))
    left = {path.name for path in output.iterdir()}
    assert left == {*NAMES[::3], "checkpoint-7", "notes.txt", SUMMARY_FILE, "trainer_state.json", ".lock"}
    (output / NAMES[0] / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"mine.txt was not written by jax-extract sae train; move it away"):
        trained(activations, output, overwrite=True)
    assert (output / NAMES[0] / "cfg.json").exists()


# ------------------------------------------------------------------------------------------------- rows


UNLIKE = 8  # tokens behind which no two texts are alike


def rows_of(run: Run, batch: int = BATCH) -> Rows:
    sites = [run.site(layer, "after_block") for layer in (1, 3)]
    return Rows(RunSource(run, sites, batch, 0, f"from:{UNLIKE}", HeldOut(0.2, 0)), batch)


def test_what_is_held_out_shares_no_sample_with_what_is_trained_on(activations: Path) -> None:
    run = open_activations(activations)
    rows = rows_of(run)
    aside, samples = rows.held_out()
    chosen = HeldOut(0.2, 0)(np.arange(len(run)))
    assert set(samples.tolist()) == set(np.flatnonzero(chosen).tolist())
    assert len(aside) == sum(len(run[int(i)].get(layer=1)) - UNLIKE for i in np.flatnonzero(chosen))
    trained_on = {
        row.tobytes() for row in np.concatenate([b for b, _ in zip(everything(rows), range(40), strict=False)])
    }
    assert not trained_on & {row.tobytes() for row in aside}


def everything(rows: Rows) -> Any:
    return rows.batches(Scales.of(rows.measured(), 0.0))


def test_an_epoch_has_every_row_once_and_rows_of_large_norm_are_left_out(activations: Path) -> None:
    run = open_activations(activations)
    rows = rows_of(run, batch=64)
    norms = np.linalg.norm(rows.measured(), axis=2)
    scales = Scales.of(rows.measured(), 1.1)
    too_large = (norms > 1.1 * np.median(norms, axis=0)[None]).any(axis=1)
    assert 0.01 < too_large.mean() < 0.5
    found = rows.batches(scales)
    read = []
    while rows.read < rows.source.rows - 128:  # a batch may take two reads, and the second be of the next epoch
        read.append(next(found))
    kept = np.concatenate(read)
    assert (np.linalg.norm(kept, axis=2) <= 1.1001 * np.median(norms, axis=0)[None]).all()
    assert rows.left_out == pytest.approx(too_large.mean() * rows.read, rel=0.1)
    layers = [[run[i].get(layer=layer)[UNLIKE:] for layer in (1, 3)] for i in range(len(run))]
    there = Counter(row.tobytes() for sample in layers for row in np.stack(sample, axis=1))
    assert not Counter(row.tobytes() for row in kept) - there, "a row came twice"
    np.testing.assert_allclose(scales.factor, np.sqrt(WIDTH) / norms[~too_large].mean(axis=0), rtol=1e-5)


def test_rows_that_are_not_finite_are_left_out_and_told(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((6_000, 8)).astype(np.float32)
    array[[7, 77, 777]], array[4_000, 3] = np.nan, np.inf
    np.save(tmp_path / "rows.npy", array)
    told = Told()
    options = {**SMALL, "layers": None, "training_rows": 21 * BATCH, "baselines": ("none",)}
    config = SaeTrainConfig(str(tmp_path / "rows.npy"), str(tmp_path / "saes"), **options)
    said = sae_train(config, told)
    assert np.isfinite(said["saes"][0]["metrics"]["mse"])
    assert re.search(r"[1-4] rows? left out, with a value that is no finite number", " ".join(told.lines))


def test_every_batch_is_the_next_one_from_every_state(activations: Path) -> None:
    run = open_activations(activations)
    rows, scales = rows_of(run, 64), Scales.of(rows_of(run).measured(), 1.1)
    found, states = [], []
    for batch, _ in zip(rows.batches(scales), range(30), strict=False):
        found.append(batch)
        states.append(json.loads(json.dumps(rows.state)))
    for at in (0, 7, 20):
        again = rows_of(run, 64)
        again.state = states[at]
        following = again.batches(scales)
        for expected in found[at + 1 : at + 4]:
            np.testing.assert_array_equal(next(following), expected)


def test_rows_of_an_array_come_once_an_epoch_from_every_state_and_neighbours_are_held_out_together() -> None:
    array = np.arange(5_000 * 6, dtype=np.float32).reshape(5_000, 6) + 1
    rows = Rows(ArraySource(array, 100, 3, HeldOut(0.1, 0)), 100)
    scales = Scales.of(rows.measured(), 0.0)
    aside, blocks = rows.held_out()
    assert set(np.bincount(blocks)[np.unique(blocks)].tolist()) <= {64, 5_000 % 64}
    found, states = [], []
    for batch, _ in zip(rows.batches(scales), range(2 * rows.source.rows // 100), strict=False):
        found.append(batch[:, 0, 0])
        states.append(json.loads(json.dumps(rows.state)))
    epochs = np.split(np.concatenate(found), 2)
    assert not set(epochs[0].tolist()) & set(aside[:, 0, 0].tolist())
    for epoch in epochs:
        assert len(set(epoch.tolist())) == len(epoch)
    assert (epochs[0] != epochs[1]).mean() > 0.9
    again = Rows(ArraySource(array, 100, 3, HeldOut(0.1, 0)), 100)
    again.state = states[7]
    np.testing.assert_array_equal(next(again.batches(scales))[:, 0, 0], found[8])


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_file_of_rows_is_trained_on_too(suffix: str, activations: Path, tmp_path: Path) -> None:
    run = open_activations(activations)
    if suffix == ".npy":
        path = tmp_path / "rows.npy"
        np.save(path, run.get(layer=1))
    else:
        path = next(activations.glob("*layer_1_*.safetensors"))
    options = {"batch_size": 32, "training_rows": 320, "held_out": 0.4, "baselines": ("none",), "seed": (1,)}
    said = trained(path, tmp_path / "saes", layers=None, **options)
    [sae] = said["saes"]
    assert sae["name"] == "layer_0_rows_batchtopk_d48_k4_seed1" and sae["trained_on"]["activations"] == str(path)
    assert SparseAutoencoder.open(tmp_path / "saes" / sae["name"]).d_in == WIDTH


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (np.zeros((3, 4, 5, 6), np.float32), "has the shape [3, 4, 5, 6]"),
        (np.zeros((300, 4), np.int64), "and the dtype int64; expected floating-point rows"),
        (np.ones((200, 4), np.float32), "makes no batch of 256"),
        (np.zeros((3_000, 4), np.float32), "all rows of a layer are zeros"),
        (np.full((3_000, 4), np.nan, np.float32), "no row is finite"),
        (np.array([{}], object), "was not read"),
    ],
)
def test_a_file_that_holds_no_rows_is_refused(content: np.ndarray, said: str, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", content, allow_pickle=True)
    with pytest.raises(UserError) as refusal:
        trained(tmp_path / "rows.npy", tmp_path / "saes", layers=None)
    assert said in str(refusal.value)


# --------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": "2"}, "this run holds no layer 2 of 'after_block'; it holds the layers [1, 3]"),
        ({"hook": "ffn_out"}, "this run holds no 'ffn_out'"),
        ({"architecture": ("batchtop",)}, "did you mean batchtopk?"),
        ({"k": (49.0,)}, "--k 49 must be from 1 to the 48 latents"),
        ({"k": (2.5,), "architecture": ("topk",)}, "--k 2.5 of topk must be a whole number"),
        ({"k": (0.0,)}, "--k 0.0 must be a positive number"),
        ({"training_rows": 10}, "--training_rows 10 makes no batch of --batch_size 256"),
        ({"batch_size": 1_000_000, "training_rows": None}, "which makes no batch of 1000000"),
        ({"held_out": 1.0}, "--held_out 1.0 must be a share of the samples"),
        ({"baselines": ("random",)}, "--baselines 'random' is none of frozen_decoder, frozen_random, none"),
        ({"positions": "first:0"}, "positions='first:0' is no choice of positions"),
        ({"held_out": 1e-6}, "--held_out 1e-06 of the 200 samples of this run holds out no row"),
        ({"layers": None, "hook": "blocks.2.hook_resid_post"}, "this run holds no layer 2 of 'after_block'"),
        ({"seed": (-1,)}, "--seed -1 must be from 0"),
        ({"learning_rate": (float("nan"),)}, "--learning_rate nan must be a positive number"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    options: dict[str, Any], said: str, activations: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refusal:
        trained(activations, tmp_path / "saes", **options)
    assert said in str(refusal.value)
    assert not (tmp_path / "saes").exists()


def test_a_rate_that_diverges_is_told(activations: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"so training does not converge; give a smaller --learning_rate"):
        trained(activations, tmp_path / "saes", learning_rate=(1e20,), architecture=("standard",))


def test_a_name_of_transformer_lens_says_the_layer(activations: Path, tmp_path: Path) -> None:
    options = {"layers": None, "training_rows": 2 * BATCH, "baselines": ("none",)}
    said = trained(activations, tmp_path / "saes", hook="blocks.3.hook_resid_post", **options)
    assert [sae["layer"] for sae in said["saes"]] == [3]


@pytest.mark.parametrize("shape", ["4,1", "2,2"])
def test_devices_share_a_batch_and_come_to_the_same_losses(
    shape: str, activations: Path, whole: Path, tmp_path: Path
) -> None:
    flags: list[object] = ["sae", "train", "--activations", activations, "--output_dir", tmp_path / "mesh"]
    for name, value in SMALL.items():
        flags += [f"--{name}", *(value if isinstance(value, tuple) else (value,))]
    env = {"JAX_NUM_CPU_DEVICES": "4"}
    done = run_cli(*flags, "--mesh_shape", shape, script=None, cwd=tmp_path, env=env, fresh=True)
    assert done.returncode == 0, done.stderr
    logs = [
        json.loads((place / "trainer_state.json").read_text())["log_history"] for place in (tmp_path / "mesh", whole)
    ]
    assert len(logs[0]) == len(logs[1])
    for ours, theirs in zip(*logs, strict=True):
        for name, value in theirs.items():
            if name.endswith("/loss"):
                assert ours[name] == pytest.approx(value, rel=1e-4), (name, ours["step"])


def test_help_lists_what_there_is(tmp_path: Path) -> None:
    done = run_cli("sae", "--help", script=None, cwd=tmp_path)
    assert done.returncode == 0 and "train" in done.stdout
    assert "--expansion_factor" in run_cli("sae", "train", "--help", script=None, cwd=tmp_path).stdout


def test_what_is_no_run_is_refused_by_the_command_in_one_line(tmp_path: Path) -> None:
    done = run_cli("sae", "train", "--activations", tmp_path, "--output_dir", tmp_path / "o", script=None, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    done = run_cli("sae", "trane", script=None, cwd=tmp_path)
    assert done.returncode == 2 and "jax-extract sae needs one of train" in done.stderr


def test_a_notebook_trains_on_a_run_or_an_array_and_gets_saes_by_name(activations: Path, tmp_path: Path) -> None:
    options = {**SMALL, "training_rows": 8 * BATCH, "baselines": "none", "silent": True}
    run = open_activations(activations)
    by_run = train_saes(run, tmp_path / "run", **options)
    assert list(by_run) == NAMES[::3]
    again = train_saes(run, tmp_path / "run", **options)
    for name, sae in by_run.items():
        np.testing.assert_array_equal(sae.params["W_dec"], again[name].params["W_dec"])
    rows = run.get(layer=1)
    [(name, sae)] = train_saes(rows, tmp_path / "array", **{**options, "layers": None, "k": 4}).items()
    assert name == "layer_0_rows_batchtopk_d48_k4_seed0" and sae(rows[:5]).shape == (5, WIDTH)
    with pytest.raises(UserError, match="there is no option 'expansion'; did you mean 'expansion_factor'"):
        train_saes(rows, tmp_path / "other", expansion=8)
    with pytest.raises(UserError, match="7 is no run, array of rows or iterable of such"):
        train_saes(7, tmp_path / "other")  # type: ignore[arg-type]
