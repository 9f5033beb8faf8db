"""`jax-extract upload`: brings a run that was written locally into a bucket; to be repeated until it says all is there.

In: a run directory, finished or not, and `gs://bucket/prefix`. Out: the same run in the bucket.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from jax_extract.errors import UserError
from jax_extract.extraction.place import CONFIG_FILE, copy_run
from jax_extract.store.ledger import PLAN, SESSIONS, Ledger
from jax_extract.store.metadata import write_metadata
from jax_extract.store.storage.opening import open_storage
from jax_extract.store.storage.verbs import BUCKET_SCHEME, Storage
from jax_extract.store.survey import survey
from jax_extract.store.upload import Uploader, open_copy
from jax_extract.terminal import Terminal, bytes_text, plural


@dataclass(frozen=True)
class UploadConfig:
    """Upload a run. Exit code 0 when the whole run is in the bucket, 1 when parts of it are still to be computed.

    Attributes:
      directory: run directory.
      bucket: gs://bucket/prefix.
      delete_local: delete a part's shards in the directory when the bucket has them.
    """

    directory: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIRECTORY")]
    bucket: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="BUCKET")]
    delete_local: bool = False


def upload(config: UploadConfig, terminal: Terminal | None = None) -> int:
    """Uploads what the bucket lacks, checks that it is there, and says what is still missing."""
    terminal = terminal or Terminal()
    if not config.bucket.startswith(BUCKET_SCHEME) or config.directory.startswith(BUCKET_SCHEME):
        raise UserError(
            f"upload goes from a directory to a bucket, not from {config.directory!r} to {config.bucket!r}; "
            "give jax-extract upload DIRECTORY gs://bucket/prefix"
        )
    source, storage = Ledger.open(open_storage(config.directory)), open_storage(config.bucket)
    storage.require_usable()
    target = open_copy(source, copy_run(source, storage))
    _copy_small_files(source, storage)

    there = target.committed()
    left = [record for key, record in source.committed().items() if key not in there]
    size = sum(file["bytes"] for record in left for file in record["files"])
    terminal.line("upload", f"{plural(len(left), 'part')}, {bytes_text(size)}, from {config.directory} to {storage}")
    with terminal.progress(size, "upload", "B") as bar:
        _upload(source, target, left, config.delete_local, bar.update)
    write_metadata(target)
    return _tell(source, target, terminal)


def _copy_small_files(source: Ledger, storage: Storage) -> None:
    """Plans and sessions, which are written once, and the configuration."""
    for folder in (PLAN, SESSIONS):
        there = storage.entries(folder)
        names = [name for name in source.names(folder) if name not in there]
        for path, data in source.storage.read_many(f"{folder}/{name}" for name in names).items():
            try:
                storage.write(path, data)
            except FileExistsError:  # another upload was faster
                continue
    if source.storage.exists(CONFIG_FILE):
        storage.replace(CONFIG_FILE, source.storage.read(CONFIG_FILE))


def _upload(
    source: Ledger, target: Ledger, records: Sequence[Mapping[str, Any]], delete_local: bool, on_bytes: Any
) -> None:
    uploader = Uploader(source, target, uuid.uuid4().hex[:12], delete_local, on_bytes=on_bytes)
    try:
        for record in records:
            uploader.submit(record)
        uploader.close()
    except BaseException:
        uploader.cancel()
        raise


def _tell(source: Ledger, target: Ledger, terminal: Terminal) -> int:
    found, local = survey(target), source.committed()
    for name, wrong in found.torn.items():
        raise UserError(
            f"{target.storage.where(name)} does not hold: {wrong}; give it up with jax-extract sweep --torn"
        )
    if absent := [key for key in local if key not in found.committed]:
        raise UserError(f"{plural(len(absent), 'part')} are not in {target.storage} yet; give the same command again")
    if not found.complete:
        terminal.line(
            "done",
            f"all {plural(len(local), 'part')} that {source.storage} holds are in {target.storage}; "
            f"{plural(len(found.missing), 'part')} of the run still to be computed",
        )
        return 1
    terminal.line("done", f"all is there: {plural(len(found.committed), 'part')} in {target.storage}")
    return 0
