"""Extraction, whole: a configuration in, a run in a directory or a bucket out.

In: `ExtractConfig`. Out: committed shards with metadata.json. This process may be the only one, one of a
program over many hosts, or one of many independent workers: what it finds committed decides what it does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from jax_extract.config import ExtractConfig
from jax_extract.devices.choice import use_devices
from jax_extract.devices.processes import Processes, start_processes
from jax_extract.errors import UserError, user_path
from jax_extract.extraction.as_begun import (
    fields_as_begun,
    named_as_begun,
    of_the_same_commits,
    of_the_same_hook_points,
)
from jax_extract.extraction.backend import Loadable
from jax_extract.extraction.model_fields import (
    MODEL_FIELDS,
    is_older,
    model_fields,
    require_meaning_as_begun,
    require_same_fields,
)
from jax_extract.extraction.named_source import source_named
from jax_extract.extraction.pending import Committed, pending_parts
from jax_extract.extraction.place import Place, keep_config, kept_by
from jax_extract.extraction.planned_input import PlannedInput
from jax_extract.extraction.prepare import Job, wrapping_of
from jax_extract.extraction.requirements import (
    host_budget,
    require_a_row_each,
    require_one_window,
    require_room,
    require_rows,
    require_samples,
)
from jax_extract.extraction.resumption import FINGERPRINT, Fingerprint, Resumption
from jax_extract.extraction.session import Left, Session, Windows, keep_in
from jax_extract.extraction.summary import (
    tell_input,
    tell_layout,
    tell_notes,
    tell_plan,
    tell_request,
    tell_result,
    tell_without_rows,
)
from jax_extract.inputs.planning.slabs import PlanSettings, Shapes, SlabShape
from jax_extract.inputs.planning.windows import shapes_of
from jax_extract.inputs.sources import Source
from jax_extract.inputs.tokenize import Continued, tokenizer_digest
from jax_extract.inputs.tokenizing.share import Share
from jax_extract.inputs.wrapping import Kept
from jax_extract.store.ledger import COMMITS, RUN_FILE, Ledger, RunStartedMeanwhile, part_name
from jax_extract.store.metadata import write_metadata
from jax_extract.store.storage.local import require_open_files
from jax_extract.store.sweep import erase, remove_kept
from jax_extract.store.writer import KEEPS_SUMS
from jax_extract.terminal import Terminal, plural

_UNUSABLE_NAMED = 20
_STARTED_MEANWHILE = "another command has just started a run in %s; give this one again when that has ended"


def extract_to_directory(
    config: ExtractConfig,
    terminal: Terminal | None = None,
    source: Source | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Runs or resumes an extraction; returns what metadata.json says (on the first process of several).

    Everything that can be refused is refused before anything is written.

    Args:
      source: instead of the one that the configuration names.
      about: what metadata.json says besides; plain JSON.

    Raises:
      UserError: anything the user can mend; nothing that was committed is lost.
    """
    processes = join_processes(config)
    with processes.to_the_end():
        terminal = terminal or Terminal(silent=not processes.is_first)
        place, source, job = open_request(config, processes, source)
        return extract_request(config, processes, place, source, job, terminal, about=about or {})


def extract_request(
    config: ExtractConfig,
    processes: Processes,
    place: Place,
    source: Source,
    job: Job,
    terminal: Terminal,
    continued: Continued | None = None,
    about: Mapping[str, Any] | None = None,
    kept: Kept | None = None,
) -> dict[str, Any]:
    """What `open_request` has opened.

    Args:
      continued: gives a sample with what follows its prompt.
      kept: what a new run keeps from its start, where that was before this.
    """
    place.require_shared(processes)
    tell_request(job, config, processes.count, terminal)
    while True:
        try:
            return _Extraction(config, processes, place, source, job, terminal, continued, about or {}, kept).run()
        except RunStartedMeanwhile:  # another worker was faster: its run is resumed
            config = dataclasses.replace(config, overwrite=False)


def join_processes(config: ExtractConfig) -> Processes:
    """Checks the configuration and joins the other hosts, if there are any; before any device is used."""
    config.check()
    if config.backend == "torch":
        use_devices("cpu")  # JAX would take the GPU's memory for itself
        return Processes()
    return start_processes(
        config.distributed if config.worker_id is None else "off",
        config.coordinator_address,
        config.num_processes,
        config.process_id,
    )


