"""`jax-extract verify`: shows that a run is what it says, or names what is not.

In: a run, finished or not, in a directory or a bucket, and the model it was made with. Out: a `Verdict`, as
lines and as `verification.json` beside metadata.json. First every record is read, every file against its
checksums, every sidecar against its record and the plan; then some samples are computed again by an
independent reference, and every stored row of theirs is compared. One part and one sample are in memory at once.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Annotated, Any, cast

import ml_dtypes
import numpy as np
import tyro

from jax_extract.errors import UserError, damage_is_told
from jax_extract.inputs.plan import Part, Slab
from jax_extract.inputs.tokenize import TokenizedSample
from jax_extract.prepare import OpenModel
from jax_extract.reference import References, SiteErrors, SiteKey, SiteVerdict, Wanted, plan_of
from jax_extract.store.ledger import PARTS, Key, Ledger, Record, part_name, to_json
from jax_extract.store.parts import PartContent, Site
from jax_extract.store.sidecar import BLOCK_BYTES, BlockChecksums, Sidecar, StoredArray
from jax_extract.store.storage import Entry, Storage, crc32c, open_storage
from jax_extract.store.survey import wrong_with
from jax_extract.store.writer import lanes_for
from jax_extract.terminal import Terminal, bytes_text, plural
from jax_extract.weights.load import Weights
from models.hooks import HOOK_POINTS
from models.ports import hook_width
from models.positions import Positions

VERDICT_FILE = "verification.json"

_CHUNK = 8 << 20  # bytes of a file that are in memory at once, in each of a few threads
_NAMED = 20  # how many of a kind are named; the rest are counted
_BEGINNINGS = 64  # of each sample, in which the peer's worst row is looked for as well
_RESTORE = "restore its _run folder from a copy"

Advance = Callable[[int], None]
Planned = Mapping[Key, Mapping[str, Any]]  # the parts of the stored plan, as they stand there


@dataclass(frozen=True)
class VerifyConfig:
    """Read every checksum of a run, and compute samples of it again. Exit code 1 when something is not as it should be.

    Attributes:
      place: run directory or gs://bucket/prefix.
      samples: how many samples are computed again; the longest and the shortest always are.
      seed: of their choice.
      model_path: where the model is now, if not where the run found it.
    """

    place: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PLACE")]
    samples: int = 16
    seed: int = 0
    model_path: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What `verification.json` says.

    Attributes:
      verdict: the gravest that is true: `damaged`, `out of bounds`, `unfinished`, else `verified`.
      date: UTC, when the reading began.
      read: how many parts, files, bytes and blocks were read, and how many samples are in parts without a flaw.
      damaged, missing: sentences, one a thing.
      reference: what the rows were compared with, and in which versions.
      samples: those computed again.
      notes: what else a reader of the verdict must know.
    """

    verdict: str
    place: str
    run_id: str
    date: str
    read: Mapping[str, int]
    damaged: Sequence[str]
    missing: Sequence[str]
    reference: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]
    sites: Sequence[SiteVerdict]
    notes: Sequence[str]

    @property
    def exit_status(self) -> int:
        """An unfinished run is told, and is nobody's mistake; `jax-extract status` answers whether all is there."""
        return 1 if self.verdict in ("damaged", "out of bounds") else 0

    def to_json(self) -> bytes:
        sites = [_plain({**dataclasses.asdict(site), "ok": site.ok}) for site in self.sites]
        return to_json({**dataclasses.asdict(self), "sites": sites})


def verify_command(config: VerifyConfig) -> int:
    """Verifies and tells; 1 where something is damaged or out of bounds, else 0."""
    verdict = verify(config.place, samples=config.samples, seed=config.seed, model_path=config.model_path)
    return verdict.exit_status


def verify(
    place: str,
    *,
    samples: int = 16,
    seed: int = 0,
    model_path: str | None = None,
    terminal: Terminal | None = None,
) -> Verdict:
    """Verifies what is committed of a run, tells it line by line, and writes the verdict beside the metadata.

    Raises:
      UserError: there is no run, or its model is not there, or is another one.
    """
    terminal = terminal or Terminal()
    if samples < 1:
        raise UserError(f"--samples {samples} must be at least 1; the longest and the shortest are always among them")
    if seed < 0:
        raise UserError(f"--seed {seed} is negative; give a whole number from 0 on")
    date = datetime.now(UTC).isoformat(timespec="seconds")
    ledger = Ledger.open(open_storage(place, "the place to verify"))
    layout = _Layout.of(ledger)
    model = _open_model(ledger, layout, model_path)  # before the long reading: it may be the wrong one

    reading = _Reading(ledger, layout)
    reading.run(terminal)
    _tell_reading(reading, terminal)
    comparison = _Comparison(layout, model, _choose(reading.whole, layout.positions, samples, seed))
    comparison.run(terminal)
    _tell_comparison(comparison, terminal)

    verdict = Verdict(
        verdict=_gravest(reading, comparison),
        place=place,
        run_id=str(ledger.run["run_id"]),
        date=date,
        read={**reading.counts, "samples": sum(len(part.lengths) for part in reading.whole.values())},
        damaged=reading.damaged,
        missing=reading.missing,
        reference=comparison.compared_with,
        samples=comparison.samples,
        sites=comparison.sites,
        notes=comparison.notes,
    )
    _tell_verdict(verdict, terminal)
    ledger.storage.replace(VERDICT_FILE, verdict.to_json())
    return verdict


