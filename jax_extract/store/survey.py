"""What is really there of a run: committed, missing and torn parts, and files that no record names.

In: a ledger. Out: a `Survey`. A part is missing when the plan names it and no record does; it is torn when
its record is damaged or names a file that is not there as the record says; that the bytes of a file are others,
at its right size, is for integrity.py to see. Shards without a record are orphans: left by killed attempts, or on
their way into a record of a process that runs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from jax_extract.errors import damage_is_told
from jax_extract.store.ledger import COMMITS, PARTS, Key, Ledger, Record, part_name
from jax_extract.store.parts import ShardName
from jax_extract.store.storage.verbs import Entry, Storage

_SIDECAR = re.compile(r"(\d{6,})_\d{3,}(?:_attempt_[0-9a-f]+)?\.safetensors")
_OF_PART = re.compile(r"(?:.*_batch_|_run/parts/)(\d{6,})(?:_part)?(?:_(\d{3,}))?(?:_attempt_[0-9a-f]+)?\.\w+")
_UNNAMED = re.compile(
    r"\.writing-[0-9a-f]{32}|(?:(?:metadata|verification|submission|score)\.json|answers\.jsonl)\.[0-9a-f]{32}"
    r"|_run/config\.yaml\.[0-9a-f]{32}|_run/shared-[0-9a-f]{32}"
)


@dataclass(frozen=True)
class Survey:
    """Attributes:
    planned: every part that the stored plans name -> its samples.
    plan_is_whole: whether the last window is planned; a stream is planned as it is read.
    committed: records, torn ones left out.
    torn: name of the record -> what is wrong.
    unreadable: those of the torn records that are damaged themselves.
    files: name -> bytes, of every file that can only be this run's.
    held: files that a torn record names, or may have named where it cannot be read.
    """

    planned: Mapping[Key, int]
    plan_is_whole: bool
    committed: Mapping[Key, Record]
    torn: Mapping[str, str]
    unreadable: Collection[str]
    files: Mapping[str, int]
    held: Collection[str]

    @property
    def missing(self) -> list[Key]:
        """Parts that are planned and not committed; torn ones are among them."""
        return [key for key in self.planned if key not in self.committed]

    @property
    def complete(self) -> bool:
        return self.plan_is_whole and bool(self.planned) and not self.missing and not self.torn

    @property
    def orphans(self) -> dict[str, int]:
        """Name -> bytes, of files of this run that no record names."""
        return {name: size for name, size in self._unclaimed.items() if name not in self.held}

    @property
    def of_torn(self) -> dict[str, int]:
        """Name -> bytes, of files of this run that belong to torn parts and to no committed one."""
        return {name: size for name, size in self._unclaimed.items() if name in self.held}

    @cached_property
    def _unclaimed(self) -> dict[str, int]:
        claimed = named_by(self.committed.values())
        return {name: size for name, size in self.files.items() if name not in claimed}

    def giving_up(self, wrong: Mapping[Key, str]) -> Survey:
        """The same, with further parts torn, of which something is wrong that names and sizes do not show."""
        return dataclasses.replace(
            self,
            committed={key: record for key, record in self.committed.items() if key not in wrong},
            torn={**self.torn, **{record_name(key): why for key, why in wrong.items()}},
            held={*self.held, *named_by(self.committed[key] for key in wrong)},
        )


def survey(ledger: Ledger) -> Survey:
    """Looks at every record and at the names, sizes and, in a bucket, checksums of all files."""
    records, torn = ledger.records()
    unreadable = set(torn)
    entries = entries_of(ledger.storage)
    with damage_is_told(f"the run in {ledger.storage}", "restore its _run folder from a copy"):
        files = _own_files(ledger, entries)
    held = _maybe_of(unreadable, files)
    for key, record in list(records.items()):
        if wrong := next(filter(None, (wrong_with(file, record, entries) for file in files_of(record))), None):
            torn[record_name(key)] = wrong
            held |= named_by([records.pop(key)])
    with damage_is_told(f"the plan in {ledger.storage}", "restore its _run folder from a copy"):
        plans = ledger.plans()
        planned = {(int(p["batch"]), int(p["part"])): int(p["samples"]) for plan in plans for p in plan["parts"]}
        whole = bool(plans) and bool(plans[-1]["last"])
    return Survey(dict(sorted(planned.items())), whole, records, torn, unreadable, files, held)


def entries_of(storage: Storage) -> dict[str, Entry]:
    """The files of a place, by name, in all the folders in which shards, sidecars and half-made files lie."""
    entries = dict(storage.entries())
    for folder in ("_run", PARTS):
        entries |= {f"{folder}/{name}": entry for name, entry in storage.entries(folder).items()}
    return entries


def files_of(record: Record) -> list[dict[str, Any]]:
    """What a record names: its sidecar and its shards."""
    return [record["sidecar"], *record["files"]]


def record_name(key: Key) -> str:
    return f"{COMMITS}/{part_name(key)}.json"


def wrong_with(file: Mapping[str, object], record: Record, entries: Mapping[str, Entry]) -> str | None:
    """What is wrong with a file that a record names, or None."""
    name = str(file["path"])
    if (entry := entries.get(name)) is None:
        gone = record.get("uploaded_to") and not name.startswith(PARTS)
        return None if gone else f"{name} is missing"
    if entry.size != file["bytes"]:
        return f"{name} has {entry.size} bytes where the record says {file['bytes']}"
    if entry.crc32c is not None and entry.crc32c != file["crc32c"]:
        return f"{name} has another checksum than the record says"
    return None


def named_by(records: Iterable[Record]) -> set[str]:
    return {file["path"] for record in records for file in files_of(record)}


def _maybe_of(unreadable: Collection[str], files: Mapping[str, int]) -> set[str]:
    """Files that by their names belong to parts whose records cannot be read: these may come back from a copy."""
    parts = {PurePosixPath(name).stem for name in unreadable}
    return {name for name in files if parts and _part_of(name) in parts}


def _part_of(name: str) -> str | None:
    """Which part a shard or sidecar is of; a batch of one part has no number of the part in its shards' names."""
    if (shard := ShardName.parse(name)) and shard.is_whole:
        return part_name((1, 1))  # the only one
    match = _OF_PART.fullmatch(name)
    return part_name((int(match[1]), int(match[2] or 1))) if match else None


def _own_files(ledger: Ledger, entries: Mapping[str, Entry]) -> dict[str, int]:
    """Files that can only be this run's: of its sites and format, or half-made ones of our own naming."""
    identity = ledger.run["identity"]
    sites = {(site["hook"], site["layer"]) for site in identity["sites"]}
    files: dict[str, int] = {}
    for name, entry in entries.items():
        shard = ShardName.parse(name)
        own = (
            shard
            and (shard.hook, shard.layer) in sites
            and shard.format == identity["shard_format"]
            and shard.is_whole == identity.get("one_file_per_layer", False)
        )
        sidecar = name.startswith(f"{PARTS}/") and _SIDECAR.fullmatch(name.removeprefix(f"{PARTS}/"))
        if own or sidecar or _UNNAMED.fullmatch(name):
            files[name] = entry.size
    return files
