"""`sae train --online`: rows are those of `extract`, each once a pass, and weights do not know of kills or of
meshes."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import Told, make_model, run_cli, run_here, write_jsonl

from jax_extract import SparseAutoencoder, open_activations, train_saes
from jax_extract.errors import UserError
from jax_extract.sae.command import sae_train
from jax_extract.sae.config import SaeTrainConfig
from jax_extract.sae.online.opening import open_online
from jax_extract.sae.rows import Scales
from jax_extract.sae.sources import HeldOut
from jax_extract.terminal import Terminal

WIDTH, BATCH, WINDOW = 16, 64, 1_024
SMALL: dict[str, Any] = {
    "layers": "1,2",
    "expansion_factor": (3.0,),
    "k": (4.0,),
    "batch_size": BATCH,
    "buffer_rows": WINDOW,
    "training_rows": 100 * BATCH,
    "save_steps": 20,
    "eval_steps": 50,
    "logging_steps": 10,
    "learning_rate": (3e-3,),
    "baselines": ("none",),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, in.jsonl, and act/, the run that extract makes of them."""
    root = tmp_path_factory.mktemp("online")
    write_jsonl(root / "in.jsonl", np.random.default_rng(0).integers(10, 60, 120).tolist())
    make_model(root / "model", layers=4, hidden=WIDTH)
    run_here(root / "model", root / "in.jsonl", root / "act", layers_to_extract=(1, 2), positions="from:1")
    return root


def config(place: Path, output: Path, **options: Any) -> SaeTrainConfig:
    known = {"online": True, "model_path": str(place / "model"), "tasks_file": str(place / "in.jsonl")}
    return SaeTrainConfig(output_dir=str(output), **{**known, **SMALL, **options})


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    sae_train(config(place, place / "whole"), Terminal(silent=True))
    return place / "whole"


