"""Parameters to a Hugging Face folder: the way of `load`, backwards.

In: a port, its configuration, parameters. Out: tensors by the names that transformers gives them, in
model.safetensors.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.ports import ModelConfig, Parameters, Port

WEIGHTS_FILE = "model.safetensors"


def hugging_face_tensors(port: Port, config: ModelConfig, params: Parameters) -> dict[str, np.ndarray]:
    """Every parameter, float32, on the host, under its name in a checkpoint."""
    tensors: dict[str, np.ndarray] = {}
    for path, source in port.sources(config).items():
        value: Any = params
        for key in path.split("."):
            value = value[key]
        whole = np.asarray(value)
        for layer in range(len(whole)) if source.per_layer else (None,):
            rows = whole if layer is None else whole[layer]
            pieces = np.split(rows, np.cumsum(source.rows)[:-1])
            for name, piece in zip(source.names, pieces, strict=True):
                stored = piece.T if source.transposed else piece
                tensors[name.replace("{i}", str(layer))] = np.ascontiguousarray(stored)
    return tensors


def write_weights(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """model.safetensors, as transformers marks its own; OSError where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(dict(tensors), folder / WEIGHTS_FILE, {"format": "pt"})
    except SafetensorError as error:  # its way to say that the disk is full
        raise OSError(errno.EIO, str(error), str(folder / WEIGHTS_FILE)) from None
