"""Qwen2 and Qwen2.5 with hook points, and by configuration the whole Llama family.

In: a Hugging Face config.json, sharded parameters, token ids, taps. Out: taps with the
captured activations. Flax NNX names, shapes and stacks the parameters; the forward is a pure function
of their state. Blocks are stacked on a leading axis and scanned, q/k/v are one product and gate/up
another. Family members differ in biases, q/k norm, sliding windows and rope scaling only: Qwen2,
Qwen3, Llama 2 and 3, TinyLlama, SmolLM2, Mistral. A configuration field that is neither understood
nor known to leave the mathematics alone is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.accelerated_attention import kernel_attention
from models.attention import causal_attention
from models.errors import UserError
from models.hooks import HOOK_POINTS, Taps
from models.layers import Numerics, Places, Rotary, rms_norm, rotate
from models.ports import Gather, Parameters, Port, TensorSource

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
    model_type: str = "qwen2"

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}; grouped-query attention needs whole groups"
            )

    @property
    def query_rows(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_rows(self) -> int:
        return self.num_key_value_heads * self.head_dim

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
    """The model without its head: embedding [vocab, d], stacked blocks, final norm [d]."""

    def __init__(self, config: Qwen2Config, layers: int, dtype: str) -> None:
        self.embedding = nnx.Param(jnp.zeros((config.vocab_size, config.hidden_size), dtype))
        self.blocks = Blocks(config, layers, dtype)
        self.final_norm = nnx.Param(jnp.zeros((config.hidden_size,), dtype))


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
    """The head (there is none here) and the rotary tables that old checkpoints store."""
    layers = range(config.num_hidden_layers)
    return frozenset(
        {"lm_head.weight", "model.rotary_emb.inv_freq"}
        | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in layers}
    )


# ------------------------------------------------------------------------------------------- forward


def forward(
    config: Qwen2Config, params: Parameters, tokens: Array, taps: Taps, numerics: Numerics, gather: Gather
) -> Taps:
    """Runs `taps.num_blocks` blocks over rows of samples and returns the filled taps.

    Args:
      params: `nnx.to_pure_dict` of `Qwen2`'s state, with at least that many blocks.
      tokens: int32 [b, t]; `taps.packing` says whose they are.
      gather: makes whole arrays of this device's shards, at the moment they are needed.
    """
    with jax.named_scope("embeddings"):
        embedding = gather("embedding", params["embedding"])
        x = jnp.take(embedding, tokens, axis=0, mode="clip").astype(jnp.float32)
    x, taps = taps.visit("embeddings", None, x)
    places = Places.of(taps.packing.positions, config.rotary, config.head_dim)
    windows = jnp.array(config.windows or (0,) * config.num_hidden_layers, jnp.int32)

    def body(carry: tuple[Array, Taps], xs: tuple[Parameters, Array, Array]) -> tuple[tuple[Array, Taps], None]:
        shards, layer, window = xs
        return block(config, gather("blocks", shards), *carry, layer, window, places, numerics), None

    n = taps.num_blocks
    if n:
        stacked = jax.tree.map(lambda p: p[:n], params["blocks"])
        (x, taps), _ = jax.lax.scan(body, (x, taps), (stacked, jnp.arange(n, dtype=jnp.int32), windows[:n]))
    # The input of the block after the last one that runs is the output of that one.
    if n in dict(taps.plan.layers).get("residual_before", ()):
        x, taps = taps.visit("residual_before", jnp.int32(n), x)
    if taps.plan.needs_final_norm:
        x = rms_norm(x, gather("final_norm", params["final_norm"]), config.rms_norm_eps)
        _, taps = taps.visit("final_norm", None, x)
    return taps


def block(
    config: Qwen2Config,
    p: Parameters,
    x: Array,
    taps: Taps,
    layer: Array,
    window: Array,
    places: Places,
    numerics: Numerics,
) -> tuple[Array, Taps]:
    """One decoder block on the residual stream x, float32 [b, t, d]; `p` holds this layer's parameters."""
    x, taps = taps.visit("residual_before", layer, x)
    with jax.named_scope("attention"):
        normed = rms_norm(x, p["attention_norm"], config.rms_norm_eps)
        update = _attention(config, p, normed, window, config.windows[: taps.num_blocks], places, numerics)
    update, taps = taps.visit("attention_out", layer, update)
    x, taps = taps.visit("after_attention", layer, x + update)
    with jax.named_scope("ffn"):
        normed = rms_norm(x, p["ffn_norm"], config.rms_norm_eps)
        gate, up = jnp.split(numerics.linear(normed, p["gate_up"], p.get("gate_up_bias")), 2, axis=-1)
        gate, taps = taps.visit("ffn_gate", layer, gate)
        up, taps = taps.visit("ffn_up", layer, up)
        hidden, taps = taps.visit("ffn_hidden", layer, jax.nn.silu(gate) * up)
        update, taps = taps.visit("ffn_out", layer, numerics.linear(hidden, p["down"], p.get("down_bias")))
    return taps.visit("after_block", layer, x + update)


