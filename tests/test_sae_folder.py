"""What is stored is what was trained: for rows as they are, in SAELens' hands as in ours."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_cases import CASES, D_IN, D_SAE, SaeCase, rows

from jax_extract.errors import UserError
from jax_extract.sae.architecture import Architecture
from jax_extract.sae.autoencoder import SparseAutoencoder
from jax_extract.sae.folder import CONFIG_FILE, WEIGHTS_FILE, config_of, folded, with_threshold, write
from jax_extract.sae.parameters import first_parameters

SCALE, THRESHOLD = 0.37, 0.11


def trained_like(architecture: Architecture) -> dict[str, np.ndarray]:
    """Weights of which none is as it began."""
    random = np.random.default_rng(3)
    return {
        name: value + 0.05 * random.standard_normal(value.shape).astype(np.float32)
        for name, value in first_parameters(architecture, 0).items()
    }


def stored(case: SaeCase, folder: Path) -> tuple[SparseAutoencoder, np.ndarray, np.ndarray]:
    """Read again; rows; and the latents and reconstructions that the trained weights have of them, side by side."""
    architecture = case.architecture_of()
    params = trained_like(architecture)
    folder.mkdir()
    metadata = {"model_name": "a model", "hook_name": "blocks.12.hook_resid_post"}
    write(folder, config_of(architecture, metadata), for_rows_as_they_are(architecture, params, SCALE))
    x = rows(1)[0] / np.float32(SCALE)
    f = by_hand(architecture, params, x * SCALE)
    out = (f @ params["W_dec"] + params["b_dec"]) / SCALE
    return SparseAutoencoder.open(folder), x, out


def for_rows_as_they_are(architecture: Architecture, params: dict[str, np.ndarray], scale_out: float) -> Any:
    tensors = folded(architecture, params, SCALE, scale_out)
    over_batch = architecture.name in ("batchtopk", "matryoshka_batchtopk")
    return with_threshold(tensors, THRESHOLD / scale_out) if over_batch else tensors


def by_hand(architecture: Architecture, params: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The latents that trained weights have of scaled rows, in float64."""
    p = {name: value.astype(np.float64) for name, value in params.items()}
    z = (x - p["b_dec"] * architecture.centred if architecture.centred else x) @ p["W_enc"]
    if architecture.name == "gated":
        return (z + p["b_gate"] > 0) * np.maximum(z * np.exp(p["r_mag"]) + p["b_mag"], 0)
    pre, norms = z + p["b_enc"], np.linalg.norm(p["W_dec"], axis=1)
    if architecture.name == "jumprelu":
        return pre * (pre > np.maximum(p["threshold"], 0))
    if architecture.name == "topk":
        kth = np.sort(pre * norms, axis=1)[:, -architecture.k]
        return np.maximum(pre, 0) * (pre * norms >= kth[:, None])
    return np.maximum(pre, 0) * (pre * norms > THRESHOLD if "batchtopk" in architecture.name else 1)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_a_stored_sae_reconstructs_rows_as_they_are(case: SaeCase, tmp_path: Path) -> None:
    sae, x, expected = stored(case, tmp_path / "sae")
    assert 0 < float((sae.encode(x) > 0).mean()) < 1
    assert np.linalg.norm(np.asarray(sae(x)) - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_saelens_loads_it_and_finds_the_same_latents_and_reconstruction(case: SaeCase, tmp_path: Path) -> None:
    sae, x, _ = stored(case, tmp_path / "sae")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import SAE

        theirs = SAE.load_from_disk(str(tmp_path / "sae"))
    assert theirs.cfg.metadata.hook_name == "blocks.12.hook_resid_post"
    with torch.no_grad():
        f = theirs.encode(torch.from_numpy(x)).numpy()
        out = theirs(torch.from_numpy(x)).numpy()
    for ours, expected in ((sae.encode(x), f), (sae(x), out)):
        assert np.linalg.norm(np.asarray(ours) - expected) <= 1e-5 * np.linalg.norm(expected)


def test_a_transcoder_is_one_of_saelens_too(tmp_path: Path) -> None:
    architecture = Architecture("batchtopk", D_IN, 10, D_SAE, centred=False)
    params = trained_like(architecture)
    write(tmp_path, config_of(architecture, {}), for_rows_as_they_are(architecture, params, 2.0))
    sae, [x] = SparseAutoencoder.open(tmp_path), rows(1)
    f = by_hand(architecture, params, x * SCALE)
    expected = (f @ params["W_dec"] + params["b_dec"]) / 2.0
    assert np.linalg.norm(np.asarray(sae(x)) - expected) <= 1e-5 * np.linalg.norm(expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import SAE

        theirs = SAE.load_from_disk(str(tmp_path))
    with torch.no_grad():
        out = theirs(torch.from_numpy(x)).numpy()
    assert out.shape == (len(x), 10)
    assert np.linalg.norm(out - expected) <= 1e-5 * np.linalg.norm(expected)


def test_a_transcoder_that_saelens_has_not_is_refused() -> None:
    with pytest.raises(UserError, match="SAELens has no transcoder of the architecture 'topk'"):
        config_of(Architecture("topk", D_IN, 10, D_SAE, k=3, centred=False), {})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "temporal"}, "has the architecture 'temporal', which is not understood"),
        ({"architecture": 3}, "is damaged"),
        ({"normalize_activations": "layer_norm"}, "is not folded into its weights"),
        ({"d_sae": 7}, "has W_enc of (24, 192), and cfg.json says (24, 7)"),
        ({"d_in": None}, "lacks d_in or d_sae"),
    ],
)
def test_a_folder_that_is_not_understood_is_refused_with_what_is_wrong(
    change: dict[str, object], said: str, tmp_path: Path
) -> None:
    stored(CASES["standard"], tmp_path / "sae")
    config = tmp_path / "sae" / CONFIG_FILE
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(UserError) as refusal:
        SparseAutoencoder.open(tmp_path / "sae")
    assert said in str(refusal.value)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_folder_that_lacks_a_file_or_is_cut_short_is_named(name: str, tmp_path: Path) -> None:
    stored(CASES["standard"], tmp_path / "sae")
    path = tmp_path / "sae" / name
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=f"{name} is damaged"):
        SparseAutoencoder.open(tmp_path / "sae")
    path.unlink()
    with pytest.raises(UserError, match=f"has no {name}, so it is no sparse autoencoder"):
        SparseAutoencoder.open(tmp_path / "sae")


def test_rows_of_another_width_are_refused(tmp_path: Path) -> None:
    sae, *_ = stored(CASES["standard"], tmp_path / "sae")
    with pytest.raises(
        UserError, match=r"rows of shape \[2, 5\] are not those of this SAE, which encodes \[rows, 24\]"
    ):
        sae.encode(np.zeros((2, 5)))
