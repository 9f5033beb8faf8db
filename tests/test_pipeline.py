"""The loop: computing and writing overlap, memory has a bound, and whatever fails ends it with its cause.

The device is made up: it computes one step at a time, each for a set time, and hands out the rows when it
is done, as a device does whose arrays are awaited.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_extract.errors import UserError
from jax_extract.extraction.loop import STEPS_IN_MEMORY, LoopStatistics, run_parts
from jax_extract.extraction.summary import stages_text
from jax_extract.forward.edits import Edits, Placed
from jax_extract.inputs.planning.slabs import PlanSettings, SlabShape
from jax_extract.inputs.planning.windows import Part, plan_windows
from jax_extract.inputs.token_table import TokenizedSample
from jax_extract.store import writer
from jax_extract.store.budget import ByteBudget
from jax_extract.store.lanes import Call, Countdown, Lanes
from jax_extract.store.ledger import Ledger
from jax_extract.store.parts import PartContent, Site
from jax_extract.store.storage.local import Directory, LocalFile
from jax_extract.store.upload import Uploader
from jax_extract.store.writer import Blocks, PartWriter, RowPiece
from models.capture_plan import CapturePlan
from models.positions import Positions

ALL = Positions.parse("all")
LENGTH, WIDTH, ROWS, SLABS = 16, 8, 2, 5
SITES = (Site("after_block", 3, WIDTH), Site("after_block", 7, WIDTH))
STEP = len(SITES) * ROWS * LENGTH * WIDTH * 4  # bytes that a step brings to the host
FAST, SLOW = 0.01, 0.02  # seconds a step; the one takes half the time of the other
STEPS = 60
DEADLINE = 20  # seconds after which something hangs


def make_parts(steps: int) -> list[Part]:
    """Parts of five steps each."""
    samples = [TokenizedSample(i, f"s{i}", np.full(LENGTH, i, np.int32), LENGTH, {}) for i in range(steps * ROWS)]
    settings = PlanSettings(ROWS * SLABS, ROWS, ROWS * LENGTH, LENGTH, LENGTH, ALL, WIDTH * 4)
    return [part for window in plan_windows(samples, settings) for part in window.parts]


@dataclass
class MadeUpProgram:
    """A `Program` whose device is a thread.

    Attributes:
      seconds: of a step.
      fails_at: the step that goes wrong on the device.
      busy: seconds in which the device computed.
    """

    seconds: float = 0.0
    fails_at: int | None = None
    hosts: int = 1
    host: int = 0
    devices_of_host: int = 1
    rows_travel: bool = False
    edits: Edits | None = None
    busy: float = 0.0
    steps: int = 0
    plan: CapturePlan = field(default_factory=lambda: CapturePlan((("after_block", (3, 7)),), ALL))
    _device: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def compiled(self, shape: SlabShape) -> None:
        assert shape == (LENGTH, ROWS, 1)

    def bytes_on_host(self, shape: SlabShape) -> int:
        return STEP

    def run(self, tokens: np.ndarray, lengths: np.ndarray, placed: Iterable[Placed] = ()) -> Future[np.ndarray]:
        return self._device.submit(self._one, tokens)

    def on_host(self, captured: Future[np.ndarray]) -> list[Blocks]:
        rows = captured.result()
        return [{site.key: rows[slot] for slot, site in enumerate(SITES)}]

    def _one(self, tokens: np.ndarray) -> np.ndarray:
        """float32 [layers, rows, length, width]: every value of a row is its token."""
        started = time.perf_counter()
        self.steps += 1
        if self.steps == self.fails_at:
            raise FloatingPointError("the device went wrong")
        time.sleep(self.seconds)
        self.busy += time.perf_counter() - started
        return np.broadcast_to(tokens[None, :, :, None], (len(SITES), *tokens.shape, WIDTH)).astype(np.float32)


class SlowSink:
    """A `PartSink` that takes a set time for a step's rows of each site."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.lanes = Lanes(len(SITES))
        self.parts = 0

    def begin(self, content: PartContent) -> SlowSink:
        return self

    def append(self, blocks: Blocks, kept: Sequence[RowPiece], done: Call) -> None:
        countdown = Countdown(len(SITES), done)

        def write(rows: np.ndarray) -> None:
            time.sleep(self._seconds)
            assert rows.shape == (ROWS, LENGTH, WIDTH)
            countdown()

        for lane, site in enumerate(SITES):
            self.lanes.submit(lane, lambda rows=blocks[site.key]: write(rows))

    def commit(self) -> None:
        self.parts += 1

    def close(self) -> None:
        self.lanes.close()

    def cancel(self) -> None:
        self.lanes.cancel()


def _run(parts: Iterable[Part], program: MadeUpProgram, sink: Any, budget: ByteBudget) -> LoopStatistics:
    return run_parts(parts, program, sink, budget)