def _attention(
    config: Qwen2Config,
    p: Parameters,
    x: Array,
    window: Array,
    windows: tuple[int, ...],
    places: Places,
    numerics: Numerics,
) -> Array:
    """x [b, t, d] -> what attention adds to the stream; `window` is this layer's, `windows` of all that run."""
    b, t, _ = x.shape
    q_rows, k_rows = config.query_rows, config.key_rows
    qkv = numerics.linear(x, p["qkv"], p.get("qkv_bias"))
    query, key, value = jnp.split(qkv, (q_rows, q_rows + k_rows), axis=-1)
    query = query.reshape(b, t, config.num_attention_heads, config.head_dim)
    key = key.reshape(b, t, config.num_key_value_heads, config.head_dim)
    value = value.reshape(b, t, config.num_key_value_heads, config.head_dim)
    if config.qk_norm:
        query = rms_norm(query, p["query_norm"], config.rms_norm_eps)
        key = rms_norm(key, p["key_norm"], config.rms_norm_eps)
    query, key = rotate(query, places.rotary), rotate(key, places.rotary)
    if numerics.attention == "blockwise":
        reach = places.positions
        if any(windows):
            reach = jnp.where(window == 0, reach, jnp.minimum(reach, window - 1))
        mixed = causal_attention(query, key, value, reach=reach, numerics=numerics)
    else:
        mixed = kernel_attention(query, key, value, places.positions, window=_common(windows), numerics=numerics)
    return numerics.linear(mixed, p["attention_output"], p.get("attention_output_bias"))


def _common(windows: tuple[int, ...]) -> int | None:
    """The sliding window that all these layers share, as kernels need it: known when they are compiled."""
    (window,) = set(windows) or {0}
    return window or None


# ------------------------------------------------------------------------------------- configuration

