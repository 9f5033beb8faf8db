"""A trained sparse autoencoder as a folder: cfg.json and sae_weights.safetensors, as SAELens has them.

In: weights as they are trained, on scaled rows. Out: weights for rows as they are, which SAELens, Neuronpedia's tools
and `SparseAutoencoder` load; and such a folder read again, whoever wrote it. The scale s of the input and t of the
output (the same of an autoencoder) are folded in: W_enc * s, W_dec / t, b_dec / t. TopK and BatchTopK choose by
activations scaled with the decoder's norms, which are folded in too, so that every direction of theirs has norm 1;
BatchTopK is stored as JumpReLU, with one threshold. A crosscoder is stored as an SAE of its layers' rows side by side.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_extract.errors import UserError, damage_is_told
from jax_extract.sae.architecture import OVER_BATCH, WITH_K, Architecture
from jax_extract.sae.parameters import Parameters, norms_by_layer

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
SAELENS_VERSION = "6.54.12"  # whose format this is; its loader takes what has none, or one before 6, for an older one
Scale = float | np.ndarray
_SMALLEST_NORM = 1e-8  # as SAELens clamps norms that it folds in
_AS_TRANSCODER = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}


def stored_name(architecture: Architecture) -> str:
    """SAELens' name of the architecture of which the folder is; UserError where it has none."""
    name = "jumprelu" if architecture.name in OVER_BATCH else architecture.name
    if not architecture.is_transcoder:
        return name
    if name not in _AS_TRANSCODER:
        raise UserError(
            f"SAELens has no transcoder of the architecture {architecture.name!r}; give standard, jumprelu, batchtopk "
            "or matryoshka_batchtopk"
        )
    return _AS_TRANSCODER[name]


def folded(architecture: Architecture, params: Mapping[str, Any], scale_in: Scale, scale_out: Scale) -> Parameters:
    """float32 arrays by name, for rows as they are, computed in float64; BatchTopK wants `with_threshold` besides.

    Args:
      scale_in, scale_out: of the input and of the output; of a crosscoder one of each layer.
    """
    found = {name: np.asarray(value, np.float64) for name, value in params.items()}
    norms = norms_by_layer(found["W_dec"], architecture.layers).sum(axis=1)
    of_in, of_out = (
        _by_value(scale, width) for scale, width in ((scale_in, architecture.d_in), (scale_out, architecture.d_out))
    )
    found["W_enc"] = found["W_enc"] * of_in[:, None]
    found["W_dec"] = found["W_dec"] / of_out
    found["b_dec"] = found["b_dec"] / of_out
    if architecture.name in WITH_K:
        norms = np.maximum(norms / of_out.mean(), _SMALLEST_NORM)
        found["W_enc"] = found["W_enc"] * norms
        found["b_enc"] = found["b_enc"] * norms
        found["W_dec"] = found["W_dec"] / norms[:, None]
    if architecture.name == "jumprelu":
        found["threshold"] = np.maximum(found["threshold"], 0)
    return {name: np.ascontiguousarray(value, np.float32) for name, value in found.items()}


def _by_value(scale: Scale, width: int) -> np.ndarray:
    """float64 [width]."""
    of_layers = np.atleast_1d(np.asarray(scale, np.float64))
    return np.repeat(of_layers, width // len(of_layers))


def with_threshold(tensors: Parameters, threshold: float) -> Parameters:
    """The same with one threshold for all latents, in units of the folded activations."""
    return {**tensors, "threshold": np.full_like(tensors["b_enc"], threshold)}


def config_of(architecture: Architecture, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """cfg.json of a folder.

    Args:
      metadata: model_name, hook_name and whatever else is to be said, in JSON.
    """
    config: dict[str, Any] = {
        "architecture": stored_name(architecture),
        "d_in": architecture.d_in,
        "d_sae": architecture.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": architecture.centred,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "training_architecture": architecture.name,
            **metadata,
        },
    }
    if architecture.name == "topk":
        config |= {"k": architecture.k, "rescale_acts_by_decoder_norm": False}
    if architecture.is_transcoder:
        config["d_out"] = architecture.d_out
    return config


def write(folder: Path, config: Mapping[str, Any], tensors: Parameters) -> None:
    """Into a folder that is there; OSError where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    (folder / CONFIG_FILE).write_text(json.dumps(dict(config), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    try:
        save_file(tensors, folder / WEIGHTS_FILE)
    except SafetensorError as error:  # its way to say that the disk is full
        raise OSError(errno.EIO, str(error), str(folder / WEIGHTS_FILE)) from None


def read(folder: Path) -> tuple[dict[str, Any], Parameters]:
    """cfg.json and float32 arrays of a folder.

    Raises:
      UserError: it is none, or it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}, so it is no sparse autoencoder; give a folder that has both")
    with damage_is_told(str(folder / CONFIG_FILE), "write it again, or restore it from a copy"):
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
            raise ValueError("it names no architecture")
    with damage_is_told(str(folder / WEIGHTS_FILE), "write it again, or restore it from a copy"):
        try:
            loaded = load_file(folder / WEIGHTS_FILE)
        except SafetensorError as error:
            raise ValueError(str(error)) from None
        tensors = {name: np.asarray(value, np.float32) for name, value in loaded.items()}
    return config, tensors