def open_request(
    config: ExtractConfig, processes: Processes, source: Source | None = None
) -> tuple[Place, Source, Job]:
    """What a configuration names, opened and checked as far as that goes without reading inputs or weights."""
    with processes.together():
        place = Place.of(config)
        what_to_do = [str(place.storage), place.spool is not None, config.overwrite, config.delete_local]
    processes.require_equal("place and options", json.dumps(what_to_do), "give every process the same command")
    as_begun = of_the_same_hook_points(of_the_same_commits(config, place, processes), place, processes)
    with processes.together():
        place.written_to.require_usable()
        source = source or source_named(config)
        job = Job.open(as_begun)
        place.require_usable()
        require_open_files(len(job.sites))
    if config.adapter and not config.overwrite and (found := place.find(processes)) and is_older(found):
        job = job.as_begun_before()
    return place, source, job


class _Plan(NamedTuple):
    """Attributes:
    windows: None where nothing is to be computed any more, and nobody has planned.
    digest: of what was planned.
    left: what is still to be computed; None where nobody knows.
    shapes: that a slab may have.
    pending: that slabs which are still to be computed have, as far as they are planned.
    """

    windows: Windows | None
    digest: str
    left: Left | None
    shapes: Shapes
    pending: set[SlabShape]


@dataclass(frozen=True)
class _Extraction:
    """A command on its way from what is asked for and found to a session.

    Attributes:
      continued: gives a sample with what follows its prompt, where something does.
      about: what metadata.json says besides.
      kept: what the run keeps from its start; None where that is now, or is there.
    """

    config: ExtractConfig
    processes: Processes
    place: Place
    source: Source
    job: Job
    terminal: Terminal
    continued: Continued | None
    about: Mapping[str, Any]
    kept: Kept | None

    def run(self) -> dict[str, Any]:
        found = None if self.config.overwrite else self.place.find(self.processes)
        with self.processes.together():
            settings = self.job.plan_settings(self.config, found.run["identity"]["plan_settings"] if found else None)
        kept = self.kept if self.kept and not found else kept_by(found, self.processes)
        source = fields_as_begun(named_as_begun(self.source, self.config, found), kept)
        return dataclasses.replace(self, source=source, job=self.job.under(settings), kept=kept)._run(found, settings)

    def _run(self, found: Ledger | None, settings: PlanSettings) -> dict[str, Any]:
        config, processes, terminal = self.config, self.processes, self.terminal
        with processes.together():
            run = run_of(config, self.job, self.weights, settings)
            run["description"] |= {
                "source": run["description"]["source"] or self.source.name,
                "about": dict(self.about),
                "kept": self._kept.as_json(),
                **_left_out(self.source),
            }
            if found:
                found.require_same(run["identity"], run["numerics"], config.allow_numeric_change)
                require_same_fields(found, self.job.model, self.job.max_length)
                if not self.source.finite:  # of others the longest sample is known when they are planned
                    require_meaning_as_begun(found, self.job.model, self.job.max_length)
        for note in self.weights.notes:
            terminal.line("note", note)
        fields = run["description"][MODEL_FIELDS]
        decisive = [run["identity"], run["numerics"], fields["understood"] or fields["config.json"]]
        same = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
        processes.require_equal("model, options or library versions", same, "make them the same on every host")
        committed = self.place.committed(processes, found)
        known = Fingerprint(dataclasses.replace(self.source, fingerprint=_unknown) if self.continued else self.source)
        resumed = Resumption.of(known, found, committed, processes, terminal)
        with processes.together():
            plan = self._check_plan(settings, resumed, found, committed)
            budget = host_budget(config, self.job, self.place, plan.pending)
        if not found and (fingerprint := known.of_all(processes)):
            run["description"][FINGERPRINT], resumed = fingerprint, Resumption(keeps=True)
        processes.require_equal("plan", plan.digest, "give every process the same inputs, model and options")
        with processes.together():
            self.place.bring_over()
        ledger = self.place.find(processes) if found else self._start(run)
        assert ledger is not None
        if found and processes.is_first:
            ledger.drop_stale_notes()
            if resumed.unusable:
                ledger.storage.delete(resumed.unusable)
        if committed:
            samples = sum(part.samples for part in committed.values())
            terminal.line("resume", f"{plural(samples, 'sample')} committed already")
        spool = self.place.open_spool(ledger, config)
        stored = resumed.has_plan if found and found.storage is ledger.storage else None
        session = Session(config, processes, self.job, terminal, ledger, spool, budget, resumed.keeps, stored)
        if config.explain:
            tell_layout(self.job, self.weights, plan.shapes, terminal)
        if plan.windows and (plan.left is None or plan.left.tokens):
            needed = sorted(plan.pending, reverse=True)
            session.compute(
                plan.windows, committed, plan.left, lambda say: self.job.program(self.weights, plan.shapes, needed, say)
            )
        statistics = session.end()
        if not processes.is_first:
            return {}
        metadata = write_metadata(ledger)
        tell_result(metadata, statistics, ledger.storage, terminal)
        if self.source.finite and plan.windows:
            _require_all(ledger, plan.windows)
        remove_kept(ledger.storage)
        return metadata

    @property
    def _kept(self) -> Kept:
        assert self.kept is not None, "run() sees to it"
        return self.kept

    @cached_property
    def weights(self) -> Loadable:
        return self.job.weights()

    def _nothing_to_do(self, last_plan: Mapping[str, Any]) -> _Plan:
        """What is told of a run that is finished; its input was counted when its last window was planned."""
        counts = self.job.new_counts()
        for name, value in last_plan["input"].items():
            setattr(counts, name, value)
        counts.opened_samples = 0  # told when that was new
        tell_input(self.source, counts, self.job, self.terminal)
        shapes = tuple(SlabShape(*shape) for shape in last_plan["shapes"])
        return _Plan(None, last_plan["digest"], Left(0, {}), shapes, set())

    def _check_plan(
        self, settings: PlanSettings, resumed: Resumption, found: Ledger | None, committed: Committed
    ) -> _Plan:
        """Refuses inputs that are not the run's, and what cannot fit the disk.

        Of a finite input the plan is complete before the first step; of a stream one window, so that an input
        that cannot be read is refused before anything is written.
        """
        if self.config.one_file_per_layer and not self.source.finite:
            require_one_window(self.config.n_samples)
        if resumed.last_plan:
            return self._nothing_to_do(resumed.last_plan)
        wrapping = wrapping_of(self.config, self._kept)
        processes = self.processes
        share = Share(processes.index, processes.count, processes.gather_bytes) if processes.count > 1 else None
        planned = PlannedInput(
            self.source, self.job, settings, wrapping, self.continued, resumed.kept, resumed.done, share
        )
        if not self.source.finite:
            return self._check_first_window(planned)
        every = list(planned.windows())
        counts = every[-1].counts if every else self.job.new_counts()
        require_samples(counts, self.source)
        windows = [each.window for each in every]
        if self.job.edits:
            self.job.edits.check(sample for window in windows for sample in window.arrangement.table)
        if found:
            longest = max(int(window.arrangement.lengths.max()) for window in windows)
            require_meaning_as_begun(found, self.job.model, longest)
        if found and self.processes.is_first:  # whose inputs must be these, be it finished or not
            for _ in pending_parts(
                windows, committed, lambda w: None if resumed.has_plan(w, counts) else keep_in(found, w, counts)
            ):
                pass
        tell_input(self.source, counts, self.job, self.terminal)
        parts = [part for window in windows for part in window.parts]
        if self.config.one_file_per_layer:
            require_one_window(counts.samples)
            require_a_row_each(parts, self.job)
        require_rows(parts, self.job)
        counted = self.job.step_counts(parts)
        tell_plan(parts, counted, self.terminal)
        tell_without_rows(parts, self.job, self.terminal)
        pending = [part for part in parts if part.key not in committed]
        parties = max(self.processes.count, self.config.num_workers or 1)
        sizes = [self.job.bytes_stored(part.lengths) for part in pending]
        require_room(self.place, sum(sizes), parties, max(sizes, default=0))
        shapes = shapes_of(pending)
        steps = (counted if len(pending) == len(parts) else self.job.step_counts(pending)).steps
        left = Left(sum(part.tokens for part in pending), steps)
        return _Plan(planned.windows, windows[-1].digest, left, windows[0].shapes, shapes)

    def _check_first_window(self, planned: PlannedInput) -> _Plan:
        tell_input(self.source, self.job.new_counts(), self.job, self.terminal)
        stream = iter(planned.windows())
        first = next(stream, None)
        counts = first.counts if first else self.job.new_counts()
        require_samples(counts, self.source)
        assert first is not None
        tell_notes(counts, self.job, self.terminal)
        begun = iter([itertools.chain([first], stream)])
        shapes = first.window.shapes
        again = planned.windows
        return _Plan(lambda: next(begun, None) or again(), first.window.digest, None, shapes, set(shapes))

    def _start(self, run: Mapping[str, Any]) -> Ledger:
        """A new run in the place; with `overwrite` the one that is there goes first."""
        if self.config.overwrite:
            begin_anew(self.place, self.processes)
        storage = self.place.storage
        meanwhile = RunStartedMeanwhile() if self.processes.count == 1 else UserError(_STARTED_MEANWHILE % storage)

        def start() -> Mapping[str, Any]:
            if storage.exists(RUN_FILE):
                raise meanwhile
            keep_config(storage, self.config)
            try:
                return Ledger.start(storage, run).run
            except RunStartedMeanwhile:
                raise meanwhile from None

        return Ledger(self.place.storage, self.processes.of_first(start))


