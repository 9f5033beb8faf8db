"""Short timed tries of what a run does for hours: a few real steps, a few seconds of writing.

In: a job with parts of its plan; a place. Out: `ComputeProbe` and `WriteProbe`. The steps go through the loop of a
real run, into a sink that drops the rows. What is written goes into files without a name, or into uploads that
are never finished, which are no objects; the few small files that get a name are removed at once.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from jax_extract.devices.processes import Processes
from jax_extract.extraction.backend import Loadable, Program
from jax_extract.extraction.loop import run_parts
from jax_extract.extraction.prepare import Job
from jax_extract.inputs.planning.slabs import Shapes, SlabShape
from jax_extract.inputs.planning.windows import Part
from jax_extract.store.budget import ByteBudget
from jax_extract.store.lanes import Call
from jax_extract.store.parts import PartContent
from jax_extract.store.storage.local import Directory
from jax_extract.store.storage.verbs import PendingFile, Storage
from jax_extract.store.writer import Blocks, RowPiece

_SHAPES = 2
_SHAPE_SECONDS = 5.0
_MOST_STEPS = 50
_SLABS = 64  # real slabs of a shape that the steps take turns with

_WRITE_SECONDS = 3.0
_WRITE_BYTES = 512_000_000
_SMALL_FILES = 8  # of each lane
_SMALL_BYTES = 4_096
_REQUESTS = 3  # that an object takes besides its content: is the name free, begin, finish


@dataclass(frozen=True)
class ComputeProbe:
    """Attributes:
    load_seconds: for the weights.
    compile_seconds: for one program, which is one slab shape.
    step_seconds: of those shapes that were tried, captures copied to the host.
    tried: how many steps were timed.
    compiles_at_once: all programs, side by side.
    """

    load_seconds: float
    compile_seconds: float
    step_seconds: Mapping[SlabShape, float]
    tried: int
    compiles_at_once: bool = False

    def start_seconds(self, programs: int) -> float:
        """Until so many programs can run."""
        return self.load_seconds + self.compile_seconds * (1 if self.compiles_at_once else programs)

    def seconds(self, wanted: Mapping[SlabShape, float]) -> float:
        """For so many steps of each shape; shapes that were not tried cost what a token costs in those that were."""
        tried = {shape: count for shape, count in wanted.items() if shape in self.step_seconds}
        tokens = sum(count * shape.tokens for shape, count in tried.items())
        spent = sum(count * self.step_seconds[shape] for shape, count in tried.items())
        others = sum(n * shape.tokens for shape, n in wanted.items() if shape not in tried)
        return spent + (others * spent / tokens if tokens else 0.0)


@dataclass(frozen=True)
class WriteProbe:
    """Attributes:
    bytes_per_second: of one process into one place, as many files at a time as the writer has.
    seconds_per_file: what a file takes besides its content, all of them side by side.
    """

    bytes_per_second: float
    seconds_per_file: float

    def seconds(self, nbytes: float, files: float) -> float:
        return nbytes / self.bytes_per_second + files * self.seconds_per_file


# ----------------------------------------------------------------------------------------- computing


def probe_computing(
    job: Job, weights: Loadable, parts: Sequence[Part], planned: Shapes, budget: ByteBudget, processes: Processes
) -> ComputeProbe:
    """Loads the weights, compiles the one or two shapes that carry most tokens, and times steps of real samples."""
    started = time.perf_counter()
    program = job.program(weights, planned)
    load_seconds = time.perf_counter() - started
    counts = job.step_counts(parts).steps
    shapes = sorted(counts, key=lambda shape: (counts[shape] * shape.tokens, shape), reverse=True)
    compile_seconds: list[float] = []
    step_seconds: dict[SlabShape, float] = {}
    tried = 0
    started = time.perf_counter()
    for shape in shapes[:_SHAPES]:
        compiling = time.perf_counter()
        program.compiled(shape)
        compile_seconds.append(time.perf_counter() - compiling)
        stepping = time.perf_counter()
        slabs = _slabs_of(parts, shape)
        step_seconds[shape], count = _time_steps(program, slabs, budget, processes)
        tried += count
        spent = time.perf_counter() - stepping
        if processes.of_first(lambda spent=spent: spent > 2 * _SHAPE_SECONDS):  # a slow machine; one shape will do
            break
    at_once = job.backend.defaults.compiles_at_once  # then the slowest program counts
    compile_one = max(compile_seconds) if at_once else sum(compile_seconds) / len(compile_seconds)
    return ComputeProbe(load_seconds, compile_one, step_seconds, tried, at_once)


def _slabs_of(parts: Iterable[Part], shape: SlabShape) -> list[Part]:
    """Some of the plan's slabs of a shape, each as a part of its own."""
    found = (
        replace(part, start=max(part.start, slab.first), stop=min(part.stop, slab.first + slab.count))
        for part in parts
        for slab in (part.arrangement.slabs[i] for i in part.arrangement.slabs_of(part.start, part.stop))
        if slab.shape == shape
    )
    return list(itertools.islice(found, _SLABS))


