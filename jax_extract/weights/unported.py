"""Models that no port computes and Hugging Face does: what an extraction by forward hooks needs of them.

In: config.json. Out: `UNPORTED`, a family with the hook points that every decoder has: the stream before and behind
each block, what enters the first one, and what the base model gives; or, of a type that has a port, the family of its
variants, which have their hook points where all models of the type have them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jax_extract.errors import UserError
from jax_extract.weights.checkpoint import Checkpoint
from models.config_fields import untagged
from models.hooks import HOOK_POINTS, HookPoints
from models.layers import Rotary
from models.ports import Family, Module, Port


@dataclass(frozen=True)
class AllWeights:
    """The tensors of a model that no port knows, all of them."""

    checkpoint: Checkpoint

    @property
    def notes(self) -> tuple[str, ...]:
        return self.checkpoint.notes

    def provenance(self) -> str:
        """Says which weights these are: equal where the content is."""
        checkpoint = self.checkpoint
        if checkpoint.revision and not checkpoint.adapter:
            return f"hub:{checkpoint.revision}"
        return checkpoint.digest(checkpoint.names())


BLOCKS = "{blocks}"  # the list of blocks of the base model, whatever it is called there

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_NO_LIMIT = 1 << 20
_SCALINGS = ("linear", "yarn", "dynamic", "longrope")

_HOOKS = ("embeddings", "residual_before", "after_block", "final_norm")


@dataclass(frozen=True)
class UnportedConfig:
    """The figures that an extraction needs; sizes in values, positions in tokens.

    Attributes:
      output_width: of the final hidden states, where the model projects them.
      rotaries: of its rotary embeddings what decides how long samples may be, and whether their lengths matter.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    output_width: int
    rotaries: tuple[Rotary, ...]
    # Where no hook point has these widths.
    intermediate_size: int = 0
    query_rows: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0


def _config(config: Mapping[str, Any]) -> UnportedConfig:
    """UserError where transformers does not know the architecture, or it is no decoder."""
    return _read(config)[0]


def _read(config: Mapping[str, Any]) -> tuple[UnportedConfig, dict[str, Any]]:
    """What an extraction needs, and all that transformers makes of config.json."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UserError(f"model_type {model_type!r} is none that transformers knows; check config.json")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.get("is_encoder_decoder"):
        raise UserError(f"a {model_type!r} model is no causal language model of transformers; give one that is")
    try:
        read = CONFIG_MAPPING[model_type].from_dict(untagged(dict(config))).get_text_config()
        sizes = [read.vocab_size, read.hidden_size, read.num_hidden_layers, _longest(read)]
        output_width = getattr(read, "word_embed_proj_dim", None) or read.hidden_size  # OPT-350m's
        rotaries = tuple(_rotaries(read))
    except Exception as error:  # noqa: BLE001 (every configuration class fails in its own way)
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"config.json of this {model_type!r} model cannot be used ({reason})") from None
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(read, "is_decoder", False):
        raise UserError(f"this {model_type!r} model is an encoder (is_decoder is false); give a causal language model")
    if not all(type(size) is int and size > 0 for size in sizes):
        raise UserError(
            f"config.json of this {model_type!r} model has the sizes {sizes}; expected whole numbers from 1 on"
        )
    vocabulary, width, blocks, positions = sizes
    figures = UnportedConfig(model_type, vocabulary, width, blocks, positions, output_width, rotaries)
    return figures, read.to_dict()


def _longest(read: Any) -> int:
    """Positions that the model has; where it knows no limit (Mamba, ALiBi), as many as anyone would want."""
    return next((value for name in _LENGTHS if isinstance(value := getattr(read, name, None), int)), _NO_LIMIT)


def _rotaries(read: Any) -> Iterator[Rotary]:
    """Of the scalings that reach beyond the length of the training."""
    given = getattr(read, "rope_parameters", None) or {}
    for kind in (given, *(value for value in given.values() if isinstance(value, Mapping))):
        name = kind.get("rope_type")
        if name is not None and not hasattr(read, f"_validate_{name}_rope_parameters"):
            raise ValueError(f"it knows no rope type {name!r}")
        if name in _SCALINGS:
            most = _longest(read)
            original = getattr(read, "original_max_position_embeddings", None)
            original = most if name == "dynamic" else original or kind.get("original_max_position_embeddings") or most
            yield Rotary(1.0, name, float(kind.get("factor") or 1.0), original_max_positions=int(original))


def _hook_points(config: UnportedConfig) -> HookPoints:
    there = [hook for hook in _HOOKS if hook != "final_norm" or config.output_width == config.hidden_size]
    # What enters its first block has positions in it, for all that is known here.
    return {hook: None if hook == "embeddings" else HOOK_POINTS[hook].alias for hook in there}


def _modules(_: UnportedConfig) -> Mapping[str, Module]:
    return {
        "embeddings": Module(f"{BLOCKS}.0", "input"),
        "residual_before": Module(f"{BLOCKS}.{{i}}", "input"),
        "after_block": Module(f"{BLOCKS}.{{i}}", "output"),
        "final_norm": Module("", "output"),
    }


UNPORTED = Family(config=_config, hook_points=_hook_points, modules=_modules, prefix="model.")


# ----------------------------------------------------------------------------- variants of what a port computes

# What of config.json decides where the hook points of a port are, and how wide.
_LAYOUT = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim max_position_embeddings use_parallel_residual n_embd n_layer n_head n_inner n_positions rms_norm_eps "
    "layer_norm_eps layer_norm_epsilon"
).split()
_WIDTHS = "intermediate_size query_rows num_attention_heads num_key_value_heads head_dim".split()


def variant_of(port: Port, config: Mapping[str, Any]) -> tuple[Family, UnportedConfig]:
    """A model of a type that has a port, computed by transformers because the port does not understand it.

    Its class in transformers is the same, so that the port's hook points are where they always are, unless the port
    does not even understand its sizes. UserError where transformers does not read the configuration either.
    """
    figures, read = _read(config)
    layout = {key: read[key] for key in _LAYOUT if read.get(key) is not None}
    if "rope_parameters" in read:
        layout["rope_parameters"] = {"partial_rotary_factor": 1.0}
    try:
        plain = port.config(layout)
        hook_points, modules = port.hook_points(plain), port.modules(plain)
    except UserError:
        return UNPORTED, figures
    family = Family(_config, lambda _: hook_points, lambda _: modules, port.prefix)
    return family, replace(figures, **{name: getattr(plain, name) for name in _WIDTHS})