@pytest.mark.parametrize("largest_norm", [0.0, 1.2])
def test_rows_are_those_of_extract_and_each_comes_once_a_pass(place: Path, tmp_path: Path, largest_norm: float) -> None:
    lines, held_out = (place / "in.jsonl").read_text().splitlines(), HeldOut(0.05, 0)
    aside = held_out(np.arange(len(lines)))
    # A run of the same texts has the same slabs, and so the same bits.
    (tmp_path / "in.jsonl").write_text("\n".join(np.array(lines)[~aside].tolist()) + "\n")
    run_here(place / "model", tmp_path / "in.jsonl", tmp_path / "act", layers_to_extract=(1, 2), positions="from:1")
    run = open_activations(tmp_path / "act")
    stored = np.stack([run.get(layer=layer) for layer in (1, 2)], axis=1)
    online = open_online(config(place, tmp_path / "out"), lambda _: None)
    scales = Scales.of(online.measured(), largest_norm)
    rows, samples = online.held_out()
    lengths = [len(sample.positions) for sample in open_activations(place / "act").samples()]
    assert len(rows) == sum(np.array(lengths)[aside]) > 0 and held_out(samples).all()
    expected = stored[scales.keeps(stored)]
    assert (len(expected) < len(stored)) == bool(largest_norm)
    known = Counter(row.tobytes() for row in expected)
    flow = online.batches(scales)
    windows = 3 * len(expected) // WINDOW
    got = [row.tobytes() for _ in range(windows * WINDOW // BATCH) for row in np.asarray(next(flow))]
    counts = Counter(got)
    assert set(counts) == set(known), "to the last bit"
    # After nearly three passes a row came three times, or twice where it is still to come.
    assert all(2 * known[row] <= count <= 3 * known[row] for row, count in counts.items())
    assert online.read >= len(got) and (online.left_out > 0) == bool(largest_norm)
    place_of = {row.tobytes(): i for i, row in enumerate(expected)}
    order = [place_of[row] for row in got[: len(expected) // 2]]
    assert np.corrcoef(order, np.arange(len(order)))[0, 1] < 0.98, "and not as they lie in the input"


def test_every_batch_is_the_next_one_from_every_state(place: Path, tmp_path: Path) -> None:
    online = open_online(config(place, tmp_path / "out"), lambda _: None)
    scales = Scales.of(online.measured(), 1.2)
    flow = online.batches(scales)
    states, batches = [], []
    for _ in range(60):
        batches.append(np.asarray(next(flow)))
        states.append(json.loads(json.dumps(online.state)))
    for i in (0, 14, 15, 16, 40, 47, 58):
        other = open_online(config(place, tmp_path / "out"), lambda _: None)
        other.state = states[i]
        np.testing.assert_array_equal(np.asarray(next(other.batches(scales))), batches[i + 1], err_msg=str(states[i]))


def test_another_model_of_the_same_shape_is_another_training(place: Path, whole: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "other", layers=4, hidden=WIDTH, seed=1)
    with pytest.raises(UserError, match="holds SAEs with data digest"):
        sae_train(config(place, whole, model_path=str(tmp_path / "other")), Terminal(silent=True))


def flags(place: Path, output: Path) -> list[object]:
    found: list[object] = ["sae", "train", "--online", "True", "--model_path", place / "model"]
    found += ["--tasks_file", place / "in.jsonl", "--output_dir", output]
    for name, value in SMALL.items():
        found += [f"--{name}", *(value if isinstance(value, tuple) else (value,))]
    return found


def test_killed_anywhere_it_goes_on_to_the_same_weights_bit_by_bit(place: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    for failpoint in ("training.step:after:37", "training.step:after:33"):
        done = run_cli(*flags(place, output), script=None, cwd=tmp_path, env={"JAX_EXTRACT_FAILPOINT": failpoint})
        assert done.returncode == -signal.SIGKILL, done.stderr
    done = run_cli(*flags(place, output), script=None, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for layer in (1, 2):
        name = f"layer_{layer}_batchtopk_d48_k4_seed0"
        expected, got = (SparseAutoencoder.open(folder / name) for folder in (whole, output))
        for key, value in expected.params.items():
            np.testing.assert_array_equal(got.params[key], value)
        assert expected.metadata["hook_name"] == f"blocks.{layer}.hook_resid_post"


@pytest.mark.parametrize("shape", ["4,1", "2,2"])
def test_meshes_come_to_the_same_losses(shape: str, place: Path, whole: Path, tmp_path: Path) -> None:
    done = run_cli(
        *(*flags(place, tmp_path / "mesh"), "--mesh_shape", shape),
        script=None,
        cwd=tmp_path,
        env={"JAX_NUM_CPU_DEVICES": "4"},
        fresh=True,
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (tmp_path / "mesh", whole)
    )
    assert len(ours) == len(theirs)
    for got, expected in zip(ours, theirs, strict=True):
        for name, value in expected.items():
            if name.endswith("/loss"):
                assert got[name] == pytest.approx(value, rel=1e-4), (name, got["step"])


def test_it_learns_what_training_on_the_stored_run_learns(place: Path, whole: Path, tmp_path: Path) -> None:
    options = {**SMALL, "layers": [1, 2], "baselines": "none", "silent": True}
    del options["buffer_rows"]
    train_saes(place / "act", tmp_path / "stored", positions="all", **options)
    online, stored = (
        json.loads((folder / "sae_training_summary.json").read_text())["saes"]
        for folder in (whole, tmp_path / "stored")
    )
    for one, other in zip(online, stored, strict=True):
        assert one["metrics"]["rows"] == other["metrics"]["rows"]
        assert one["metrics"]["explained_variance"] == pytest.approx(other["metrics"]["explained_variance"], abs=0.03)


def test_texts_that_were_cut_are_told(place: Path, tmp_path: Path) -> None:
    told = Told()
    sae_train(config(place, tmp_path / "out", max_seq_length=32, training_rows=4 * BATCH), told)
    lengths = [len(sample.token_ids) for sample in open_activations(place / "act").samples()]
    cut = sum(length > 32 for length in lengths)
    assert f"{cut} of {len(lengths)} texts are longer than 32 tokens, and were cut there" in " ".join(told.lines)
    assert "epochs" not in " ".join(told.lines)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"activations": "act"}, "--activations act and --online are both given"),
        ({"online": False}, "give --activations, or --online True"),
        ({"model_path": ""}, "--online needs --model_path"),
        ({"training_rows": None}, "--training_rows is not given"),
        ({"tasks_file": None}, "Give either --tasks_file or --dataset"),
        ({"backend": "torch"}, "--online computes with JAX"),
        ({"layers": "9"}, "9"),
        ({"held_out": 1e-6}, "--held_out 1e-06 of the input holds out no row"),
        ({"hook": "ffn_hidden", "target_hook": "ffn_out"}, "give those of one width"),
    ],
)
def test_mistakes_are_told(options: dict[str, Any], said: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        sae_train(config(place, tmp_path / "out", **options), Terminal(silent=True))
    assert said in str(refusal.value)
    assert not [path for path in (tmp_path / "out").glob("*") if path.name != ".lock"]
