"""Removing what a run has left behind: orphans, torn parts, or the whole of it.

In: a ledger, in whose place nothing else runs. Out: fewer files. Only files that can be none but this
run's own are touched.
"""

from __future__ import annotations

from jax_extract.errors import damage_is_told
from jax_extract.store.ledger import COMMITS, FOLDERS, RUN_FILE, Ledger
from jax_extract.store.metadata import METADATA_FILE, VERIFICATION_FILE
from jax_extract.store.parts import ShardName
from jax_extract.store.storage.failpoints import step
from jax_extract.store.storage.verbs import Storage
from jax_extract.store.survey import Survey


def sweep(ledger: Ledger, found: Survey, torn: bool = False) -> None:
    """Deletes the orphans that a survey found; with `torn` the torn parts too, so that they are computed again."""
    if torn:
        for name in found.torn:
            with step("sweep.record"):
                ledger.storage.delete(name)
        ledger.storage.sync(COMMITS)
    for name in found.orphans:
        with step("sweep.orphan"):
            ledger.storage.delete(name)


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
    if _empty(storage, COMMITS):
        storage.sync(COMMITS)  # not even a power cut leaves a record without its shards
    for name in storage.entries():
        shard = ShardName.parse(name)
        if shard and (shard.hook, shard.layer) in sites and shard.batch in batches and shard.format == shard_format:
            storage.delete(name)
    for folder in FOLDERS:
        _empty(storage, folder)
    for name in (METADATA_FILE, VERIFICATION_FILE):
        storage.delete(name)
    storage.delete(RUN_FILE)


def _empty(storage: Storage, folder: str) -> int:
    """Deletes the files of a folder; returns how many there were."""
    names = list(storage.entries(folder))
    for name in names:
        storage.delete(f"{folder}/{name}")
    return len(names)
