"""Which architecture a config.json describes that does not say it, as files before transformers 3 do not.

In: config.json as a dictionary. Out: the same with `model_type`, and the sentence that tells it; or nothing, where it
could be several. Weights of another architecture are refused by the names of their tensors.
"""

from __future__ import annotations

from typing import Any

from models.registry import PORTS

# Classes that such files name, and fields that only one supported type has.
_TYPES = {
    "GPT2LMHeadModel": "gpt2",
    "GPTNeoXForCausalLM": "gpt_neox",
    "LlamaForCausalLM": "llama",
    "LLaMAForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "PhiForCausalLM": "phi",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
}
_GPT2_SIZES = frozenset({"n_embd", "n_head", "n_layer", "n_positions", "vocab_size"})


def name_model_type(config: dict[str, Any]) -> tuple[str, ...]:
    """Writes `model_type` into `config` where it is missing and clear; says so."""
    if config.get("model_type") is not None:
        return ()
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    if isinstance(first, str) and first in _TYPES:
        config["model_type"] = _TYPES[first]
        return (f"config.json names no model_type: read as {_TYPES[first]!r}, of which its architectures say {first}",)
    if first is None and config.keys() >= _GPT2_SIZES and not PORTS["gpt2"].fields["gpt2"].unread(config):
        config["model_type"] = "gpt2"
        return ("config.json names no model_type: read as 'gpt2', whose fields it has and no others",)
    return ()
