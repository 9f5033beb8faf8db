"""The model that is trained: a preset and the data's vocabulary to a port's configuration, and first weights.

In: the path of a Hugging Face config.json, a vocabulary size, a seed. Out: the config.json that will lie beside the
weights, the port and its configuration; parameters drawn as transformers draws those of a Llama: normal with
`initializer_range` for matrices, ones for norms, zeros for biases.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_extract.devices.sharding import dotted
from jax_extract.errors import UserError, user_path
from jax_extract.weights.checkpoint import read_json
from jax_extract.weights.load import parameter_shapes
from models.ports import ModelConfig, Parameters, Port
from models.qwen2_jax_with_hooks import MODEL_TYPES
from models.registry import port_for

_DEFAULT_RANGE = 0.02  # transformers' initializer_range
_LARGEST_RANGE = 10.0
_ANY_SIZE = 2  # of a vocabulary that nobody knows yet
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


@dataclass(frozen=True)
class TrainedModel:
    """Attributes:
    said: config.json as it will be saved.
    """

    said: dict[str, Any]
    port: Port
    config: ModelConfig

    @classmethod
    def open(cls, path: str, vocab_size: int | None, max_length: int) -> TrainedModel:
        """UserError where the file is none, or describes what cannot be trained on these data.

        Args:
          vocab_size: None where the data are still to be made, and any size is as good.
        """
        said = {**_read(user_path(path, "--model_config"))}
        vocab_size = vocab_size or said.get("vocab_size") or _ANY_SIZE
        if (wanted := said.get("vocab_size")) not in (None, vocab_size):
            raise UserError(
                f"{path} has vocab_size {wanted} and the dataset {vocab_size} words; leave vocab_size out of it, so "
                "that the data decides"
            )
        if said.get("model_type") not in MODEL_TYPES:
            raise UserError(
                f"{path} has the model_type {said.get('model_type')!r}; training is for {', '.join(MODEL_TYPES)}"
            )
        if said.get("attention_dropout"):
            raise UserError(f"{path} asks for attention_dropout, which training here has not; set it to 0.0")
        initializer_range = said.setdefault("initializer_range", _DEFAULT_RANGE)
        if type(initializer_range) not in (int, float) or not 0 < initializer_range < _LARGEST_RANGE:
            raise UserError(f"{path} has initializer_range {initializer_range!r:.40}; it must be a positive number")
        said |= {"vocab_size": vocab_size, "dtype": "float32"}
        said.pop("torch_dtype", None)
        port = port_for(said)
        try:
            _require_written_down(said, port.fields[said["model_type"]].unread(said))
            config = port.config(said)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        if max_length > config.max_position_embeddings:
            raise UserError(
                f"--max_length {max_length} is more than the max_position_embeddings {config.max_position_embeddings} "
                f"of {path}; give less, or raise it there"
            )
        return cls(said, port, config)

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.shapes))

    @property
    def shapes(self) -> Parameters:
        return parameter_shapes(self.port, self.config, self.config.num_hidden_layers, "float32", head=True)

    def first_parameters(self, seed: int) -> Parameters:
        """float32 on the host; each parameter has a stream of its own, so that none depends on another's shape."""

        def draw(path: tuple[Any, ...], value: jax.ShapeDtypeStruct) -> np.ndarray:
            name = dotted(path)
            if "norm" in name:
                return np.ones(value.shape, np.float32)
            if name.endswith("bias"):
                return np.zeros(value.shape, np.float32)
            random = np.random.default_rng([seed, zlib.crc32(name.encode())])
            drawn = random.standard_normal(value.shape, np.float32)
            return drawn * np.float32(self.said["initializer_range"])

        return jax.tree_util.tree_map_with_path(draw, self.shapes)


def _require_written_down(said: Mapping[str, Any], unread: Sequence[str]) -> None:
    """A model that is made here is what its file says: no size is another model's, and no field is misspelled."""
    for name in _SIZES:
        if said.get(name) is None:
            raise UserError(f"config.json lacks {name!r}; write down how large the model is to be")
    if unread:
        raise UserError(
            f"config.json has {', '.join(map(repr, unread))}, which no model of that type reads; leave it out"
        )


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        there = sorted(str(p) for p in path.parent.glob("config_*.json"))
        mend = f"there are: {', '.join(there)}" if there else "give a Hugging Face config.json"
        raise UserError(f"there is no model configuration {path}, given as --model_config (CONFIG); {mend}")
    return read_json(path)
