"""What is really there of a run: committed, missing and torn parts, and files that no record names.

In: a ledger. Out: a `Survey`. A part is missing when the plan names it and no record does; it is torn when
its record is damaged or names a file that is not there as the record says. Shards without a record are
orphans: left by killed attempts, or on their way into a record of a process that runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from jax_extract.errors import damage_is_told
from jax_extract.store.ledger import COMMITS, PARTS, Key, Ledger, Record, part_name
from jax_extract.store.parts import ShardName
from jax_extract.store.storage.verbs import Entry

_SIDECAR = re.compile(r"(\d{6,})_\d{3,}(?:_attempt_[0-9a-f]+)?\.safetensors")
_UNNAMED = re.compile(
    r"\.writing-[0-9a-f]{32}|(?:metadata|verification)\.json\.[0-9a-f]{32}"
    r"|_run/config\.yaml\.[0-9a-f]{32}|_run/shared-[0-9a-f]{32}"
)


@dataclass(frozen=True)
class Survey:
    """Attributes:
    planned: every part that the stored plans name -> its samples.
    plan_is_whole: whether the last window is planned; a stream is planned as it is read.
    committed: records, torn ones left out.
    torn: name of the record -> what is wrong.
    orphans: name -> bytes, of files of this run that no record names.
    """

    planned: Mapping[Key, int]
    plan_is_whole: bool
    committed: Mapping[Key, Record]
    torn: Mapping[str, str]
    orphans: Mapping[str, int]

    @property
    def missing(self) -> list[Key]:
        """Parts that are planned and not committed; torn ones are among them."""
        return [key for key in self.planned if key not in self.committed]

    @property
    def complete(self) -> bool:
        return self.plan_is_whole and bool(self.planned) and not self.missing and not self.torn


def survey(ledger: Ledger) -> Survey:
    """Looks at every record and at the names, sizes and, in a bucket, checksums of all files."""
    records, torn = ledger.records()
    entries = dict(ledger.storage.entries())
    for folder in ("_run", PARTS):
        entries |= {f"{folder}/{name}": entry for name, entry in ledger.storage.entries(folder).items()}
    named = {file["path"] for record in records.values() for file in _files(record)}  # those of torn parts too
    for key, record in list(records.items()):
        if wrong := next(filter(None, (wrong_with(file, record, entries) for file in _files(record))), None):
            torn[f"{COMMITS}/{part_name(key)}.json"] = wrong
            del records[key]
    with damage_is_told(f"the plan in {ledger.storage}", "restore its _run folder from a copy"):
        plans = ledger.plans()
        planned = {(part["batch"], part["part"]): part["samples"] for plan in plans for part in plan["parts"]}
        whole = bool(plans) and bool(plans[-1]["last"])
    return Survey(dict(sorted(planned.items())), whole, records, torn, _orphans(ledger, named, entries))


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


def _files(record: Record) -> list[dict]:
    return [record["sidecar"], *record["files"]]


def _orphans(ledger: Ledger, named: set[str], entries: Mapping[str, Entry]) -> dict[str, int]:
    """Files that can only be this run's: of its sites and format, or half-made ones of our own naming."""
    identity = ledger.run["identity"]
    sites = {(site["hook"], site["layer"]) for site in identity["sites"]}
    orphans: dict[str, int] = {}
    for name, entry in entries.items():
        shard = ShardName.parse(name)
        own = shard and (shard.hook, shard.layer) in sites and shard.format == identity["shard_format"]
        sidecar = name.startswith(f"{PARTS}/") and _SIDECAR.fullmatch(name.removeprefix(f"{PARTS}/"))
        if name not in named and (own or sidecar or _UNNAMED.fullmatch(name)):
            orphans[name] = entry.size
    return orphans
