"""`jax-extract estimate`: what a run will write and how long it will take, before it is started.

In: the configuration of the run. Out: an `Estimate` (`figures`): bytes a site, files, room, seconds of reading, of
computing and of writing, and which of them bounds the run. Bytes and files follow from the plan (`output`); seconds
follow from short timed tries (`probe`), and from how long the plan takes here. Nothing stays in the run's place, and
what the run would refuse is refused here.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

from jax_extract.config import ExtractConfig
from jax_extract.devices.processes import Processes
from jax_extract.errors import UserError
from jax_extract.estimation.figures import Estimate, ReadProbe, Work
from jax_extract.estimation.output import Output, output_of, with_plans, with_run_files
from jax_extract.estimation.probe import probe_computing, probe_writing
from jax_extract.estimation.telling import tell
from jax_extract.extraction.as_begun import named_as_begun
from jax_extract.extraction.command import join_processes, open_request, run_of
from jax_extract.extraction.model_fields import require_same_fields
from jax_extract.extraction.pending import Committed, parse_committed, pending_parts, read_committed
from jax_extract.extraction.place import Place, kept_by
from jax_extract.extraction.planned_input import PlannedInput
from jax_extract.extraction.prepare import Job, wrapping_of
from jax_extract.extraction.requirements import host_budget, require_room, require_rows, require_samples
from jax_extract.extraction.resumption import Resumption
from jax_extract.extraction.session import keep_in
from jax_extract.extraction.summary import tell_input, tell_plan, tell_request, tell_without_rows
from jax_extract.inputs.contexts import ContextCounts
from jax_extract.inputs.planning.slabs import PlanSettings, Shapes
from jax_extract.inputs.planning.windows import Part, Window
from jax_extract.inputs.sources import Source
from jax_extract.inputs.tokenize import InputCounts
from jax_extract.inputs.tokenizing.share import Share
from jax_extract.inputs.wrapping import Wrapping
from jax_extract.store.ledger import PLAN, RUN_FILE, Ledger
from jax_extract.store.storage.verbs import BUCKET_SCHEME
from jax_extract.store.writer import lanes_for
from jax_extract.terminal import Terminal

MILLION = 1_000_000


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
    resumed = Resumption()
    if found:
        resumed = Resumption.of(source, found, committed, processes, terminal)
    with processes.together():
        settings = job.plan_settings(config, found.run["identity"]["plan_settings"] if found else None)
        job, weights = job.under(settings), job.weights()
        if found:
            run = run_of(config, job, weights, settings)
            found.require_same(run["identity"], run["numerics"], config.allow_numeric_change)
            require_same_fields(found, job.model, job.max_length)
        request = _Request(config, processes, source, job, settings, wrapping, found, committed, resumed, terminal)
        work, parts, shapes, reading = _plan(request)
        if work.covers != "million":
            require_room(place, work.output.file_bytes, parties)
        budget = host_budget(config, job, place, set(work.steps))
    compute, writes = None, {}
    if parts:
        places = [place.storage] if place.spool is None else [place.spool, place.storage]
        with terminal.waiting("timing a few steps"):
            with processes.together():
                writes = {
                    str(storage): probe_writing(storage, lanes_for(str(storage), len(job.sites))) for storage in places
                }
            compute = probe_computing(job, weights, parts, shapes, budget, processes)
    apart = place.spool is not None or str(place.storage).startswith(BUCKET_SCHEME)
    free = place.written_to.free_bytes()
    return Estimate(config, work, reading, compute, writes, workers, parties if apart else 1, free)


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
    resumed: Resumption
    terminal: Terminal

    @property
    def share(self) -> Share | None:
        """Of what is tokenised, where several processes do it together."""
        processes = self.processes
        return Share(processes.index, processes.count, processes.gather_bytes) if processes.count > 1 else None

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


def _plan(request: _Request) -> tuple[Work, list[Part], Shapes, ReadProbe]:
    """The work, the parts of it that are planned (all of a finite input, the first window of a stream), slab shapes.

    And how long it took to read so much of the input, to tokenise and to plan it, which the run does alike.
    """
    job, source, terminal = request.job, request.source, request.terminal
    started = time.perf_counter()
    windows, counts = _windows(request)
    seconds = time.perf_counter() - started
    require_samples(counts, source)
    when = "before" if source.finite else "between" if request.share else "beside"
    reading = ReadProbe(seconds, counts.tokens, when)
    tell_input(source, counts, job, terminal)
    every = [part for window in windows for part in window.parts]
    require_rows(every, job)
    tell_plan(every, job.step_counts(every), terminal)
    tell_without_rows(every, job, terminal)
    pending = _pending(request, windows, counts)
    whole = windows[-1].is_last
    parts = pending if whole else every  # what foretells the rest must be typical of it
    output = output_of(parts, job.sites, job.plan.positions, request.config.capture_dtype, request.config.shard_format)
    output = with_plans(output, windows, counts, request.found)
    covers, factor = _outlook(request, output, whole, counts)
    output = output if whole else output.times(factor)
    if not output.parts:
        nothing = Work(output, {}, covers, request.committed_samples, request.settings.samples_per_batch)
        return nothing, [], (), reading
    sessions = max(request.processes.count, request.config.num_workers or 1)
    output = with_run_files(output, job, sessions, is_new=request.found is None)
    steps = {shape: count * factor for shape, count in job.step_counts(parts).steps.items()}
    work = Work(output, steps, covers, request.committed_samples, request.settings.samples_per_batch)
    return work, parts, windows[0].shapes, reading


def _windows(request: _Request) -> tuple[list[Window], InputCounts]:
    """As the run makes them, from what it has kept where it is there already."""
    job, source, settings, wrapping = request.job, request.source, request.settings, request.wrapping
    if source.finite:
        kept, done = request.resumed.kept, request.resumed.done
        planned = list(PlannedInput(source, job, settings, wrapping, None, kept, done, request.share).windows())
        return [each.window for each in planned], planned[-1].counts if planned else job.new_counts(settings)
    counts = job.new_counts(settings)
    stream = job.windows(source.samples(), settings, wrapping, counts, share=request.share)
    return list(itertools.islice(stream, 1)), counts


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
