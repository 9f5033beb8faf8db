"""Downloads a model from the Hugging Face hub, or says at once why not.

In: a hub id and a revision. Out: the local snapshot folder and the commit it is of.
"""

from __future__ import annotations

from pathlib import Path

from jax_extract.errors import UserError

# Weights as safetensors only; what else a tokenizer or a configuration may need.
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def download(repo_id: str, revision: str | None) -> tuple[Path, str]:
    """(snapshot folder, commit); uses the local cache first when the hub cannot be reached."""
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
        raise UserError(f"model {repo_id!r} is gated; accept its licence on the hub and log in with a token") from None
    except RevisionNotFoundError:
        raise UserError(
            f"model {repo_id!r} has no revision {revision!r}; leave --revision out for the newest"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"model {repo_id!r} is neither a local folder nor a public model of the hub") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError):
        raise UserError(
            f"model {repo_id!r} is not a local folder, and the hub cannot be reached from here; "
            "download it where there is a network and give its folder as --model_path"
        ) from None
    return Path(folder), Path(folder).name
