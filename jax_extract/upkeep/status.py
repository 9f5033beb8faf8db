"""`jax-extract status` and `jax-extract sweep`: what is there of a run, and away with what does not belong.

In: a run directory or `gs://bucket/prefix`. Out: text, and whether the run is complete.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated

import tyro

from jax_extract.errors import UserError
from jax_extract.progress import WIDEST
from jax_extract.store.integrity import flawed_parts
from jax_extract.store.ledger import COMMITS, FOLDERS, FOREIGN, RUN_FILE, Key, Ledger, part_name
from jax_extract.store.metadata import write_metadata
from jax_extract.store.storage.opening import open_storage
from jax_extract.store.survey import Survey, files_of, record_name, survey
from jax_extract.store.sweep import doomed, sweep
from jax_extract.store.upload import open_noted
from jax_extract.terminal import Terminal, bytes_text, folded, plural

_SHOWN = 10

Place = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PLACE")]


@dataclass(frozen=True)
class StatusConfig:
    """Show which parts of a run are committed, missing and torn.

    Exit code 0 when the run is complete, else 1.

    Attributes:
      place: run directory or gs://bucket/prefix.
    """

    place: Place


@dataclass(frozen=True)
class SweepConfig:
    """Remove files that no record names.

    Only when nothing writes to the run: a part that is being written would go.

    Attributes:
      place: run directory or gs://bucket/prefix.
      damaged: read every byte first and give up the parts that are not as they were committed (torn ones among them),
        so that the command that started the run computes them again.
      torn: give up only parts whose files are missing or cut short, which shows without reading.
      dry_run: only say what would be removed.
    """

    place: Place
    damaged: bool = False
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
    of_samples = f"{samples:,} of {plural(planned, 'sample')}" if found.planned else plural(samples, "sample")
    _tell("committed", f"{len(found.committed):,}{of}; {of_samples}, {bytes_text(size)}")
    missing = [key for key in found.missing if record_name(key) not in found.torn]
    known = f"{plural(len(missing), 'part')}{_few([part_name(key) for key in missing])}"
    _tell("missing", known if found.planned else "not known: there is no plan yet")
    elsewhere = _elsewhere(found)
    for to, parts in elsewhere.items():
        _tell("elsewhere", f"{plural(parts, 'part')}, uploaded and deleted here: jax-extract status {to} looks at them")
    _tell("torn", plural(len(found.torn), "part"))
    for wrong in list(found.torn.values())[:_SHOWN]:
        _tell("", wrong)
    _tell("orphans", _orphans_text(found))
    print(folded("  ", _verdict(found, config.place, bool(elsewhere))))
    if not found.complete:
        _tell_command(ledger, config.place)
    return 0 if found.complete else 1


def _say(text: str) -> None:
    print(folded("", text))


def _tell(label: str, text: str) -> None:
    print(folded(f"  {label:<11}", text))


def _tell_command(ledger: Ledger, place: str) -> None:
    """The one that goes on."""
    from jax_extract.upkeep.going_on import command_of, folded_command, needs_its_folder  # it brings JAX

    if (said := command_of(ledger, place)) is None:
        print("  the command that started the run goes on, given again")
        return
    where = ", given in the folder where the run was started" if needs_its_folder(ledger) else ""
    print(f"  this command goes on{where}:")
    print(folded_command(said, WIDEST, "    "))


def _few(names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f": {', '.join(names[:_SHOWN])}{more}"


def _orphans_text(found: Survey) -> str:
    if not found.orphans:
        return "none"
    return f"{plural(len(found.orphans), 'file')} without a record, {bytes_text(sum(found.orphans.values()))}"


def _elsewhere(found: Survey) -> Counter[str]:
    """Where parts are whose shards are not here any more, and how many."""
    gone = (r for r in found.committed.values() if not all(file["path"] in found.files for file in r["files"]))
    return Counter(str(record["uploaded_to"]) for record in gone if "uploaded_to" in record)


def _verdict(found: Survey, place: str, elsewhere: bool) -> str:
    if found.complete and elsewhere:
        return "complete, as far as it is here: what is elsewhere was not looked at"
    if found.complete:
        return f"complete, by names and sizes; jax-extract verify {place} reads the bytes too"
    if found.torn:
        return (
            f"torn parts: restore their files from a copy, or give them up with jax-extract sweep {place} --damaged, "
            "which reads every byte (with --torn only what is told here, without reading)"
        )
    return "not complete"


def sweep_command(config: SweepConfig, terminal: Terminal | None = None) -> int:
    """Removes what is nobody's, and what is given up; 1 where parts stay that are not whole, else 0."""
    ledger = Ledger.open(open_storage(config.place))
    for folder in FOLDERS:
        ledger.storage.require_plain(folder)
    found, unread = survey(ledger), []
    if found.unreadable and all(FOREIGN in found.torn[name] for name in found.unreadable) and not found.committed:
        raise UserError(
            f"every record in {config.place} is of another run than its {RUN_FILE}, which was restored from a wrong "
            "copy; restore the right one, nothing was removed"
        )
    if config.damaged:
        found, unread = _read_whole(ledger, found, terminal or Terminal())
    given_up = found.torn if config.damaged or config.torn else {}
    gone = doomed(ledger, found, bool(given_up))
    for name, wrong in sorted(given_up.items()):
        print(folded(f"  part {PurePosixPath(name).stem}: ", wrong))
    for name, size in gone.items():
        print(f"  {name}  {bytes_text(size)}")
    said = f"{plural(len(gone), 'file')}, {bytes_text(sum(gone.values()))}"
    said += f", {plural(len(given_up), 'part')} of the run among them" if given_up else ""
    if config.dry_run:
        _say(f"{said}, would be removed from {config.place}")
        return 0
    sweep(ledger, found, bool(given_up))
    left = survey(ledger)
    if not left.unreadable:
        write_metadata(ledger)
    _say(f"{said}, removed from {config.place}" + ("" if left.unreadable else "; metadata.json is written anew"))
    if given_up:
        print("the command that started the run, given again, computes what was given up")
    for flaw in unread:
        _say(f"not judged: {flaw}; mend that, or remove the file by hand, and give the same command again")
    if left.torn:
        mend = f"restore what is wrong from a copy, or give up with jax-extract sweep {config.place} --damaged"
        _say(f"left as it is: {plural(len(left.torn), 'torn part')}; {mend}")
    return 1 if left.torn or unread else 0


