"""The extraction loop: slabs of parts through the compiled program into a sink.

In: parts in plan order, a `CaptureProgram`, a `PartSink`. Out: committed parts, and `LoopStatistics`.
A step gives every device one slab of one shape. While a step computes, the one before it is copied to
the host, and a background thread writes the one before that, behind a bound on bytes in memory.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from jax_extract.inputs.plan import Part, Slab
from jax_extract.program import CaptureProgram
from jax_extract.store.background import BackgroundWorker
from jax_extract.store.parts import PartContent
from jax_extract.store.writer import Blocks, PartSink
from models.positions import Positions

STEPS_IN_FLIGHT = 1  # computed but not yet on the host, besides the one that computes
WAITING_BYTES = 1 << 30  # captured rows on the host that wait for the writer


@dataclass
class LoopStatistics:
    """What a loop did: real tokens, slab tokens with all padding and dummy rows, seconds."""

    samples: int = 0
    tokens: int = 0
    slab_tokens: int = 0
    parts: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0


@dataclass(frozen=True)
class _Work:
    """One slab of one part; the part begins with its first slab and is committed after its last."""

    part: Part
    slab: Slab

    @property
    def is_first(self) -> bool:
        return self.slab.first == 0

    @property
    def is_last(self) -> bool:
        return self.slab.first + self.slab.count == len(self.part.samples)


def run_parts(
    parts: Iterable[Part],
    program: CaptureProgram,
    sink: PartSink,
    on_progress: Callable[[LoopStatistics], None] = lambda _: None,
) -> LoopStatistics:
    """Computes and commits the parts, in order.

    Raises:
      Whatever the computation or the sink raised, after the writer has stopped.
    """
    statistics = LoopStatistics()
    worker = BackgroundWorker(WAITING_BYTES)
    in_flight: deque[tuple[list[_Work], dict[str, jax.Array]]] = deque()
    started = time.perf_counter()

    def finish_oldest() -> None:
        step, captured = in_flight.popleft()
        for work, blocks in zip(step, _host_blocks(captured, program), strict=False):
            nbytes = sum(block.nbytes for block in blocks.values())
            worker.submit(partial(_store, work, blocks, sink, program.plan.positions), nbytes)
            statistics.samples += work.slab.count
            statistics.tokens += sum(s.length for s in _samples(work))
            statistics.parts += work.is_last
        statistics.seconds = time.perf_counter() - started - statistics.compile_seconds
        on_progress(statistics)

    try:
        for step in _steps(parts, program.devices):
            slab = step[0].slab
            compiling = time.perf_counter()
            program.compiled(slab.rows, slab.length)
            statistics.compile_seconds += time.perf_counter() - compiling
            captured = program.run(*_pack(step, program.devices))
            for array in captured.values():
                array.copy_to_host_async()
            in_flight.append((step, captured))
            statistics.slab_tokens += program.devices * slab.rows * slab.length
            if len(in_flight) > STEPS_IN_FLIGHT:
                finish_oldest()
        while in_flight:
            finish_oldest()
        worker.close()
    except BaseException:
        worker.cancel()
        sink.abandon()
        raise
    statistics.seconds = time.perf_counter() - started - statistics.compile_seconds
    return statistics


def _steps(parts: Iterable[Part], devices: int) -> Iterator[list[_Work]]:
    """Slabs in order, as many of one shape at a time as there are devices; steps cross parts and batches."""
    step: list[_Work] = []
    for part in parts:
        for slab in part.slabs:
            other_shape = step and (slab.rows, slab.length) != (step[0].slab.rows, step[0].slab.length)
            if other_shape or len(step) == devices:
                yield step
                step = []
            step.append(_Work(part, slab))
    if step:
        yield step


def tokens_computed(parts: Iterable[Part], devices: int) -> int:
    """Slab tokens of all steps, idle devices included."""
    first = (step[0].slab for step in _steps(parts, devices))
    return sum(devices * slab.rows * slab.length for slab in first)


def _pack(step: list[_Work], devices: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 [devices * rows, length] and lengths int32 [devices * rows]; the rest is dummy rows."""
    slab = step[0].slab
    tokens = np.zeros((devices * slab.rows, slab.length), np.int32)
    lengths = np.ones(devices * slab.rows, np.int32)
    for place, work in enumerate(step):
        for row, sample in enumerate(_samples(work), place * slab.rows):
            tokens[row, : sample.length] = sample.token_ids
            lengths[row] = sample.length
    return tokens, lengths


def _samples(work: _Work) -> tuple:
    return work.part.samples[work.slab.first : work.slab.first + work.slab.count]


def _host_blocks(captured: dict[str, jax.Array], program: CaptureProgram) -> list[Blocks]:
    """Each device's captures on the host, in the order of the devices: site -> [rows, positions, width]."""
    blocks: list[dict[tuple[str, int | None], np.ndarray]] = [{} for _ in range(program.devices)]
    for hook, layers in program.plan.layers:
        shards = sorted(captured[hook].addressable_shards, key=lambda shard: shard.index[1].start or 0)
        for device, shard in enumerate(shards):
            data = np.asarray(shard.data)
            for slot, layer in enumerate(layers or (None,)):
                blocks[device][hook, layer] = data[slot]
    return list(blocks)


def _store(work: _Work, blocks: Blocks, sink: PartSink, positions: Positions) -> None:
    if work.is_first:
        sink.begin(part_content(work.part, positions))
    sink.append(blocks, [positions.rows(sample.length) for sample in _samples(work)])
    if work.is_last:
        sink.commit()


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
