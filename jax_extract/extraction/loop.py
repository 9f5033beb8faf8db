"""The extraction loop: slabs of parts through the compiled program into a sink.

In: parts in plan order, a `Program`, a `PartSink`, a `ByteBudget`. Out: committed parts, and
`LoopStatistics`. While a step computes, the one before it is copied to the host, and the sink writes the
ones before that. No step starts before there is room on the host for what it captures.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np

from jax_extract.devices.exhaustion import refusing_exhaustion
from jax_extract.extraction.backend import Program
from jax_extract.extraction.schedule import Step, Work, steps
from jax_extract.inputs.planning.windows import Part
from jax_extract.startup import seconds_since_start
from jax_extract.store.budget import ByteBudget
from jax_extract.store.lanes import Countdown
from jax_extract.store.parts import PartContent
from jax_extract.store.writer import Blocks, OpenPart, PartSink
from models.positions import Positions

STEPS_IN_FLIGHT = 1  # computed but not yet on the host, besides the one that computes
STEPS_IN_MEMORY = 3  # room for so many lets all stages work at once: computing, on the way to the host, being written


@dataclass
class LoopStatistics:
    """What a loop did.

    Attributes:
      tokens, slab_tokens: real tokens of this host's slabs; those with all padding, dummy rows and idle devices.
      seconds: from first to last step, compiling left out.
      compile_seconds: spent waiting for programs; the first one is compiled while the weights are read.
      first_step_seconds: from the beginning of the process until its first step was on its way; None without one.
      waited: stage -> seconds that the loop waited for it: `input` (reading, tokenising, planning the next
        part), `device` (computing and copying to the host), `writer` (room for more rows, and the end).
      writer_busy: seconds in which the writer's busiest thread worked.
    """

    samples: int = 0
    tokens: int = 0
    slab_tokens: int = 0
    parts: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    first_step_seconds: float | None = None
    writer_busy: float = 0.0
    waited: dict[str, float] = field(default_factory=lambda: {"input": 0.0, "device": 0.0, "writer": 0.0})

    def add(self, other: LoopStatistics) -> None:
        """Takes in what another loop of the same session did."""
        for entry in fields(self):
            if entry.name not in ("waited", "first_step_seconds"):
                setattr(self, entry.name, getattr(self, entry.name) + getattr(other, entry.name))
        self.first_step_seconds = self.first_step_seconds or other.first_step_seconds
        for stage, seconds in other.waited.items():
            self.waited[stage] += seconds

    @classmethod
    def side_by_side(cls, loops: Sequence[Mapping[str, Any]]) -> LoopStatistics:
        """What loops on several hosts did together, each as a dictionary: counts added up, times of the slowest."""
        counts = {name: sum(loop[name] for loop in loops) for name in ("samples", "tokens", "slab_tokens", "parts")}
        slowest = max(loops, key=lambda loop: loop["seconds"])
        return cls(**{**slowest, **counts})

    @contextmanager
    def waiting(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.waited[stage] += time.perf_counter() - started


@refusing_exhaustion()
def run_parts(
    parts: Iterable[Part],
    program: Program,
    sink: PartSink,
    budget: ByteBudget,
    on_progress: Callable[[LoopStatistics], None] = lambda _: None,
) -> LoopStatistics:
    """Computes and commits the parts, in order; of a program on several hosts, this host's share of them.

    Raises:
      Whatever the computation or the sink raised, after the sink has let go of what was not durable.
    """
    statistics = LoopStatistics()
    feeder = _Feeder(sink, budget, program.plan.positions)
    in_flight: deque[tuple[Step, Any]] = deque()
    started = time.perf_counter()

    def finish_oldest(room: int = 0) -> None:
        """Hands the oldest step in flight to the sink; `room` is what there must be for the next one, and is not."""
        step, captured = in_flight.popleft()
        waiting = time.perf_counter()
        blocks = program.on_host(captured)
        # Without room even now, it was the writer that the next step waited for all the time.
        statistics.waited["device" if budget.fits(room) else "writer"] += time.perf_counter() - waiting
        with statistics.waiting("writer"):  # which may want room on the disk before it begins another part
            feeder.feed(step.work[program.host], blocks, program.bytes_on_host(step.shape))
        for work in step.work[program.host]:
            statistics.samples += work.slab.count
            statistics.tokens += sum(sample.length for row in work.rows for sample in row)
            statistics.parts += work.is_last
        statistics.seconds = time.perf_counter() - started - statistics.compile_seconds
        on_progress(statistics)

    try:
        stream = steps(parts, program.hosts, program.devices_of_host)
        while True:
            with statistics.waiting("input"):
                step = next(stream, None)
            if step is None:
                break
            compiling = time.perf_counter()
            program.compiled(step.shape)
            statistics.compile_seconds += time.perf_counter() - compiling
            needed = program.bytes_on_host(step.shape)
            while in_flight and not budget.fits(needed):  # nobody else would make the room that its rows take
                finish_oldest(needed)
            with statistics.waiting("writer"):
                budget.acquire(needed)
            with statistics.waiting("device"):  # a CPU device computes some programs before it returns
                captured = program.run(*_pack(step, program))
            statistics.first_step_seconds = statistics.first_step_seconds or seconds_since_start()
            in_flight.append((step, captured))
            statistics.slab_tokens += program.devices_of_host * step.shape.tokens
            if len(in_flight) > STEPS_IN_FLIGHT:
                finish_oldest()
        while in_flight:
            finish_oldest()
        with statistics.waiting("writer"):
            sink.close()
    except BaseException:
        sink.cancel()
        raise
    statistics.seconds = time.perf_counter() - started - statistics.compile_seconds
    return statistics


class _Feeder:
    """Hands blocks to the parts they belong to, and gives their bytes back when they are written."""

    def __init__(self, sink: PartSink, budget: ByteBudget, positions: Positions) -> None:
        self._sink = sink
        self._budget = budget
        self._positions = positions
        self._open: OpenPart | None = None

    def feed(self, slabs: tuple[Work, ...], blocks: list[Blocks], nbytes: int) -> None:
        """One step's slabs of this host and its devices' blocks, which together take `nbytes`."""
        release = partial(self._budget.release, nbytes)
        if not slabs:
            release()
            return
        done = Countdown(len(slabs), release)
        for work, block in zip(slabs, blocks, strict=False):
            if work.is_first:
                self._open = self._sink.begin(part_content(work.part, self._positions))
            assert self._open is not None
            kept = [sum(self._positions.rows(sample.length) for sample in row) for row in work.rows]
            self._open.append(block, kept, done)
            if work.is_last:
                self._open.commit()


def _pack(step: Step, program: Program) -> tuple[np.ndarray, np.ndarray]:
    """This host's token ids [devices * rows, length] and lengths [devices * rows, samples], int32; the rest is 0."""
    shape, rows = step.shape, program.devices_of_host * step.shape.rows
    tokens = np.zeros((rows, shape.length), np.int32)
    lengths = np.zeros((rows, shape.samples), np.int32)
    for place, work in enumerate(step.work[program.host]):
        for row, samples in enumerate(work.rows, place * shape.rows):
            ids = np.concatenate([sample.token_ids for sample in samples])
            tokens[row, : len(ids)] = ids
            lengths[row, : len(samples)] = [sample.length for sample in samples]
    return tokens, lengths


def part_content(part: Part, positions: Positions) -> PartContent:
    """What the store is told of a part of the plan."""
    samples = part.samples
    return PartContent(
        batch=part.batch,
        part=part.part,
        parts_in_batch=part.parts_in_batch,
        sample_indices=np.array([s.sample_index for s in samples], np.int64),
        sample_ids=tuple(s.sample_id for s in samples),
        token_ids=tuple(s.token_ids for s in samples),
        positions=tuple(positions.of(s.length) for s in samples),
        full_lengths=np.array([s.full_length for s in samples], np.int64),
        meta=tuple(s.meta for s in samples),
        plan=part.digest,
    )
