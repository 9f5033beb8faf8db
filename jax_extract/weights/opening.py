"""Opens a model: a Hugging Face folder, a hub id or a GGUF file, all behind one interface.

In: `--model_path`. Out: a `Checkpoint`.
"""

from __future__ import annotations

from pathlib import Path

from jax_extract.errors import UserError, user_path
from jax_extract.weights.checkpoint import Checkpoint, is_hub_id
from jax_extract.weights.folder import SafetensorsCheckpoint, refuse_folder_without_config


def open_checkpoint(model_path: str, revision: str | None = None) -> Checkpoint:
    """Finds out what `model_path` is; UserError where it is nothing that can be read."""
    path = user_path(model_path, "--model_path")
    if path.is_dir():
        return _open_folder(path, model_path)
    if path.is_file():
        if path.suffix != ".gguf" and (path.parent / "config.json").is_file():
            raise UserError(f"model {model_path!r} is one file of a model; give its folder, {path.parent}")
        if path.suffix != ".gguf":
            raise UserError(f"model {model_path!r} is a file but not .gguf; give the folder that holds config.json")
        from jax_extract.weights.gguf import GgufCheckpoint

        return GgufCheckpoint(path)
    if is_hub_id(model_path):
        from jax_extract.weights.hub import download, refuse_without_weights

        folder, commit = download(model_path, revision)
        refuse_without_weights(model_path, commit, folder)
        return SafetensorsCheckpoint(folder, source=model_path, revision=commit)
    raise UserError(
        f"model {model_path!r} was not found; give a Hugging Face folder, a .gguf file, "
        "or a hub id of the form OWNER/NAME"
    )


def _open_folder(folder: Path, source: str) -> Checkpoint:
    """A Hugging Face model, or the GGUF model that lies there alone."""
    has_config = (folder / "config.json").exists()
    others = ("*.safetensors", "pytorch_model*.bin")
    if any(folder.glob("*.gguf")) and not (has_config and any(any(folder.glob(names)) for names in others)):
        from jax_extract.weights.gguf import GgufCheckpoint
        from jax_extract.weights.gguf_container import only_model

        path = only_model(folder)
        return GgufCheckpoint(path, f"{path.name} is read, as {folder} has no other weights" if has_config else None)
    if not has_config:
        refuse_folder_without_config(folder, source)
    return SafetensorsCheckpoint(folder, source=source)
