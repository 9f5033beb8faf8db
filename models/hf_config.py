"""A Hugging Face config.json, read field by field; what a port does not compute is refused by name.

In: config.json as a dictionary, in the spelling of transformers 4 or 5, completed by `config_fields`. Out: checked
values, or one sentence that names the field, what it holds and what was expected.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

from models.errors import UserError
from models.layers import Rotary

Config = Mapping[str, Any]

# What each rope type cannot do without.
_ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
_ORIGINAL = "original_max_position_embeddings"
# What says how positions are rotated, and what each means where it is missing.
ROPE_FIELDS = {
    **{"rope_theta": 10_000.0, "rope_scaling": None, "rope_parameters": None, "partial_rotary_factor": None},
    _ORIGINAL: None,
}
# Whole numbers that transformers takes as they come, 8192.0 too; it checks the types of others.
_UNTYPED = ("original_max_position_embeddings", "sliding_window_pattern")
_LAYER_TYPES = {"full_attention": False, "attention": False, "sliding_attention": True}  # -> whether it has a window


def require_model_type(config: Config, family: Sequence[str]) -> str:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in family:
        raise UserError(f"model_type {model_type!r} is not of this family: {', '.join(family)}")
    return model_type


def size(config: Config, key: str, default: int | None = None) -> int:
    value = _given(config, key, default)
    if key in _UNTYPED and type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or not 1 <= value < 2**31:
        raise UserError(f"config.json has {key} {_shown(value)}; it must be a whole number of at least 1")
    return value


def positive(config: Config, key: str, default: float | None = None) -> float:
    value = _given(config, key, default)
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise UserError(f"config.json has {key} {_shown(value)}; it must be a positive number")
    return float(value)


def switch(config: Config, key: str) -> bool:
    value = _given(config, key)
    if value not in (True, False):
        raise UserError(f"config.json has {key} {_shown(value)}; it must be true or false")
    return bool(value)


def mapping(config: Config, key: str) -> Config:
    """Of names to values; empty where there is none."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"config.json has {key} {_shown(value)}; it must be a mapping from names to values")
    return value or {}


def require(config: Config, key: str, accepted: tuple[Any, ...]) -> Any:
    """The value of a field; UserError where it is one that the port does not compute."""
    value = config.get(key)
    if not isinstance(value, (str, bool, int, NoneType)) or value not in accepted:
        raise UserError(
            f"config.json asks for {key} {_shown(value)}; this port computes {', '.join(map(_shown, accepted))}"
        )
    return value


def require_whole_heads(width: int, heads: int, key_heads: int) -> None:
    """UserError where heads do not divide the stream (`width`, 0 where they need not), or groups are not whole."""
    if width % heads:
        raise UserError(f"the width {width} is not a multiple of the {heads} heads that config.json has")
    if heads % key_heads:
        raise UserError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {key_heads}; grouped-query "
            "attention needs whole groups"
        )


def _given(config: Config, key: str, default: Any = None) -> Any:
    if (value := config.get(key)) is not None:
        return value
    if default is None:
        raise UserError(
            f"config.json has {key} null, which transformers cannot compute with; leave it out to have its default"
            if key in config
            else f"config.json lacks {key!r}; it must be a complete Hugging Face file"
        )
    return default


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)[:40]


# ------------------------------------------------------------------------------------------- rotations


def rotary(config: Config, default_theta: float = 10_000.0, *, width: int) -> Rotary:
    """From `rope_scaling` with `rope_theta` (transformers 4), or `rope_parameters` (transformers 5).

    Args:
      width: how many values of a head are rotated.
    """
    parameters = dict(mapping(config, "rope_scaling") or mapping(config, "rope_parameters"))
    if (original := config.get(_ORIGINAL)) is not None:  # beside them it counts for more than in them
        parameters[_ORIGINAL] = original
    return rotary_of(parameters, config.get("rope_theta"), default_theta, config, width)