# Fields that say nothing about the forward pass, or only about parts it does not have (head, dropout,
# cache, initialisation, generation).
_HARMLESS = frozenset(
    (
        "architectures auto_map _name_or_path transformers_version torch_dtype dtype use_cache bos_token_id "
        "eos_token_id pad_token_id initializer_range attention_dropout model_type is_llama_config "
        "rope_interleaved pretraining_tp unsloth_version unsloth_fixed transformers.js_config output_attentions "
        "output_hidden_states return_dict chunk_size_feed_forward is_encoder_decoder id2label label2id "
        "problem_type finetuning_task task_specific_params"
    ).split()
)
_SIZES = frozenset(
    (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim rms_norm_eps max_position_embeddings tie_word_embeddings hidden_act"
    ).split()
)
_VARIANTS = frozenset(
    (
        "attention_bias mlp_bias sliding_window use_sliding_window max_window_layers layer_types rope_theta "
        "rope_scaling rope_parameters partial_rotary_factor"
    ).split()
)
_ROPE_FIELDS = {
    "default": {"rope_theta"},
    "linear": {"rope_theta", "factor"},
    "llama3": {
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
}


def _from_hf(config: Mapping[str, Any]) -> Qwen2Config:
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(f"model_type {model_type!r} is not of this family: {', '.join(MODEL_TYPES)}")
    unknown = sorted(k for k, v in config.items() if k not in _HARMLESS | _SIZES | _VARIANTS and v is not None)
    if unknown:
        raise UserError(
            f"config.json has {', '.join(map(repr, unknown))}, which this port does not understand and which "
            "may change the mathematics; remove the field if it does not, or ask for support"
        )
    _require(config, "hidden_act", ("silu", "swish"), "silu")
    _require(config, "partial_rotary_factor", (1, 1.0), 1.0)
    _require(config, "rope_interleaved", (False,), False)
    _require(config, "pretraining_tp", (0, 1), 1)
    heads, hidden, layers = (_size(config, k) for k in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    bias = _switch(config, "attention_bias")
    return Qwen2Config(
        vocab_size=_size(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_size(config, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_size(config, "num_key_value_heads", default=heads),
        head_dim=_size(config, "head_dim", default=hidden // heads),
        rotary=_rotary(config),
        rms_norm_eps=_positive(config, "rms_norm_eps"),
        max_position_embeddings=_size(config, "max_position_embeddings"),
        tie_word_embeddings=_switch(config, "tie_word_embeddings"),
        qkv_bias=True if model_type == "qwen2" else bias,
        output_bias=False if model_type == "qwen2" else bias,
        mlp_bias=_switch(config, "mlp_bias"),
        qk_norm=model_type == "qwen3",
        windows=_windows(config, layers),
        model_type=model_type,
    )


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise UserError(f"config.json lacks {key!r}; it must be a complete Hugging Face file")
    if type(value) is not int or not 1 <= value < 2**31:
        raise UserError(f"config.json has {key} {_shown(value)}; it must be a whole number of at least 1")
    return value


def _positive(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    if value is None:
        raise UserError(f"config.json lacks {key!r}; it must be a complete Hugging Face file")
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise UserError(f"config.json has {key} {_shown(value)}; it must be a positive number")
    return float(value)


def _switch(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value not in (None, True, False):
        raise UserError(f"config.json has {key} {_shown(value)}; it must be true or false")
    return bool(value)


def _shown(value: Any) -> str:
    return repr(value)[:40]


def _require(config: Mapping[str, Any], key: str, accepted: tuple[Any, ...], default: Any) -> None:
    value = config.get(key, default)
    if value is not None and value not in accepted:
        raise UserError(f"config.json asks for {key} {value!r}; this port computes {accepted[0]!r} only")


def _rotary(config: Mapping[str, Any]) -> Rotary:
    """From `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling` (transformers 4)."""
    scaling: dict[str, Any] = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if kind not in _ROPE_FIELDS:
        raise UserError(f"unsupported rope type {kind!r} in config.json; supported: {', '.join(_ROPE_FIELDS)}")
    _require(scaling, "partial_rotary_factor", (1, 1.0), 1.0)
    scaling.pop("partial_rotary_factor", None)
    if unknown := sorted(set(scaling) - _ROPE_FIELDS[kind]):
        raise UserError(f"rope type {kind!r} in config.json has {', '.join(unknown)}, which is not understood")
    # Files older than the field mean 10,000, as transformers reads them.
    theta = next((t for t in (scaling.pop("rope_theta", None), config.get("rope_theta")) if t is not None), 10_000.0)
    needed = _ROPE_FIELDS[kind] - {"rope_theta"}
    if missing := sorted(needed - set(scaling)):
        raise UserError(f"rope type {kind!r} in config.json lacks {', '.join(missing)}")
    base = _positive({"rope_theta": theta}, "rope_theta")
    if kind == "default":
        return Rotary(base)
    factor = _positive(scaling, "factor")
    if kind == "linear":
        return Rotary(base, "linear", factor)
    low, high = _positive(scaling, "low_freq_factor"), _positive(scaling, "high_freq_factor")
    if high <= low:
        raise UserError(f"config.json has high_freq_factor {high}, which must be above low_freq_factor {low}")
    return Rotary(base, "llama3", factor, low, high, _size(scaling, "original_max_position_embeddings"))


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Sliding windows per layer, empty where no layer has one; each model type has its own switch."""
    size = None if config.get("sliding_window") is None else _size(config, "sliding_window")
    types = config.get("layer_types")
    if config["model_type"] in ("qwen2", "qwen3"):
        size = size if _switch(config, "use_sliding_window") else None
        first = 0 if not config.get("max_window_layers") else _size(config, "max_window_layers")
        sliding = [t == "sliding_attention" for t in types] if types else [i >= first for i in range(layers)]
    else:
        sliding = [t == "sliding_attention" for t in types] if types else [True] * layers
        if config["model_type"] == "llama":
            size = None
    if types and (strange := sorted(set(types) - {"full_attention", "sliding_attention"})):
        raise UserError(f"config.json has the layer type {strange[0]!r}; known: full_attention, sliding_attention")
    if len(sliding) < layers:
        raise UserError(f"config.json names {len(sliding)} layer_types for {layers} layers")
    if size is None or not any(sliding[:layers]):
        return ()
    return tuple(int(size) if s else 0 for s in sliding[:layers])


def _hook_points(config: Qwen2Config) -> tuple[str, ...]:
    return tuple(HOOK_POINTS)  # sequential gated blocks have them all


PORT = Port(
    config=Qwen2Config.from_hf,
    hook_points=_hook_points,
    structure=Qwen2,
    sources=sources,
    unused_tensors=unused_tensors,
    forward=forward,
)
