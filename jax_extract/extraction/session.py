"""One session of a run: what this process computes from when the plan is checked until nothing is pending.

In: a job, the ledger, the plan, a budget. Out: committed parts, in a bucket too where they are uploaded, and
a record of the session. Parts are computed in rounds: what other workers took and did not finish, and parts
whose names were taken meanwhile, come in a later one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from jax_extract.config import ExtractConfig
from jax_extract.devices.processes import Processes, leave
from jax_extract.errors import UserError
from jax_extract.extraction.backend import Program, Say
from jax_extract.extraction.kept_windows import Keeper, Planned
from jax_extract.extraction.loop import LoopStatistics, run_parts
from jax_extract.extraction.pending import Committed, Worker, parse_committed, pending_parts, plan_json
from jax_extract.extraction.prepare import Job
from jax_extract.inputs.planning.slabs import SlabShape
from jax_extract.inputs.planning.windows import Part, Window
from jax_extract.inputs.tokenize import InputCounts
from jax_extract.preemption import on_preemption
from jax_extract.progress import LOADING
from jax_extract.store.budget import ByteBudget
from jax_extract.store.ledger import COMMITS, Ledger, part_name
from jax_extract.store.metadata import write_metadata
from jax_extract.store.upload import Uploader
from jax_extract.store.writer import PartWriter
from jax_extract.terminal import Terminal, plural

_KEEPS_SECONDS = 5.0  # after trouble, for windows that wait to be kept
_SPOOL_SHARE = 0.9  # of the free disk, for parts that are written, uploaded and deleted again

Windows = Callable[[], Iterable[Planned]]  # the plan, from its beginning at each call


class Left(NamedTuple):
    """What is still to be computed, on all devices: real tokens, and how many steps of each slab shape."""

    tokens: int
    steps: Mapping[SlabShape, int]


@dataclass
class Session:
    """Attributes:
    ledger: the records that decide.
    spool: the local ledger of the same run, where parts are uploaded from there; or None.
    keeps_tokens: whether windows are kept for the next session too, until the run is whole.
    has_plan: whether the plan of a window is known to be in the ledger already.
    attempt: names what this session writes.
    statistics: what it has done so far.
    """

    config: ExtractConfig
    processes: Processes
    job: Job
    terminal: Terminal
    ledger: Ledger
    spool: Ledger | None
    budget: ByteBudget
    keeps_tokens: bool = False
    has_plan: Callable[[Window, InputCounts], bool] | None = None
    attempt: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    statistics: LoopStatistics = field(default_factory=LoopStatistics)

    @property
    def worker(self) -> Worker:
        return Worker(self.config.worker_id or 0, self.config.num_workers or 1)

    @property
    def parties(self) -> int:
        """How many processes work on this run side by side."""
        return max(self.processes.count, self.worker.count)

    def compute(
        self,
        windows: Windows,
        committed: Committed,
        left: Left | None,
        make_program: Callable[[Say], Program],
    ) -> None:
        """Computes what is pending, so much of it where that is known; `committed` is what was found at the start."""
        keeper = Keeper(self.ledger, self.attempt) if self.keeps_tokens and self.processes.is_first else None
        is_stream = left is None
        if keeper and not is_stream:  # all are there: they are kept while the first program is compiled
            for planned in windows():
                keeper.keep(planned)
        wind_up = _KEEPS_SECONDS
        try:
            with self.terminal.waiting(LOADING) as waiting:
                program = make_program(waiting.say)
            with contextlib.closing(program):
                self._compute(windows, committed, left, program, keeper if is_stream else None)
            wind_up = 0.0  # all is committed
        finally:
            if keeper and (trouble := keeper.close(wind_up)):
                self.terminal.line("note", f"token ids could not be kept, so a restart would tokenise again: {trouble}")

    def _compute(
        self,
        windows: Windows,
        committed: Committed,
        left: Left | None,
        program: Program,
        keeper: Keeper | None,
    ) -> None:
        cost = self.job.step_cost
        total = None if left is None else left.tokens // self.parties
        # Processes of one program compute each step together, workers steps of their own.
        in_all = None if left is None else cost.of_all(left.steps) / self.worker.count
        with self.terminal.progress(total, cost=in_all) as bar:

            def advance(so_far: LoopStatistics, shape: SlabShape) -> None:
                seconds = self.statistics.seconds + so_far.seconds
                bar.spend(self.statistics.tokens + so_far.tokens - bar.n, cost(shape), seconds)

            seen, before, again = 0, LoopStatistics(), False
            for number in itertools.count():
                steal = number > 0 and self.worker.count > 1
                committed = self._committed_now(committed)
                if steal and before.parts and not again and len(committed) == seen:
                    raise UserError(
                        f"parts were computed and none of them is in {self.ledger.storage}; see jax-extract status "
                        "and give the same command again"
                    )
                done, again = self._round(self._pending(windows(), committed, steal, keeper), program, advance, bar.say)
                seen, before = len(committed), done
                self.statistics.add(done)
                if not (again or (self.worker.count > 1 and (done.parts or not steal))):
                    return

    def end(self) -> LoopStatistics:
        """Records the session; returns what all processes did together."""
        for ledger in self._ledgers:
            ledger.end_session(
                self.attempt,
                {
                    **dataclasses.asdict(self.statistics),
                    "mesh": dict(self.job.backend.mesh_shape),
                    "processes": self.parties,
                    "numerics": self.job.backend.fingerprint(),
                },
            )
        everywhere = LoopStatistics.side_by_side(self.processes.of_all(dataclasses.asdict(self.statistics)))
        if self.spool is not None:
            write_metadata(self.spool)
        return everywhere

    def _committed_now(self, known: Committed) -> Committed:
        """What has a record by now, as the first process sees it. Only records that are not known are read."""

        def read() -> list[list[Any]]:
            there = set(self.ledger.names(COMMITS))
            held = {key: part for key, part in known.items() if f"{part_name(key)}.json" in there}
            said = [[*key, part.samples, part.plan] for key, part in held.items()]
            records = self.ledger.committed(but=held)
            return said + [[*key, record["samples"], record["plan"]] for key, record in records.items()]

        return parse_committed(self.processes.of_first(read))

    @property
    def _ledgers(self) -> list[Ledger]:
        return [self.ledger] if self.spool is None else [self.ledger, self.spool]

    def _pending(
        self, windows: Iterable[Planned], committed: Committed, steal: bool, keeper: Keeper | None
    ) -> Iterable[Part]:
        """Parts that are to be computed; `keeper` takes the windows of a stream, of which it has none yet."""
        current: dict[int, Planned] = {}

        def keep_plan(window: Window) -> None:
            planned = current.pop(window.number)
            mend = "give every process the same inputs"
            self.processes.require_equal(f"plan of window {window.number}", window.digest, mend)
            with self.processes.together():
                if self.processes.is_first and not (self.has_plan and self.has_plan(*planned)):
                    keep_in(self.ledger, window, planned.counts)
                if self.spool is not None:
                    keep_in(self.spool, window, planned.counts)
            if keeper:
                keeper.keep(planned)

        def plan() -> Iterator[Window]:
            for planned in windows:
                current[planned.window.number] = planned
                yield planned.window

        if self.worker.count == 1:
            return pending_parts(plan(), committed, keep_plan)
        if not steal:
            return self._with_tokens(pending_parts(plan(), committed, keep_plan, self.worker.own))

        def stolen(parts: Sequence[Part]) -> Iterator[Part]:
            devices = self.job.backend.devices
            return self.worker.to_steal(parts, devices, lambda part: self.ledger.is_committed(part.key))

        return self._with_tokens(pending_parts(plan(), committed, keep_plan, stolen))

    def _with_tokens(self, parts: Iterable[Part]) -> Iterator[Part]:
        """Without those for which nothing is kept any more, because another worker has found the run whole."""
        for part in parts:
            try:
                _ = part.arrangement.table.token_ids  # read here, where they are read when they are asked for
            except UserError:
                if self.ledger.is_committed(part.key):
                    continue
                raise
            yield part

    def _round(
        self,
        parts: Iterable[Part],
        program: Program,
        advance: Callable[[LoopStatistics, SlabShape], None],
        say: Say,
    ) -> tuple[LoopStatistics, bool]:
        """Computes these parts; says what was done, and whether some must be written again."""
        uploader = None
        for_uploads: dict[str, Any] = {}
        if self.spool is not None:
            delete = self.config.delete_local
            uploader = Uploader(self.spool, self.ledger, self.attempt, delete, self.budget.fail)
            for_uploads["on_commit"] = uploader.submit
            if delete and (free := self.spool.storage.free_bytes()) is not None:
                for_uploads["before_part"] = partial(uploader.expect, int(free * _SPOOL_SHARE))
                for_uploads["on_refusal"] = uploader.forget

        def failed(failure: BaseException) -> None:
            self.budget.fail(failure)
            if uploader is not None:
                uploader.give_up(failure)

        sink = PartWriter(
            self.spool or self.ledger,
            self.job.sites,
            self.config.shard_format,
            self.config.capture_dtype,
            self.attempt,
            on_failure=failed,
            one_file_per_layer=self.config.one_file_per_layer,
            **for_uploads,
        )
        buffers = sink.buffer_bytes + (uploader.buffer_bytes if uploader else 0)
        self.budget.acquire(buffers)

        def wind_up(seconds: float) -> str:
            in_time = sink.commit_what_is_complete(seconds) and (uploader is None or uploader.wait(seconds))
            parts = f"{plural(sink.committed, 'part')} of this session are committed"
            return parts if in_time else f"{parts}; the {seconds:.0f} s did not suffice for the others"

        try:
            with on_preemption(wind_up, linger=self.processes.count > 1 and self.processes.is_first):
                done = run_parts(parts, program, sink, self.budget, advance, say)
                if uploader is not None:
                    with done.waiting("writer"):
                        uploader.close()
        except BaseException as failure:
            if uploader is not None:
                uploader.cancel()
            if self.processes.count > 1:
                leave(failure)
            raise
        finally:
            self.budget.release(buffers)
        done.writer_busy = max(sink.lanes.busy_seconds)
        return done, self.processes.any(sink.refused > 0)


def keep_in(ledger: Ledger, window: Window, counts: InputCounts) -> None:
    """Stores a window's plan, or checks that it is the one that is stored; UserError."""
    if not ledger.holds_plan(window.number, window.digest, counts.as_json()):
        ledger.keep_plan(window.number, plan_json(window, counts.as_json()))
