"""Reads a run whole: every record, every file against its checksums, every sidecar against record and plan.

In: a ledger. Out: the parts without a flaw, sentences that name what is damaged or missing, which rows are not
finite, and which places hold parts that can be given up. One part's sidecar and a few pieces of files are in memory at
once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from jax_extract.errors import UserError, damage_is_told
from jax_extract.inputs.planning.slabs import Slab
from jax_extract.inputs.planning.windows import part_digest
from jax_extract.inputs.token_table import TokenizedSample, TokenTable
from jax_extract.store.finite import NotFiniteRows
from jax_extract.store.integrity import (
    NAMED,
    Advance,
    Flaw,
    dtype_of,
    read_sidecar,
    shard_flaw,
    some_of,
)
from jax_extract.store.ledger import Key, Ledger, Record, part_name
from jax_extract.store.parts import PartContent, Site
from jax_extract.store.sidecar import Sidecar
from jax_extract.store.storage.opening import open_storage
from jax_extract.store.storage.verbs import Entry, Storage
from jax_extract.store.survey import entries_of, files_of
from jax_extract.store.writer import lanes_for
from jax_extract.terminal import Terminal, plural
from models.positions import Positions

RESTORE = "restore its _run folder from a copy"

SiteKey = tuple[str, int | None]
Planned = Mapping[Key, Mapping[str, Any]]  # the parts of the stored plan, as they stand there


@dataclass(frozen=True)
class Layout:
    """What run.json says that every part is like.

    Attributes:
      dtype: of the stored values, as NumPy has it.
      computed_in: `float32` or `bfloat16`.
      plan_version: as its settings have it.
    """

    sites: tuple[Site, ...]
    positions: Positions
    dtype: np.dtype
    computed_in: str
    plan_version: int

    @classmethod
    def of(cls, ledger: Ledger) -> Layout:
        with damage_is_told(f"the run in {ledger.storage}", RESTORE):
            identity = ledger.run["identity"]
            return cls(
                tuple(Site(str(s["hook"]), s["layer"], int(s["width"])) for s in identity["sites"]),
                Positions.parse(identity["positions"]),
                dtype_of(ledger),
                str(ledger.run["numerics"]["dtype"]),
                int(identity["plan_settings"].get("version", 1)),
            )


@dataclass(frozen=True)
class WholePart:
    """A part without a flaw: where it lies, and what samples are chosen by."""

    storage: Storage
    record: Record
    lengths: np.ndarray

    def sidecar(self) -> Sidecar:
        file = self.record["sidecar"]
        return Sidecar.read(self.storage, file["path"], file["crc32c"], file.get("generation"))


@dataclass(frozen=True)
class Home:
    """A place with the records and the files that are there."""

    ledger: Ledger
    records: Mapping[Key, Record]
    damaged: Mapping[str, str]

    @classmethod
    def of(cls, ledger: Ledger) -> Home:
        return cls(ledger, *ledger.records())

    @cached_property
    def entries(self) -> dict[str, Entry]:
        return entries_of(self.ledger.storage)


@dataclass
class NotFinite:
    """The rows of one hook point and layer that hold values which are no finite numbers.

    Attributes:
      rows: how many.
      infinite, undefined: how many of their values are infinite, and how many are no numbers at all.
      samples: how many samples they are of.
      first_samples: the first of these, by id.
    """

    hook: str
    layer: int | None
    rows: int = 0
    infinite: int = 0
    undefined: int = 0
    samples: int = 0
    first_samples: list[str] = field(default_factory=list)

    def add(self, found: NotFiniteRows, content: PartContent) -> None:
        """What was found in the array of one part; no sample is in two."""
        rows = found.rows
        samples = np.unique(np.searchsorted(content.row_offsets, rows, side="right") - 1)
        self.rows += len(rows)
        self.infinite += found.infinite
        self.undefined += found.undefined
        self.samples += len(samples)
        self.first_samples += [content.sample_ids[i] for i in samples[: NAMED - len(self.first_samples)]]


@dataclass
class Reading:
    """Reads every record, sidecar and shard of a run.

    Attributes:
      whole: the parts without a flaw.
      damaged, missing: sentences that name what is wrong, and what is not there yet.
      not_finite: by hook point and layer, in the parts without a flaw; those alone that have such rows.
      to_give_up: places with damaged parts that `jax-extract sweep PLACE --damaged` gives up.
      counts: of what was read.
    """

    ledger: Ledger
    layout: Layout
    whole: dict[Key, WholePart] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    not_finite: dict[SiteKey, NotFinite] = field(default_factory=dict)
    to_give_up: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("parts", "files", "bytes", "blocks"), 0))
    _indices: dict[Key, np.ndarray] = field(default_factory=dict)
    _elsewhere: dict[str, Home] = field(default_factory=dict)

    def run(self, terminal: Terminal) -> None:
        home = Home.of(self.ledger)
        self.damaged += self._told(home, *map(Flaw, home.damaged.values()))
        planned = self._read_plan(home)
        total = sum(file["bytes"] for record in home.records.values() for file in files_of(record))
        lock = threading.Lock()
        threads = lanes_for(str(self.ledger.storage), len(self.layout.sites))
        with terminal.progress(total, "reading", "B") as bar, ThreadPoolExecutor(threads) as pool:

            def advance(count: int) -> None:
                with lock:
                    self.counts["bytes"] += count
                    bar.update(count)

            for key, record in home.records.items():
                problems = self._read_part(key, record, home, planned, pool, advance)
                self.damaged += [f"part {part_name(key)}: {problem}" for problem in problems]
                self.counts["parts"] += 1
        self.damaged += _told_twice(self._indices)

    def _read_plan(self, home: Home) -> Planned | None:
        """The planned parts, having told which are missing; None where there is no plan to hold the records against."""
        try:
            with damage_is_told(f"the plan in {self.ledger.storage}", RESTORE):
                plans = self.ledger.plans()
                planned = {(part["batch"], part["part"]): part for plan in plans for part in plan["parts"]}
                samples = {key: int(part["samples"]) for key, part in planned.items()}
                whole = bool(plans) and bool(plans[-1]["last"])
                if whole and sum(samples.values()) != plans[-1]["input"]["samples"]:
                    raise ValueError("it names other samples than the input had")
        except UserError as error:
            self.damaged.append(str(error))
            return None
        torn = {path.rpartition("/")[2] for path in home.damaged}
        gone = [key for key in sorted(planned) if key not in home.records and f"{part_name(key)}.json" not in torn]
        if gone:
            lost = sum(samples[key] for key in gone)
            self.missing.append(
                f"{len(gone)} of {plural(len(planned), 'part')} with {plural(lost, 'sample')}: "
                f"{some_of(map(part_name, gone))}"
            )
        if not plans:  # as in a directory from which parts are uploaded
            self.missing.append("no plan is stored here, so it is not known what else there should be")
            return None
        if not whole:
            self.missing.append("the input is not planned to its end yet")
        return planned

    def _read_part(
        self,
        key: Key,
        record: Record,
        home: Home,
        planned: Planned | None,
        pool: ThreadPoolExecutor,
        advance: Advance,
    ) -> list[str]:
        """What is wrong with a part; one that was uploaded and deleted here is read where it is now."""
        problems: list[str] = []
        if uploaded_to := record.get("uploaded_to"):
            problems = self._told(home, read_sidecar(record, home.ledger.storage, home.entries, advance)[1])
            here, home = home, self._home(uploaded_to)
            if home.ledger.run["run_id"] != self.ledger.run["run_id"] or key not in home.records:
                return problems + self._told(here, Flaw(f"it was uploaded to {uploaded_to}, where no record of it is"))
            record = home.records[key]
        storage, entries = home.ledger.storage, home.entries
        sidecar, flaw = read_sidecar(record, storage, entries, advance)
        problems += self._told(home, flaw)
        if sidecar:
            self._indices[key] = sidecar.content.sample_indices
            problems += self._disagreements(record, sidecar, planned)
        arrays = sidecar.arrays if sidecar and not problems else ()
        width = self.layout.dtype.itemsize
        watches = {array.path: NotFiniteRows(array.site.width, self.layout.dtype) for array in arrays}

        def flaw_of(file: Mapping[str, Any]) -> Flaw | None:
            watch = watches.get(file["path"])
            return shard_flaw(file, record, storage, entries, arrays, width, advance, watch and watch.add)

        flaws = pool.map(flaw_of, record["files"])
        problems += self._told(home, *flaws)
        self.counts["files"] += len(files_of(record))
        self.counts["blocks"] += sum(len(array.blocks) for array in arrays)
        if sidecar and not problems:
            lengths = np.array([len(tokens) for tokens in sidecar.content.token_ids], np.int32)
            self.whole[key] = WholePart(storage, record, lengths)
            for array in arrays:
                if len(watches[array.path].rows):
                    of_site = self.not_finite.setdefault(array.site.key, NotFinite(*array.site.key))
                    of_site.add(watches[array.path], sidecar.content)
        return problems

    def _told(self, home: Home, *flaws: Flaw | None) -> list[str]:
        """What these say; the place in which a part has one is remembered."""
        place = str(home.ledger.storage)
        if any(flaw and flaw.certain for flaw in flaws) and place not in self.to_give_up:
            self.to_give_up.append(place)
        return [flaw.says for flaw in flaws if flaw]

    def _disagreements(self, record: Record, sidecar: Sidecar, planned: Planned | None) -> list[str]:
        try:
            with damage_is_told("what its record, its sidecar or the plan says", RESTORE):
                return [
                    *_disagreements(record, sidecar, self.layout),
                    *_unplanned(sidecar.content, planned, self.layout.plan_version),
                ]
        except UserError as error:
            return [str(error)]

    def _home(self, place: str) -> Home:
        if place not in self._elsewhere:
            self._elsewhere[place] = Home.of(Ledger.open(open_storage(place)))
        return self._elsewhere[place]


def _disagreements(record: Record, sidecar: Sidecar, layout: Layout) -> Iterator[str]:
    """Where a sidecar says other than the record or run.json."""
    content = sidecar.content
    said = {
        "batch": content.batch,
        "part": content.part,
        "parts_in_batch": content.parts_in_batch,
        "samples": len(content.sample_ids),
        "tokens": content.tokens,
        "rows": content.rows,
        "plan": content.plan,
    }
    for name, value in said.items():
        if record[name] != value:
            yield f"its sidecar says {name} {value!r} and its record {record[name]!r}"
    if {a.path: a.site.key for a in sidecar.arrays} != {f["path"]: (f["hook"], f["layer"]) for f in record["files"]}:
        yield "its sidecar and its record name different files"
    if sorted(map(str, (array.site for array in sidecar.arrays))) != sorted(map(str, layout.sites)):
        yield "its files are not one for each hook point and layer of the run"
    for name, tokens, positions in zip(content.sample_ids, content.token_ids, content.positions, strict=True):
        if not np.array_equal(positions, layout.positions.of(len(tokens))):
            yield f"the positions of sample {name!r} are not {layout.positions}"
            return


def _unplanned(content: PartContent, planned: Planned | None, version: int) -> Iterator[str]:
    """Where samples, their order, names or tokens are other than the plan's, whose digest is over all of them."""
    if planned is None:
        return
    if content.key not in planned:
        yield "the plan does not name it"
        return
    samples = zip(content.sample_indices, content.sample_ids, content.token_ids, content.full_lengths, strict=True)
    table = TokenTable.of(
        TokenizedSample(int(index), name, tokens, int(full), {}) for index, name, tokens, full in samples
    )
    slabs = tuple(map(Slab.from_json, planned[content.key]["slabs"]))
    digest = part_digest(version, content.key, slabs, table)
    if not digest == planned[content.key]["digest"] == content.plan:
        yield "its samples or their tokens are not those of the plan"


def _told_twice(indices: Mapping[Key, np.ndarray]) -> list[str]:
    """Samples that are there more than once, over all parts."""
    if not indices:
        return []
    keys = list(indices)
    every = np.concatenate(list(indices.values()))
    parts = np.repeat(np.arange(len(keys)), [len(i) for i in indices.values()])
    order = np.argsort(every, kind="stable")
    again = np.flatnonzero(np.diff(every[order]) == 0)
    pairs = [(every[order[i]], keys[parts[order[i]]], keys[parts[order[i + 1]]]) for i in again[:NAMED]]
    told = [f"sample {n} of the input is in part {part_name(a)} and again in part {part_name(b)}" for n, a, b in pairs]
    more = len(again) - NAMED
    return told + ([f"{plural(more, 'more sample')}, there twice or oftener"] if more > 0 else [])
