"""Qwen2 and Qwen2.5 with hook points, and by configuration the whole Llama family.

In: a Hugging Face config.json, sharded parameters, token ids, taps. Out: taps with the
captured activations. Flax NNX names, shapes and stacks the parameters; the forward is a pure function
of their state. Blocks are stacked on a leading axis and scanned, q/k/v are one product and gate/up
another. Family members differ in biases, q/k norm, sliding windows and rope scaling only: Qwen2,
Qwen3, Llama 2 and 3, TinyLlama, SmolLM2, Mistral.
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
from models.errors import UserError
from models.feed_forward import gated
from models.hf_config import size, switch
from models.hooks import GATED, HookPoints
from models.layers import ACTIVATIONS, Numerics, Rotary, TokenPlaces, embed, rms_norm, rotate, split_heads
from models.ports import Carry, Gather, Module, Parameters, Port, TensorSource
from models.self_attention import AttentionRule, SelfAttention, attend
from models.taps import Taps

DEFAULT_SAE_LAYERS = list(range(10, 24))  # Layers 10-23

MODEL_TYPES = ("qwen2", "qwen3", "llama", "mistral")


@dataclass(frozen=True)
class Qwen2Config:
    """Shape and variant of one model of the family; sizes in values, positions in tokens.

    Attributes (beyond config.json's own names):
      qkv_bias, output_bias, mlp_bias: whether those projections have a bias.
      qk_norm: RMS norm over each query and key head before the rotation (Qwen3).
      windows: per layer, how many positions a query sees, itself included; 0 where it sees all.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary: Rotary
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    qkv_bias: bool = True
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int, ...] = ()
    activation: str = "silu"
    model_type: str = "qwen2"

    def __post_init__(self) -> None:
        hf_config.require_whole_heads(0, self.num_attention_heads, self.num_key_value_heads)

    @property
    def query_rows(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_rows(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def parallel(self) -> bool:
        return False

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        return (self.rotary,)

    @property
    def attention(self) -> AttentionRule:
        return AttentionRule(windows=self.windows)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Qwen2Config:
        """Reads config.json in the spelling of transformers 4 or 5; UserError on anything not understood."""
        return _from_hf(config)

    @classmethod
    def qwen2_5_0_5b(cls) -> Qwen2Config:
        return cls(151_936, 896, 4_864, 24, 14, 2, 64, Rotary(1e6), tie_word_embeddings=True)

    @classmethod
    def qwen2_5_1_5b(cls) -> Qwen2Config:
        return cls(151_936, 1_536, 8_960, 28, 12, 2, 128, Rotary(1e6), 1e-6, 131_072, tie_word_embeddings=True)

    @classmethod
    def qwen2_5_3b(cls) -> Qwen2Config:
        return cls(151_936, 2_048, 11_008, 36, 16, 2, 128, Rotary(1e6), tie_word_embeddings=True)

    @classmethod
    def qwen2_5_7b(cls) -> Qwen2Config:
        return cls(152_064, 3_584, 18_944, 28, 28, 4, 128, Rotary(1e6), 1e-6, 131_072)

    @classmethod
    def qwen2_5_14b(cls) -> Qwen2Config:
        return cls(152_064, 5_120, 13_824, 48, 40, 8, 128, Rotary(1e6), 1e-5, 131_072)

    @classmethod
    def qwen3_0_6b(cls) -> Qwen2Config:
        base = cls(151_936, 1_024, 3_072, 28, 16, 8, 128, Rotary(1e6), 1e-6, 40_960, tie_word_embeddings=True)
        return replace(base, qkv_bias=False, qk_norm=True, model_type="qwen3")

    @classmethod
    def llama2_7b(cls) -> Qwen2Config:
        base = cls(32_000, 4_096, 11_008, 32, 32, 32, 128, Rotary(1e4), 1e-5, 4_096)
        return replace(base, qkv_bias=False, model_type="llama")

    @classmethod
    def llama3_8b(cls) -> Qwen2Config:
        base = cls(128_256, 4_096, 14_336, 32, 32, 8, 128, Rotary(5e5), 1e-5, 8_192)
        return replace(base, qkv_bias=False, model_type="llama")

    @classmethod
    def llama3_2_1b(cls) -> Qwen2Config:
        base = cls(128_256, 2_048, 8_192, 16, 32, 8, 64, Rotary(5e5, "llama3", 32.0, 1.0, 4.0, 8_192), 1e-5, 131_072)
        return replace(base, qkv_bias=False, tie_word_embeddings=True, model_type="llama")

    @classmethod
    def tinyllama_1_1b(cls) -> Qwen2Config:
        base = cls(32_000, 2_048, 5_632, 22, 32, 4, 64, Rotary(1e4), 1e-5, 2_048)
        return replace(base, qkv_bias=False, model_type="llama")

    @classmethod
    def smollm2_135m(cls) -> Qwen2Config:
        base = cls(49_152, 576, 1_536, 30, 9, 3, 64, Rotary(1e5), 1e-5, 8_192)
        return replace(base, qkv_bias=False, tie_word_embeddings=True, model_type="llama")

    @classmethod
    def mistral_7b(cls) -> Qwen2Config:
        base = cls(32_000, 4_096, 14_336, 32, 32, 8, 128, Rotary(1e4), 1e-5, 32_768)
        return replace(base, qkv_bias=False, windows=(4_096,) * 32, model_type="mistral")


# ---------------------------------------------------------------------------------------- parameters


class Blocks(nnx.Module):
    """Parameters of all blocks, stacked on a leading layer axis; matrices are [layers, out, in]."""

    def __init__(self, config: Qwen2Config, layers: int, dtype: str) -> None:
        d, f = config.hidden_size, config.intermediate_size
        qkv = config.query_rows + 2 * config.key_rows

        def parameter(*shape: int) -> nnx.Param[Array]:
            return nnx.Param(jnp.zeros((layers, *shape), dtype))

        self.attention_norm = parameter(d)
        self.qkv = parameter(qkv, d)
        self.attention_output = parameter(d, config.query_rows)
        self.ffn_norm = parameter(d)
        self.gate_up = parameter(2 * f, d)
        self.down = parameter(d, f)
        if config.qkv_bias:
            self.qkv_bias = parameter(qkv)
        if config.output_bias:
            self.attention_output_bias = parameter(d)
        if config.qk_norm:
            self.query_norm = parameter(config.head_dim)
            self.key_norm = parameter(config.head_dim)
        if config.mlp_bias:
            self.gate_up_bias = parameter(2 * f)
            self.down_bias = parameter(d)


class Qwen2(nnx.Module):
    """The model: embedding [vocab, d], stacked blocks, final norm [d]; and, if asked for, the head [vocab, d]."""

    def __init__(self, config: Qwen2Config, layers: int, dtype: str, with_head: bool = False) -> None:
        self.embedding = nnx.Param(jnp.zeros((config.vocab_size, config.hidden_size), dtype))
        self.blocks = Blocks(config, layers, dtype)
        self.final_norm = nnx.Param(jnp.zeros((config.hidden_size,), dtype))
        if with_head and not config.tie_word_embeddings:
            self.head = nnx.Param(jnp.zeros((config.vocab_size, config.hidden_size), dtype))


def sources(config: Qwen2Config) -> dict[str, TensorSource]:
    """Parameter path -> its tensors in a Hugging Face checkpoint."""
    d, f, q, k, h = (
        config.hidden_size,
        config.intermediate_size,
        config.query_rows,
        config.key_rows,
        config.head_dim,
    )

    def block(rows: dict[str, int]) -> TensorSource:
        return TensorSource(tuple(f"model.layers.{{i}}.{name}" for name in rows), tuple(rows.values()))

    def qkv(kind: str) -> TensorSource:
        return block({f"self_attn.{x}_proj.{kind}": rows for x, rows in (("q", q), ("k", k), ("v", k))})

    def gate_up(kind: str) -> TensorSource:
        return block({f"mlp.gate_proj.{kind}": f, f"mlp.up_proj.{kind}": f})

    table = {
        "embedding": TensorSource(("model.embed_tokens.weight",), (config.vocab_size,)),
        "final_norm": TensorSource(("model.norm.weight",), (d,)),
        "blocks.attention_norm": block({"input_layernorm.weight": d}),
        "blocks.qkv": qkv("weight"),
        "blocks.attention_output": block({"self_attn.o_proj.weight": d}),
        "blocks.ffn_norm": block({"post_attention_layernorm.weight": d}),
        "blocks.gate_up": gate_up("weight"),
        "blocks.down": block({"mlp.down_proj.weight": d}),
    }
    if not config.tie_word_embeddings:
        table["head"] = TensorSource(("lm_head.weight",), (config.vocab_size,))
    if config.qkv_bias:
        table["blocks.qkv_bias"] = qkv("bias")
    if config.output_bias:
        table["blocks.attention_output_bias"] = block({"self_attn.o_proj.bias": d})
    if config.qk_norm:
        table["blocks.query_norm"] = block({"self_attn.q_norm.weight": h})
        table["blocks.key_norm"] = block({"self_attn.k_norm.weight": h})
    if config.mlp_bias:
        table["blocks.gate_up_bias"] = gate_up("bias")
        table["blocks.down_bias"] = block({"mlp.down_proj.bias": d})
    return table


def unused_tensors(config: Qwen2Config) -> frozenset[str]:
    """A second copy of a head that is the embedding, and the rotary tables that old checkpoints store."""
    layers = range(config.num_hidden_layers)
    return frozenset(
        {"lm_head.weight", "model.rotary_emb.inv_freq"}
        | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in layers}
    )


# ------------------------------------------------------------------------------------------- forward


def embedded(config: Qwen2Config, params: Parameters, tokens: Array, places: TokenPlaces, gather: Gather) -> Array:
    return embed(gather("embedding", params["embedding"]), tokens)


def rotations(config: Qwen2Config, places: TokenPlaces) -> tuple[Array, Array]:
    return config.rotary.tables(places, config.head_dim)


def final_norm(config: Qwen2Config, params: Parameters, x: Array, gather: Gather) -> Array:
    return rms_norm(x, gather("final_norm", params["final_norm"]), config.rms_norm_eps)


def block(
    config: Qwen2Config,
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
        normed = rms_norm(x, p["attention_norm"], config.rms_norm_eps)
        (query, key, value), taps = _heads(config, p, normed, tables, taps, layer, numerics)
        mixed, taps, attention = attend(config.attention, attention, layer, query, key, value, taps, numerics)
        update = numerics.linear(mixed, p["attention_output"], p.get("attention_output_bias"))
    update, taps = taps.visit("attention_out", layer, update)
    x, taps = taps.visit("after_attention", layer, x + update)
    with jax.named_scope("ffn"):
        normed = rms_norm(x, p["ffn_norm"], config.rms_norm_eps)
        update, taps = gated(p, normed, taps, layer, ACTIVATIONS[config.activation], numerics)
    update, taps = taps.visit("ffn_out", layer, update)
    x, taps = taps.visit("after_block", layer, x + update)
    return x, taps, attention


def _heads(
    config: Qwen2Config,
    p: Parameters,
    x: Array,
    tables: tuple[Array, Array],
    taps: Taps,
    layer: Array,
    numerics: Numerics,
) -> tuple[tuple[Array, Array, Array], Taps]:
    """x [b, t, d] -> queries [b, t, heads, h], keys and values [b, t, key/value heads, h]."""
    qkv = numerics.linear(x, p["qkv"], p.get("qkv_bias"))
    query, key, value = split_heads(qkv, config.num_attention_heads, config.num_key_value_heads)
    (query, key, value), taps = taps.visit_heads(layer, query=query, key=key, value=value)
    if config.qk_norm:
        query = rms_norm(query, p["query_norm"], config.rms_norm_eps)
        key = rms_norm(key, p["key_norm"], config.rms_norm_eps)
    query, key = rotate(query, tables), rotate(key, tables)
    (query, key), taps = taps.visit_heads(layer, query_rotated=query, key_rotated=key)
    return (query, key, value), taps


# ------------------------------------------------------------------------------------- configuration

_SHARED = {
    **hf_config.ROPE_FIELDS,
    "hidden_size": 4_096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_WINDOWS = {"use_sliding_window": False, "sliding_window": 4_096, "max_window_layers": 28, "layer_types": None}
_QWEN = {
    **_SHARED,
    **_WINDOWS,
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
}
_DROPOUT = frozenset({"attention_dropout"})

FIELDS: Mapping[str, Fields] = {
    "qwen2": Fields(_QWEN, _DROPOUT),
    "qwen3": Fields({**_QWEN, "head_dim": 128, "attention_bias": False}, _DROPOUT),
    "llama": Fields(
        {
            **_SHARED,
            "vocab_size": 32_000,
            "intermediate_size": 11_008,
            "num_key_value_heads": None,
            "max_position_embeddings": 2_048,
            "attention_bias": False,
            "mlp_bias": False,
        },
        _DROPOUT | {"pretraining_tp"},
    ),
    "mistral": Fields(
        {
            **_SHARED,
            "vocab_size": 32_000,
            "intermediate_size": 14_336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "sliding_window": 4_096,
            "layer_types": None,  # transformers takes a Mistral with them for a Ministral, whose windows are by layer
        },
        _DROPOUT,
    ),
}


def _from_hf(config: Mapping[str, Any]) -> Qwen2Config:
    model_type = hf_config.require_model_type(config, MODEL_TYPES)
    config = FIELDS[model_type].complete(config)
    heads, hidden, layers = (size(config, k) for k in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    head_dim = size(config, "head_dim", default=None if model_type == "qwen3" else hidden // heads)
    if hf_config.rotated_width(config, head_dim) != head_dim:
        raise UserError("config.json has a partial_rotary_factor below 1, which no model of this family has")
    bias = _biased(config, "attention_bias")
    return Qwen2Config(
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=size(config, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=size(config, "num_key_value_heads", default=heads),
        head_dim=head_dim,
        rotary=hf_config.rotary(
            config, width=head_dim
        ),  # files older than `rope_theta` mean 10,000, as transformers reads them
        rms_norm_eps=hf_config.positive(config, "rms_norm_eps"),
        max_position_embeddings=size(config, "max_position_embeddings"),
        tie_word_embeddings=switch(config, "tie_word_embeddings"),
        qkv_bias=True if model_type == "qwen2" else bias,
        output_bias=False if model_type == "qwen2" else bias,
        mlp_bias=_biased(config, "mlp_bias"),
        qk_norm=model_type == "qwen3",
        windows=_windows(config, layers),
        activation=hf_config.require(config, "hidden_act", tuple(ACTIVATIONS)),
        model_type=model_type,
    )


def _biased(config: Mapping[str, Any], key: str) -> bool:
    """Only a type whose class has the switch listens to it; Qwen2's biases are what they are."""
    return key in FIELDS[config["model_type"]].read and switch(config, key)


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Each model type has its own switch; null means no window."""
    if config["model_type"] == "llama":
        return ()
    if config["model_type"] == "mistral":
        return hf_config.sliding_windows(config, layers, [config["sliding_window"] is not None] * layers)
    if not switch(config, "use_sliding_window"):
        config = {**config, "sliding_window": None}
    first = config["max_window_layers"]
    if type(first) is not int:
        raise UserError(f"config.json has max_window_layers {first!r:.40}; it must be a whole number")
    windowed = config["sliding_window"] is not None
    return hf_config.sliding_windows(config, layers, [windowed and layer >= first for layer in range(layers)])


def _hook_points(config: Qwen2Config) -> HookPoints:
    return GATED


def _modules(config: Qwen2Config) -> dict[str, Module]:
    return {
        "embeddings": Module("embed_tokens", "output"),
        "residual_before": Module("layers.{i}", "input"),
        "query": Module("layers.{i}.self_attn.q_proj", "output"),
        "key": Module("layers.{i}.self_attn.k_proj", "output"),
        "query_rotated": Module("layers.{i}.self_attn", "query"),
        "key_rotated": Module("layers.{i}.self_attn", "key"),
        "value": Module("layers.{i}.self_attn.v_proj", "output"),
        "attention_pattern": Module("layers.{i}.self_attn", "pattern"),
        "attention_heads": Module("layers.{i}.self_attn.o_proj", "input"),
        "attention_out": Module("layers.{i}.self_attn", "output"),
        "after_attention": Module("layers.{i}.post_attention_layernorm", "input"),
        "ffn_gate": Module("layers.{i}.mlp.gate_proj", "output"),
        "ffn_up": Module("layers.{i}.mlp.up_proj", "output"),
        "ffn_hidden": Module("layers.{i}.mlp.down_proj", "input"),
        "ffn_out": Module("layers.{i}.mlp", "output"),
        "after_block": Module("layers.{i}", "output"),
        "final_norm": Module("norm", "output"),
    }


PORT = Port(
    config=Qwen2Config.from_hf,
    fields=FIELDS,
    hook_points=_hook_points,
    structure=Qwen2,
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
