"""Architectures that no port computes and Hugging Face does: what an extraction by forward hooks needs of them.

In: config.json. Out: `UNPORTED`, a family with the hook points that every decoder has: the stream before and behind
each block, what enters the first one, and what the base model gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jax_extract.errors import UserError
from models.hooks import HOOK_POINTS, HookPoints
from models.ports import Family, Module

BLOCKS = "{blocks}"  # the list of blocks of the base model, whatever it is called there

_HOOKS = ("embeddings", "residual_before", "after_block", "final_norm")


@dataclass(frozen=True)
class UnportedConfig:
    """The figures that an extraction needs; sizes in values, positions in tokens."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int

    @property
    def intermediate_size(self) -> int:
        raise NotImplementedError("no hook point of an unported architecture has this width")


def _config(config: Mapping[str, Any]) -> UnportedConfig:
    """As transformers reads config.json; UserError where it does not know the architecture, or it is no decoder."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UserError(f"model_type {model_type!r} is none that transformers knows; check config.json")
    fields = {key: value for key, value in config.items() if key != "model_type"}
    try:
        read = CONFIG_MAPPING[model_type](**fields).get_text_config()
        sizes = [read.vocab_size, read.hidden_size, read.num_hidden_layers, read.max_position_embeddings]
    except Exception as error:  # noqa: BLE001 (every configuration class fails in its own way)
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"config.json of this {model_type!r} model cannot be used ({reason})") from None
    if not all(type(size) is int and size > 0 for size in sizes):
        raise UserError(
            f"config.json of this {model_type!r} model has the sizes {sizes}; expected whole numbers from 1 on"
        )
    return UnportedConfig(model_type, *sizes)


def _hook_points(_: UnportedConfig) -> HookPoints:
    # What enters its first block has positions in it, for all that is known here.
    return {hook: None if hook == "embeddings" else HOOK_POINTS[hook].alias for hook in _HOOKS}


def _modules(_: UnportedConfig) -> Mapping[str, Module]:
    return {
        "embeddings": (f"{BLOCKS}.0", "input"),
        "residual_before": (f"{BLOCKS}.{{i}}", "input"),
        "after_block": (f"{BLOCKS}.{{i}}", "output"),
        "final_norm": ("", "output"),
    }


UNPORTED = Family(config=_config, hook_points=_hook_points, modules=_modules, prefix="model.")