# --------------------------------------------------------------------------------- the run and its model


@dataclass(frozen=True)
class _Layout:
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
    def of(cls, ledger: Ledger) -> _Layout:
        with damage_is_told(f"the run in {ledger.storage}", _RESTORE):
            identity = ledger.run["identity"]
            stored = identity["capture_dtype"]
            return cls(
                tuple(Site(str(s["hook"]), s["layer"], int(s["width"])) for s in identity["sites"]),
                Positions.parse(identity["positions"]),
                np.dtype(ml_dtypes.bfloat16 if stored == "bfloat16" else stored),
                str(ledger.run["numerics"]["dtype"]),
            )


def _open_model(ledger: Ledger, layout: _Layout, model_path: str | None) -> OpenModel:
    """The model that the run names, or where the user says it is now; UserError unless it is the run's."""
    with damage_is_told(f"the run in {ledger.storage}", _RESTORE):
        model_type, weights = ledger.run["identity"]["model_type"], str(ledger.run["identity"]["weights"])
        source, revision = str(ledger.run["description"]["model_path"]), ledger.run["description"]["model_revision"]
    try:
        model = OpenModel.open(model_path or source, revision)
    except UserError as error:
        if model_path:
            raise
        raise UserError(f"{error}; the run was made with it: say where it is now with --model_path") from None
    source = model.checkpoint.source
    if model.config.model_type != model_type:
        raise UserError(f"{source} is of type {model.config.model_type!r} and the run of {model_type!r}; {_WRONG}")
    blocks = plan_of(layout.sites).blocks_needed(model.config.num_hidden_layers)
    found = Weights(model.checkpoint, model.port, model.config, blocks).provenance()
    if found != weights:
        raise UserError(f"the weights of {source} are {found[:19]}… and those of the run {weights[:19]}…; {_WRONG}")
    for site in layout.sites:
        if (width := hook_width(model.config, HOOK_POINTS[site.hook].width)) != site.width:
            raise UserError(f"{source} has {width} values a row at {site.hook} and the run {site.width}; {_WRONG}")
    return model


_WRONG = "give --model_path the model that the run was made with (of a hub model its hub id, at the same commit)"


# ----------------------------------------------------------------------------------------- reading it all


@dataclass(frozen=True)
class _WholePart:
    """A part without a flaw: where it lies, and what samples are chosen by."""

    storage: Storage
    record: Record
    lengths: np.ndarray

    def sidecar(self) -> Sidecar:
        return _sidecar_of(self.record, self.storage)


@dataclass(frozen=True)
class _Home:
    """A place with the records and the files that are there."""

    ledger: Ledger
    records: Mapping[Key, Record]
    damaged: Mapping[str, str]

    @classmethod
    def of(cls, ledger: Ledger) -> _Home:
        return cls(ledger, *ledger.records())

    @cached_property
    def entries(self) -> dict[str, Entry]:
        storage = self.ledger.storage
        return {**storage.entries(), **{f"{PARTS}/{name}": entry for name, entry in storage.entries(PARTS).items()}}


@dataclass
class _Reading:
    """Reads every record, sidecar and shard of a run.

    Attributes:
      whole: the parts without a flaw.
      damaged, missing: sentences that name what is wrong, and what is not there yet.
      counts: of what was read.
    """

    ledger: Ledger
    layout: _Layout
    whole: dict[Key, _WholePart] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("parts", "files", "bytes", "blocks"), 0))
    _indices: dict[Key, np.ndarray] = field(default_factory=dict)
    _elsewhere: dict[str, _Home] = field(default_factory=dict)

    def run(self, terminal: Terminal) -> None:
        home = _Home.of(self.ledger)
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

    def _read_plan(self, home: _Home) -> Planned | None:
        """The planned parts, having told which are missing; None where there is no plan to hold the records against."""
        try:
            with damage_is_told(f"the plan in {self.ledger.storage}", _RESTORE):
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
                f"{_some(map(part_name, gone))}"
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
        home: _Home,
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
            self.whole[key] = _WholePart(home.ledger.storage, record, lengths)
        return problems

    def _disagreements(self, record: Record, sidecar: Sidecar, planned: Planned | None) -> list[str]:
        try:
            with damage_is_told("what its record, its sidecar or the plan says", _RESTORE):
                return [*_disagreements(record, sidecar, self.layout), *_unplanned(sidecar.content, planned)]
        except UserError as error:
            return [str(error)]

    def _home(self, place: str) -> _Home:
        if place not in self._elsewhere:
            self._elsewhere[place] = _Home.of(Ledger.open(open_storage(place)))
        return self._elsewhere[place]


