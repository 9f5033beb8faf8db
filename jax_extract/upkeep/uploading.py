"""`jax-extract upload`: brings a run that was written locally into a bucket; to be repeated until it says all is there.

In: a run directory, finished or not, and `gs://bucket/prefix`. Out: the same run in the bucket. Parts that are not on
the disk as they were committed are left out and named in the end; all others are there then.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any

import tyro

from jax_extract.errors import UserError
from jax_extract.extraction.place import copy_run
from jax_extract.store.integrity import some_of
from jax_extract.store.ledger import CONFIG_FILE, PLAN, SESSIONS, Key, Ledger, Record, part_name
from jax_extract.store.metadata import VERIFICATION_FILE, write_metadata
from jax_extract.store.storage.opening import open_storage
from jax_extract.store.storage.verbs import BUCKET_SCHEME, Storage
from jax_extract.store.survey import Survey, record_name, survey
from jax_extract.store.upload import Uploader, open_copy
from jax_extract.terminal import Terminal, bytes_text, plural


@dataclass(frozen=True)
class UploadConfig:
    """Upload a run.

    Exit code 0 when all is in the bucket, 1 when parts are still to be computed, 2 after trouble.

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

    found, there = survey(source), survey(target)
    known = {*there.torn, *map(record_name, there.committed)}
    left = [record for key, record in found.committed.items() if record_name(key) not in known]
    _refuse_if_moved(left, found, storage)
    damaged = {name: wrong for name, wrong in found.torn.items() if name not in known}
    size = sum(file["bytes"] for record in left for file in record["files"])
    terminal.line("upload", f"{plural(len(left), 'part')}, {bytes_text(size)}, from {config.directory} to {storage}")
    with terminal.progress(size, "uploading", "B") as bar:
        damaged |= _upload(source, target, left, config.delete_local, bar.update)
    there = survey(target)
    if not there.unreadable:
        write_metadata(target)
    _require_whole(source, damaged, target, there)
    _copy_verification(source, target, there)
    return _tell(source, found, target, there, terminal)


def _refuse_if_moved(records: Iterable[Record], found: Survey, storage: Storage) -> None:
    """UserError where a part was uploaded to another place and deleted here: there the run is to be completed."""
    for record in records:
        to = record.get("uploaded_to", str(storage))
        if to != str(storage) and not all(file["path"] in found.files for file in record["files"]):
            name = part_name((record["batch"], record["part"]))
            raise UserError(f"part {name} was uploaded to {to} and deleted here; upload the others to {to} too")


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
) -> dict[str, str]:
    """Brings parts over; name of the record -> what is wrong, of those that are not here as they were committed."""
    damaged: dict[str, str] = {}

    def leave_out(key: Key, wrong: str) -> None:
        damaged[record_name(key)] = wrong

    uploader = Uploader(source, target, uuid.uuid4().hex[:12], delete_local, on_bytes=on_bytes, leave_out=leave_out)
    try:
        for record in records:
            uploader.submit(record)
        uploader.close()
    except BaseException:
        uploader.cancel()
        raise
    return damaged


def _copy_verification(source: Ledger, target: Ledger, there: Survey) -> None:
    """What `jax-extract verify` said here holds there too, where it read every part that is there.

    The bytes are the same, by their checksums. What is in the bucket already and is newer stays.
    """
    here = _verification(source)
    if not here or not there.complete or here["parts"] != len(there.committed) or here["verdict"] == "damaged":
        return
    old = _verification(target)
    if not old or old["date"] < here["date"]:
        target.storage.replace(VERIFICATION_FILE, source.storage.read(VERIFICATION_FILE))


def _verification(ledger: Ledger) -> dict[str, Any]:
    """What verification.json says of this very run; empty where there is none, or none that can be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        said = json.loads(ledger.storage.read(VERIFICATION_FILE))
        if said["run_id"] == ledger.run["run_id"]:
            return {"date": str(said["date"]), "verdict": said["verdict"], "parts": said["read"]["parts"]}
    return {}


def _require_whole(source: Ledger, damaged: Mapping[str, str], target: Ledger, there: Survey) -> None:
    """UserError that names what is damaged in either place, and the mend; everything else is in the bucket."""
    again = "compute them again with the command that started the run, and upload again"
    said = []
    for ledger, torn, then in ((source, damaged, again), (target, there.torn, "upload again")):
        if torn:
            parts = some_of(PurePosixPath(name).stem for name in sorted(torn))
            said.append(
                f"{ledger.storage} holds {plural(len(torn), 'damaged part')}: {parts} ({torn[min(torn)]}); restore "
                f"from a copy, or give up with jax-extract sweep {ledger.storage} --damaged, {then}"
            )
    if said:
        raise UserError(f"all else is in {target.storage}, but {'; and '.join(said)}")


def _tell(source: Ledger, found: Survey, target: Ledger, there: Survey, terminal: Terminal) -> int:
    if absent := [key for key in found.committed if key not in there.committed]:
        raise UserError(f"not in {target.storage} yet: {plural(len(absent), 'part')}; give the same command again")
    if not there.complete:
        terminal.line(
            "done",
            f"all that {source.storage} holds, {plural(len(found.committed), 'part')}, is in {target.storage}; "
            f"{plural(len(there.missing), 'part')} of the run still to be computed",
        )
        return 1
    terminal.line("done", f"all is there: {plural(len(there.committed), 'part')} in {target.storage}")
    return 0
