"""Tiny random Hugging Face models of the whole family, and what torch computes at every hook point of them.

In: the name of a variant. Out: a folder with config.json, safetensors and a tokenizer, as `jax_extract`
takes it; and, from the torch model by forward hooks, the rows of every hook point, one text at a time,
without padding. Nothing is left at its initial value: fresh models have zero biases and unit norms,
which would hide a bias or a norm weight that is applied wrongly.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging as transformers_logging

from models.hooks import HOOK_POINTS
from models.registry import port_for

transformers_logging.disable_progress_bar()

Rows = dict[tuple[str, int | None], np.ndarray]  # (hook point, layer) -> [tokens, width]

CHARACTERS = 94  # printable ASCII from "!" on: the tokens that texts are made of
_FIRST_CHARACTER = 33
_END = "<|endoftext|>"

_ROOT = tempfile.TemporaryDirectory(prefix="tiny_models_")
atexit.register(_ROOT.cleanup)

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def families(one_a_port: str, more: str) -> list[str]:
    """Names between spaces; `more` only where EVERY_FAMILY is in the environment, because they take minutes."""
    return [*one_a_port.split(), *(more.split() if os.environ.get("EVERY_FAMILY") else ())]


def _sizes(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "rms_norm_eps": 3e-3,  # so large that forgetting or misreading it shows
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _theta(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def _gpt2(hidden: int, layers: int, heads: int, vocab: int) -> dict[str, Any]:
    sizes = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "vocab_size": vocab}
    return {**sizes, "n_positions": 512, "layer_norm_epsilon": 3e-3, "bos_token_id": None, "eos_token_id": None}


def _neox(hidden: int, ffn: int, layers: int, heads: int, vocab: int) -> dict[str, Any]:
    sizes = _sizes(hidden, ffn, layers, heads, heads, vocab)
    del sizes["num_key_value_heads"], sizes["rms_norm_eps"]
    return {**sizes, "layer_norm_eps": 3e-3}


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    # On a `model` axis of 8 every matrix of this one shards but gate_up (2 x 50 rows); heads divide nothing.
    "qwen2": lambda: Qwen2Config(**_sizes(56, 50, 4, 7, 1, 136), rope_parameters=_theta(7e4)),
    "qwen2_window": lambda: Qwen2Config(
        **_sizes(54, 70, 5, 9, 3, 131), use_sliding_window=True, sliding_window=29, max_window_layers=2
    ),
    "qwen2_tied": lambda: Qwen2Config(**_sizes(36, 52, 4, 6, 2, 130), tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_sizes(48, 72, 4, 6, 2, 133), head_dim=10, rope_parameters=_theta(3e5)),
    "llama": lambda: LlamaConfig(**_sizes(54, 80, 5, 9, 3, 129)),
    "llama_llama3_rope": lambda: LlamaConfig(**_sizes(48, 61, 4, 6, 2, 128), rope_parameters=_LLAMA3),
    "llama_linear_rope": lambda: LlamaConfig(
        **_sizes(42, 66, 4, 7, 1, 131), rope_parameters={"rope_type": "linear", "rope_theta": 5e3, "factor": 2.5}
    ),
    "llama_biases": lambda: LlamaConfig(**_sizes(54, 64, 4, 9, 3, 131), attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**_sizes(64, 90, 4, 8, 2, 127), head_dim=6, sliding_window=21),
    "gpt2": lambda: GPT2Config(**_gpt2(48, 4, 6, 131)),
    "gpt2_variant": lambda: GPT2Config(
        **_gpt2(40, 4, 5, 129),
        n_inner=70,
        activation_function="gelu",
        scale_attn_by_inverse_layer_idx=True,
        scale_attn_weights=False,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_neox(48, 70, 4, 6, 131), rotary_pct=0.25),
    "gpt_neox_sequential": lambda: GPTNeoXConfig(
        **_neox(56, 64, 4, 7, 129), rotary_pct=0.5, use_parallel_residual=False, attention_bias=False
    ),
    "phi": lambda: PhiConfig(**_neox(60, 80, 4, 6, 133), partial_rotary_factor=0.4),
    "phi_variant": lambda: PhiConfig(
        **_neox(48, 70, 4, 6, 131), num_key_value_heads=2, partial_rotary_factor=0.5, qk_layernorm=True
    ),
    "gemma": lambda: GemmaConfig(**_sizes(48, 70, 4, 6, 1, 131), head_dim=10),
    "gemma2": lambda: Gemma2Config(
        **_sizes(48, 70, 5, 6, 2, 131),
        head_dim=10,
        sliding_window=21,
        query_pre_attn_scalar=17,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_sizes(48, 70, 7, 6, 2, 131), head_dim=10, sliding_window=25, query_pre_attn_scalar=13
    ),
    "gemma3_with_pictures": lambda: Gemma3Config(
        text_config=FAMILIES["gemma3"]().to_dict(),
        vision_config={
            **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
            **{"image_size": 28, "patch_size": 14},
        },
        mm_tokens_per_image=4,
    ),
    "long": lambda: LlamaConfig(**{**_sizes(36, 44, 2, 6, 2, 131), "max_position_embeddings": 8_192}),
}


@functools.cache
def tiny_model(family: str) -> PreTrainedModel:
    return random_model(FAMILIES[family](), seed=sum(family.encode()))


def random_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """The torch model in float32 with eager attention; every value is representable in bfloat16 too,
    as in real checkpoints, so that a bfloat16 run differs by its arithmetic alone."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name or ".ln_" in name:
                value.uniform_(0.5, 1.5, generator=random)
            elif name.endswith("bias"):
                value.normal_(0.0, 0.3, generator=random)
            else:
                value.normal_(0.0, 1.0 if "embed" in name else value.shape[1] ** -0.5, generator=random)
            value.copy_(value.bfloat16().float())
    return model


