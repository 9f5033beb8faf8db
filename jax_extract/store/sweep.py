"""Removing what a run has left behind: orphans, torn parts, or the whole of it.

In: a ledger, in whose place nothing else runs. Out: fewer files. Only files that can be none but this
run's own are touched, and none that a committed part names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from pathlib import PurePosixPath

from jax_extract.errors import damage_is_told
from jax_extract.store import token_files
from jax_extract.store.ledger import COMMITS, FOLDERS, RUN_FILE, UPLOADED, Ledger
from jax_extract.store.metadata import METADATA_FILE, VERIFICATION_FILE
from jax_extract.store.parts import ShardName
from jax_extract.store.storage.failpoints import step
from jax_extract.store.storage.verbs import BUCKET_SCHEME, Storage
from jax_extract.store.survey import Survey, named_by

_AT_ONCE = 32  # a bucket answers each deletion after a round trip
_QUEUED = 4_096  # deletions that wait for one of these threads


def doomed(ledger: Ledger, found: Survey, torn: bool = False) -> dict[str, int]:
    """Name -> bytes of everything that `sweep` removes, in its order."""
    if not torn or not found.torn:
        return {**found.orphans, **_kept(ledger, found)}
    said = {**_of_torn(ledger, found, UPLOADED), **_of_torn(ledger, found, COMMITS)}
    if ledger.storage.exists(VERIFICATION_FILE):
        said = {VERIFICATION_FILE: len(ledger.storage.read(VERIFICATION_FILE)), **said}
    return {**said, **found.of_torn, **found.orphans}


def sweep(ledger: Ledger, found: Survey, torn: bool = False) -> None:
    """Deletes the orphans that a survey found; with `torn` the torn parts too, so that they are computed again."""
    storage = ledger.storage
    if torn and found.torn:
        storage.delete(VERIFICATION_FILE)  # which speaks of parts that are no more
        if notes := _of_torn(ledger, found, UPLOADED):  # before the record: who computes the part again finds none
            _delete(storage, notes)
            storage.sync(UPLOADED)
        _delete(storage, found.torn, partial(step, "sweep.record"))
        storage.sync(COMMITS)  # not even a power cut leaves a record without its shards
        _delete(storage, found.of_torn, partial(step, "sweep.orphan"))
    # Looked at again: reading every byte takes its time, and a process that should not run may have committed since.
    claimed = named_by(ledger.records()[0].values())
    unclaimed = (name for name in found.orphans if name not in claimed)
    _delete(storage, (*unclaimed, *_kept(ledger, found)), partial(step, "sweep.orphan"))


def erase(storage: Storage) -> None:
    """Removes a run from a place: its records first, then its shards; every other file is left alone.

    The plan goes when no shard is left: an erasure that was broken off learns from it what is still to go.
    """
    ledger = Ledger.open(storage)
    for folder in FOLDERS:
        storage.require_plain(folder)
    with damage_is_told(f"the run in {storage}", "remove it by hand"):
        batches = {part["batch"] for plan in ledger.plans() for part in plan["parts"]}
        sites = {(site["hook"], site["layer"]) for site in ledger.run["identity"]["sites"]}
        shard_format = ledger.run["identity"]["shard_format"]
        is_whole = ledger.run["identity"].get("one_file_per_layer", False)

    def is_own(name: str) -> bool:
        if not (shard := ShardName.parse(name)):
            return False
        belongs = (shard.hook, shard.layer) in sites and shard.batch in batches and shard.format == shard_format
        return belongs and shard.is_whole == is_whole

    if _empty(storage, COMMITS):
        storage.sync(COMMITS)  # not even a power cut leaves a record without its shards
    _delete(storage, filter(is_own, storage.entries()))
    for folder in FOLDERS:
        _empty(storage, folder)
    for name in (METADATA_FILE, VERIFICATION_FILE):
        storage.delete(name)
    storage.delete(RUN_FILE)


def remove_kept(storage: Storage) -> None:
    """Removes the token ids that are kept for a restart; for a run that is whole, whose sidecars hold the same."""
    _delete(storage, token_files.sizes(storage))


def _kept(ledger: Ledger, found: Survey) -> dict[str, int]:
    """Name -> bytes of the token ids that are kept for a restart, of a run that needs none."""
    return token_files.sizes(ledger.storage) if found.complete else {}


def _of_torn(ledger: Ledger, found: Survey, folder: str) -> dict[str, int]:
    """Name -> bytes of the files of torn parts in a folder of records or notes."""
    there = ledger.storage.entries(folder)
    names = [PurePosixPath(name).name for name in found.torn]
    return {f"{folder}/{name}": there[name].size for name in names if name in there}


def _empty(storage: Storage, folder: str) -> int:
    """Deletes the files of a folder; returns how many there were."""
    names = list(storage.entries(folder))
    _delete(storage, (f"{folder}/{name}" for name in names))
    return len(names)


def _delete(
    storage: Storage, names: Iterable[str], taking: Callable[[], AbstractContextManager[None]] = nullcontext
) -> None:
    """Deletes files, those of a bucket side by side; when it returns they are gone."""

    def one(name: str) -> None:
        with taking():
            storage.delete(name)

    if not str(storage).startswith(BUCKET_SCHEME):
        for name in names:
            one(name)
        return
    left = iter(names)
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="jax_extract-sweeper") as pool:
        while some := list(islice(left, _QUEUED)):
            for _ in pool.map(one, some):  # what fails ends the rest
                pass
