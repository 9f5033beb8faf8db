"""GPT-2 with hook points: learned positions, layer norms with biases, an ungated feed-forward network.

In: a Hugging Face config.json, sharded parameters, token ids, taps. Out: taps with the captured activations. The
checkpoint keeps its matrices as [in, out], and they are turned when they are loaded. `embeddings` is what enters
block 0, so positions are in it.
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
from models.hooks import ROTATED, UNGATED, HookPoints
from models.layers import ACTIVATIONS, Numerics, Rotary, TokenPlaces, embed, layer_norm, split_heads
from models.ports import Carry, Gather, Module, Parameters, Port, TensorSource
from models.self_attention import AttentionRule, SelfAttention, attend
from models.taps import Taps

MODEL_TYPES = ("gpt2",)


@dataclass(frozen=True)
class GPT2Config:
    """Shape and variant of one model; sizes in values, positions in tokens.

    Attributes (beyond what config.json calls n_embd and so on):
      scaled: whether logits are divided by the root of a head's width.
      scaled_by_layer: whether they are divided by the layer's number too, counted from 1.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 1_024
    layer_norm_eps: float = 1e-5
    activation: str = "gelu_new"
    scaled: bool = True
    scaled_by_layer: bool = False
    tie_word_embeddings: bool = True
    model_type: str = "gpt2"

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
    def parallel(self) -> bool:
        return False

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        return ()

    @property
    def attention(self) -> AttentionRule:
        return AttentionRule(scale=None if self.scaled else 1.0)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> GPT2Config:
        """Reads config.json; UserError on anything not understood."""
        return _from_hf(config)

    @classmethod
    def small(cls) -> GPT2Config:
        return cls(50_257, 768, 3_072, 12, 12)

    @classmethod
    def medium(cls) -> GPT2Config:
        return cls(50_257, 1_024, 4_096, 24, 16)

    @classmethod
    def large(cls) -> GPT2Config:
        return cls(50_257, 1_280, 5_120, 36, 20)

    @classmethod
    def xl(cls) -> GPT2Config:
        return cls(50_257, 1_600, 6_400, 48, 25)


# ---------------------------------------------------------------------------------------- parameters


class Blocks(nnx.Module):
    """Parameters of all blocks, stacked on a leading layer axis; matrices are [layers, out, in]."""

    def __init__(self, config: GPT2Config, layers: int, dtype: str) -> None:
        d, f = config.hidden_size, config.intermediate_size

        def parameter(*shape: int) -> nnx.Param[Array]:
            return nnx.Param(jnp.zeros((layers, *shape), dtype))

        self.attention_norm, self.attention_norm_bias = parameter(d), parameter(d)
        self.qkv, self.qkv_bias = parameter(3 * d, d), parameter(3 * d)
        self.attention_output, self.attention_output_bias = parameter(d, d), parameter(d)
        self.ffn_norm, self.ffn_norm_bias = parameter(d), parameter(d)
        self.up, self.up_bias = parameter(f, d), parameter(f)
        self.down, self.down_bias = parameter(d, f), parameter(d)


class GPT2(nnx.Module):
    """The model: embedding [vocab, d], positions [n, d], stacked blocks, final norm [d]; if asked for, the head."""

    def __init__(self, config: GPT2Config, layers: int, dtype: str, with_head: bool = False) -> None:
        d = config.hidden_size
        self.embedding = nnx.Param(jnp.zeros((config.vocab_size, d), dtype))
        self.position_embedding = nnx.Param(jnp.zeros((config.max_position_embeddings, d), dtype))
        self.blocks = Blocks(config, layers, dtype)
        self.final_norm = nnx.Param(jnp.zeros((d,), dtype))
        self.final_norm_bias = nnx.Param(jnp.zeros((d,), dtype))
        if with_head and not config.tie_word_embeddings:
            self.head = nnx.Param(jnp.zeros((config.vocab_size, d), dtype))


def sources(config: GPT2Config) -> dict[str, TensorSource]:
    """Parameter path -> its tensors in a Hugging Face checkpoint."""
    d, f = config.hidden_size, config.intermediate_size

    def one(name: str, rows: int, transposed: bool = False) -> TensorSource:
        return TensorSource((f"transformer.{name}",), (rows,), transposed)

    table = {
        "embedding": one("wte.weight", config.vocab_size),
        "position_embedding": one("wpe.weight", config.max_position_embeddings),
        "final_norm": one("ln_f.weight", d),
        "final_norm_bias": one("ln_f.bias", d),
    }
    if not config.tie_word_embeddings:
        table["head"] = TensorSource(("lm_head.weight",), (config.vocab_size,))
    for ours, theirs, rows in (
        ("qkv", "attn.c_attn", 3 * d),
        ("attention_output", "attn.c_proj", d),
        ("up", "mlp.c_fc", f),
        ("down", "mlp.c_proj", d),
    ):
        table[f"blocks.{ours}"] = one(f"h.{{i}}.{theirs}.weight", rows, transposed=True)
        table[f"blocks.{ours}_bias"] = one(f"h.{{i}}.{theirs}.bias", rows)
    for ours, theirs in (("attention_norm", "ln_1"), ("ffn_norm", "ln_2")):
        table[f"blocks.{ours}"] = one(f"h.{{i}}.{theirs}.weight", d)
        table[f"blocks.{ours}_bias"] = one(f"h.{{i}}.{theirs}.bias", d)
    return table


def unused_tensors(config: GPT2Config) -> frozenset[str]:
    """A second copy of a head that is the embedding, and the causal masks that old checkpoints store."""
    layers = range(config.num_hidden_layers)
    return frozenset(
        {"lm_head.weight"} | {f"transformer.h.{i}.attn.{name}" for i in layers for name in ("bias", "masked_bias")}
    )


