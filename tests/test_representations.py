"""Representations are the model's rows, and after training they have the shape of the graph."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_run import snapshot
from stage02 import SILENT, make_walks, trained, write_preset
from transformers import AutoModelForCausalLM

from jax_extract.errors import UserError
from jax_extract.inputs.graphs import make_graph
from jax_extract.inputs.walk_dataset import WalkDataset
from jax_extract.representations import command as representations
from jax_extract.representations.command import token_representations
from jax_extract.representations.config import RepresentationsConfig
from jax_extract.representations.distances import graph_distances

TYPES = ("residual_before", "after_attention", "after_block", "ffn_gate", "ffn_up")
NODES, HIDDEN, FFN, LAYERS = 36, 32, 64, 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset and a model that has learnt it."""
    root = tmp_path_factory.mktemp("stage02")
    make_walks(root / "dataset", nodes=NODES, train_walks=10_000, validation_walks=200, walk_length=12)
    done = trained(
        write_preset(root / "preset.json"), root / "dataset", root / "run", learning_rate=8e-3, logging_steps=50
    )
    (root / "loss.json").write_text(json.dumps([done["loss"], done["entropy"]]))
    return root


def extracted(place: Path, output: Path, **options: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    info = token_representations(
        RepresentationsConfig(
            model_path=str(place / "run" / "final_model"),
            representation_dir=str(output),
            **{"dataset_dir": str(place / "dataset"), **options},
        ),
        SILENT,
    )
    assert json.loads((output / "representation_info.json").read_text()) == info
    with np.load(output / "token_representations.npz", allow_pickle=False) as arrays:
        return dict(arrays), info


def test_the_loss_comes_within_a_twentieth_of_the_entropy_of_the_walks(place: Path) -> None:
    loss, entropy = json.loads((place / "loss.json").read_text())
    assert entropy == pytest.approx(np.log(8))
    assert entropy * 0.99 < loss < entropy * 1.05


def test_neighbours_are_nearer_than_distant_nodes_once_the_walks_are_learnt(place: Path, tmp_path: Path) -> None:
    _, info = extracted(place, tmp_path)
    found = info["graph_distances"][f"layer_{LAYERS - 1}_after_block"]
    by_hops = {int(hops): distance for hops, distance in found["mean_distance_by_hops"].items()}
    assert sorted(by_hops) == [1, 2, 3]
    print(f"\nneighbours at {found['neighbours_over_all_pairs']:.1%} of the mean distance; by edges: {by_hops}")
    assert by_hops[1] < 0.9 * by_hops[3]
    assert found["neighbours_over_all_pairs"] < 0.9
    untrained = graph_distances(
        np.random.default_rng(0).normal(size=(NODES, HIDDEN)), make_graph("torus", NODES, 8, 0).hops()
    )
    assert untrained is not None and untrained.neighbours > 0.95


def test_each_token_alone_has_the_rows_of_transformers(place: Path, tmp_path: Path) -> None:
    arrays, info = extracted(place, tmp_path, representations=TYPES)
    expected = _torch_rows(place, np.arange(NODES, dtype=np.int64)[:, None])
    assert set(arrays) == set(expected) == set(info["arrays"])
    for key, rows in arrays.items():
        assert rows.shape == (NODES, FFN if "ffn" in key else HIDDEN) and rows.dtype == np.float32
        reference = expected[key][:, 0]
        error = np.linalg.norm(rows - reference, axis=1) / np.linalg.norm(reference, axis=1)
        assert error.max() < 1e-5, key
    assert info["vocab_size"] == NODES and info["source"] == "tokens" and info["occurrences"] == NODES


def test_a_mean_over_occurrences_is_the_mean_over_all_of_them(place: Path, tmp_path: Path) -> None:
    arrays, info = extracted(
        place, tmp_path, source="occurrences", walks="validation", representations=("after_block",)
    )
    walks = WalkDataset.open(place / "dataset").validation
    assert info["occurrences"] == walks.tokens.size
    for key, rows in _torch_rows(place, walks.tokens.astype(np.int64)).items():
        if key not in arrays:
            continue
        for token in range(NODES):
            mean = rows[walks.tokens == token].astype(np.float64).mean(axis=0)
            assert np.linalg.norm(arrays[key][token] - mean) < 1e-5 * np.linalg.norm(mean), (key, token)


def test_the_same_request_gives_the_same_bytes_and_another_takes_its_place(place: Path, tmp_path: Path) -> None:
    extracted(place, tmp_path)
    first = (tmp_path / "token_representations.npz").read_bytes()
    arrays, _ = extracted(place, tmp_path, representations=("ffn_up", "final_norm"))
    assert set(arrays) == {"layer_0_ffn_up", "layer_1_ffn_up", "final_norm"}
    extracted(place, tmp_path)
    assert (tmp_path / "token_representations.npz").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["representation_info.json", "token_representations.npz"]


def test_what_is_said_of_arrays_stays_until_others_are_there(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extracted(place, tmp_path)
    before = snapshot(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(representations, "_write_npz", full)
    with pytest.raises(UserError, match=r"token_representations.npz cannot be written \(No space left on device\)"):
        extracted(place, tmp_path, representations=("ffn_up",))
    assert snapshot(tmp_path) == before


def test_without_two_neighbours_that_occur_no_distance_is_told_and_another_column_is_read(
    place: Path, tmp_path: Path
) -> None:
    dataset = Path(shutil.copytree(place / "dataset", tmp_path / "dataset"))
    (dataset / "train.jsonl").write_text('{"walk": "0 14 0"}\n')
    named = {"dataset_dir": str(dataset), "text_column": "walk", "source": "occurrences"}
    arrays, info = extracted(place, tmp_path / "out", **named)
    assert info["graph_distances"] == {} and info["occurrences"] == 3
    assert np.isfinite(arrays["layer_0_after_block"][[0, 14]]).all()


def test_a_token_that_never_occurs_has_no_row_and_is_named(place: Path, tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    make_walks(dataset, nodes=NODES, train_walks=5, validation_walks=1, walk_length=3)
    info = token_representations(
        RepresentationsConfig(
            model_path=str(place / "run" / "final_model"),
            representation_dir=str(tmp_path / "out"),
            dataset_dir=str(dataset),
            source="occurrences",
            walks="validation",
        ),
        SILENT,
    )
    with np.load(tmp_path / "out" / "token_representations.npz") as arrays:
        missing = np.flatnonzero(np.isnan(arrays["layer_0_after_block"]).all(axis=1))
    assert len(missing) >= NODES - 3 and missing.tolist() == info["tokens_without_occurrence"]


def _torch_rows(place: Path, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Key -> [walks, t, width], by forward hooks."""
    model = AutoModelForCausalLM.from_pretrained(place / "run" / "final_model", local_files_only=True).eval()
    kept: dict[str, np.ndarray] = {}
    handles = []
    for i, layer in enumerate(model.model.layers):
        for key, module, side in (
            (f"layer_{i}_residual_before", layer, "input"),
            (f"layer_{i}_after_attention", layer.post_attention_layernorm, "input"),
            (f"layer_{i}_after_block", layer, "output"),
            (f"layer_{i}_ffn_gate", layer.mlp.gate_proj, "output"),
            (f"layer_{i}_ffn_up", layer.mlp.up_proj, "output"),
        ):

            def keep(_: Any, given: Any, gave: Any, key: str = key, side: str = side) -> None:
                value = given[0] if side == "input" else gave
                kept[key] = (value[0] if isinstance(value, tuple) else value).detach().numpy()

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model.model(input_ids=torch.from_numpy(tokens))
    for handle in handles:
        handle.remove()
    return kept
