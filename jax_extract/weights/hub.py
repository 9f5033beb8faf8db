"""Downloads a model from the Hugging Face hub, or says at once why not.

In: a hub id and a revision. Out: the local snapshot folder and the commit it is of.
"""

from __future__ import annotations

from pathlib import Path

from jax_extract.errors import UserError

# Weights as safetensors only; what else a tokenizer or a configuration may need.
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


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
        folder = snapshot_download(repo_id, revision=revision, allow_patterns=_WANTED, etag_timeout=5)
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
