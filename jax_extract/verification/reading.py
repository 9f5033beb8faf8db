"""Reads a run whole: every record, every file against its checksums, every sidecar against record and plan.

In: a ledger. Out: the parts without a flaw, and sentences that name what is damaged or missing. One part's
sidecar and a few pieces of files are in memory at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, cast

import ml_dtypes
import numpy as np

from jax_extract.errors import UserError, damage_is_told
from jax_extract.inputs.plan import Part, Slab
from jax_extract.inputs.tokenize import TokenizedSample
from jax_extract.store.ledger import PARTS, Key, Ledger, Record, part_name
from jax_extract.store.parts import PartContent, Site
from jax_extract.store.sidecar import BLOCK_BYTES, BlockChecksums, Sidecar, StoredArray
from jax_extract.store.storage.opening import open_storage
from jax_extract.store.storage.verbs import Entry, Storage, crc32c
from jax_extract.store.survey import wrong_with
from jax_extract.store.writer import lanes_for
from jax_extract.terminal import Terminal, plural
from models.positions import Positions

NAMED = 20  # how many of a kind are named; the rest are counted
RESTORE = "restore its _run folder from a copy"

_CHUNK = 8 << 20  # bytes of a file that are in memory at once, in each of a few threads

Advance = Callable[[int], None]
Planned = Mapping[Key, Mapping[str, Any]]  # the parts of the stored plan, as they stand there


@dataclass(frozen=True)
class Layout:
    """What run.json says that every part is like.

    Attributes:
      dtype: of the stored values, as NumPy has it.
      computed_in: `float32` or `bfloat16`.
    """

    sites: tuple[Site, ...]
    positions: Positions
    dtype: np.dtype
    computed_in: str

    @classmethod
    def of(cls, ledger: Ledger) -> Layout:
        with damage_is_told(f"the run in {ledger.storage}", RESTORE):
            identity = ledger.run["identity"]
            stored = identity["capture_dtype"]
            return cls(
                tuple(Site(str(s["hook"]), s["layer"], int(s["width"])) for s in identity["sites"]),
                Positions.parse(identity["positions"]),
                np.dtype(ml_dtypes.bfloat16 if stored == "bfloat16" else stored),
                str(ledger.run["numerics"]["dtype"]),
            )


@dataclass(frozen=True)
class WholePart:
    """A part without a flaw: where it lies, and what samples are chosen by."""

    storage: Storage
    record: Record
    lengths: np.ndarray

    def sidecar(self) -> Sidecar:
        return _sidecar_of(self.record, self.storage)


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
        storage = self.ledger.storage
        return {**storage.entries(), **{f"{PARTS}/{name}": entry for name, entry in storage.entries(PARTS).items()}}


@dataclass
class Reading:
    """Reads every record, sidecar and shard of a run.

    Attributes:
      whole: the parts without a flaw.
      damaged, missing: sentences that name what is wrong, and what is not there yet.
      counts: of what was read.
    """

    ledger: Ledger
    layout: Layout
    whole: dict[Key, WholePart] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("parts", "files", "bytes", "blocks"), 0))
    _indices: dict[Key, np.ndarray] = field(default_factory=dict)
    _elsewhere: dict[str, Home] = field(default_factory=dict)

    def run(self, terminal: Terminal) -> None:
        home = Home.of(self.ledger)
        self.damaged += home.damaged.values()
        planned = self._read_plan(home)
        total = sum(file["bytes"] for record in home.records.values() for file in _files(record))
        lock = threading.Lock()
        threads = lanes_for(str(self.ledger.storage), len(self.layout.sites))
        with terminal.progress(total, "read", "B") as bar, ThreadPoolExecutor(threads) as pool:

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
            _, problems = _read_sidecar(record, home, advance)
            home = self._home(uploaded_to)
            if home.ledger.run["run_id"] != self.ledger.run["run_id"] or key not in home.records:
                return [*problems, f"it was uploaded to {uploaded_to}, where no record of it is"]
            record = home.records[key]
        sidecar, more = _read_sidecar(record, home, advance)
        problems += more
        if sidecar:
            self._indices[key] = sidecar.content.sample_indices
            problems += self._disagreements(record, sidecar, planned)
        arrays = {array.path: array for array in sidecar.arrays} if sidecar and not problems else {}
        check = partial(_file_problem, home, record, arrays, self.layout.dtype.itemsize, advance)
        problems += filter(None, list(pool.map(check, record["files"])))
        self.counts["files"] += len(_files(record))
        self.counts["blocks"] += sum(len(array.blocks) for array in arrays.values())
        if sidecar and not problems:
            lengths = np.array([len(tokens) for tokens in sidecar.content.token_ids], np.int32)
            self.whole[key] = WholePart(home.ledger.storage, record, lengths)
        return problems

    def _disagreements(self, record: Record, sidecar: Sidecar, planned: Planned | None) -> list[str]:
        try:
            with damage_is_told("what its record, its sidecar or the plan says", RESTORE):
                return [*_disagreements(record, sidecar, self.layout), *_unplanned(sidecar.content, planned)]
        except UserError as error:
            return [str(error)]

    def _home(self, place: str) -> Home:
        if place not in self._elsewhere:
            self._elsewhere[place] = Home.of(Ledger.open(open_storage(place)))
        return self._elsewhere[place]


def _files(record: Record) -> list[dict[str, Any]]:
    return [record["sidecar"], *record["files"]]


def _sidecar_of(record: Record, storage: Storage) -> Sidecar:
    file = record["sidecar"]
    return Sidecar.read(storage, file["path"], file["crc32c"], file.get("generation"))


def _read_sidecar(record: Record, home: Home, advance: Advance) -> tuple[Sidecar | None, list[str]]:
    """A sidecar, or what is wrong with it."""
    file, storage = record["sidecar"], home.ledger.storage
    if wrong := wrong_with(file, record, home.entries):
        return None, [wrong]
    try:
        # By itself: trouble with the place ends the command, and only what has arrived can be damaged.
        data = storage.read(file["path"], generation=file.get("generation"))
    except OSError as error:
        return None, [f"{file['path']} cannot be read ({error.strerror or error})"]
    advance(len(data))
    arrived = SimpleNamespace(where=storage.where, read=lambda *_, **__: data)
    try:
        return _sidecar_of(record, cast(Storage, arrived)), []
    except UserError as error:
        return None, [str(error)]


def _file_problem(
    home: Home,
    record: Record,
    arrays: Mapping[str, StoredArray],
    itemsize: int,
    advance: Advance,
    file: Mapping[str, Any],
) -> str | None:
    """Reads a whole shard once, against its own checksum and those of the blocks of its array."""
    name, size = str(file["path"]), int(file["bytes"])
    if wrong := wrong_with(file, record, home.entries):
        return wrong
    array = arrays.get(name)
    start = array.offset if array else 0
    stop = start + (record["rows"] * array.site.width * itemsize if array else 0)
    if array and not (0 <= start <= stop <= size and len(array.blocks) == -(-(stop - start) // BLOCK_BYTES)):
        return f"{name} cannot hold the array that its sidecar describes"
    total, blocks, at = 0, BlockChecksums(), 0
    buffer = memoryview(bytearray(min(_CHUNK, size)))
    while at < size:
        piece = buffer[: min(_CHUNK, size - at)]
        try:
            got = home.ledger.storage.read_into(name, at, piece, file.get("generation"))
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
        advance(got)
        if got < len(piece):
            return f"{name} is cut short at byte {at + got}"
        total = crc32c(piece, total)
        blocks.update(piece[max(0, start - at) : max(0, stop - at)])
        at += got
    pairs = zip(blocks.values(), array.blocks if array else (), strict=True)
    changed = [str(i) for i, (is_now, was) in enumerate(pairs) if is_now != was]
    if changed:
        return f"{name} is changed: block {some_of(changed)} of its array does not match its checksum"
    return f"{name} is changed: it does not match its checksum" if total != file["crc32c"] else None


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


def _unplanned(content: PartContent, planned: Planned | None) -> Iterator[str]:
    """Where samples, their order, names or tokens are other than the plan's, whose digest is over all of them."""
    if planned is None:
        return
    if content.key not in planned:
        yield "the plan does not name it"
        return
    samples = zip(content.sample_indices, content.sample_ids, content.token_ids, content.full_lengths, strict=True)
    part = Part(
        content.batch,
        content.part,
        content.parts_in_batch,
        tuple(TokenizedSample(int(index), name, tokens, int(full), {}) for index, name, tokens, full in samples),
        tuple(Slab(*slab) for slab in planned[content.key]["slabs"]),
    )
    if not part.digest == planned[content.key]["digest"] == content.plan:
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
    return told + ([f"{len(again) - NAMED} more samples are there twice"] if len(again) > NAMED else [])


def some_of(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest
