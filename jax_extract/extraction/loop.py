"""The extraction loop: slabs through the compiled program, their rows into the parts of a sink.

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
from jax_extract.extraction.backend import Program, Say, silent
from jax_extract.extraction.schedule import Step, Work, steps
from jax_extract.forward.edits import Placed
from jax_extract.inputs.planning.slabs import SlabShape
from jax_extract.inputs.planning.windows import Part
from jax_extract.progress import COMPILING, COMPUTING
from jax_extract.startup import seconds_since_start
from jax_extract.store.budget import ByteBudget
from jax_extract.store.lanes import Call, Countdown
from jax_extract.store.ledger import Key
from jax_extract.store.parts import PartContent
from jax_extract.store.writer import Blocks, OpenPart, PartSink, RowPiece
from models.positions import Positions

STEPS_IN_FLIGHT = 1  # computed but not yet on the host, besides the one that computes
STEPS_IN_MEMORY = 3  # room for so many lets all stages work at once: computing, on the way to the host, being written


_COUNTS = ("samples", "tokens", "slab_tokens", "idle_tokens", "parts")


@dataclass
class LoopStatistics:
    """What a loop did.

    Attributes:
      steps: in which this host's devices computed, or stood idle while others did.
      idle_steps: of these, those in which none of this host's devices had a slab.
      tokens, slab_tokens: real tokens of this host's slabs; those with all padding, dummy rows and idle devices.
      idle_tokens: of these, those of devices without a slab.
      seconds: from first to last step, compiling left out.
      compile_seconds: spent waiting for programs; the first one is compiled while the weights are read.
      first_step_seconds: from the beginning of the process until its first step was on its way; None without one.
      waited: stage -> seconds that the loop waited for it: `input` (reading, tokenising, planning the next
        part), `device` (computing and copying to the host), `writer` (room for more rows, and the end).
      writer_busy: seconds in which the writer's busiest thread worked.
    """

    samples: int = 0
    steps: int = 0
    idle_steps: int = 0
    tokens: int = 0
    slab_tokens: int = 0
    idle_tokens: int = 0
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

    def add_step(self, shape: SlabShape, work: Sequence[Work], devices: int, stored: Sequence[Part]) -> None:
        """Takes in a step of this host's devices, and the parts that are complete with it."""
        self.steps += 1
        self.idle_steps += not work
        self.tokens += sum(slab.tokens for slab in work)
        self.slab_tokens += devices * shape.tokens
        self.idle_tokens += (devices - len(work)) * shape.tokens
        self.samples += sum(len(part) for part in stored)
        self.parts += len(stored)

    @classmethod
    def side_by_side(cls, loops: Sequence[Mapping[str, Any]]) -> LoopStatistics:
        """What loops on several hosts did together, each as a dictionary: counts added up, times of the slowest.

        Steps are those of one host; idle ones those of the host that has most of them.
        """
        counts = {name: sum(loop[name] for loop in loops) for name in _COUNTS}
        counts["idle_steps"] = max(loop["idle_steps"] for loop in loops)
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
    on_progress: Callable[[LoopStatistics, SlabShape], None] = lambda *_: None,
    say: Say = silent,
) -> LoopStatistics:
    """Computes and commits the parts, in order; of a program on several hosts, this host's share of them.

    Args:
      on_progress: is told after every step what was done so far, and of which shape its slabs were.
      say: is told where a program is still compiled, and when computing goes on.

    Raises:
      Whatever the computation or the sink raised, after the sink has let go of what was not durable.
    """
    statistics = LoopStatistics()
    feeder = _Feeder(sink, budget, program.plan.positions, program.host)
    in_flight: deque[tuple[Step, Any]] = deque()
    ready: set[SlabShape] = set()
    started = time.perf_counter()

    def finish_oldest(room: int = 0) -> None:
        """Hands the oldest step in flight to the sink; `room` is what there must be for the next one, and is not."""
        step, captured = in_flight.popleft()
        waiting = time.perf_counter()
        blocks = program.on_host(captured)
        # Without room even now, it was the writer that the next step waited for all the time.
        statistics.waited["device" if budget.fits(room) else "writer"] += time.perf_counter() - waiting
        with statistics.waiting("writer"):  # which may want room on the disk before it begins another part
            stored = feeder.feed(_with_blocks(step, blocks, program), program.bytes_on_host(step.shape))
        statistics.add_step(step.shape, step.work[program.host], program.devices_of_host, stored)
        statistics.seconds = time.perf_counter() - started - statistics.compile_seconds
        on_progress(statistics, step.shape)

    try:
        stream = steps(parts, program.hosts, program.devices_of_host, program.rows_travel)
        while True:
            with statistics.waiting("input"):
                step = next(stream, None)
            if step is None:
                break
            compiling = time.perf_counter()
            if step.shape not in ready:
                say(COMPILING)
            program.compiled(step.shape)
            say(COMPUTING)
            ready.add(step.shape)
            statistics.compile_seconds += time.perf_counter() - compiling
            needed = program.bytes_on_host(step.shape)
            while in_flight and not budget.fits(needed):  # nobody else would make the room that its rows take
                finish_oldest(needed)
            with statistics.waiting("writer"):
                budget.acquire(needed)
            with statistics.waiting("device"):  # a CPU device computes some programs before it returns
                captured = program.run(*packed(step.shape, step.work[program.host], program))
            statistics.first_step_seconds = statistics.first_step_seconds or seconds_since_start()
            in_flight.append((step, captured))
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
    """Hands rows to the parts of this host, and gives the bytes of their blocks back when they are written."""

    def __init__(self, sink: PartSink, budget: ByteBudget, positions: Positions, host: int) -> None:
        self._sink = sink
        self._budget = budget
        self._positions = positions
        self._host = host
        self._open: dict[Key, OpenPart] = {}

    def feed(self, works: Sequence[tuple[Work, Blocks]], nbytes: int) -> list[Part]:
        """Hands over the slabs of a step, whose blocks take `nbytes`; returns the parts that are complete with it."""
        mine = [(taker.part, work, block) for work, block in works for taker in work.takers if taker.host == self._host]
        release = partial(self._budget.release, nbytes)
        if not mine:
            release()
            return []
        done = Countdown(len(mine), release)
        return [part for part, work, block in mine if self._append(part, work, block, done)]

    def _append(self, part: Part, work: Work, block: Blocks, done: Call) -> bool:
        """Whether the part is complete now; its slabs come in plan order."""
        if part.key not in self._open:
            self._open[part.key] = self._sink.begin(part_content(part, self._positions))
        self._open[part.key].append(block, rows_of_part(part, work, self._positions), done)
        if part.stop > work.slab.first + work.slab.count:
            return False
        self._open.pop(part.key).commit()
        return True