@functools.cache
def tiny_folder(family: str) -> Path:
    """The same model saved as `save_pretrained` does, with a tokenizer."""
    folder = Path(_ROOT.name) / family
    save(tiny_model(family), folder)
    return folder


def save(model: PreTrainedModel, folder: Path, **options: Any) -> None:
    """Config, safetensors and a tokenizer of single characters; `options` as of `save_pretrained`."""
    model.save_pretrained(folder, **options)
    # No merges, byte level: what transformers makes of any tokenizer that it finds beside a Qwen2 model.
    vocabulary = {chr(_FIRST_CHARACTER + i): i for i in range(CHARACTERS)} | {_END: CHARACTERS}
    characters = Tokenizer(BPE(vocabulary, merges=[]))
    characters.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    PreTrainedTokenizerFast(tokenizer_object=characters, eos_token=_END).save_pretrained(folder)


def random_ids(lengths: Iterable[int], seed: int = 0) -> list[np.ndarray]:
    """int32 token ids of printable characters, one array a length."""
    random = np.random.default_rng(seed)
    return [random.integers(0, CHARACTERS, length).astype(np.int32) for length in lengths]


def text_of(token_ids: np.ndarray) -> str:
    """The text that the tiny tokenizer turns into these ids."""
    return "".join(chr(_FIRST_CHARACTER + i) for i in token_ids)


