"""Hugging Face's model in torch, without the blocks that are not needed and without its head.

In: an `OpenModel`, how many blocks run, a dtype. Out: the base model, as transformers reads its weights or as we do.
Nothing is unpickled, and no code of the folder's is run.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from jax_extract.weights.open_model import OpenModel
from jax_extract.weights.unported import BLOCKS
from models.config_fields import untagged
from models.ports import Module, Port

_POOLER = "pooler."  # behind the last hidden state of models that may be encoders too
_SOFT_CAPS = ("attn_logit_softcapping", "attention_logit_softcapping")  # as models without a port call it


def load_theirs(model: OpenModel, layers: int, dtype: torch.dtype, head: bool = False) -> Any:
    """As any user of transformers loads it; with `head`, the language-model head too.

    A family without a port keeps its upper blocks: some compute with their number.
    """
    is_port = isinstance(model.family, Port)
    # Safetensors only: nothing is run.
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    options |= _attention(model)
    path = Path(model.checkpoint.source).expanduser()
    if path.suffix == ".gguf":
        if "rope_scaling" in model.checkpoint.config:
            raise ValueError("it does not read the scaling of a GGUF model's rotary embedding")
        source, options["gguf_file"] = path.parent, path.name
    else:
        if (path / "adapter_config.json").exists():
            raise ValueError("it would merge the adapter that lies beside the weights")
        source = path if path.exists() else model.checkpoint.source
        options["revision"] = model.checkpoint.revision or "main"
        config = AutoConfig.from_pretrained(source, revision=options["revision"], trust_remote_code=False)
        if is_port:
            _without_upper_blocks(config.get_text_config(), layers)
        options["config"] = config
    adapter = getattr(model.checkpoint, "adapter_folder", None)
    # An adapter names the modules of the model with its head.
    kind: Any = AutoModelForCausalLM if head or adapter is not None else AutoModel
    loaded, info = kind.from_pretrained(source, output_loading_info=True, **options)
    lost = sorted([*info["missing_keys"], *info["mismatched_keys"]])
    if lacking := [name for name in lost if not name.startswith(_POOLER)]:
        raise ValueError(f"it did not find {lacking[0]!r}")  # and would compute with random numbers in its place
    if adapter is not None:
        loaded = _merged(loaded, adapter)
    if head:
        return loaded.eval()
    if adapter is not None:
        loaded = loaded.base_model
    loaded = getattr(loaded, "language_model", loaded)  # of a model that reads pictures too
    if is_port:
        del loaded.get_submodule(blocks_path(loaded, model))[layers:]
        loaded.config.num_hidden_layers = layers
    return loaded.eval()


def _merged(loaded: Any, adapter: Path) -> Any:
    """The base model with an adapter in its weights; ValueError where that is not one of this model."""
    from peft import PeftModel

    before = _sums(loaded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(loaded, adapter).merge_and_unload()
    if _sums(merged) == before:
        raise ValueError(f"the adapter in {adapter} changes nothing of this model")
    return merged


def _sums(loaded: Any) -> dict[str, float]:
    return {name: value.sum(dtype=torch.float64).item() for name, value in loaded.named_parameters()}


def load_ours(model: OpenModel, layers: int, dtype: torch.dtype, head: bool = False) -> Any:
    """With the tensors that our reader gives, merged with an adapter where there is one; with `head`, that too."""
    fields = untagged(dict(model.checkpoint.config))
    model_type = fields.pop("model_type")
    if model_type == "mistral" and "layer_types" in fields:
        model_type = "ministral"  # as AutoConfig takes it
    config = _without_upper_blocks(AutoConfig.for_model(model_type, **fields), layers)
    with no_init_weights():  # every parameter is written over
        kind = AutoModelForCausalLM if head else AutoModel
        loaded = kind.from_config(config, dtype=dtype, **_attention(model)).eval()
        loaded.tie_weights()  # which is part of what is left out
    stored = model.checkpoint.names()
    heads: dict[str, str] = _stored_heads(loaded, model) if head else {}
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            whole = (heads.get(name) or name) if head else model.family.prefix + name
            bare = whole.removeprefix(model.family.prefix)
            values = model.checkpoint.read(whole if whole in stored else bare)
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    return loaded


def _stored_heads(loaded: Any, model: OpenModel) -> dict[str, str]:
    """A parameter of the head -> its name in a checkpoint, which need not be that in the model."""
    sources = model.port.sources(model.config)
    ours = dict(loaded.get_output_embeddings().named_parameters())
    stored = {"weight": sources.get("head"), "bias": sources.get("head_bias")}
    return {
        name: source.names[0]
        for name, parameter in loaded.named_parameters()
        for kind, source in stored.items()
        if source is not None and parameter is ours.get(kind)
    }


def hooked_modules(loaded: Any, model: OpenModel) -> Mapping[str, Module]:
    """Hook point -> the base model's submodule that has it, `{i}` standing for the layer, and what of it."""
    modules = model.family.modules(model.config)
    if not any(BLOCKS in module.path for module in modules.values()):
        return modules
    blocks = blocks_path(loaded, model)
    return {hook: module._replace(path=module.path.replace(BLOCKS, blocks)) for hook, module in modules.items()}


def blocks_path(loaded: Any, model: OpenModel) -> str:
    """The base model's list of blocks; ValueError where there is none that is clearly it."""
    path = model.family.modules(model.config)["after_block"].path.removesuffix(".{i}")
    if path != BLOCKS:
        return path
    lists = [name for name, module in loaded.named_modules() if isinstance(module, torch.nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    blocks = [name for name in outermost if len(loaded.get_submodule(name)) == model.config.num_hidden_layers]
    if len(blocks) != 1:
        raise ValueError(f"{len(blocks)} of its lists of modules could be its {model.config.num_hidden_layers} blocks")
    return blocks[0]


def _attention(model: OpenModel) -> dict[str, str]:
    """The attention of torch's that never holds tokens x tokens values, unless it would leave out what is asked for."""
    if not isinstance(model.family, Port):
        caps = any(model.checkpoint.config.get(key) is not None for key in _SOFT_CAPS)
        return {"attn_implementation": "eager"} if caps else {}
    return {"attn_implementation": "sdpa" if model.config.attention.soft_cap is None else "eager"}


def forget_lengths(loaded: Any) -> None:
    """Rotations as they are before the first sample.

    transformers keeps those of the longest sample that a `dynamic` rotation was asked for, and goes on with them for
    shorter ones.
    """
    for module in loaded.modules():
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, getattr(module, "original_max_seq_len", getattr(module, name)))
        for name, first in [*module.named_buffers(recurse=False)]:
            if name.endswith("original_inv_freq"):
                setattr(module, name.replace("original_inv_freq", "inv_freq"), first.clone())


def _without_upper_blocks(config: Any, layers: int) -> Any:
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    config.num_hidden_layers = layers
    return config


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and reports of a model library, which speak of blocks left out on purpose."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
