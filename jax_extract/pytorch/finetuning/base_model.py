"""Which base model it is, whatever its folder is called.

In: an opened checkpoint. Out: plain values, with a digest that is equal where configuration and weights are.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from jax_extract.weights.checkpoint import Checkpoint


def describe_base(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where it is, its type, its commit on the hub, and its digest: `sha256:…`."""
    total = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    # Of the weights themselves: a commit would make a local copy of a hub model another one.
    total.update(checkpoint.digest(checkpoint.names()).encode())
    return {
        "model_path": checkpoint.source if checkpoint.revision else absolute(checkpoint.source),
        "revision": checkpoint.revision,
        "model_type": checkpoint.config.get("model_type"),
        "digest": f"sha256:{total.hexdigest()}",
    }


def absolute(path: str) -> str:
    """A local file or folder by a name that means the same from every folder; a hub id as it is."""
    local = Path(path).expanduser()
    return str(local.absolute()) if local.exists() else path
