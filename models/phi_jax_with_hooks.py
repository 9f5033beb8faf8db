"""Phi-1, Phi-1.5 and Phi-2 with hook points: parallel blocks behind one norm, partial rotation.

In: a Hugging Face config.json, sharded parameters, token ids, taps. Out: taps with the captured activations.
Attention and the feed-forward network read the same normed stream, and both add to it, so there is no stream
between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
from models.layers import ACTIVATIONS, Numerics, Rotary, TokenPlaces, embed, layer_norm, rotate, split_heads
from models.ports import Carry, Gather, Module, Parameters, Port, TensorSource
from models.self_attention import AttentionRule, SelfAttention, attend
from models.taps import Taps

MODEL_TYPES = ("phi",)


@dataclass(frozen=True)
class PhiConfig:
    """Shape and variant of one model; sizes in values, positions in tokens.

    Attributes (beyond config.json's own names):
      rotated: how many values of each head are rotated.
      qk_norm: layer norm over each query and key head before the rotation.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rotary: Rotary
    rotated: int
    layer_norm_eps: float = 1e-5
    max_position_embeddings: int = 2_048
    activation: str = "gelu_new"
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    model_type: str = "phi"

    def __post_init__(self) -> None:
        hf_config.require_whole_heads(self.hidden_size, self.num_attention_heads, self.num_key_value_heads)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def query_rows(self) -> int:
        return self.hidden_size

    @property
    def key_rows(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def parallel(self) -> bool:
        return True

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        return (self.rotary,)

    @property
    def attention(self) -> AttentionRule:
        return AttentionRule()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> PhiConfig:
        """Reads config.json in the spelling of transformers 4 or 5; UserError on anything not understood."""
        return _from_hf(config)

    @classmethod
    def phi_1_5(cls) -> PhiConfig:
        return cls(51_200, 2_048, 8_192, 24, 32, 32, Rotary(1e4), 32)

    @classmethod
    def phi_2(cls) -> PhiConfig:
        return cls(51_200, 2_560, 10_240, 32, 32, 32, Rotary(1e4), 32)


# ---------------------------------------------------------------------------------------- parameters


class Blocks(nnx.Module):
    """Parameters of all blocks, stacked on a leading layer axis; matrices are [layers, out, in]."""

    def __init__(self, config: PhiConfig, layers: int, dtype: str) -> None:
        d, f = config.hidden_size, config.intermediate_size
        qkv = config.query_rows + 2 * config.key_rows

        def parameter(*shape: int) -> nnx.Param[Array]:
            return nnx.Param(jnp.zeros((layers, *shape), dtype))

        self.norm, self.norm_bias = parameter(d), parameter(d)
        self.qkv, self.qkv_bias = parameter(qkv, d), parameter(qkv)
        self.attention_output, self.attention_output_bias = parameter(d, config.query_rows), parameter(d)
        self.up, self.up_bias = parameter(f, d), parameter(f)
        self.down, self.down_bias = parameter(d, f), parameter(d)
        if config.qk_norm:
            self.query_norm, self.query_norm_bias = parameter(config.head_dim), parameter(config.head_dim)
            self.key_norm, self.key_norm_bias = parameter(config.head_dim), parameter(config.head_dim)


class Phi(nnx.Module):
    """The model: embedding [vocab, d], stacked blocks, final norm [d]; and, if asked for, the head [vocab, d]."""

    def __init__(self, config: PhiConfig, layers: int, dtype: str, with_head: bool = False) -> None:
        d = config.hidden_size
        self.embedding = nnx.Param(jnp.zeros((config.vocab_size, d), dtype))
        self.blocks = Blocks(config, layers, dtype)
        self.final_norm = nnx.Param(jnp.zeros((d,), dtype))
        self.final_norm_bias = nnx.Param(jnp.zeros((d,), dtype))
        if with_head:
            self.head_bias = nnx.Param(jnp.zeros((config.vocab_size,), dtype))
        if with_head and not config.tie_word_embeddings:
            self.head = nnx.Param(jnp.zeros((config.vocab_size, d), dtype))


def sources(config: PhiConfig) -> dict[str, TensorSource]:
    """Parameter path -> its tensors in a Hugging Face checkpoint."""
    d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
    table = {
        "embedding": TensorSource(("model.embed_tokens.weight",), (config.vocab_size,)),
        "head_bias": TensorSource(("lm_head.bias",), (config.vocab_size,)),
    }
    if not config.tie_word_embeddings:
        table["head"] = TensorSource(("lm_head.weight",), (config.vocab_size,))
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        table[f"final_norm{suffix}"] = TensorSource((f"model.final_layernorm.{kind}",), (d,))
        for ours, rows in {
            "norm": {"input_layernorm": d},
            "qkv": {
                "self_attn.q_proj": config.query_rows,
                "self_attn.k_proj": config.key_rows,
                "self_attn.v_proj": config.key_rows,
            },
            "attention_output": {"self_attn.dense": d},
            "up": {"mlp.fc1": f},
            "down": {"mlp.fc2": d},
            **(
                {"query_norm": {"self_attn.q_layernorm": h}, "key_norm": {"self_attn.k_layernorm": h}}
                if config.qk_norm
                else {}
            ),
        }.items():
            names = tuple(f"model.layers.{{i}}.{name}.{kind}" for name in rows)
            table[f"blocks.{ours}{suffix}"] = TensorSource(names, tuple(rows.values()))
    return table


def unused_tensors(config: PhiConfig) -> frozenset[str]:
    """A second copy of a head that is the embedding."""
    return frozenset({"lm_head.weight"})


# ------------------------------------------------------------------------------------------- forward


def embedded(config: PhiConfig, params: Parameters, tokens: Array, places: TokenPlaces, gather: Gather) -> Array:
    return embed(gather("embedding", params["embedding"]), tokens)


def rotations(config: PhiConfig, places: TokenPlaces) -> tuple[Array, Array]:
    return config.rotary.tables(places, config.rotated)


def final_norm(config: PhiConfig, params: Parameters, x: Array, gather: Gather) -> Array:
    weight, bias = (gather(name, params[name]) for name in ("final_norm", "final_norm_bias"))
    return layer_norm(x, weight, bias, config.layer_norm_eps)


def block(
    config: PhiConfig,
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
    normed = layer_norm(x, p["norm"], p["norm_bias"], config.layer_norm_eps)
    with jax.named_scope("attention"):
        qkv = numerics.linear(normed, p["qkv"], p["qkv_bias"])
        query, key, value = split_heads(qkv, config.num_attention_heads, config.num_key_value_heads)
        (query, key, value), taps = taps.visit_heads(layer, query=query, key=key, value=value)
        if config.qk_norm:
            query = layer_norm(query, p["query_norm"], p["query_norm_bias"], config.layer_norm_eps)
            key = layer_norm(key, p["key_norm"], p["key_norm_bias"], config.layer_norm_eps)
        query, key = rotate(query, tables), rotate(key, tables)
        (query, key), taps = taps.visit_heads(layer, query_rotated=query, key_rotated=key)
        mixed, taps, attention = attend(config.attention, attention, layer, query, key, value, taps, numerics)
        update = numerics.linear(mixed, p["attention_output"], p["attention_output_bias"])
    update, taps = taps.visit("attention_out", layer, update)
    x = x + update
    with jax.named_scope("ffn"):
        update, taps = ungated(p, normed, taps, layer, ACTIVATIONS[config.activation], numerics)
    update, taps = taps.visit("ffn_out", layer, update)
    x, taps = taps.visit("after_block", layer, x + update)
    return x, taps, attention


# ------------------------------------------------------------------------------------- configuration

FIELDS: Mapping[str, Fields] = {
    "phi": Fields(
        read={
            **hf_config.ROPE_FIELDS,
            "partial_rotary_factor": 0.5,
            "vocab_size": 51_200,
            "hidden_size": 2_048,
            "intermediate_size": 8_192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "head_dim": None,
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 2_048,
            "qk_layernorm": False,
            "tie_word_embeddings": False,
        },
        ignored=frozenset("resid_pdrop embd_pdrop attention_dropout".split()),
    )
}


def _from_hf(config: Mapping[str, Any]) -> PhiConfig:
    model_type = hf_config.require_model_type(config, MODEL_TYPES)
    config = FIELDS[model_type].complete(config)
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    hf_config.require(config, "head_dim", (None, hidden // heads))
    rotated = hf_config.rotated_width(config, hidden // heads, 0.5)
    return PhiConfig(
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=size(config, "intermediate_size"),
        num_hidden_layers=size(config, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=size(config, "num_key_value_heads", default=heads),
        rotary=hf_config.rotary(config, width=rotated),
        rotated=rotated,
        layer_norm_eps=hf_config.positive(config, "layer_norm_eps"),
        max_position_embeddings=size(config, "max_position_embeddings"),
        activation=hf_config.require(config, "hidden_act", tuple(ACTIVATIONS)),
        qk_norm=switch(config, "qk_layernorm"),
        tie_word_embeddings=switch(config, "tie_word_embeddings"),
    )


def _hook_points(config: PhiConfig) -> HookPoints:
    return {hook: alias for hook, alias in UNGATED.items() if hook != "after_attention"}


def _modules(config: PhiConfig) -> dict[str, Module]:
    return {
        "embeddings": Module("embed_tokens", "output"),
        "residual_before": Module("layers.{i}", "input"),
        "query": Module("layers.{i}.self_attn.q_proj", "output"),
        "key": Module("layers.{i}.self_attn.k_proj", "output"),
        "query_rotated": Module("layers.{i}.self_attn", "query"),
        "key_rotated": Module("layers.{i}.self_attn", "key"),
        "value": Module("layers.{i}.self_attn.v_proj", "output"),
        "attention_pattern": Module("layers.{i}.self_attn", "pattern"),
        "attention_heads": Module("layers.{i}.self_attn.dense", "input"),
        "attention_out": Module("layers.{i}.self_attn", "output"),
        "ffn_up": Module("layers.{i}.mlp.fc1", "output"),
        "ffn_hidden": Module("layers.{i}.mlp.fc2", "input"),
        "ffn_out": Module("layers.{i}.mlp", "output"),
        "after_block": Module("layers.{i}", "output"),
        "final_norm": Module("final_layernorm", "output"),
    }


PORT = Port(
    config=PhiConfig.from_hf,
    fields=FIELDS,
    hook_points=_hook_points,
    structure=Phi,
    sources=sources,
    unused_tensors=unused_tensors,
    embed=embedded,
    shared=rotations,
    block=block,
    final_norm=final_norm,
    logits=head.logits,
    prefix="model.",
    modules=_modules,
)
