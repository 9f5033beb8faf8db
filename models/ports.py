"""What a model port gives to the rest: the contract between one architecture's file and its callers.

In: nothing. Out: `TensorSource`, `ModelConfig` and `Port`, the types that weight loading,
sharding and the compiled program are written against, so that they know no architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from flax import nnx
from jax import Array

from models.hooks import Taps
from models.layers import Numerics

Parameters = dict[str, Any]  # nested dictionaries of arrays, as `nnx.to_pure_dict` gives them
Gather = Callable[[str, Any], Any]  # (parameter path prefix, local shards) -> whole arrays


@dataclass(frozen=True)
class TensorSource:
    """Where one parameter comes from in a Hugging Face checkpoint.

    Attributes:
      names: tensor names, `{i}` standing for the layer; several are concatenated along their first axis.
      rows: first-axis length of each, in the same order.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]

    @property
    def per_layer(self) -> bool:
        return "{i}" in self.names[0]


class ModelConfig(Protocol):
    """The figures that callers need of any architecture; each port's own dataclass has more."""

    @property
    def model_type(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def query_rows(self) -> int:
        """Outputs of the query projection: values that all query heads of a token have together."""
        ...

    @property
    def windows(self) -> tuple[int, ...]:
        """Per layer, how many positions a query sees, itself included, 0 for all; empty where no layer has one."""
        ...

    @property
    def max_position_embeddings(self) -> int: ...


@dataclass(frozen=True)
class Port:
    """One architecture: pure functions over its frozen configuration.

    Attributes:
      config: config.json as a dictionary -> the port's configuration; refuses what it does not understand.
      hook_points: configuration -> the hook points this architecture has.
      structure: (configuration, blocks, dtype) -> the NNX module that names and shapes the parameters;
        call it under `nnx.eval_shape`.
      sources: (configuration) -> parameter path (dotted) -> where it comes from.
      unused_tensors: (configuration) -> names that a checkpoint may have and the forward never reads.
      forward: (configuration, parameters, tokens int32 [batch, length], taps, numerics, gather) -> taps.
    """

    config: Callable[[Mapping[str, Any]], Any]
    hook_points: Callable[[Any], tuple[str, ...]]
    structure: Callable[[Any, int, str], nnx.Module]
    sources: Callable[[Any], Mapping[str, TensorSource]]
    unused_tensors: Callable[[Any], frozenset[str]]
    forward: Callable[[Any, Parameters, Array, Taps, Numerics, Gather], Taps]


def hook_width(config: ModelConfig, width: str) -> int:
    """Values a row has at a hook point of width `d_model` or `d_ff`."""
    return config.hidden_size if width == "d_model" else config.intermediate_size
