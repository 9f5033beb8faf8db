"""A Hugging Face model that is in memory already, as a checkpoint: its configuration and the tensors it holds now.

In: a transformers model of torch. Out: a `Checkpoint`, which reads from the model's own tensors what others read from
files. torch is what such a model is made of, so it is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_extract.errors import UserError
from jax_extract.weights.checkpoint import folder_tokenizer

# As safetensors and torch name them: the digest is that of the same tensors in a file.
_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def is_live_model(model: object) -> bool:
    """Whether it is a model of transformers, and no name of one."""
    config = getattr(model, "config", None)
    return callable(getattr(model, "state_dict", None)) and callable(getattr(config, "to_json_string", None))


def describe_live_models(model: object) -> str:
    """What to give instead of something that is no model."""
    return (
        f"{type(model).__name__} {model!r:.60} is no model; give a Hugging Face folder, a hub id, a .gguf file, or a "
        "model of transformers as from_pretrained makes it (of other libraries: save it with save_pretrained and give "
        "the folder)"
    )


class LiveCheckpoint:
    """Reads the tensors as they are when they are read; the model is not changed, and not kept on its device twice."""

    revision = None
    adapter = None
    notes: tuple[str, ...] = ()

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        """`tokenizer`: of the model; where it is None and the model came from a folder, the folder's."""
        self._tensors: dict[str, Any] = dict(model.state_dict())
        self._model, self._tokenizer = model, tokenizer
        self._folder = str(getattr(model, "name_or_path", "") or "")
        self.config: dict[str, Any] = {
            **json.loads(model.config.to_json_string()),
            "model_type": model.config.model_type,
            "architectures": [type(model).__name__],
        }

    @property
    def source(self) -> str:
        """The name under which it was loaded; else that of its class."""
        return self._folder or type(self._model).__name__

    @property
    def generation(self) -> dict[str, Any]:
        config = getattr(self._model, "generation_config", None)
        return {} if config is None else json.loads(config.to_json_string())

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        self._code(name)
        return tuple(self._tensors[name].shape)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        tensor = self._tensors[name].detach()
        tensor = (tensor[rows] if tensor.ndim else tensor).contiguous().cpu()
        if self._code(name) == "BF16":
            import torch

            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def digest(self, names: Iterable[str]) -> str:
        total = hashlib.sha256()
        for name in sorted(names):
            total.update(f"{name} {self._code(name)} {list(self.shape(name))}\n".encode())
            total.update(np.atleast_1d(self.read(name)).reshape(-1).view(np.uint8).data)
        return f"sha256:{total.hexdigest()}"

    def tokenizer(self) -> Any:
        if self._tokenizer is not None:
            return self._tokenizer
        if self._folder and (folder := Path(self._folder)).is_dir():
            return folder_tokenizer(folder)
        raise UserError(f"the model {self.source} came without a tokenizer; give it too, as in tokenizer=tokenizer")

    def _code(self, name: str) -> str:
        tensor = self._tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _CODES or tensor.device.type == "meta":
            where = "is not loaded" if tensor.device.type == "meta" else f"is held as {dtype}"
            raise UserError(
                f"tensor {name!r} of {self.source} {where}, which is not understood; load the model whole, as one of "
                f"{', '.join(_CODES)}, or give its folder"
            )
        return _CODES[dtype]