@dataclass(frozen=True)
class Overlap:
    """How one run of both stages went; in seconds."""

    wall: float
    computing: float
    writing: float
    statistics: LoopStatistics

    @property
    def slower(self) -> float:
        return max(self.computing, self.writing)


def _overlap(compute: float, write: float) -> Overlap:
    program, sink, budget = MadeUpProgram(compute), SlowSink(write), ByteBudget(STEPS_IN_MEMORY * STEP)
    started = time.perf_counter()
    statistics = _run(make_parts(STEPS), program, sink, budget)
    wall = time.perf_counter() - started
    assert sink.parts == statistics.parts == STEPS // SLABS
    assert budget.peak <= budget.limit
    assert budget.fits(budget.limit)  # all was given back
    if write > compute:
        assert budget.peak == budget.limit  # as much waits for the writer as is allowed
    statistics.writer_busy = max(sink.lanes.busy_seconds)
    return Overlap(wall, program.busy, statistics.writer_busy, statistics)


@pytest.mark.parametrize(
    ("compute", "write", "stage", "said"), [(FAST, SLOW, "writer", "writing"), (SLOW, FAST, "device", "computing")]
)
def test_computing_and_writing_take_as_long_as_the_slower_of_them_and_memory_stays_under_the_budget(
    compute: float, write: float, stage: str, said: str
) -> None:
    # Of three tries, since a busy machine delays what it likes; stages that take turns never come near.
    tries = (_overlap(compute, write) for _ in range(3))
    best = next((one for one in tries if one.wall <= 1.1 * one.slower), None)
    assert best, "the wall time was more than that of the slower stage"
    assert best.slower == (best.writing if stage == "writer" else best.computing)
    assert best.wall < 0.85 * (best.computing + best.writing)
    waited = best.statistics.waited
    assert waited[stage] > 2 * sum(seconds for other, seconds in waited.items() if other != stage)
    assert stages_text(best.statistics).startswith(f"bound by {said}: ")


def test_with_room_for_one_step_the_stages_take_turns_and_nothing_hangs() -> None:
    program, sink, budget = MadeUpProgram(0.001), SlowSink(0.001), ByteBudget(STEP)
    statistics = _within_deadline(lambda: _run(make_parts(SLABS * 4), program, sink, budget))
    assert statistics.parts == 4
    assert budget.peak == STEP


def test_a_slow_input_is_what_the_loop_waited_for() -> None:
    def slowly() -> Iterator[Part]:
        for part in make_parts(SLABS * 10):
            time.sleep(0.02)
            yield part

    statistics = _run(slowly(), MadeUpProgram(0.001), SlowSink(0.001), ByteBudget(10 * STEP))
    assert stages_text(statistics).startswith("bound by reading the input: ")
    assert statistics.waited["input"] > 0.2


@pytest.mark.parametrize("broken", [None, "bucket", "disk"])
def test_the_loop_waits_for_uploads_that_would_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str | None
) -> None:
    class Slow(Directory):
        def create(self, name: str, own: str) -> LocalFile:
            time.sleep(0.01)
            if broken == "bucket" and name.startswith("layer_7_batch_000003"):
                raise UserError("the bucket is gone")
            return super().create(name, own)

    spool = _ledger(tmp_path / "spool")
    (tmp_path / "bucket").mkdir()
    bucket = Ledger.start(Slow(tmp_path / "bucket"), spool.run)
    budget = ByteBudget(100 * STEP)
    uploader = Uploader(spool, bucket, "abc", on_failure=budget.fail)
    one_part, waiting = SLABS * STEP, []

    def submit(record: Mapping[str, Any]) -> None:
        uploader.submit(record)
        waiting.append(len(uploader._on_the_way))

    def failed(failure: BaseException) -> None:
        budget.fail(failure)
        uploader.give_up(failure)

    finish = writer._Shard.finish

    def broken_finish(shard: Any) -> None:
        if shard._content.batch == 3:
            time.sleep(0.2)  # the loop waits for room by now
            raise UserError("the disk is gone")
        finish(shard)

    if broken == "disk":
        monkeypatch.setattr(writer._Shard, "finish", broken_finish)
    room = partial(uploader.expect, (1 if broken == "disk" else 3) * one_part)
    sink = PartWriter(spool, SITES, "safetensors", "float32", "abc", failed, submit, room, uploader.forget)

    def run() -> LoopStatistics:
        try:
            statistics = _run(make_parts(8 * SLABS), MadeUpProgram(), sink, budget)
            uploader.close()
            return statistics
        except BaseException:
            uploader.cancel()
            raise

    if broken:
        with pytest.raises(UserError, match=f"the {broken} is gone"):
            _within_deadline(run)
    else:
        assert _within_deadline(run).parts == len(bucket.committed()) == 8
        assert uploader._on_the_way == {}
    assert max(waiting) <= 3


