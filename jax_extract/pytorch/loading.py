"""Hugging Face's model in torch, without the blocks that are not needed and without its head.

In: an `OpenModel`, how many blocks run, a dtype. Out: the base model, as transformers reads its weights or as we do.
Nothing is unpickled, and no code of the folder's is run.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel
from transformers.initialization import no_init_weights

from jax_extract.weights.open_model import OpenModel
from jax_extract.weights.unported import BLOCKS
from models.config_fields import untagged
from models.ports import Module, Port


def load_theirs(model: OpenModel, layers: int, dtype: torch.dtype) -> Any:
    """As any user of transformers loads it.

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
    loaded, info = AutoModel.from_pretrained(source, output_loading_info=True, **options)
    if lacking := sorted([*info["missing_keys"], *info["mismatched_keys"]]):
        raise ValueError(f"it did not find {lacking[0]!r}")  # and would compute with random numbers in its place
    loaded = getattr(loaded, "language_model", loaded)  # of a model that reads pictures too
    if is_port:
        del loaded.get_submodule(blocks_path(loaded, model))[layers:]
        loaded.config.num_hidden_layers = layers
    return loaded.eval()


def load_ours(model: OpenModel, layers: int, dtype: torch.dtype) -> Any:
    """With the tensors that our reader gives, merged with an adapter where there is one."""
    fields = untagged(dict(model.checkpoint.config))
    model_type = fields.pop("model_type")
    if model_type == "mistral" and "layer_types" in fields:
        model_type = "ministral"  # as AutoConfig takes it
    config = _without_upper_blocks(AutoConfig.for_model(model_type, **fields), layers)
    with no_init_weights():  # every parameter is written over
        loaded = AutoModel.from_config(config, dtype=dtype, **_attention(model)).eval()
    stored = model.checkpoint.names()
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            whole = model.family.prefix + name
            values = model.checkpoint.read(whole if whole in stored else name)
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    return loaded


def hooked_modules(loaded: Any, model: OpenModel) -> Mapping[str, Module]:
    """Hook point -> the base model's submodule that has it, `{i}` standing for the layer, and what of it."""
    modules = model.family.modules(model.config)
    if not any(BLOCKS in path for path, _ in modules.values()):
        return modules
    blocks = blocks_path(loaded, model)
    return {hook: (path.replace(BLOCKS, blocks), side) for hook, (path, side) in modules.items()}


def blocks_path(loaded: Any, model: OpenModel) -> str:
    """The base model's list of blocks; ValueError where there is none that is clearly it."""
    path = model.family.modules(model.config)["after_block"][0].removesuffix(".{i}")
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
        return {}
    return {"attn_implementation": "sdpa" if model.config.attention.soft_cap is None else "eager"}


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