def _files(record: Record) -> list[dict[str, Any]]:
    return [record["sidecar"], *record["files"]]


def _sidecar_of(record: Record, storage: Storage) -> Sidecar:
    file = record["sidecar"]
    return Sidecar.read(storage, file["path"], file["crc32c"], file.get("generation"))


def _read_sidecar(record: Record, home: _Home, advance: Advance) -> tuple[Sidecar | None, list[str]]:
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
    home: _Home,
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
        return f"{name} is changed: block {_some(changed)} of its array does not match its checksum"
    return f"{name} is changed: it does not match its checksum" if total != file["crc32c"] else None


def _disagreements(record: Record, sidecar: Sidecar, layout: _Layout) -> Iterator[str]:
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
    pairs = [(every[order[i]], keys[parts[order[i]]], keys[parts[order[i + 1]]]) for i in again[:_NAMED]]
    told = [f"sample {n} of the input is in part {part_name(a)} and again in part {part_name(b)}" for n, a, b in pairs]
    return told + ([f"{len(again) - _NAMED} more samples are there twice"] if len(again) > _NAMED else [])


# ------------------------------------------------------------------------------- computing samples again


@dataclass(frozen=True)
class _Chosen:
    """A sample to compute again: a part, and the sample's place in it."""

    part: _WholePart
    place: int

    @property
    def length(self) -> int:
        return int(self.part.lengths[self.place])


def _choose(parts: Mapping[Key, _WholePart], positions: Positions, count: int, seed: int) -> dict[Key, list[_Chosen]]:
    """Samples to compute again, by part: the longest, the shortest, and others spread over lengths and parts.

    One sample is drawn from each of equal strata of length, from the part that has given the fewest so far.
    """
    keys = list(parts)
    if not keys:
        return {}
    lengths = np.concatenate([parts[key].lengths for key in keys])
    part = np.repeat(np.arange(len(keys)), [len(parts[key].lengths) for key in keys])
    place = np.concatenate([np.arange(len(parts[key].lengths)) for key in keys])
    order = np.argsort(lengths, kind="stable")
    distinct = np.unique(lengths)
    order = order[np.isin(lengths[order], [n for n in distinct if positions.rows(int(n))])]  # those that gave a row
    between = np.array_split(order[1:-1], count - 2) if count > 2 else []  # noqa: PLR2004 (longest and shortest)
    random = np.random.default_rng(seed)
    used = np.zeros(len(keys), np.int64)
    chosen: dict[Key, list[_Chosen]] = {}
    for stratum in (order[-1:], order[:-1][:1], *between):
        if len(stratum):
            shuffled = random.permutation(stratum)
            one = shuffled[np.argmin(used[part[shuffled]])]
            used[part[one]] += 1
            key = keys[part[one]]
            chosen.setdefault(key, []).append(_Chosen(parts[key], int(place[one])))
    return dict(sorted(chosen.items()))