def reference(
    model: PreTrainedModel,
    token_ids: np.ndarray,
    layers: Sequence[int] | None = None,
    pattern_tokens: int | None = None,
) -> Rows:
    """Every hook point of one text, unbatched and unpadded, as torch computes it, in float32.

    What attention multiplies is what transformers' own eager attention is called with, and gives.

    Args:
      layers: only these; None for all.
      pattern_tokens: weights that a row of `attention_pattern` has for each head; None leaves that hook point out.
    """
    rows: Rows = {}
    base = getattr(model.base_model, "language_model", model.base_model)
    config = json.loads(base.config.to_json_string())
    if config["model_type"] == "ministral":  # as which transformers takes a Mistral with layer_types
        config["model_type"] = "mistral"
    port = port_for(config)
    modules = port.modules(port.config(config))

    def keep(key: tuple[str, int | None], value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        value = value[0].detach().float().numpy().copy()
        if part := modules[key[0]].part:
            groups, parts, number = part
            value = value.reshape(len(value), groups, parts, -1)[:, :, number].reshape(len(value), -1)
        rows[key] = value

    def hook(name: str, layer: int | None) -> Any:
        path, side, _ = modules[name]
        module = base.get_submodule(path.format(i=layer))
        if side == "output":
            return module.register_forward_hook(lambda module, args, result: keep((name, layer), result))
        return module.register_forward_pre_hook(
            lambda module, args, kwargs: keep((name, layer), args or kwargs["hidden_states"]), with_kwargs=True
        )

    chosen = range(base.config.num_hidden_layers) if layers is None else layers
    points = port.hook_points(port.config(config))
    in_attention = {modules[name].side: name for name in points if modules[name].side not in ("input", "output")}
    if pattern_tokens is None:
        del in_attention["pattern"]

    def see(layer: int, side: str, x: torch.Tensor) -> None:
        if side in in_attention and layer in chosen:
            width = x.shape[-1] if side != "pattern" else pattern_tokens
            rows[in_attention[side], layer] = head_rows(x, width).numpy().copy()

    handles = []
    for name in points:
        for layer in chosen if HOOK_POINTS[name].per_layer else (None,):
            if name not in in_attention.values() and name != "attention_pattern":
                handles.append(hook(name, layer))
    try:
        with torch.inference_mode(), watched_attention(base, see):
            base(torch.from_numpy(np.asarray(token_ids, np.int64))[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return rows


def head_rows(x: torch.Tensor, width: int) -> torch.Tensor:
    """x [1, heads, t, n] -> float32 [t, heads * width], zero where n is less."""
    padded = torch.nn.functional.pad(x[0].float(), (0, width - x.shape[-1]))
    return padded.transpose(0, 1).flatten(1)


# layer, what of attention, [1, heads, t, ·] -> None, or what is put in its place.
SeeAttention = Callable[[int, str, torch.Tensor], torch.Tensor | None]
_watchers: list[SeeAttention] = []


@contextlib.contextmanager
def watched_attention(base: Any, see: SeeAttention) -> Iterator[None]:
    """Inside, `see` is shown what transformers' own attention multiplies, behind those that see it already.

    Weights are those of eager attention.
    """
    functions, name = vars(sys.modules[type(base).__module__]), "eager_attention_forward"
    if base.config._attn_implementation == "sdpa":
        functions, name = ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa"
    theirs = functions[name]

    def shown(module: Any, side: str, x: torch.Tensor) -> torch.Tensor:
        for watcher in _watchers:
            changed = watcher(module.layer_idx, side, x)
            x = x if changed is None else changed
        return x

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **given: Any) -> Any:
        query, key = shown(module, "query", query), shown(module, "key", key)
        mixed, weights = theirs(module, query, key, value, mask, **given)
        if weights is None:
            return mixed, None
        changed = shown(module, "pattern", weights)
        if changed is not weights:
            values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
            mixed = (changed @ values).transpose(1, 2)
        return mixed, changed

    _watchers.append(see)
    if len(_watchers) == 1:
        functions[name] = attention
    try:
        yield
    finally:
        _watchers.pop()
        if not _watchers:
            functions[name] = theirs


def row_errors(rows: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """float64 [rows]: relative distance of each row, absolute where the true row is zero."""
    assert rows.shape == truth.shape, (rows.shape, truth.shape)
    rows, truth = rows.astype(np.float64), truth.astype(np.float64)
    norm = np.linalg.norm(truth, axis=-1)
    return np.linalg.norm(rows - truth, axis=-1) / np.where(norm == 0, 1.0, norm)


def run_rows(run: Any, sample_id: str) -> Rows:
    """All that a run holds of one sample."""
    sample = run.sample(sample_id)
    return {(site.hook, site.layer): sample.get(site.layer, site.hook) for site in run.sites}
