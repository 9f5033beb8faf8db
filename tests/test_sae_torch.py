"""`sae train --backend torch`: SAELens' trainer on our reader comes to the weights that JAX comes to, is gone on with,
and writes the same files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import run_cli

from jax_extract import SparseAutoencoder, train_saes
from jax_extract.errors import UserError

WIDTH, BATCH = 16, 128
ARCHITECTURES = ["standard", "topk", "batchtopk", "jumprelu", "gated", "matryoshka_batchtopk"]
OPTIONS: dict[str, Any] = {
    "expansion_factor": 3,
    "k": 4,
    "l1_coefficient": 0.5,
    "l0_coefficient": 0.1,
    "batch_size": BATCH,
    "training_rows": 24 * BATCH,
    "learning_rate": 1e-3,
    "learning_rate_warm_up": 0.1,
    "dead_after_rows": 3 * BATCH,
    "save_steps": 10,
    "silent": True,
}


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """float32 [rows, WIDTH], of a few directions at once, about a mean."""
    random = np.random.default_rng(0)
    there = np.maximum(random.standard_normal((6_000, 40)) - 1.2, 0)
    return (there @ random.standard_normal((40, WIDTH)) + 0.5).astype(np.float32)


def off(a: Any, b: Any) -> float:
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


def test_both_backends_come_to_the_same_saes_and_baselines(rows: np.ndarray, tmp_path: Path) -> None:
    found = {
        backend: train_saes(rows, tmp_path / backend, architecture=ARCHITECTURES, backend=backend, **OPTIONS)
        for backend in ("jax", "torch")
    }
    assert list(found["jax"]) == list(found["torch"]) and len(found["jax"]) == 3 * len(ARCHITECTURES)
    for name, ours in found["jax"].items():
        for key, value in ours.params.items():
            assert off(found["torch"][name].params[key], value) <= 2e-3, (name, key)
    said, theirs = (
        {
            sae["name"]: sae["metrics"]
            for sae in json.loads((tmp_path / each / "sae_training_summary.json").read_text())["saes"]
        }
        for each in ("jax", "torch")
    )
    for name, metrics in said.items():
        assert theirs[name]["explained_variance"] == pytest.approx(metrics["explained_variance"], abs=2e-3), name


def test_it_goes_on_from_a_checkpoint_to_the_same_weights(rows: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", rows)
    options = {**OPTIONS, "architecture": ["batchtopk", "gated"], "backend": "torch"}
    whole = train_saes(tmp_path / "rows.npy", tmp_path / "whole", **options)
    flags: list[object] = ["sae", "train", "--activations", tmp_path / "rows.npy", "--output_dir", tmp_path / "cut"]
    for name, value in options.items():
        if name != "silent":
            flags += [f"--{name}", *(value if isinstance(value, list) else [value])]
    env = {"JAX_EXTRACT_FAILPOINT": "training.step:after:17"}
    done = run_cli(*flags, script=None, cwd=tmp_path, env=env, fresh=True)
    assert done.returncode < 0 and (tmp_path / "cut" / "checkpoint-10").is_dir()
    train_saes(tmp_path / "rows.npy", tmp_path / "cut", **options)
    for name, sae in whole.items():
        for key, value in sae.params.items():
            np.testing.assert_array_equal(SparseAutoencoder.open(tmp_path / "cut" / name).params[key], value)
    with pytest.raises(UserError, match="was computed with backend torch and here it is jax"):
        (tmp_path / "cut" / "trainer_state.json").unlink()
        train_saes(tmp_path / "rows.npy", tmp_path / "cut", **{**options, "backend": "jax"})


def test_what_it_cannot_do_is_told(rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several = np.stack([rows, rows], axis=1)
    with pytest.raises(UserError, match="SAELens trains no transcoders and no crosscoders"):
        train_saes(several, tmp_path / "out", crosscoder=True, backend="torch", **OPTIONS)
    with pytest.raises(UserError, match="--mesh_shape 1,1 is of JAX"):
        train_saes(rows, tmp_path / "out", mesh_shape="1,1", backend="torch", **OPTIONS)
    with pytest.raises(UserError, match="--backend torch has no TPU"):
        train_saes(rows, tmp_path / "out", device="tpu", backend="torch", **OPTIONS)
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs sae-lens, which is not installed"):
        train_saes(rows, tmp_path / "out", backend="torch", **OPTIONS)
    assert not (tmp_path / "out").exists()
