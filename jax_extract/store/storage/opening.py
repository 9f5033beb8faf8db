"""The places there are.

In: what a user wrote, a directory or `gs://bucket/prefix`. Out: its `Storage`.
"""

from __future__ import annotations

import re
from pathlib import Path

from jax_extract.errors import UserError, user_path
from jax_extract.store.storage.local import Directory
from jax_extract.store.storage.verbs import BUCKET_SCHEME, Storage

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")  # of other clouds, or misspelt


def open_storage(place: str | Path, flag: str = "the directory") -> Storage:
    """The storage that a user named; UserError where the words are no place at all. Nothing is touched yet."""
    if str(place).startswith(BUCKET_SCHEME):
        from jax_extract.store.storage.gcs import Bucket

        return Bucket.parse(str(place))
    if _SCHEME.match(str(place)):
        raise UserError(f"{flag} {str(place)[:80]!r} is neither a directory nor a bucket; write gs://bucket/prefix")
    return Directory(user_path(str(place), flag))
