"""Whether an input is still the one that a run was begun with, told without reading its samples.

In: the options that decide which samples there are, and the files that they come from. Out: `sha256:…` over all of it
and the versions of the libraries that read and tokenise; equal ones give equal samples. Unequal ones may do so too.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jax_extract.errors import UserError

_READERS = ("jax_extract", "tokenizers", "transformers", "datasets", "pyarrow")
_AT_A_COMMIT = re.compile(r"hf://datasets/[^@]+@[0-9a-f]{40}/.+")
_AT_ONCE = 4  # files


def fingerprint(
    options: Mapping[str, Any],
    origin: Iterable[str | Path] | None,
    within: Path | None = None,
    most: int | None = None,
) -> str | None:
    """`sha256:…`, or None where the content cannot be known without reading it as samples.

    Args:
      options: plain JSON.
      origin: paths of files, of which names and bytes count, and URLs on the hub that name a commit; in the order in
        which they are read.
      within: a folder whose files they are; their names are told from there.
      most: bytes of files that are worth looking at.
    """
    if origin is None:
        return None
    try:
        there = [entry if _AT_A_COMMIT.fullmatch(str(entry)) else Path(entry) for entry in origin]
        files = [entry for entry in there if isinstance(entry, Path)]
        if not all(file.is_file() for file in files):
            return None
        if most is not None and sum(file.stat().st_size for file in files) > most:
            return None
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="jax_extract-fingerprint") as pool:
            digests = dict(zip(files, pool.map(_digest, files), strict=True))
    except (OSError, UserError):  # told when it is read
        return None
    names = {file: file.name if within is None else file.relative_to(within).as_posix() for file in files}
    content = [[names[entry], digests[entry]] if isinstance(entry, Path) else entry for entry in there]
    said = json.dumps([dict(options), _versions(), content], sort_keys=True)
    return f"sha256:{hashlib.sha256(said.encode()).hexdigest()}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _READERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