def rotary_of(parameters: Config, theta: Any, default_theta: float, config: Config, width: int) -> Rotary:
    """From one set of rope parameters, whose further keys change nothing.

    Args:
      theta: what config.json says of it elsewhere.
      width: how many values of a head are rotated.
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if not isinstance(kind, str) or kind not in _ROPE_TYPES:
        raise UserError(f"unsupported rope type {_shown(kind)} in config.json; supported: {', '.join(_ROPE_TYPES)}")
    if missing := [key for key in _ROPE_TYPES[kind] if key not in parameters]:
        raise UserError(f"rope type {kind!r} in config.json lacks {', '.join(missing)}")
    theta = next((t for t in (parameters.get("rope_theta"), theta) if t is not None), default_theta)
    base = positive({"rope_theta": theta}, "rope_theta")
    if kind == "default":
        return Rotary(base)
    if kind == "linear":
        return Rotary(base, "linear", positive(parameters, "factor"))
    most = size(config, "max_position_embeddings")
    if kind == "dynamic":
        if width <= 2:  # noqa: PLR2004 (its formula divides by what is more)
            raise UserError(f"rope type 'dynamic' in config.json needs more than {width} rotated values of a head")
        return Rotary(base, "dynamic", positive(parameters, "factor"), original_max_positions=most)
    original = size(parameters, _ORIGINAL, most)
    if kind == "llama3":
        factor, low, high = (positive(parameters, key) for key in _ROPE_TYPES["llama3"])
        if high <= low:
            raise UserError(f"config.json has high_freq_factor {high}, which must be above low_freq_factor {low}")
        return Rotary(base, "llama3", factor, low, high, original)
    factor = positive(parameters, "factor", most / original)
    if kind == "longrope":
        return _longrope(parameters, base, factor, original, width)
    return _yarn(parameters, base, factor, original)


def _yarn(parameters: Config, base: float, factor: float, original: int) -> Rotary:
    if base <= 1:
        raise UserError(f"rope type 'yarn' in config.json needs a rope_theta above 1, not {base:g}")
    mscale, mscale_all_dim = (_number(parameters, key, 0.0) for key in ("mscale", "mscale_all_dim"))
    if mscale and mscale_all_dim:
        scale = _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all_dim)
    else:
        scale = _yarn_scale(factor, 1.0)
    return Rotary(
        base,
        "yarn",
        factor,
        original_max_positions=original,
        attention_scale=_number(parameters, "attention_factor", scale),
        beta_fast=_number(parameters, "beta_fast", 0.0) or 32.0,
        beta_slow=_number(parameters, "beta_slow", 0.0) or 1.0,
        truncate=bool(parameters.get("truncate", True)),  # null is false
    )


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(parameters: Config, base: float, factor: float, original: int, width: int) -> Rotary:
    factors = {}
    for key in ("short_factor", "long_factor"):
        found = parameters[key]
        if not isinstance(found, list) or len(found) != width // 2:
            raise UserError(
                f"config.json has {key} {_shown(found)}; it must be a list of {width // 2} numbers, one for each "
                f"frequency of a head"
            )
        factors[key] = tuple(positive({key: one}, key) for one in found)
    scale = 1.0 if factor <= 1 or original == 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return Rotary(
        base,
        "longrope",
        factor,
        original_max_positions=original,
        attention_scale=_number(parameters, "attention_factor", scale),
        short_factors=factors["short_factor"],
        long_factors=factors["long_factor"],
    )


def _number(parameters: Config, key: str, default: float) -> float:
    """From 0 on; absent and null are the default."""
    value = parameters.get(key)
    return default if value is None else 0.0 if value == 0 and type(value) is not bool else positive(parameters, key)


def rotated_width(config: Config, head_dim: int, default: float = 1.0, key: str = "partial_rotary_factor") -> int:
    """How many values of a head are rotated, from the share that config.json names."""
    said = mapping(config, "rope_scaling") or mapping(config, "rope_parameters")
    share = said.get("partial_rotary_factor")
    share = positive({key: config.get(key) if share is None else share}, key, default)
    width = int(head_dim * share)
    if share > 1 or width == 0 or width % 2:
        raise UserError(
            f"config.json has {key} {share:g}, which rotates {width} of a head's {head_dim} values; it must be an even "
            f"number from 2 to {head_dim}"
        )
    return width


# -------------------------------------------------------------------------------------- sliding windows


def sliding_windows(config: Config, layers: int, sliding: Sequence[bool]) -> tuple[int, ...]:
    """Per layer, how many positions a query sees, itself included, 0 for all; empty where no layer has a window.

    Args:
      sliding: which layers have one where config.json has no `layer_types`.
    """
    if (types := config.get("layer_types")) is not None:
        if not isinstance(types, list) or len(types) != layers:
            raise UserError(f"config.json has layer_types {_shown(types)}; expected a list of {layers}, one a layer")
        for kind in types:
            if not isinstance(kind, str) or kind not in _LAYER_TYPES:
                raise UserError(f"config.json has the layer type {_shown(kind)}; known: {', '.join(_LAYER_TYPES)}")
        sliding = [_LAYER_TYPES[kind] for kind in types]
    if not any(sliding[:layers]):
        return ()
    if config.get("sliding_window") is None:
        raise UserError(
            "config.json has layers with a sliding window and no sliding_window that says how long it is; add it"
        )
    window = size(config, "sliding_window")
    return tuple(window if slides else 0 for slides in sliding[:layers])
