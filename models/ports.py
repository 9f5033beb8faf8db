"""What a model port gives to the rest: the contract between one architecture's file and its callers.

In: nothing. Out: `TensorSource`, `ModelConfig`, `Family` and `Port`, the types that weight loading,
sharding and the compiled program are written against, so that they know no architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from flax import nnx
from jax import Array

from models.capture_plan import PATTERN_TOKENS
from models.config_fields import Fields
from models.hooks import HOOK_POINTS, HookPoints
from models.layers import Numerics, Rotary, TokenPlaces
from models.self_attention import AttentionRule, SelfAttention
from models.taps import Taps

Parameters = dict[str, Any]  # nested dictionaries of arrays, as `nnx.to_pure_dict` gives them
Gather = Callable[[str, Any], Any]  # (parameter path prefix, local shards) -> whole arrays
Carry = tuple[Array, Taps, SelfAttention]  # what goes from block to block; the stream is float32 [b, t, d]


class Module(NamedTuple):
    """Where Hugging Face's base model has a hook point.

    Attributes:
      path: of a submodule, `{i}` standing for the layer.
      side: what of it: what goes in, what comes out, or what attention in it computes with: queries and keys as they
        are multiplied, or the softmax weights.
      part: (how many groups of values, how many parts each group has, which of them), where a projection gives several
        hook points at once; None for all of it.
    """

    path: str
    side: Literal["input", "output", "query", "key", "pattern"]
    part: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class TensorSource:
    """Where one parameter comes from in a Hugging Face checkpoint.

    Attributes:
      names: tensor names, `{i}` standing for the layer; several are concatenated along their first axis.
      rows: first-axis length of each, in the same order.
      transposed: stored as [in, out], and turned when they are read; `rows` are those of the parameter.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    transposed: bool = False

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
    def parallel(self) -> bool:
        """Whether attention and the feed-forward network of a block read the same stream."""
        ...

    @property
    def attention(self) -> AttentionRule: ...
    @property
    def max_position_embeddings(self) -> int:
        """As config.json says; `longest_sample` is what can be computed."""
        ...

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        """The rotary embeddings that its layers have; none where positions are learned."""
        ...


@dataclass(frozen=True)
class Family:
    """What of an architecture its callers need, whoever computes it.

    Attributes:
      config: config.json as a dictionary -> the configuration; refuses what is not understood.
      hook_points: configuration -> the hook points this architecture has.
      modules: configuration -> where Hugging Face's base model has each hook point.
      prefix: of all tensors but the head, absent where only the base model was saved.
    """

    config: Callable[[Mapping[str, Any]], Any]
    hook_points: Callable[[Any], HookPoints]
    modules: Callable[[Any], Mapping[str, Module]]
    prefix: str


@dataclass(frozen=True)
class Port(Family):
    """An architecture that is computed here: pure functions over its frozen configuration.

    Attributes:
      fields: model type -> which fields of config.json are read, and what a missing one means.
      structure: (configuration, blocks, dtype, head) -> the NNX module that names and shapes the parameters, those of
        the head among them if asked for; call it under `nnx.eval_shape`.
      sources: (configuration) -> parameter path (dotted) -> where it comes from, the head's included.
      unused_tensors: (configuration) -> names that a checkpoint may have and the forward never reads.
      embed: (configuration, parameters, tokens int32 [b, t], where they lie, gather) -> the stream that enters the
        first block, float32 [b, t, d].
      shared: (configuration, where the tokens lie) -> what every block is given, computed once, as rotations are.
      block: (configuration, parameters of the layer, stream, taps, attention, layer int32, what is shared, numerics) ->
        the stream behind it, taps filled, attention with what it remembers.
      final_norm: (configuration, parameters, stream float32 [b, t, d], gather) -> float32 [b, t, d].
      logits: (configuration, parameters, rows of `final_norm` float32 [b, t, d], numerics, gather) -> float32
        [b, t, vocab], by the head.

    Parameters are this device's shards; `gather` makes those outside of blocks whole, at the moment they are needed.
    `models.decoder.Decoder` runs these one after the other.
    """

    fields: Mapping[str, Fields]
    structure: Callable[[Any, int, str, bool], nnx.Module]
    sources: Callable[[Any], Mapping[str, TensorSource]]
    unused_tensors: Callable[[Any], frozenset[str]]
    embed: Callable[[Any, Parameters, Array, TokenPlaces, Gather], Array]
    shared: Callable[[Any, TokenPlaces], Any]
    block: Callable[[Any, Parameters, Array, Taps, SelfAttention, Array, Any, Numerics], Carry]
    final_norm: Callable[[Any, Parameters, Array, Gather], Array]
    logits: Callable[[Any, Parameters, Array, Numerics, Gather], Array]


def hook_width(config: ModelConfig, hook: str, pattern_tokens: int = PATTERN_TOKENS) -> int:
    """Values a row has at a hook point.

    Args:
      pattern_tokens: those of the `CapturePlan`, which `attention_pattern` alone depends on.
    """
    match HOOK_POINTS[hook].width:
        case "d_model":
            return config.hidden_size
        case "d_ff":
            return config.intermediate_size
        case "query_heads":
            return config.query_rows
        case "key_heads":
            return config.num_key_value_heads * config.head_dim
        case "pattern":
            return config.num_attention_heads * pattern_tokens


def longest_sample(config: ModelConfig) -> int:
    """In tokens: what the model was made for, or what a scaling of its rotations makes of that."""
    most = config.max_position_embeddings
    return max((rotary.allows(most) for rotary in config.rotaries), default=most)


def same_rotations_to(config: ModelConfig) -> int | None:
    """Longest sample whose tokens are rotated as they are in any shorter one that they begin; None where all are."""
    return min((rotary.same_to for rotary in config.rotaries if rotary.same_to is not None), default=None)