# ------------------------------------------------------------------------------ whatever fails, where ever


def _within_deadline(call: Callable[[], LoopStatistics]) -> LoopStatistics:
    """What a call gives or raises; AssertionError where it hangs, or leaves a thread of ours behind."""
    outcome: list[LoopStatistics | BaseException] = []

    def kept() -> None:
        try:
            outcome.append(call())
        except BaseException as error:  # noqa: BLE001 (raised below)
            outcome.append(error)

    thread = threading.Thread(target=kept, daemon=True)
    thread.start()
    thread.join(DEADLINE)
    assert not thread.is_alive(), "it hangs"
    assert not [left.name for left in threading.enumerate() if left.name.startswith("jax_extract-")]
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _ledger(root: Path) -> Ledger:
    sites = [{"hook": site.hook, "layer": site.layer, "width": site.width} for site in SITES]
    identity = {"sites": sites, "shard_format": "safetensors", "capture_dtype": "float32"}
    description = {"model_name": "none", "hidden_dim": WIDTH}
    return Ledger.start(Directory(root), {"identity": identity, "numerics": {}, "description": description})


def _extract(ledger: Ledger, parts: Iterable[Part], program: MadeUpProgram, steps_of_room: int) -> LoopStatistics:
    """With the real writer, as a session has it."""
    budget = ByteBudget(steps_of_room * STEP)
    sink = PartWriter(ledger, SITES, "safetensors", "float32", "abc", on_failure=budget.fail)
    return _run(parts, program, sink, budget)


def test_the_made_up_program_goes_through_the_real_writer(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path)
    assert _within_deadline(lambda: _extract(ledger, make_parts(4 * SLABS), MadeUpProgram(), 3)).parts == 4
    assert len(ledger.committed()) == 4


@pytest.mark.parametrize("steps_of_room", [1, 100])  # the loop waits for room, or is far ahead
@pytest.mark.parametrize("where", ["rows", "shard", "record"])
def test_a_failure_while_writing_ends_the_run_with_its_cause_and_keeps_what_was_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, steps_of_room: int
) -> None:
    ledger, calls = _ledger(tmp_path), 0
    target, name = {
        "rows": (writer._Shard, "append"),
        "shard": (writer._Shard, "finish"),
        "record": (Ledger, "commit"),
    }[where]
    original = getattr(target, name)

    def failing(*words: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > {"rows": 3 * SLABS * len(SITES), "shard": 3 * len(SITES), "record": 3}[where]:
            raise OSError("the disk is on fire")
        return original(*words)

    monkeypatch.setattr(target, name, failing)
    with pytest.raises(OSError, match="the disk is on fire"):
        _within_deadline(lambda: _extract(ledger, make_parts(10 * SLABS), MadeUpProgram(), steps_of_room))
    assert len(ledger.committed()) <= 3
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_told_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    ledger = _ledger(tmp_path)

    def full(fd: int, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match=r"no space left for .*what is committed is safe"):
        _within_deadline(lambda: _extract(ledger, make_parts(10 * SLABS), MadeUpProgram(), 3))


@pytest.mark.parametrize("steps_of_room", [1, 100])
def test_a_failure_on_the_device_ends_the_run_with_its_cause_and_keeps_what_was_committed(
    tmp_path: Path, steps_of_room: int
) -> None:
    ledger = _ledger(tmp_path)
    program = MadeUpProgram(fails_at=3 * SLABS + 2)
    with pytest.raises(FloatingPointError, match="the device went wrong"):
        _within_deadline(lambda: _extract(ledger, make_parts(10 * SLABS), program, steps_of_room))
    assert len(ledger.committed()) <= 3
    assert not list(tmp_path.glob(".*"))


def test_a_program_that_cannot_be_started_ends_the_run_with_its_cause(tmp_path: Path) -> None:
    class Broken(MadeUpProgram):
        def run(self, tokens: np.ndarray, lengths: np.ndarray, placed: Iterable[Placed] = ()) -> dict[str, Any]:
            raise MemoryError("the device is full")

    ledger = _ledger(tmp_path)
    with pytest.raises(MemoryError, match="the device is full"):
        _within_deadline(lambda: _extract(ledger, make_parts(SLABS), Broken(), 3))


def test_a_failure_of_the_input_ends_the_run_with_its_cause_and_keeps_what_was_committed(tmp_path: Path) -> None:
    def breaking() -> Iterator[Part]:
        yield from make_parts(10 * SLABS)[:4]
        raise UserError("line 41 is no JSON")

    ledger = _ledger(tmp_path)
    with pytest.raises(UserError, match="line 41 is no JSON"):
        _within_deadline(lambda: _extract(ledger, breaking(), MadeUpProgram(), 3))
    assert len(ledger.committed()) <= 4
