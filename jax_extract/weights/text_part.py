"""The language model of a checkpoint that can do more: what reads pictures is left where it lies.

In: a `Checkpoint` whose config.json has a `text_config`. Out: a `Checkpoint` of that part alone, with the names that
its tensors have where it is released by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_extract.weights.checkpoint import Checkpoint
from jax_extract.weights.renamed import RenamedCheckpoint

# Whose text goes through the language model as it would through that model alone -> the type of that.
_WHOLE_TYPES = {"gemma3": "gemma3_text"}
# What config.json says once, for the whole: before what the part says of it, and after.
_OF_WHOLE = {"tie_word_embeddings": True}  # -> what transformers takes where it is missing
_OF_BOTH = ("eos_token_id", "quantization_config", "quantization", "compression_config", "transformers_weights")
# As transformers 4 and 5 begin the names of the part; a head has none of its own.
_PREFIXES = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.": ""}
_HEAD = "lm_head."


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the language model, which is the whole one where that is all there is."""
    part = config.get("text_config")
    if str(config.get("model_type")) not in _WHOLE_TYPES or not isinstance(part, dict | None):
        return dict(config)
    ours = {"model_type": _WHOLE_TYPES[config["model_type"]]} | {key: config[key] for key in _OF_BOTH if key in config}
    return ours | (part or {}) | {key: config.get(key, absent) for key, absent in _OF_WHOLE.items()}


def text_name(name: str) -> str | None:
    """What a tensor of the whole is called in the part; None where it is of something else."""
    for prefix, own in _PREFIXES.items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name if name.startswith(_HEAD) else None


def text_part(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself where it holds a language model and nothing else."""
    config = text_config(checkpoint.config)
    if config == checkpoint.config:
        return checkpoint
    stored = {own: name for name in checkpoint.names() if (own := text_name(name)) is not None}
    return RenamedCheckpoint(checkpoint, stored, config)