def _read_whole(ledger: Ledger, found: Survey, terminal: Terminal) -> tuple[Survey, list[str]]:
    """What the bytes of the committed parts say beside what their names and sizes said; and what cannot be read.

    Only what was read, and is not what was committed, is given up.
    """
    here = (file["path"] for record in found.committed.values() for file in files_of(record))
    with terminal.progress(sum(found.files.get(name, 0) for name in here), "reading", "B") as bar:
        flawed = flawed_parts(ledger, found.committed, bar.update)
    wrong = {key: says for key, flaws in flawed.items() if (says := "; ".join(f.says for f in flaws if f.certain))}
    unread = [flaw.says for key, flaws in flawed.items() if key not in wrong for flaw in flaws]
    return found.giving_up({**_lost_elsewhere(ledger, found), **wrong}), unread


def _lost_elsewhere(ledger: Ledger, found: Survey) -> dict[Key, str]:
    """Parts that were uploaded and deleted here, and are not where they went any more."""
    lost: dict[Key, str] = {}
    gone = {
        key: str(record["uploaded_to"])
        for key, record in found.committed.items()
        if "uploaded_to" in record and not all(file["path"] in found.files for file in record["files"])
    }
    for place in dict.fromkeys(gone.values()):
        there = open_noted(ledger, place)
        records = set(there.names(COMMITS))  # one that is damaged is for a sweep of that place
        lost |= {
            key: f"it was uploaded to {place}, where no record of it is"
            for key, went in gone.items()
            if went == place and f"{part_name(key)}.json" not in records
        }
    return lost