@dataclass
class _Comparison:
    """Computes the chosen samples again, and gathers how far the stored rows are.

    Attributes:
      sites: a verdict on each; none where there was no sample to compute.
      samples: which were computed.
      compared_with: the reference, for people and scripts.
      notes: why it is not the first choice, and what was not judged.
    """

    layout: _Layout
    model: OpenModel
    chosen: Mapping[Key, Sequence[_Chosen]]
    sites: list[SiteVerdict] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    compared_with: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def run(self, terminal: Terminal) -> None:
        if not self.chosen:
            return
        layout = self.layout
        references = References.open(self.model, layout.sites, layout.computed_in, self.notes.append)
        if layout.computed_in == "bfloat16" and references.peer is None:
            self.notes.append(
                "a bfloat16 run is judged by the errors of Hugging Face in bfloat16, which cannot be had here: its "
                "errors are told and not judged; pip install torch to have them judged"
            )
        self.compared_with = {
            "name": references.truth.name,
            "judged_by": references.peer.name if references.peer else None,
            "versions": {**references.truth.versions, "jax_extract": importlib.metadata.version("jax_extract")},
            "model": self.model.checkpoint.source,
        }
        errors = {site.key: SiteErrors() for site in layout.sites}
        tokens = sum(sample.length for samples in self.chosen.values() for sample in samples)
        with terminal.progress(tokens, "recompute") as bar:
            for key, samples in self.chosen.items():
                sidecar = samples[0].part.sidecar()
                for sample in samples:
                    self._compare(key, sample, sidecar, references, errors)
                    bar.update(sample.length)
        self.sites = [errors[site.key].verdict(site, layout.computed_in) for site in layout.sites]

    def _compare(
        self,
        key: Key,
        sample: _Chosen,
        sidecar: Sidecar,
        references: References,
        errors: Mapping[SiteKey, SiteErrors],
    ) -> None:
        """Every stored row of one sample; the model sees the token ids as they are stored, not the text again."""
        content, sites = sidecar.content, self.layout.sites
        tokens, positions = content.token_ids[sample.place], content.positions[sample.place]
        first = int(content.row_offsets[sample.place])
        arrays = {array.site.key: array for array in sidecar.arrays}
        wanted = Wanted.of(tokens, positions, _BEGINNINGS if references.peer else 0)
        theirs = references.peer.rows(wanted, sites) if references.peer else None
        for site, truth in references.truth.rows(wanted, sites):
            stored = self._stored(sample.part, arrays[site.key], first, len(positions))
            errors[site.key].add(stored, truth, next(theirs)[1] if theirs else None)
        self.samples.append(
            {
                "sample_id": content.sample_ids[sample.place],
                "sample_index": int(content.sample_indices[sample.place]),
                "part": part_name(key),
                "tokens": len(tokens),
                "rows": len(positions),
            }
        )

    def _stored(self, part: _WholePart, array: StoredArray, first: int, rows: int) -> np.ndarray:
        """Rows as they are stored, [rows, width]; their blocks were checked before."""
        row_bytes = array.site.width * self.layout.dtype.itemsize
        data = np.empty(rows * row_bytes, np.uint8)
        generation = next(file.get("generation") for file in part.record["files"] if file["path"] == array.path)
        with damage_is_told(f"shard {array.path}", "it changed while it was verified: verify again"):
            got = part.storage.read_into(array.path, array.offset + first * row_bytes, data.data, generation)
            if got < len(data):
                raise ValueError("it is cut short")
        return data.view(self.layout.dtype).reshape(rows, array.site.width)


# --------------------------------------------------------------------------------------- what is told


def _gravest(reading: _Reading, comparison: _Comparison) -> str:
    if reading.damaged:
        return "damaged"
    if any(site.ok is False for site in comparison.sites):
        return "out of bounds"
    return "unfinished" if reading.missing else "verified"


def _tell_reading(reading: _Reading, terminal: Terminal) -> None:
    counts = reading.counts
    terminal.line(
        "read",
        f"{plural(counts['parts'], 'part')}, {plural(counts['files'], 'file')}, {bytes_text(counts['bytes'])}, "
        f"{plural(counts['blocks'], 'block')}{'' if reading.damaged else ': every checksum is right'}",
    )
    for thing in reading.damaged:
        terminal.line("damaged", thing)
    for thing in reading.missing:
        terminal.line("missing", thing)


def _tell_comparison(comparison: _Comparison, terminal: Terminal) -> None:
    """One line a site."""
    if not comparison.samples:
        return
    used, lengths = comparison.compared_with, [sample["tokens"] for sample in comparison.samples]
    chosen = f"{plural(len(lengths), 'sample')} of {min(lengths):,} to {max(lengths):,} tokens"
    terminal.line("compared", f"every row of {chosen} with {used['name']}")
    if used["judged_by"]:
        terminal.line("bounds", f"the worst and the median row of {used['judged_by']}, on the same samples")
    for note in comparison.notes:
        terminal.line("note", note)
    terminal.line("", f"{'hook point':<16} {'layer':>5} {'rows':>9}   {'worst':>7}  {'median':>7}   {'bound':>7}")
    for site in comparison.sites:
        layer = "" if site.layer is None else str(site.layer)
        bounds = "  ".join(f"{b:>7.1e}" for b in (site.bound, site.median_bound) if b is not None)
        judged = {True: "ok", False: "OUT OF BOUNDS", None: "not judged"}[site.ok]
        errors = f"{site.worst:>7.1e}  {site.median:>7.1e}"
        terminal.line("", f"{site.hook:<16} {layer:>5} {site.rows:>9,}   {errors}   {bounds}  {judged}")


def _tell_verdict(verdict: Verdict, terminal: Terminal) -> None:
    judged = all(site.ok is not None for site in verdict.sites)
    rows = "the rows are the model's" if judged else "its rows were not judged"
    told = {
        "verified": f"every byte is as it was written, and {rows}",
        "damaged": f"{plural(len(verdict.damaged), 'thing')}, named above",
        "out of bounds": _some(site.name for site in verdict.sites if site.ok is False),
        "unfinished": f"of what is committed, every byte is as it was written, and {rows}",
    }
    terminal.line("verdict", f"{verdict.verdict}: {told[verdict.verdict]}")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + rest


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON has them, which knows no infinity."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
