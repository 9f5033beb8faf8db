"""Downloads a model from the Hugging Face hub, or says at once why not.

In: a hub id and a revision. Out: the local snapshot folder and the commit it is of.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from jax_extract.errors import UserError

# Weights as safetensors only; what else a tokenizer or a configuration may need.
_WANTED = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja"]
# Second copies in the form of another program, and models within a model's repository: nothing reads them.
_UNWANTED = ["consolidated*", "*/*.safetensors", "original/*", "onnx/*", "checkpoint-*/*", "runs/*"]


def download(repo_id: str, revision: str | None, what: str = "model", flag: str = "--model_path") -> tuple[Path, str]:
    """(snapshot folder, commit) of a model, or of something else that a flag names.

    The local cache is used first when the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            repo_id, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, etag_timeout=5
        )
    except GatedRepoError:
        raise UserError(f"{what} {repo_id!r} is gated; accept its licence on the hub and log in with a token") from None
    except RevisionNotFoundError:
        raise UserError(f"{what} {repo_id!r} has no revision {revision!r}; leave it out for the newest") from None
    except RepositoryNotFoundError:
        raise UserError(f"{what} {repo_id!r} is neither a local folder nor public on the hub") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError):
        raise UserError(
            f"{what} {repo_id!r} is not a local folder, and the hub cannot be reached from here; "
            f"download it where there is a network and give its folder as {flag}"
        ) from None
    return Path(folder), Path(folder).name


def refuse_without_weights(repo_id: str, commit: str, folder: Path) -> None:
    """UserError where what was downloaded is no model that can be read, by what else its repository holds."""
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{repo_id} is an adapter; give it as --adapter, and its base model as --model_path")
    if (names := _names_on_hub(repo_id, commit)) is None:
        return  # what was downloaded once has its own sentences
    name = repo_id.partition("/")[2]
    if ggufs := sorted(file for file in names if file.endswith(".gguf")):
        raise UserError(
            f"{repo_id} holds GGUF files ({len(ggufs)} of them); download one, and give it as --model_path: "
            f"hf download {repo_id} {shlex.quote(ggufs[0])} --local-dir {name}"
        )
    if any(file.startswith("pytorch_model") and file.endswith(".bin") for file in names):
        from jax_extract.weights.folder import conversion_command

        pattern = "pytorch_model.bin" if "pytorch_model.bin" in names else "pytorch_model-*.bin"
        raise UserError(
            f"{repo_id} has its weights as {pattern}, pickles, which are never opened here; download and convert it, "
            f"where torch is installed, and give the folder {name} as --model_path: hf download {repo_id} "
            f"--local-dir {name} && {conversion_command(Path(name), pattern, 'model.safetensors')}"
        )
    lacking = "*.safetensors" if (folder / "config.json").is_file() else "config.json"
    raise UserError(f"{repo_id} has no {lacking} on the hub; give a model in Hugging Face's form, with safetensors")


def _names_on_hub(repo_id: str, commit: str) -> list[str] | None:
    """What the repository holds; None where it cannot be asked."""
    from huggingface_hub import list_repo_files

    try:
        return list_repo_files(repo_id, revision=commit)
    except Exception:  # noqa: BLE001 (a sentence that says less is no reason for another error)
        return None
