"""`jax-extract status` and `jax-extract sweep`: what is there of a run, and away with what does not belong.

In: a run directory or `gs://bucket/prefix`. Out: text, and whether the run is complete.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from jax_extract.store.ledger import Ledger, part_name
from jax_extract.store.metadata import write_metadata
from jax_extract.store.storage.opening import open_storage
from jax_extract.store.survey import Survey, survey
from jax_extract.store.sweep import sweep
from jax_extract.terminal import bytes_text, plural

_SHOWN = 10

Place = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PLACE")]


@dataclass(frozen=True)
class StatusConfig:
    """Show which parts of a run are committed, missing and torn. Exit code 0 when the run is complete, else 1.

    Attributes:
      place: run directory or gs://bucket/prefix.
    """

    place: Place


@dataclass(frozen=True)
class SweepConfig:
    """Remove files that no record names. Only when nothing writes to the run: a part that is being written would go.

    Attributes:
      place: run directory or gs://bucket/prefix.
      torn: give up parts whose files are missing or cut short too, so that the same command computes them again.
      dry_run: only say what would be removed.
    """

    place: Place
    torn: bool = False
    dry_run: bool = False


def status(config: StatusConfig) -> int:
    """Prints the state of a run; 0 where every planned part is committed and whole, else 1."""
    ledger = Ledger.open(open_storage(config.place))
    found = survey(ledger)
    samples = sum(record["samples"] for record in found.committed.values())
    size = sum(file["bytes"] for record in found.committed.values() for file in record["files"])
    planned = sum(found.planned.values())
    print(f"{config.place}: {ledger.run['description']['model_name']}, run {ledger.run['run_id'][:12]}")
    of = f" of {plural(len(found.planned), 'part')}" if found.plan_is_whole else ", of a plan that is not complete yet"
    print(f"  committed  {len(found.committed):,}{of}; {samples:,} of {plural(planned, 'sample')}, {bytes_text(size)}")
    missing = [key for key in found.missing if f"_run/commits/{part_name(key)}.json" not in found.torn]
    print(f"  missing    {plural(len(missing), 'part')}{_few([part_name(key) for key in missing])}")
    print(f"  torn       {plural(len(found.torn), 'part')}")
    for wrong in list(found.torn.values())[:_SHOWN]:
        print(f"             {wrong}")
    print(f"  orphans    {_orphans_text(found)}")
    print(f"  {_verdict(found, config.place)}")
    return 0 if found.complete else 1


def _few(names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f": {', '.join(names[:_SHOWN])}{more}"


def _orphans_text(found: Survey) -> str:
    if not found.orphans:
        return "none"
    return f"{plural(len(found.orphans), 'file')} without a record, {bytes_text(sum(found.orphans.values()))}"


def _verdict(found: Survey, place: str) -> str:
    if found.complete:
        return "complete"
    if found.torn:
        return f"torn parts: restore their files from a copy, or give them up with jax-extract sweep {place} --torn"
    return "not complete: give the command that started the run again"


def sweep_command(config: SweepConfig) -> int:
    """Removes what `survey` finds to be nobody's; UserError where there is no run."""
    ledger = Ledger.open(open_storage(config.place))
    found = survey(ledger)
    doomed = [*(found.torn if config.torn else ()), *found.orphans]
    for name in doomed:
        print(f"  {name}")
    size = bytes_text(sum(found.orphans.values()))
    if config.dry_run:
        print(f"{plural(len(doomed), 'file')}, {size}, would be removed from {config.place}")
        return 0
    sweep(ledger, found, config.torn)
    if config.torn and found.torn:  # their shards have no record any more
        left = survey(ledger)
        sweep(ledger, left)
        doomed += left.orphans
    write_metadata(ledger)
    print(f"{plural(len(doomed), 'file')}, {size}, removed from {config.place}; metadata.json is written anew")
    if left := survey(ledger).torn:
        print(f"{plural(len(left), 'torn part')} stay; restore their files from a copy, or give them up with --torn")
    return 1 if left else 0
