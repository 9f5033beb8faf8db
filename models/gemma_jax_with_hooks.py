"""Gemma 1, 2 and 3 (text) with hook points: scaled embeddings, norms centred at one, capped logits, norms behind.

In: a Hugging Face config.json, sharded parameters, token ids, taps. Out: taps with the captured activations. Gemma 2
and 3 have a norm behind attention and one behind the feed-forward network: `attention_out` and `ffn_out` are what is
added to the stream, so they lie behind it, and `attention_out_raw` and `ffn_out_raw` before it. Gemma 2 caps
attention's logits, Gemma 3 norms queries and keys; both alternate layers with a sliding window and layers that see all,
which Gemma 3 rotates with different bases.
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
from models.feed_forward import gated
from models.hf_config import positive, size
from models.hooks import BEFORE_NORMS_BEHIND, GATED, HookPoints
from models.layers import ACTIVATIONS, Numerics, Rotary, TokenPlaces, embed, rms_norm, rotate, soft_capped, split_heads
from models.ports import Carry, Gather, Module, Parameters, Port, TensorSource
from models.self_attention import AttentionRule, SelfAttention, attend
from models.taps import Taps

MODEL_TYPES = ("gemma", "gemma2", "gemma3_text")
_GELU = ACTIVATIONS["gelu_pytorch_tanh"]


@dataclass(frozen=True)
class GemmaConfig:
    """Shape and variant of one model; sizes in values, positions in tokens.

    Attributes (beyond config.json's own names):
      rotary: of layers that see all.
      local_rotary: of layers with a sliding window.
      query_scale: what logits are multiplied by.
      soft_cap: of attention's logits; None where there is none.
      head_soft_cap: of the head's logits; None where there is none.
      norms_behind: whether attention and the feed-forward network have a norm behind them.
      qk_norm: RMS norm over each query and key head before the rotation.
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
    local_rotary: Rotary
    query_scale: float
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 8_192
    soft_cap: float | None = None
    head_soft_cap: float | None = None
    norms_behind: bool = False
    qk_norm: bool = False
    windows: tuple[int, ...] = ()
    tie_word_embeddings: bool = True
    model_type: str = "gemma"

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
        return self.rotary, self.local_rotary

    @property
    def attention(self) -> AttentionRule:
        return AttentionRule(self.query_scale, self.soft_cap, self.windows)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> GemmaConfig:
        """Reads config.json in the spelling of transformers 4 or 5; UserError on anything not understood."""
        return _from_hf(config)

    @classmethod
    def gemma_2b(cls) -> GemmaConfig:
        return cls(256_000, 2_048, 16_384, 18, 8, 1, 256, Rotary(1e4), Rotary(1e4), 256**-0.5)

    @classmethod
    def gemma_7b(cls) -> GemmaConfig:
        return cls(256_000, 3_072, 24_576, 28, 16, 16, 256, Rotary(1e4), Rotary(1e4), 256**-0.5)

    @classmethod
    def gemma2_2b(cls) -> GemmaConfig:
        base = cls(256_000, 2_304, 9_216, 26, 8, 4, 256, Rotary(1e4), Rotary(1e4), 256**-0.5, model_type="gemma2")
        return replace(base, soft_cap=50.0, head_soft_cap=30.0, norms_behind=True, windows=(4_096, 0) * 13)

    @classmethod
    def gemma3_1b(cls) -> GemmaConfig:
        base = cls(262_144, 1_152, 6_912, 26, 4, 1, 256, Rotary(1e6), Rotary(1e4), 256**-0.5, 1e-6, 32_768)
        windows = tuple(512 if (layer + 1) % 6 else 0 for layer in range(26))
        return replace(base, norms_behind=True, qk_norm=True, windows=windows, model_type="gemma3_text")


# ---------------------------------------------------------------------------------------- parameters


class Blocks(nnx.Module):
    """Parameters of all blocks, stacked on a leading layer axis; matrices are [layers, out, in]."""

    def __init__(self, config: GemmaConfig, layers: int, dtype: str) -> None:
        d, f = config.hidden_size, config.intermediate_size

        def parameter(*shape: int) -> nnx.Param[Array]:
            return nnx.Param(jnp.zeros((layers, *shape), dtype))

        self.attention_norm = parameter(d)
        self.qkv = parameter(config.query_rows + 2 * config.key_rows, d)
        self.attention_output = parameter(d, config.query_rows)
        self.ffn_norm = parameter(d)
        self.gate_up = parameter(2 * f, d)
        self.down = parameter(d, f)
        if config.norms_behind:
            self.after_attention_norm = parameter(d)
            self.after_ffn_norm = parameter(d)
        if config.qk_norm:
            self.query_norm = parameter(config.head_dim)
            self.key_norm = parameter(config.head_dim)


class Gemma(nnx.Module):
    """The model: embedding [vocab, d], stacked blocks, final norm [d]; and, if asked for, the head [vocab, d]."""

    def __init__(self, config: GemmaConfig, layers: int, dtype: str, with_head: bool = False) -> None:
        self.embedding = nnx.Param(jnp.zeros((config.vocab_size, config.hidden_size), dtype))
        self.blocks = Blocks(config, layers, dtype)
        self.final_norm = nnx.Param(jnp.zeros((config.hidden_size,), dtype))
        if with_head and not config.tie_word_embeddings:
            self.head = nnx.Param(jnp.zeros((config.vocab_size, config.hidden_size), dtype))


def sources(config: GemmaConfig) -> dict[str, TensorSource]:
    """Parameter path -> its tensors in a Hugging Face checkpoint."""
    d, f, q, k = config.hidden_size, config.intermediate_size, config.query_rows, config.key_rows

    def block(rows: dict[str, int]) -> TensorSource:
        return TensorSource(tuple(f"model.layers.{{i}}.{name}.weight" for name in rows), tuple(rows.values()))

    table = {
        "embedding": TensorSource(("model.embed_tokens.weight",), (config.vocab_size,)),
        "final_norm": TensorSource(("model.norm.weight",), (d,)),
        "blocks.attention_norm": block({"input_layernorm": d}),
        "blocks.qkv": block({"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": k}),
        "blocks.attention_output": block({"self_attn.o_proj": d}),
        "blocks.gate_up": block({"mlp.gate_proj": f, "mlp.up_proj": f}),
        "blocks.down": block({"mlp.down_proj": d}),
    }
    if not config.tie_word_embeddings:
        table["head"] = TensorSource(("lm_head.weight",), (config.vocab_size,))
    if config.norms_behind:
        table["blocks.after_attention_norm"] = block({"post_attention_layernorm": d})
        table["blocks.ffn_norm"] = block({"pre_feedforward_layernorm": d})
        table["blocks.after_ffn_norm"] = block({"post_feedforward_layernorm": d})
    else:
        table["blocks.ffn_norm"] = block({"post_attention_layernorm": d})
    if config.qk_norm:
        table["blocks.query_norm"] = block({"self_attn.q_norm": config.head_dim})
        table["blocks.key_norm"] = block({"self_attn.k_norm": config.head_dim})
    return table


def unused_tensors(config: GemmaConfig) -> frozenset[str]:
    """A second copy of a head that is the embedding."""
    return frozenset({"lm_head.weight"})


# ------------------------------------------------------------------------------------------- forward


def embedded(config: GemmaConfig, params: Parameters, tokens: Array, places: TokenPlaces, gather: Gather) -> Array:
    return embed(gather("embedding", params["embedding"]), tokens) * jnp.float32(config.hidden_size**0.5)


def rotations(config: GemmaConfig, places: TokenPlaces) -> list[tuple[Array, Array]]:
    """Of layers that see everything, and of those with a window."""
    return [rotary.tables(places, config.head_dim) for rotary in config.rotaries]


def final_norm(config: GemmaConfig, params: Parameters, x: Array, gather: Gather) -> Array:
    return _norm(config, x, gather("final_norm", params["final_norm"]))


def logits(config: GemmaConfig, params: Parameters, x: Array, numerics: Numerics, gather: Gather) -> Array:
    """x float32 [b, t, d] of `final_norm` -> float32 [b, t, vocab]."""
    return soft_capped(head.logits(config, params, x, numerics, gather), config.head_soft_cap)


def block(
    config: GemmaConfig,
    p: Parameters,
    x: Array,
    taps: Taps,
    attention: SelfAttention,
    layer: Array,
    tables: list[tuple[Array, Array]],
    numerics: Numerics,
) -> Carry:
    """One decoder block on the residual stream x, float32 [b, t, d]; `p` holds this layer's parameters."""
    everywhere, nearby = tables
    sees_all = config.attention.window_of(layer) == 0
    tables_here = jax.tree.map(lambda wide, near: jnp.where(sees_all, wide, near), everywhere, nearby)
    x, taps = taps.visit("residual_before", layer, x)
    with jax.named_scope("attention"):
        qkv = numerics.linear(_norm(config, x, p["attention_norm"]), p["qkv"])
        query, key, value = split_heads(qkv, config.num_attention_heads, config.num_key_value_heads)
        (query, key, value), taps = taps.visit_heads(layer, query=query, key=key, value=value)
        if config.qk_norm:
            query, key = _norm(config, query, p["query_norm"]), _norm(config, key, p["key_norm"])
        query, key = rotate(query, tables_here), rotate(key, tables_here)
        (query, key), taps = taps.visit_heads(layer, query_rotated=query, key_rotated=key)
        mixed, taps, attention = attend(config.attention, attention, layer, query, key, value, taps, numerics)
        update = numerics.linear(mixed, p["attention_output"])
        if config.norms_behind:
            update, taps = taps.visit("attention_out_raw", layer, update)
            update = _norm(config, update, p["after_attention_norm"])
    update, taps = taps.visit("attention_out", layer, update)
    x, taps = taps.visit("after_attention", layer, x + update)
    with jax.named_scope("ffn"):
        update, taps = gated(p, _norm(config, x, p["ffn_norm"]), taps, layer, _GELU, numerics)
        if config.norms_behind:
            update, taps = taps.visit("ffn_out_raw", layer, update)
            update = _norm(config, update, p["after_ffn_norm"])
    update, taps = taps.visit("ffn_out", layer, update)
    x, taps = taps.visit("after_block", layer, x + update)
    return x, taps, attention


def _norm(config: GemmaConfig, x: Array, weight: Array) -> Array:
    """RMS norm whose stored weight is what it adds to one; the sum is taken in float32, as the weights may not be."""
    return rms_norm(x, weight.astype(jnp.float32) + jnp.float32(1), config.rms_norm_eps)


# ------------------------------------------------------------------------------------- configuration

_SHARED = {
    **hf_config.ROPE_FIELDS,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_bidirectional_attention": None,
}
_SECOND = {
    **_SHARED,
    "hidden_size": 2_304,
    "intermediate_size": 9_216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4_096,
    "layer_types": None,
}
_DROPOUT = frozenset({"attention_dropout"})
_ECHOES = {"hidden_act": "hidden_activation", "sliding_window_size": "sliding_window"}

FIELDS: Mapping[str, Fields] = {
    "gemma": Fields(
        {
            **_SHARED,
            "vocab_size": 256_000,
            "hidden_size": 3_072,
            "intermediate_size": 24_576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 8_192,
        },
        # Of its successors and of transformers 4; Gemma 1 has no caps, whatever its config.json says.
        _DROPOUT | {"hidden_activation", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"},
    ),
    "gemma2": Fields(
        {
            **_SECOND,
            "vocab_size": 256_000,
            "max_position_embeddings": 8_192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        _DROPOUT,
        echoes=_ECHOES,
    ),
    "gemma3_text": Fields(
        {
            **_SECOND,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "vocab_size": 262_208,
            "max_position_embeddings": 131_072,
            "sliding_window_pattern": 6,  # every sixth layer sees all
            "final_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
        # The cap of attention is kept by transformers and not computed with.
        _DROPOUT | {"attn_logit_softcapping", "_sliding_window_pattern"},
        echoes=_ECHOES,
    ),
}
_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu")  # releases of Gemma 1 say gelu and mean its approximation


def _from_hf(config: Mapping[str, Any]) -> GemmaConfig:
    model_type = hf_config.require_model_type(config, MODEL_TYPES)
    config = FIELDS[model_type].complete(config)
    if model_type == "gemma":
        hf_config.require(config, "hidden_act", _TANH_GELU)
    else:
        hf_config.require(config, "hidden_activation", _TANH_GELU[:2])
    hf_config.require(config, "attention_bias", (False,))
    hf_config.require(config, "use_bidirectional_attention", (False, None))
    layers, head_dim = size(config, "num_hidden_layers"), size(config, "head_dim")
    rotary, local_rotary = _rotaries(config, head_dim)
    return GemmaConfig(
        vocab_size=size(config, "vocab_size"),
        hidden_size=size(config, "hidden_size"),
        intermediate_size=size(config, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=size(config, "num_attention_heads"),
        num_key_value_heads=size(config, "num_key_value_heads"),
        head_dim=head_dim,
        rotary=rotary,
        local_rotary=local_rotary,
        query_scale=(head_dim if model_type == "gemma" else positive(config, "query_pre_attn_scalar")) ** -0.5,
        rms_norm_eps=positive(config, "rms_norm_eps"),
        max_position_embeddings=size(config, "max_position_embeddings"),
        soft_cap=_cap(config, "attn_logit_softcapping") if model_type == "gemma2" else None,
        head_soft_cap=_cap(config, "final_logit_softcapping") if model_type != "gemma" else None,
        norms_behind=model_type != "gemma",
        qk_norm=model_type == "gemma3_text",
        windows=_windows(config, layers),
        tie_word_embeddings=hf_config.switch(config, "tie_word_embeddings"),
        model_type=model_type,
    )


def _cap(config: Mapping[str, Any], key: str) -> float | None:
    return None if config.get(key) is None else positive(config, key)


def _rotaries(config: Mapping[str, Any], width: int) -> tuple[Rotary, Rotary]:
    """Of layers that see all, and of layers with a sliding window; Gemma 3 has a set of parameters for each."""
    if config["model_type"] != "gemma3_text":
        rotary = hf_config.rotary(config, width=width)
        return rotary, rotary
    named = hf_config.mapping(config, "rope_parameters") or {"full_attention": {"rope_type": "default"}}
    wide = {**hf_config.mapping(named, "full_attention"), **hf_config.mapping(config, "rope_scaling")}
    near = hf_config.mapping(named, "sliding_attention")
    # transformers looks for YaRN's `truncate` beside the two sets, where no file has it.
    wide, near = ({key: one[key] for key in one if key != "truncate"} for one in (wide, near))
    return (
        hf_config.rotary_of(wide, config.get("rope_theta"), 1_000_000.0, config, width),
        hf_config.rotary_of(near, config.get("rope_local_base_freq"), 10_000.0, config, width),
    )


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Where config.json has no `layer_types`: every second layer of Gemma 2, all but every sixth of Gemma 3."""
    if config["model_type"] == "gemma":
        return ()
    pattern = 2 if config["model_type"] == "gemma2" else size(config, "sliding_window_pattern")
    return hf_config.sliding_windows(config, layers, [(layer + 1) % pattern != 0 for layer in range(layers)])


def _hook_points(config: GemmaConfig) -> HookPoints:
    return {**GATED, **BEFORE_NORMS_BEHIND} if config.norms_behind else GATED


def _modules(config: GemmaConfig) -> dict[str, Module]:
    behind = config.norms_behind
    # Where there are none behind, the norm of that name lies before the feed-forward network.
    before_ffn = "layers.{i}.pre_feedforward_layernorm" if behind else "layers.{i}.post_attention_layernorm"
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
        "attention_out_raw": Module("layers.{i}.self_attn", "output"),
        "attention_out": Module("layers.{i}.post_attention_layernorm" if behind else "layers.{i}.self_attn", "output"),
        "after_attention": Module(before_ffn, "input"),
        "ffn_gate": Module("layers.{i}.mlp.gate_proj", "output"),
        "ffn_up": Module("layers.{i}.mlp.up_proj", "output"),
        "ffn_hidden": Module("layers.{i}.mlp.down_proj", "input"),
        "ffn_out_raw": Module("layers.{i}.mlp", "output"),
        "ffn_out": Module("layers.{i}.post_feedforward_layernorm" if behind else "layers.{i}.mlp", "output"),
        "after_block": Module("layers.{i}", "output"),
        "final_norm": Module("norm", "output"),
    }


PORT = Port(
    config=GemmaConfig.from_hf,
    fields=FIELDS,
    hook_points=_hook_points,
    structure=Gemma,
    sources=sources,
    unused_tensors=unused_tensors,
    embed=embedded,
    shared=rotations,
    block=block,
    final_norm=final_norm,
    logits=logits,
    prefix="model.",
    modules=_modules,
)