# ------------------------------------------------------------------------------------------- forward


def embedded(config: GPT2Config, params: Parameters, tokens: Array, places: TokenPlaces, gather: Gather) -> Array:
    x = embed(gather("embedding", params["embedding"]), tokens)
    return x + embed(gather("position_embedding", params["position_embedding"]), places.positions)


def nothing_shared(config: GPT2Config, places: TokenPlaces) -> None:
    """Positions are in the stream that enters the first block."""


def final_norm(config: GPT2Config, params: Parameters, x: Array, gather: Gather) -> Array:
    weight, bias = (gather(name, params[name]) for name in ("final_norm", "final_norm_bias"))
    return layer_norm(x, weight, bias, config.layer_norm_eps)


def block(
    config: GPT2Config,
    p: Parameters,
    x: Array,
    taps: Taps,
    attention: SelfAttention,
    layer: Array,
    _: None,
    numerics: Numerics,
) -> Carry:
    """One decoder block on the residual stream x, float32 [b, t, d]; `p` holds this layer's parameters."""
    x, taps = taps.visit("residual_before", layer, x)
    with jax.named_scope("attention"):
        normed = layer_norm(x, p["attention_norm"], p["attention_norm_bias"], config.layer_norm_eps)
        heads = config.num_attention_heads
        query, key, value = split_heads(numerics.linear(normed, p["qkv"], p["qkv_bias"]), heads, heads)
        (query, key, value), taps = taps.visit_heads(layer, query=query, key=key, value=value)
        if config.scaled_by_layer:
            query = query / (layer + 1).astype(jnp.float32)
        mixed, taps, attention = attend(config.attention, attention, layer, query, key, value, taps, numerics)
        update = numerics.linear(mixed, p["attention_output"], p["attention_output_bias"])
    update, taps = taps.visit("attention_out", layer, update)
    x, taps = taps.visit("after_attention", layer, x + update)
    with jax.named_scope("ffn"):
        normed = layer_norm(x, p["ffn_norm"], p["ffn_norm_bias"], config.layer_norm_eps)
        update, taps = ungated(p, normed, taps, layer, ACTIVATIONS[config.activation], numerics)
    update, taps = taps.visit("ffn_out", layer, update)
    x, taps = taps.visit("after_block", layer, x + update)
    return x, taps, attention


# ------------------------------------------------------------------------------------- configuration

FIELDS: Mapping[str, Fields] = {
    "gpt2": Fields(
        read={
            "vocab_size": 50_257,
            "n_positions": 1_024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_inner": None,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
        },
        # `reorder_and_upcast_attn` rounds otherwise in half precision; the sums here are of float32 anyway.
        ignored=frozenset(
            (
                "resid_pdrop embd_pdrop attn_pdrop reorder_and_upcast_attn n_ctx n_special predict_special_tokens "
                "summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout"
            ).split()
        ),
        renamed={
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
    )
}


def _from_hf(config: Mapping[str, Any]) -> GPT2Config:
    model_type = hf_config.require_model_type(config, MODEL_TYPES)
    config = FIELDS[model_type].complete(config)
    hf_config.require(config, "add_cross_attention", (False,))
    d = size(config, "n_embd")
    return GPT2Config(
        vocab_size=size(config, "vocab_size"),
        hidden_size=d,
        intermediate_size=size(config, "n_inner", default=4 * d),
        num_hidden_layers=size(config, "n_layer"),
        num_attention_heads=size(config, "n_head"),
        max_position_embeddings=size(config, "n_positions"),
        layer_norm_eps=hf_config.positive(config, "layer_norm_epsilon"),
        activation=hf_config.require(config, "activation_function", tuple(ACTIVATIONS)),
        scaled=switch(config, "scale_attn_weights"),
        scaled_by_layer=switch(config, "scale_attn_by_inverse_layer_idx"),
        tie_word_embeddings=switch(config, "tie_word_embeddings"),
    )


def _hook_points(config: GPT2Config) -> HookPoints:
    there = {hook: alias for hook, alias in UNGATED.items() if hook not in ROTATED}
    return {**there, "embeddings": None}  # positions are in


def _modules(config: GPT2Config) -> dict[str, Module]:
    return {
        "embeddings": Module("drop", "output"),
        "residual_before": Module("h.{i}", "input"),
        "query": Module("h.{i}.attn.c_attn", "output", (1, 3, 0)),
        "key": Module("h.{i}.attn.c_attn", "output", (1, 3, 1)),
        "value": Module("h.{i}.attn.c_attn", "output", (1, 3, 2)),
        "attention_pattern": Module("h.{i}.attn", "pattern"),
        "attention_heads": Module("h.{i}.attn.c_proj", "input"),
        "attention_out": Module("h.{i}.attn", "output"),
        "after_attention": Module("h.{i}.ln_2", "input"),
        "ffn_up": Module("h.{i}.mlp.c_fc", "output"),
        "ffn_hidden": Module("h.{i}.mlp.c_proj", "input"),
        "ffn_out": Module("h.{i}.mlp", "output"),
        "after_block": Module("h.{i}", "output"),
        "final_norm": Module("ln_f", "output"),
    }


PORT = Port(
    config=GPT2Config.from_hf,
    fields=FIELDS,
    hook_points=_hook_points,
    structure=GPT2,
    sources=sources,
    unused_tensors=unused_tensors,
    embed=embedded,
    shared=nothing_shared,
    block=block,
    final_norm=final_norm,
    logits=head.logits,
    prefix="transformer.",
    modules=_modules,
)
