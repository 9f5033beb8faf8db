"""GPT-NeoX with hook points, the architecture of Pythia: parallel residual, partial rotation.

In: a Hugging Face config.json, sharded parameters, token ids, taps. Out: taps with the captured activations.
Attention and the feed-forward network read the same stream, each through a norm of its own, and both add to it, so
there is no stream between them; with `use_parallel_residual` false a block is sequential and has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from models import head, hf_config
from models.config_fields import Fields
from models.feed_forward import ungated
from models.hf_config import size, switch
from models.hooks import UNGATED, HookPoints
from models.layers import ACTIVATIONS, Numerics, Rotary, TokenPlaces, embed, layer_norm, rotate
from models.ports import Carry, Gather, Module, Parameters, Port, TensorSource
from models.self_attention import AttentionRule, SelfAttention, attend
from models.taps import Taps

MODEL_TYPES = ("gpt_neox",)


@dataclass(frozen=True)
class GPTNeoXConfig:
    """Shape and variant of one model; sizes in values, positions in tokens.

    Attributes (beyond config.json's own names):
      rotated: how many values of each head are rotated.
      parallel: whether attention and the feed-forward network read the same stream.
      attention_bias: whether attention's projections have one.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    rotary: Rotary
    rotated: int
    layer_norm_eps: float = 1e-5
    max_position_embeddings: int = 2_048
    activation: str = "gelu"
    parallel: bool = True
    attention_bias: bool = True
    tie_word_embeddings: bool = False
    model_type: str = "gpt_neox"

    def __post_init__(self) -> None:
        hf_config.require_whole_heads(self.hidden_size, self.num_attention_heads, self.num_key_value_heads)

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def query_rows(self) -> int:
        return self.hidden_size

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        return (self.rotary,)

    @property
    def attention(self) -> AttentionRule:
        return AttentionRule()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> GPTNeoXConfig:
        """Reads config.json in the spelling of transformers 4 or 5; UserError on anything not understood."""
        return _from_hf(config)

    @classmethod
    def pythia_70m(cls) -> GPTNeoXConfig:
        return cls(50_304, 512, 2_048, 6, 8, Rotary(1e4), 16)

    @classmethod
    def pythia_410m(cls) -> GPTNeoXConfig:
        return cls(50_304, 1_024, 4_096, 24, 16, Rotary(1e4), 16)

    @classmethod
    def pythia_1_4b(cls) -> GPTNeoXConfig:
        return cls(50_304, 2_048, 8_192, 24, 16, Rotary(1e4), 32)

    @classmethod
    def pythia_6_9b(cls) -> GPTNeoXConfig:
        return replace(
            cls.pythia_1_4b(),
            vocab_size=50_432,
            hidden_size=4_096,
            intermediate_size=16_384,
            num_hidden_layers=32,
            num_attention_heads=32,
        )


# ---------------------------------------------------------------------------------------- parameters


class Blocks(nnx.Module):
    """Parameters of all blocks, stacked on a leading layer axis; matrices are [layers, out, in]."""

    def __init__(self, config: GPTNeoXConfig, layers: int, dtype: str) -> None:
        d, f = config.hidden_size, config.intermediate_size

        def parameter(*shape: int) -> nnx.Param[Array]:
            return nnx.Param(jnp.zeros((layers, *shape), dtype))

        self.attention_norm, self.attention_norm_bias = parameter(d), parameter(d)
        self.qkv, self.attention_output = parameter(3 * d, d), parameter(d, d)
        if config.attention_bias:
            self.qkv_bias, self.attention_output_bias = parameter(3 * d), parameter(d)
        self.ffn_norm, self.ffn_norm_bias = parameter(d), parameter(d)
        self.up, self.up_bias = parameter(f, d), parameter(f)
        self.down, self.down_bias = parameter(d, f), parameter(d)


class GPTNeoX(nnx.Module):
    """The model: embedding [vocab, d], stacked blocks, final norm [d]; and, if asked for, the head [vocab, d]."""

    def __init__(self, config: GPTNeoXConfig, layers: int, dtype: str, with_head: bool = False) -> None:
        d = config.hidden_size
        self.embedding = nnx.Param(jnp.zeros((config.vocab_size, d), dtype))
        self.blocks = Blocks(config, layers, dtype)
        self.final_norm = nnx.Param(jnp.zeros((d,), dtype))
        self.final_norm_bias = nnx.Param(jnp.zeros((d,), dtype))
        if with_head and not config.tie_word_embeddings:
            self.head = nnx.Param(jnp.zeros((config.vocab_size, d), dtype))


def sources(config: GPTNeoXConfig) -> dict[str, TensorSource]:
    """Parameter path -> its tensors in a Hugging Face checkpoint."""
    d, f = config.hidden_size, config.intermediate_size

    def one(name: str, rows: int) -> TensorSource:
        return TensorSource((f"gpt_neox.{name}",), (rows,))

    table = {
        "embedding": one("embed_in.weight", config.vocab_size),
        "final_norm": one("final_layer_norm.weight", d),
        "final_norm_bias": one("final_layer_norm.bias", d),
    }
    if not config.tie_word_embeddings:
        table["head"] = TensorSource(("embed_out.weight",), (config.vocab_size,))
    for ours, theirs, rows in (
        ("attention_norm", "input_layernorm", d),
        ("qkv", "attention.query_key_value", 3 * d),
        ("attention_output", "attention.dense", d),
        ("ffn_norm", "post_attention_layernorm", d),
        ("up", "mlp.dense_h_to_4h", f),
        ("down", "mlp.dense_4h_to_h", d),
    ):
        table[f"blocks.{ours}"] = one(f"layers.{{i}}.{theirs}.weight", rows)
        if config.attention_bias or not theirs.startswith("attention."):
            table[f"blocks.{ours}_bias"] = one(f"layers.{{i}}.{theirs}.bias", rows)
    return table


def unused_tensors(config: GPTNeoXConfig) -> frozenset[str]:
    """A second copy of a head that is the embedding, and the masks and rotary tables that old checkpoints store."""
    buffers = ("bias", "masked_bias", "rotary_emb.inv_freq")
    return frozenset(
        {"embed_out.weight"}
        | {f"gpt_neox.layers.{i}.attention.{name}" for i in range(config.num_hidden_layers) for name in buffers}
    )


# ------------------------------------------------------------------------------------------- forward


def embedded(config: GPTNeoXConfig, params: Parameters, tokens: Array, places: TokenPlaces, gather: Gather) -> Array:
    return embed(gather("embedding", params["embedding"]), tokens)


def rotations(config: GPTNeoXConfig, places: TokenPlaces) -> tuple[Array, Array]:
    return config.rotary.tables(places, config.rotated)


def final_norm(config: GPTNeoXConfig, params: Parameters, x: Array, gather: Gather) -> Array:
    weight, bias = (gather(name, params[name]) for name in ("final_norm", "final_norm_bias"))
    return layer_norm(x, weight, bias, config.layer_norm_eps)


def block(
    config: GPTNeoXConfig,
    p: Parameters,
    x: Array,
    taps: Taps,
    attention: SelfAttention,
    layer: Array,
    tables: tuple[Array, Array],
    numerics: Numerics,
) -> Carry:
    """One decoder block on the residual stream x, float32 [b, t, d]; `p` holds this layer's parameters."""
    x, taps = taps.visit("residual_before", layer, x)
    with jax.named_scope("attention"):
        normed = layer_norm(x, p["attention_norm"], p["attention_norm_bias"], config.layer_norm_eps)
        query, key, value = _heads(config, numerics.linear(normed, p["qkv"], p.get("qkv_bias")))
        (query, key, value), taps = taps.visit_heads(layer, query=query, key=key, value=value)
        query, key = rotate(query, tables), rotate(key, tables)
        (query, key), taps = taps.visit_heads(layer, query_rotated=query, key_rotated=key)
        mixed, taps, attention = attend(config.attention, attention, layer, query, key, value, taps, numerics)
        update = numerics.linear(mixed, p["attention_output"], p.get("attention_output_bias"))
    update, taps = taps.visit("attention_out", layer, update)
    if config.parallel:
        entering, x = x, x + update
    else:
        x, taps = taps.visit("after_attention", layer, x + update)
        entering = x
    with jax.named_scope("ffn"):
        normed = layer_norm(entering, p["ffn_norm"], p["ffn_norm_bias"], config.layer_norm_eps)
        update, taps = ungated(p, normed, taps, layer, ACTIVATIONS[config.activation], numerics)
    update, taps = taps.visit("ffn_out", layer, update)
    x, taps = taps.visit("after_block", layer, x + update)
    return x, taps, attention


def _heads(config: GPTNeoXConfig, qkv: Array) -> tuple[Array, Array, Array]:
    """[b, t, heads * 3 h], each head's query, key and value side by side -> each as [b, t, heads, h]."""
    b, t, _ = qkv.shape
    query, key, value = jnp.split(qkv.reshape(b, t, config.num_attention_heads, 3 * config.head_dim), 3, axis=-1)
    return query, key, value


# ------------------------------------------------------------------------------------- configuration

FIELDS: Mapping[str, Fields] = {
    "gpt_neox": Fields(
        read={
            "rope_scaling": None,
            "rope_parameters": None,
            "original_max_position_embeddings": None,
            "rotary_emb_base": 10_000.0,
            "rotary_pct": 0.25,
            "vocab_size": 50_432,
            "hidden_size": 6_144,
            "num_hidden_layers": 44,
            "num_attention_heads": 64,
            "head_dim": None,
            "intermediate_size": 24_576,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 2_048,
            "use_parallel_residual": True,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
        ignored=frozenset("attention_dropout attention_probs_dropout_prob hidden_dropout_prob".split()),
        echoes={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    )
}


def _from_hf(config: Mapping[str, Any]) -> GPTNeoXConfig:
    model_type = hf_config.require_model_type(config, MODEL_TYPES)
    config = FIELDS[model_type].complete(config)
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    hf_config.require(config, "head_dim", (None, hidden // heads))
    rotated = hf_config.rotated_width(config, hidden // heads, 0.25, "rotary_pct")
    return GPTNeoXConfig(
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=size(config, "intermediate_size"),
        num_hidden_layers=size(config, "num_hidden_layers"),
        num_attention_heads=heads,
        rotary=hf_config.rotary({**config, "rope_theta": config["rotary_emb_base"]}, width=rotated),
        rotated=rotated,
        layer_norm_eps=hf_config.positive(config, "layer_norm_eps"),
        max_position_embeddings=size(config, "max_position_embeddings"),
        activation=hf_config.require(config, "hidden_act", tuple(ACTIVATIONS)),
        parallel=switch(config, "use_parallel_residual"),
        attention_bias=switch(config, "attention_bias"),
        tie_word_embeddings=switch(config, "tie_word_embeddings"),
    )


def _hook_points(config: GPTNeoXConfig) -> HookPoints:
    return {hook: alias for hook, alias in UNGATED.items() if hook != "after_attention" or not config.parallel}


def _modules(config: GPTNeoXConfig) -> dict[str, Module]:
    heads = config.num_attention_heads
    return {
        "embeddings": Module("embed_in", "output"),
        "residual_before": Module("layers.{i}", "input"),
        "query": Module("layers.{i}.attention.query_key_value", "output", (heads, 3, 0)),
        "key": Module("layers.{i}.attention.query_key_value", "output", (heads, 3, 1)),
        "query_rotated": Module("layers.{i}.attention", "query"),
        "key_rotated": Module("layers.{i}.attention", "key"),
        "value": Module("layers.{i}.attention.query_key_value", "output", (heads, 3, 2)),
        "attention_pattern": Module("layers.{i}.attention", "pattern"),
        "attention_heads": Module("layers.{i}.attention.dense", "input"),
        "attention_out": Module("layers.{i}.attention", "output"),
        "after_attention": Module("layers.{i}.post_attention_layernorm", "input"),
        "ffn_up": Module("layers.{i}.mlp.dense_h_to_4h", "output"),
        "ffn_hidden": Module("layers.{i}.mlp.dense_4h_to_h", "input"),
        "ffn_out": Module("layers.{i}.mlp", "output"),
        "after_block": Module("layers.{i}", "output"),
        "final_norm": Module("final_layer_norm", "output"),
    }


PORT = Port(
    config=GPTNeoXConfig.from_hf,
    fields=FIELDS,
    hook_points=_hook_points,
    structure=GPTNeoX,
    sources=sources,
    unused_tensors=unused_tensors,
    embed=embedded,
    shared=rotations,
    block=block,
    final_norm=final_norm,
    logits=head.logits,
    prefix="gpt_neox.",
    modules=_modules,
)