def _unknown() -> None:
    """The fingerprint of what nobody knows but by reading it."""


def _left_out(source: Source) -> dict[str, Any]:
    """What metadata.json says of unusable tasks; nothing where there are none."""
    if not source.left_out:
        return {}
    return {"unusable_tasks": {"count": len(source.left_out), "first": list(source.left_out[:_UNUSABLE_NAMED])}}


def begin_anew(place: Place, processes: Processes) -> None:
    """Removes the run that is there, in both places."""
    with processes.together():
        if place.spool is not None and place.spool.exists(RUN_FILE):
            erase(place.spool)

    def remove() -> None:
        if place.storage.exists(RUN_FILE):
            erase(place.storage)

    processes.of_first(remove)


def require_same_run(config: ExtractConfig, processes: Processes, place: Place, job: Job) -> None:
    """UserError where the run that is there, if there is one, is not the one that is asked for."""
    if (found := place.find(processes)) is None:
        return
    with processes.together():
        settings = job.plan_settings(config, found.run["identity"]["plan_settings"])
        job = job.under(settings)
        run = run_of(config, job, job.weights(), settings)
        found.require_same(run["identity"], run["numerics"], config.allow_numeric_change)
        require_same_fields(found, job.model, job.max_length)


def run_of(config: ExtractConfig, job: Job, weights: Loadable, settings: PlanSettings) -> dict[str, Any]:
    """What run.json says of this run; decides whether a directory holds the same one."""
    return {
        "identity": {
            **job.identity(),
            "shard_format": config.shard_format,
            "chat_template": config.chat_template,
            "answers": config.capture_answers,
            # Only where it is so: runs that were begun before there was a choice go on.
            **({"one_file_per_layer": True} if config.one_file_per_layer else {}),
            **text_identity(config),
            "weights": weights.provenance(),
            "tokenizer_hash": tokenizer_digest(job.model.tokenizer),
            "plan_settings": settings.as_json(),
        },
        "numerics": job.backend.fingerprint(),
        "description": {
            **job.description(),
            "asked": {"revision": config.revision, "adapter": config.adapter, **_asked_edits(config)},
            MODEL_FIELDS: model_fields(job.model, job.max_length),
            "source": config.dataset or config.tasks_file,
            "mesh": dict(job.backend.mesh_shape),
            KEEPS_SUMS: True,
        },
    }


def _asked_edits(config: ExtractConfig) -> dict[str, str]:
    return {} if config.edits is None else {"edits": str(user_path(config.edits, "--edits").resolve())}


def text_identity(config: ExtractConfig) -> dict[str, Any]:
    """What is put around texts, as far as a run may say nothing of it."""
    said: dict[str, Any] = {"system_prompt": config.system_prompt, "add_special_tokens": config.add_special_tokens}
    if variables := config.template_variables:
        said["chat_template_kwargs"] = json.dumps(variables, sort_keys=True)
    return {name: value for name, value in said.items() if value is not None}


def _require_all(ledger: Ledger, windows: Windows) -> None:
    """UserError where a planned part has no record after all; nobody should ever read this."""
    there = set(ledger.names(COMMITS))
    planned = [part for each in windows() for part in each.window.parts]
    if left := [part for part in planned if f"{part_name(part.key)}.json" not in there]:
        raise UserError(
            f"{len(left)} of {len(planned)} parts are not in {ledger.storage}, such as {part_name(left[0].key)}; "
            "give the same command again to compute them"
        )