def _time_steps(program: Program, slabs: Sequence[Part], budget: ByteBudget, processes: Processes) -> tuple[float, int]:
    """Seconds of a step, and how many were timed. The first one is not, unless it takes all the time there is."""

    def run(count: int) -> float:
        parts = itertools.islice(itertools.cycle(slabs), count * program.hosts * program.devices_of_host)
        return run_parts(parts, program, _Nowhere(), budget).seconds

    first = run(1)
    count = processes.of_first(lambda: min(_MOST_STEPS, int(_SHAPE_SECONDS / first)))
    return (run(count) / count, count) if count else (first, 1)


class _Nowhere:
    """A sink, and a part, that drops the rows."""

    def begin(self, content: PartContent) -> _Nowhere:
        return self

    def append(self, blocks: Blocks, kept: Sequence[RowPiece], done: Call) -> None:
        done()

    def commit(self) -> None: ...

    def close(self) -> None: ...

    def cancel(self) -> None: ...


# ------------------------------------------------------------------------------------------- writing


def probe_writing(storage: Storage, lanes: int) -> WriteProbe:
    """Writes side by side for a few seconds; the place need not exist yet, and holds nothing more afterwards.

    Raises:
      UserError: it cannot be written.
    """
    if isinstance(storage, Directory):
        root = storage.root.absolute()
        storage = Directory(next(path for path in (root, *root.parents) if path.is_dir()))
    with ThreadPoolExecutor(lanes) as pool:
        return WriteProbe(_bytes_per_second(storage, lanes, pool), _seconds_per_file(storage, lanes, pool))


def _bytes_per_second(storage: Storage, lanes: int, pool: ThreadPoolExecutor) -> float:
    piece = np.random.default_rng(0).bytes(storage.buffer_bytes)  # which neither disk nor network can compress
    pieces = max(1, _WRITE_BYTES // (lanes * len(piece)))
    with contextlib.ExitStack() as stack:
        files: list[PendingFile] = []
        for _ in range(lanes):
            name = f"_run/probe-{uuid.uuid4().hex}"
            files.append(storage.create(name, name))
            stack.callback(files[-1].discard)
            files[-1].write(piece)  # fills what a file may hold in memory: from here on bytes come out at the other end
        started = time.perf_counter()

        def stream(file: PendingFile) -> int:
            for number in range(1, pieces + 1):
                file.write(piece)
                if time.perf_counter() - started > _WRITE_SECONDS:
                    return number * len(piece)
            return pieces * len(piece)

        written = sum(pool.map(stream, files))
        return written / (time.perf_counter() - started)


def _seconds_per_file(storage: Storage, lanes: int, pool: ThreadPoolExecutor) -> float:
    if not isinstance(storage, Directory):
        started = time.perf_counter()
        storage.exists(f"_run/probe-{uuid.uuid4().hex}")
        return _REQUESTS * (time.perf_counter() - started) / lanes
    # `jax-extract sweep` knows these names, should this process be killed right here.
    names = [f".writing-{uuid.uuid4().hex}" for _ in range(lanes * _SMALL_FILES)]

    def make(name: str) -> None:
        file = storage.create(name, name)
        try:
            file.write(bytes(_SMALL_BYTES))
            file.publish()
        finally:
            file.discard()

    try:
        started = time.perf_counter()
        list(pool.map(make, names))
        return (time.perf_counter() - started) / len(names)
    finally:
        for name in names:
            storage.delete(name)