def _with_blocks(step: Step, blocks: Sequence[Blocks], program: Program) -> list[tuple[Work, Blocks]]:
    """Each slab whose captures came to this host, with them."""
    hosts = range(program.hosts) if program.rows_travel else [program.host]
    came = [blocks[i * program.devices_of_host : (i + 1) * program.devices_of_host] for i in range(len(hosts))]
    return [pair for i, host in enumerate(hosts) for pair in zip(step.work[host], came[i], strict=False)]


def rows_of_part(part: Part, work: Work, positions: Positions) -> list[RowPiece]:
    """Where a part's rows lie in the block of a slab."""
    slab = work.slab
    kept = positions.rows_of(work.arrangement.lengths[slab.first : slab.first + slab.count])
    before = np.concatenate([[0], np.cumsum(kept)])  # rows of the slab's samples before each one
    ends = np.cumsum(slab.counts)
    pieces = []
    for row, (start, end) in enumerate(zip(ends - slab.counts, ends, strict=True)):
        first, last = max(int(start), part.start - slab.first), min(int(end), part.stop - slab.first)
        if first < last and before[last] > before[first]:
            pieces.append(RowPiece(row, int(before[first] - before[start]), int(before[last] - before[first])))
    return pieces


def packed(
    shape: SlabShape, works: Sequence[Work | None], program: Program
) -> tuple[np.ndarray, np.ndarray, list[Placed]]:
    """This host's token ids [devices * rows, length] and lengths [devices * rows, samples], int32; the rest is 0.

    And where the samples lie, where the program makes edits of them.
    """
    rows = program.devices_of_host * shape.rows
    tokens = np.zeros((rows, shape.length), np.int32)
    lengths = np.zeros((rows, shape.samples), np.int32)
    placed: list[Placed] = []
    for device, work in enumerate(works):
        if work is None:
            continue
        place = work.slab.first
        for row, count in enumerate(work.slab.counts, device * shape.rows):
            ids = np.concatenate([work.arrangement.tokens_at(i) for i in range(place, place + count)])
            tokens[row, : len(ids)] = ids
            lengths[row, :count] = work.arrangement.lengths[place : place + count]
            if program.edits:
                begins = np.cumsum(lengths[row, :count]) - lengths[row, :count]
                placed += [Placed(row, int(begins[i]), work.arrangement.sample_at(place + i)) for i in range(count)]
            place += count
    return tokens, lengths, placed


def part_content(part: Part, positions: Positions) -> PartContent:
    """What the store is told of a part of the plan."""
    samples = list(part.table)
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
