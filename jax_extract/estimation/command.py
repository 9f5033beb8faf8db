"""`jax-extract estimate`: what a run will write and how long it will take, before it is started.

In: the configuration of the run. Out: an `Estimate`: bytes a site, files, room, seconds of computing and of
writing, and which of the two bounds the run. Bytes and files follow from the plan; seconds from short timed
tries (`probe`). Nothing stays in the run's place, and what the run would refuse is refused here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jax_extract.config import ExtractConfig
from jax_extract.devices.processes import Processes
from jax_extract.errors import UserError
from jax_extract.estimation.probe import ComputeProbe, WriteProbe, probe_computing, probe_writing
from jax_extract.extraction.command import (
    host_budget,
    join_processes,
    named_as_begun,
    open_request,
    require_room,
    require_rows,
    require_samples,
    run_of,
)
from jax_extract.extraction.loop import part_content
from jax_extract.extraction.model_fields import model_fields, require_same_fields
from jax_extract.extraction.pending import Committed, parse_committed, pending_parts, plan_json, read_committed
from jax_extract.extraction.place import Place, kept_by
from jax_extract.extraction.prepare import Job, wrapping_of
from jax_extract.extraction.session import keep_in
from jax_extract.extraction.summary import tell_input, tell_plan, tell_request
from jax_extract.inputs.contexts import ContextCounts
from jax_extract.inputs.planning.slabs import PlanSettings, Shapes, SlabShape
from jax_extract.inputs.planning.windows import Part, Window
from jax_extract.inputs.sources import Source
from jax_extract.inputs.tokenize import InputCounts
from jax_extract.inputs.wrapping import Wrapping
from jax_extract.store.formats import SUFFIXES, ShardHeader, shard_bytes
from jax_extract.store.ledger import PLAN, RUN_FILE, Ledger, to_json
from jax_extract.store.parts import PartContent, Site
from jax_extract.store.sidecar import BLOCK_BYTES, Sidecar, StoredArray
from jax_extract.store.storage.verbs import BUCKET_SCHEME
from jax_extract.store.writer import lanes_for
from jax_extract.terminal import Terminal, bytes_text, duration_text, plural, ranges_text, share_text
from models.positions import Positions

MILLION = 1_000_000

# Of files whose content is not known before the run, in bytes; together far less than their shards.
_RECORD, _RECORD_A_FILE = 420, 140
_RUN_FILES = ("run.json", "config.yaml", "metadata.json")
_RUN_FILE, _METADATA_A_SHARD, _SESSION = 2_700, 50, 650


@dataclass(frozen=True)
class Output:
    """What is still to be written.

    Attributes:
      rows: of one site.
      parts: units of work.
      row_bytes: of the rows alone, over all sites.
      site_bytes: of the shards, with their heads, in file order.
      shards, largest_shard: how many, and bytes of the largest.
      other_files: sidecars, commit records, plans and the like.
      file_bytes: of all files.
    """

    samples: int
    tokens: int
    rows: int
    parts: int
    row_bytes: int
    site_bytes: Mapping[Site, int]
    shards: int
    largest_shard: int
    other_files: int
    file_bytes: int

    @property
    def shard_bytes(self) -> int:
        """Of all shards."""
        return sum(self.site_bytes.values())

    @property
    def objects(self) -> int:
        return self.shards + self.other_files

    def times(self, factor: float) -> Output:
        """So many times as much, in shards of the same size."""
        counts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        counts |= {name: round(value * factor) for name, value in counts.items() if isinstance(value, int)}
        site_bytes = {site: round(value * factor) for site, value in self.site_bytes.items()}
        return Output(**{**counts, "site_bytes": site_bytes, "largest_shard": self.largest_shard})


@dataclass(frozen=True)
class Work:
    """What is left to do.

    Attributes:
      steps: of each slab shape, on all devices of a program.
      covers: what it is the work of: the rest of the run (`run`), that of an input of known length as a part of it
        foretells it (`foretold`), or that of a million tokens of an input whose length nobody knows (`million`).
      committed_samples: which are there already, and not counted.
      samples_per_batch: what file names count.
    """

    output: Output
    steps: Mapping[SlabShape, float]
    covers: str
    committed_samples: int
    samples_per_batch: int


@dataclass(frozen=True)
class Estimate:
    """Attributes:
    compute: None where nothing is left to do.
    writes: place -> what was measured there, in the order in which bytes pass; empty where nothing is left.
    workers: independent workers that share the computing.
    writers: processes that write side by side, each with a disk or a connection of its own.
    free: room where shards are written first; None where there is no limit, or none is told.
    """

    config: ExtractConfig
    work: Work
    compute: ComputeProbe | None
    writes: Mapping[str, WriteProbe]
    workers: int
    writers: int
    free: int | None

    @property
    def output(self) -> Output:
        return self.work.output

    @property
    def start_seconds(self) -> float:
        """Loading and compiling, which every worker does."""
        if self.compute is None:
            return 0.0
        return self.compute.load_seconds + self.compute.compile_seconds * len(self.work.steps)

    @property
    def computing_seconds(self) -> float:
        return self.compute.seconds(self.work.steps) / self.workers if self.compute else 0.0

    @property
    def writing_seconds(self) -> float:
        """Of the slower place, where parts pass through two."""
        output = self.output
        return max(
            (probe.seconds(output.file_bytes, output.objects) / self.writers for probe in self.writes.values()),
            default=0.0,
        )

    @property
    def bound_by_writing(self) -> bool:
        return self.writing_seconds > self.computing_seconds

    @property
    def seconds(self) -> float:
        """Of the whole run: computing and writing go on at the same time."""
        return self.start_seconds + max(self.computing_seconds, self.writing_seconds)


def estimate_command(config: ExtractConfig, terminal: Terminal | None = None) -> Estimate:
    """The command: on every host of a program, as the run itself."""
    processes = join_processes(config)
    terminal = terminal or Terminal(silent=not processes.is_first)
    found = estimate(config, terminal, processes)
    tell(found, terminal)
    return found


def estimate(config: ExtractConfig, terminal: Terminal, processes: Processes | None = None) -> Estimate:
    """What the run that this configuration starts or resumes will take.

    Raises:
      UserError: the run would be refused, or cannot fit the disk.
    """
    if config.capture_answers:
        raise UserError(
            "--capture_answers cannot be estimated before there are answers; leave it out for an estimate of the "
            "prompts alone: answers add at most --max_new_tokens tokens to each"
        )
    processes = processes or join_processes(config)
    place, source, job = open_request(config, processes)
    tell_request(job, config, processes.count, terminal)
    found, committed = _what_is_there(config, place, processes)
    workers = config.num_workers or 1
    parties = max(processes.count, workers)
    source = named_as_begun(source, config, found)
    wrapping = wrapping_of(config, kept_by(found, processes))
    with processes.together():
        settings = job.plan_settings(config, found.run["identity"]["plan_settings"] if found else None)
        job, weights = job.under(settings), job.weights()
        if found:
            run = run_of(config, job, weights, settings)
            found.require_same(run["identity"], run["numerics"], config.allow_numeric_change)
            require_same_fields(found, job.model, job.max_length)
        work, parts, shapes = _plan(
            _Request(config, processes, source, job, settings, wrapping, found, committed, terminal)
        )
        if work.covers != "million":
            require_room(place, work.output.file_bytes, parties)
        budget = host_budget(config, job, place, set(work.steps))
    compute, writes = None, {}
    if parts:
        places = [place.storage] if place.spool is None else [place.spool, place.storage]
        with processes.together():
            writes = {
                str(storage): probe_writing(storage, lanes_for(str(storage), len(job.sites))) for storage in places
            }
        compute = probe_computing(job, weights, parts, shapes, budget, processes)
    apart = place.spool is not None or str(place.storage).startswith(BUCKET_SCHEME)
    free = place.written_to.free_bytes()
    return Estimate(config, work, compute, writes, workers, parties if apart else 1, free)


@dataclass(frozen=True)
class _Request:
    config: ExtractConfig
    processes: Processes
    source: Source
    job: Job
    settings: PlanSettings
    wrapping: Wrapping
    found: Ledger | None
    committed: Committed
    terminal: Terminal

    @property
    def committed_samples(self) -> int:
        return sum(part.samples for part in self.committed.values())


def _what_is_there(config: ExtractConfig, place: Place, processes: Processes) -> tuple[Ledger | None, Committed]:
    """The run in the place, and its committed parts, those included that still wait to be uploaded."""
    if config.overwrite:
        return None, {}

    def read() -> list:
        places = [storage for storage in (place.storage, place.spool) if storage and storage.exists(RUN_FILE)]
        ledgers = [Ledger.open(storage) for storage in places]
        return [list(map(read_committed, ledgers)), bool(ledgers) and str(places[0]) == str(place.storage)]

    records, in_storage = processes.of_first(read)
    committed = {key: part for said in records for key, part in parse_committed(said).items()}
    if not records:
        return None, {}
    return Ledger.open(place.storage if in_storage else place.written_to), committed


# ---------------------------------------------------------------------------------------- what is left


def _plan(request: _Request) -> tuple[Work, list[Part], Shapes]:
    """The work, the parts of it that are planned (all of a finite input, the first window of a stream), slab shapes."""
    job, source, terminal, counts = (
        request.job,
        request.source,
        request.terminal,
        request.job.new_counts(request.settings),
    )
    stream = job.windows(source.samples(), request.settings, request.wrapping, counts)
    windows = list(stream if source.finite else itertools.islice(stream, 1))
    require_samples(counts, source)
    tell_input(source, counts, job, terminal)
    every = [part for window in windows for part in window.parts]
    require_rows(every, job)
    tell_plan(every, job.step_counts(every), terminal)
    pending = _pending(request, windows, counts)
    whole = windows[-1].is_last
    parts = pending if whole else every  # what foretells the rest must be typical of it
    output = output_of(parts, job.sites, job.plan.positions, request.config.capture_dtype, request.config.shard_format)
    output = _with_plans(output, windows, counts, request.found)
    covers, factor = _outlook(request, output, whole, counts)
    output = output if whole else output.times(factor)
    if not output.parts:
        return Work(output, {}, covers, request.committed_samples, request.settings.samples_per_batch), [], ()
    output = _with_run_files(output, request, max(request.processes.count, request.config.num_workers or 1))
    steps = {shape: count * factor for shape, count in job.step_counts(parts).steps.items()}
    work = Work(output, steps, covers, request.committed_samples, request.settings.samples_per_batch)
    return work, parts, windows[0].shapes


def _pending(request: _Request, windows: Sequence[Window], counts: InputCounts) -> list[Part]:
    """Parts without a record; UserError where the run is one over other inputs."""
    found = request.found
    stored = set(found.names(PLAN)) if found else set()

    def check_plan(window: Window) -> None:
        if found and f"{window.number:06d}.json" in stored:  # so that nothing is written
            keep_in(found, window, counts)

    return list(pending_parts(windows, request.committed, check_plan))


def _outlook(request: _Request, planned: Output, whole: bool, counts: InputCounts) -> tuple[str, float]:
    """What the work is that of, and how many times what is planned it is."""
    if whole:
        return "run", 1.0
    if request.config.n_samples is None:
        return "million", MILLION / planned.tokens
    expected = float(request.config.n_samples)
    if isinstance(counts, ContextCounts):  # texts are counted by the user, and contexts by the plan
        expected *= counts.samples / counts.documents
    return "foretold", max(expected - request.committed_samples, 0) / planned.samples


def output_of(
    parts: Iterable[Part], sites: Sequence[Site], positions: Positions, dtype: str, shard_format: str
) -> Output:
    """Shards, sidecars and records of these parts. Everything but the rows is made to be measured; rows are counted."""
    values = 4 if dtype == "float32" else 2
    counted = {"samples": 0, "tokens": 0, "rows": 0, "parts": 0, "largest_shard": 0, "file_bytes": 0}
    site_bytes = dict.fromkeys(sites, 0)
    for part in parts:
        content = part_content(part, positions)
        shards = {site: shard_bytes(shard_format, _header(content, site, dtype)) for site in sites}
        records = _sidecar_bytes(content, sites, values, shard_format) + _RECORD + _RECORD_A_FILE * (len(sites) + 1)
        counted["samples"] += len(content.sample_ids)
        counted["tokens"] += content.tokens
        counted["rows"] += content.rows
        counted["parts"] += 1
        counted["largest_shard"] = max(counted["largest_shard"], *shards.values())
        counted["file_bytes"] += sum(shards.values()) + records
        for site in sites:
            site_bytes[site] += shards[site]
    return Output(
        **counted,
        row_bytes=counted["rows"] * sum(site.width for site in sites) * values,
        site_bytes=site_bytes,
        shards=counted["parts"] * len(sites),
        other_files=2 * counted["parts"],
    )


def _header(content: PartContent, site: Site, dtype: str) -> ShardHeader:
    return ShardHeader(content.rows, site.width, dtype, site.hook, site.layer, content.sample_ids, content.row_offsets)


def _sidecar_bytes(content: PartContent, sites: Sequence[Site], values: int, shard_format: str) -> int:
    def stored(site: Site) -> StoredArray:
        name = site.shard_name(content.batch, content.part, content.parts_in_batch, SUFFIXES[shard_format])
        return StoredArray(site, name, 1_000, (0,) * -(-content.rows * site.width * values // BLOCK_BYTES))

    return len(Sidecar(content, tuple(map(stored, sites))).to_bytes())


def _with_plans(output: Output, windows: Iterable[Window], counts: InputCounts, found: Ledger | None) -> Output:
    """Adds the plans that are not stored yet."""
    stored = set(found.names(PLAN)) if found else set()
    new = [window for window in windows if f"{window.number:06d}.json" not in stored]
    sizes = [len(to_json(plan_json(window, counts.as_json()))) for window in new]
    return _with(output, len(sizes), sum(sizes))


def _with_run_files(output: Output, request: _Request, sessions: int) -> Output:
    """Adds what a run has once, and once a session."""
    size = sessions * _SESSION + output.shards * _METADATA_A_SHARD
    if request.found:
        return _with(output, sessions, size)
    fields = 2 * len(to_json(model_fields(request.job.model, request.job.max_length)))  # in metadata.json too
    return _with(output, len(_RUN_FILES) + sessions, size + len(_RUN_FILES) * _RUN_FILE + fields)


def _with(output: Output, files: int, size: int) -> Output:
    return dataclasses.replace(output, other_files=output.other_files + files, file_bytes=output.file_bytes + size)


# ----------------------------------------------------------------------------------------- what is told


def tell(found: Estimate, terminal: Terminal) -> None:
    """What a person wants to know, the conclusion last."""
    output, work = found.output, found.work
    if work.committed_samples:
        terminal.line("resume", f"{plural(work.committed_samples, 'sample')} committed already and not counted")
    if found.config.max_new_tokens is not None:
        terminal.line("note", "answering takes its own time, which is not counted")
    if not output.parts:
        terminal.line("estimate", "everything is committed already; nothing to do")
        return
    if work.covers == "million":
        terminal.line("covers", "1,000,000 tokens like those of the first window; how many there are nobody knows")
    elif work.covers == "foretold":
        terminal.line("covers", f"{plural(output.samples, 'sample')}, as the first window foretells them")
    terminal.line(
        "output",
        f"{plural(output.samples, 'sample')}, {plural(output.rows, 'row')} a site: {bytes_text(output.shard_bytes)} in "
        f"{plural(output.shards, SUFFIXES[found.config.shard_format] + ' shard')}, the largest "
        f"{bytes_text(output.largest_shard)}",
    )
    terminal.line(
        "files",
        f"{bytes_text(output.file_bytes)} in {plural(output.objects, 'file')}, with token ids, checksums, records",
    )
    a_sample = output.shard_bytes / output.samples
    terminal.line(
        "sample",
        f"{bytes_text(a_sample)} a sample"
        + (
            ""
            if found.config.one_file_per_layer
            else f"; {bytes_text(a_sample * work.samples_per_batch)} a batch of "
            f"{plural(work.samples_per_batch, 'sample')}"
        ),
    )
    for row in _table(output):
        terminal.line("", row)
    terminal.line("room", _room_text(found))
    assert found.compute is not None
    terminal.line(
        "compute",
        f"{duration_text(found.computing_seconds)}, {output.tokens / found.computing_seconds:,.0f} tokens/s"
        f"{_shared_text(found.workers, 'workers')}; before that "
        f"{duration_text(found.start_seconds)} to load the weights and compile {plural(len(work.steps), 'program')} "
        f"(timed: {plural(found.compute.tried, 'step')} of {plural(len(found.compute.step_seconds), 'shape')})",
    )
    rates = ", ".join(f"{bytes_text(probe.bytes_per_second)}/s into {name}" for name, probe in found.writes.items())
    terminal.line(
        "write",
        f"{duration_text(found.writing_seconds)}: {rates}{_shared_text(found.writers, 'processes')}",
    )
    terminal.line("bound", _bound_text(found))
    per = " for 1,000,000 tokens" if work.covers == "million" else ""
    terminal.line(
        "estimate",
        f"{duration_text(found.seconds)}, {bytes_text(output.file_bytes)} in {plural(output.objects, 'file')}{per}",
    )


def _table(output: Output) -> list[str]:
    """One line a hook point; its layers are all of one size."""
    lines = [f"{'hook point':<16} {'layers':<12} {'a row':>9} {'a sample':>9} {'a layer':>9} {'together':>9}"]
    hooks: dict[str, list[Site]] = {}
    for site in output.site_bytes:
        hooks.setdefault(site.hook, []).append(site)
    for hook, sites in hooks.items():
        size = output.site_bytes[sites[0]]
        layers = ranges_text([site.layer for site in sites if site.layer is not None])
        row = output.row_bytes / output.rows * sites[0].width / sum(site.width for site in output.site_bytes)
        sizes = (row, size / output.samples, size, sum(output.site_bytes[site] for site in sites))
        lines.append(f"{hook:<16} {layers:<12} " + " ".join(f"{bytes_text(n):>9}" for n in sizes))
    return lines


def _room_text(found: Estimate) -> str:
    config, output = found.config, found.output
    if found.free is None:
        known = config.activations_dir.startswith(BUCKET_SCHEME)
        return f"{config.activations_dir} {'has no limit' if known else 'does not say how much room it has'}"
    if found.work.covers == "million":
        tokens = found.free / output.file_bytes
        return f"{config.activations_dir} has {bytes_text(found.free)} free, enough for {tokens:,.1f} million tokens"
    return f"{config.activations_dir} has {bytes_text(found.free)} free: it fits"


def _shared_text(count: int, noun: str) -> str:
    return f" by {count} {noun}, as if each were like this one" if count > 1 else ""


def _bound_text(found: Estimate) -> str:
    """Which of the two the other waits for, by how much, and what would help."""
    computing, writing = duration_text(found.computing_seconds), duration_text(found.writing_seconds)
    if not found.bound_by_writing:
        return f"by computing: it takes {computing}, writing {writing}"
    return "; ".join([f"by writing: computing takes {computing}, writing {writing}", *_advice(found)])


def _advice(found: Estimate) -> list[str]:
    """What would make the writing shorter; of the slower place."""
    output = found.output
    slowest = max(found.writes.values(), key=lambda probe: probe.seconds(output.file_bytes, output.objects))
    if slowest.seconds(0, output.objects) > slowest.seconds(output.file_bytes, 0):
        return ["most of it goes into the number of files: a larger --batch_size makes fewer"]
    advice = []
    if found.config.capture_dtype == "float32":
        advice.append("--capture_dtype bfloat16 halves it")
    if (rows := output.rows / output.samples) > 1:
        advice.append(f"--positions last keeps {share_text(1 / rows)} of the rows")
    return advice
