"""The model of a compilation: its configuration and tokenizer, no weights.

In: what `--model_path` names: a folder or .gguf file, a hub id, or one of the known models by name. Out: an `OpenModel`
whose tensors cannot be read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_extract.errors import UserError, user_path
from jax_extract.weights.checkpoint import folder_tokenizer, is_hub_id
from jax_extract.weights.open_model import OpenModel
from jax_extract.weights.text_part import text_config
from models.gemma_jax_with_hooks import GemmaConfig
from models.gpt2_jax_with_hooks import GPT2Config
from models.gpt_neox_jax_with_hooks import GPTNeoXConfig
from models.phi_jax_with_hooks import PhiConfig
from models.ports import ModelConfig, Port
from models.qwen2_jax_with_hooks import Qwen2Config
from models.registry import PORTS, port_for

TOKENIZER_FILES = ["*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja"]
KNOWN: Mapping[str, Callable[[], ModelConfig]] = {
    "qwen2.5-0.5b": Qwen2Config.qwen2_5_0_5b,
    "qwen2.5-1.5b": Qwen2Config.qwen2_5_1_5b,
    "qwen2.5-3b": Qwen2Config.qwen2_5_3b,
    "qwen2.5-7b": Qwen2Config.qwen2_5_7b,
    "qwen2.5-14b": Qwen2Config.qwen2_5_14b,
    "qwen3-0.6b": Qwen2Config.qwen3_0_6b,
    "llama-2-7b": Qwen2Config.llama2_7b,
    "llama-3-8b": Qwen2Config.llama3_8b,
    "llama-3.2-1b": Qwen2Config.llama3_2_1b,
    "tinyllama-1.1b": Qwen2Config.tinyllama_1_1b,
    "smollm2-135m": Qwen2Config.smollm2_135m,
    "mistral-7b": Qwen2Config.mistral_7b,
    "gpt2": GPT2Config.small,
    "gpt2-medium": GPT2Config.medium,
    "gpt2-large": GPT2Config.large,
    "gpt2-xl": GPT2Config.xl,
    "pythia-70m": GPTNeoXConfig.pythia_70m,
    "pythia-410m": GPTNeoXConfig.pythia_410m,
    "pythia-1.4b": GPTNeoXConfig.pythia_1_4b,
    "pythia-6.9b": GPTNeoXConfig.pythia_6_9b,
    "gemma-2b": GemmaConfig.gemma_2b,
    "gemma-7b": GemmaConfig.gemma_7b,
    "gemma-2-2b": GemmaConfig.gemma2_2b,
    "gemma-3-1b": GemmaConfig.gemma3_1b,
    "phi-1.5": PhiConfig.phi_1_5,
    "phi-2": PhiConfig.phi_2,
}


@dataclass(frozen=True)
class WithoutWeights:
    """What there is of a checkpoint (`weights.checkpoint`) where only configuration and tokenizer are wanted.

    Attributes:
      source: as the user gave it.
      config: of config.json.
      make_tokenizer: gives the tokenizer; UserError where there is none.
    """

    source: str
    config: Mapping[str, Any]
    make_tokenizer: Callable[[], Any]
    adapter: None = None

    def tokenizer(self) -> Any:
        return self.make_tokenizer()


def open_model(model_path: str, revision: str | None = None) -> OpenModel:
    """UserError where it names no model, or one that no port computes."""
    if model_path.lower() in KNOWN and not user_path(model_path, "--model_path").exists():
        known = KNOWN[model_path.lower()]()
        alone: Any = WithoutWeights(model_path, {}, lambda: _no_tokenizer(model_path))
        return OpenModel(alone, PORTS[known.model_type], known)
    found: Any = _found(model_path, revision)
    config = text_config(dict(found.config))
    port = port_for(config)
    return OpenModel(found, port, port.config(config))


def open_config(model_path: str, revision: str | None = None) -> tuple[Port, Any]:
    """The same: its port and configuration."""
    model = open_model(model_path, revision)
    return model.port, model.config


def _found(model_path: str, revision: str | None) -> WithoutWeights:
    path = user_path(model_path, "--model_path") if model_path else Path()
    if model_path and path.is_dir() and (path / "config.json").is_file():
        return WithoutWeights(model_path, _read(path / "config.json"), lambda: folder_tokenizer(path))
    if model_path and path.exists():
        from jax_extract.weights.opening import open_checkpoint

        checkpoint = open_checkpoint(model_path, revision)
        return WithoutWeights(model_path, checkpoint.config, checkpoint.tokenizer)
    if is_hub_id(model_path):
        config = _read(_from_hub(model_path, revision))
        return WithoutWeights(model_path, config, lambda: _tokenizer_of_hub(model_path, revision))
    raise UserError(
        f"model {model_path!r} was not found; give a folder with config.json, a .gguf file, a hub id OWNER/NAME, or "
        f"one of: {', '.join(KNOWN)}"
    )


def _no_tokenizer(name: str) -> Any:
    raise UserError(
        f"{name} is known by its shape alone, without a tokenizer; give the model's folder or hub id as --model_path, "
        "or token counts as --lengths"
    )


def _tokenizer_of_hub(repo_id: str, revision: str | None) -> Any:
    """Its files alone, from the local cache where the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(repo_id, revision=revision, allow_patterns=TOKENIZER_FILES, etag_timeout=5)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        raise UserError(
            f"the tokenizer of {repo_id!r} could not be had from the hub; give a folder that holds it as --model_path, "
            "or token counts as --lengths"
        ) from None
    return folder_tokenizer(Path(folder))


def _from_hub(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, "config.json", revision=revision, etag_timeout=5))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        raise UserError(
            f"model {repo_id!r} is no local folder, and config.json could not be had from the hub; give a folder that "
            f"holds its config.json, or one of: {', '.join(KNOWN)}"
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not valid JSON of a Hugging Face model; download it again")
    return value
