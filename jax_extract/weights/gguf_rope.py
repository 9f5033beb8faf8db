"""How the rotary embedding of a GGUF model is scaled, as config.json would say it.

In: the file's metadata, and the factors of `rope_freqs.weight` where it holds them. Out: `rope_scaling`.

llama.cpp's converter keeps no parameters of Llama 3.1's scaling: it writes what they come to, one factor a frequency,
by which each is divided. The parameters are found again as those that give these factors, since the model was trained
under them. transformers' own reader of GGUF leaves the factors out, and computes another model.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_extract.errors import UserError

FOLDER_MEND = "use the model's Hugging Face folder (safetensors) instead"
ROPE_FACTORS = "rope_freqs.weight"

# Without the architecture's name before them.
ROPE_KEYS = frozenset(
    {
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.attn_factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
    }
)

# Of every Llama that is scaled so; the length that it was trained with before is a power of two.
LOW, HIGH = 1.0, 4.0
ORIGINAL_LENGTHS = (8_192, *(1 << power for power in range(5, 21) if power != 13))  # noqa: PLR2004 (8,192, the first)
FACTOR_ERROR = 1e-5  # relative; the converter computes in float32, and other lengths are further away


def decimal(metadata: Mapping[str, Any], key: str, source: str, default: float | None = None) -> float:
    """The decimal that a float32 stands for: the shortest that rounds to it (1e-05, not 9.9999997e-06)."""
    value = metadata.get(key, default)
    if not isinstance(value, float) or not value > 0:
        raise UserError(f"{source} has {value!r} for {key}; expected one positive number: {FOLDER_MEND}.")
    return float(str(np.float32(value)))


def rope_scaling(
    metadata: Mapping[str, Any], factors: np.ndarray | None, config: Mapping[str, Any], source: str
) -> dict[str, Any] | None:
    """None where nothing is scaled.

    Args:
      factors: float32 [frequencies] of `rope_freqs.weight`.
      config: what config.json has so far.

    Raises:
      UserError: the scaling is not understood.
    """
    named = _by_name(metadata, config, source)
    if factors is None or bool(np.all(factors == 1)):
        return named
    if named is not None:
        raise UserError(
            f"{source} holds {ROPE_FACTORS} and sets the scaling {named['rope_type']!r}; expected one of them: "
            f"{FOLDER_MEND}."
        )
    return _by_factors(factors, config, source)


def _by_name(metadata: Mapping[str, Any], config: Mapping[str, Any], source: str) -> dict[str, Any] | None:
    """What the keys of the file say."""
    name = f"{metadata['general.architecture']}.rope"

    def number(key: str, default: float) -> float:
        return decimal(metadata, f"{name}.{key}", source, default)

    factor = number("scaling.factor", number("scale_linear", 1.0))
    kind = metadata.get(f"{name}.scaling.type", "linear")  # llama.cpp's default
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UserError(
            f"{source} has {kind!r} for {name}.scaling.type; expected 'none', 'linear' or 'yarn': {FOLDER_MEND}."
        )
    if number("scaling.yarn_ext_factor", 1.0) != 1:
        raise UserError(
            f"{source} has {metadata[f'{name}.scaling.yarn_ext_factor']} for {name}.scaling.yarn_ext_factor; expected "
            f"1: {FOLDER_MEND}."
        )
    original = metadata.get(f"{name}.scaling.original_context_length", config["max_position_embeddings"])
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    attention = number("scaling.yarn_attn_factor", number("scaling.attn_factor", 1.0))
    if attention != 1:  # llama.cpp multiplies with it what the factor alone gives
        scaling["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if f"{name}.scaling.{theirs}" in metadata:
            scaling[ours] = number(f"scaling.{theirs}", 1.0)
    return scaling


def _by_factors(factors: np.ndarray, config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The parameters of Llama 3.1's scaling that give these factors."""
    head_dim, factor = config["head_dim"], float(f"{factors.max():.6g}")
    if factors.shape == (head_dim // 2,) and factor > 1:
        for original in ORIGINAL_LENGTHS:
            computed = _llama3_factors(head_dim, config["rope_theta"], factor, original)
            if np.allclose(factors, computed, rtol=FACTOR_ERROR, atol=0):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": LOW,
                    "high_freq_factor": HIGH,
                    "original_max_position_embeddings": original,
                }
    raise UserError(
        f"{source} holds {ROPE_FACTORS} with {factors.size} factors from {factors.min():g} to {factors.max():g}; "
        f"expected the {head_dim // 2} of Llama 3.1's scaling: {FOLDER_MEND}."
    )


def _llama3_factors(head_dim: int, theta: float, factor: float, original: int) -> np.ndarray:
    """What each frequency is divided by, float64 [head_dim / 2]: Llama 3.1's rule ("The Llama 3 Herd of Models", 2024).

    A wave that fits the original length at least HIGH times is left as it is, one that does not fit LOW times is
    stretched by the whole factor, and between the two the frequency goes over linearly.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    times = original * frequencies / (2 * np.pi)
    kept = np.clip((times - LOW) / (HIGH - LOW), 0, 1)
    return 1 / ((1 - kept) / factor + kept)
