#!/usr/bin/env python3
"""The jax_extract side: whole extractions, the bare forward, and the time to the first batch.

    python benchmarks/ours.py serve JOB.json                  answers `run`, `bare` and `plan`
    python benchmarks/ours.py first_batch STARTED WORDS…      `jax-extract extract WORDS…` until its first batch
    python benchmarks/ours.py peak JOB.json                   answers `peak`: XLA's matrix products, in a process alone

In: what `workloads` has prepared. Out: answers of `protocol.serve`. The bare forward is the same loop over the same
slabs with a program that captures as little as there is, one row of the deepest layer a sample, and a sink that drops
it: what a run takes beyond it is the price of capturing, copying and writing.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from machine import xla_peak
from protocol import Commands, serve

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "safetensors")


def main() -> int:
    what, *words = sys.argv[1:]
    if what == "first_batch":
        return first_batch(float(words[0]), words[1:])
    job = json.loads(Path(words[0]).read_text(encoding="utf-8"))
    return serve(lambda: {"serve": commands, "peak": peak}[what](job))


def peak(job: dict[str, Any]) -> Commands:
    return {"peak": lambda: {"flops_per_second": xla_peak(job["products"], job["dtype"])}}


def commands(job: dict[str, Any]) -> Commands:
    from jax_extract.config import ExtractConfig

    config = ExtractConfig(**{**job["options"], "layers_to_extract": tuple(job["options"]["layers_to_extract"])})
    config.check()
    whole = (lambda: extract(config)) if job["writes"] else (lambda: through_the_loop(config, config))
    return {"plan": lambda: plan(config), "run": whole, "bare": lambda: through_the_loop(config, barest(config))}


def extract(config: Any) -> dict[str, Any]:
    """A whole run into a directory; the clock is the loop's: from the first step until every file is durable."""
    from jax_extract.extraction.command import extract_to_directory
    from jax_extract.terminal import Terminal

    metadata = extract_to_directory(config, Terminal(silent=True))
    return _told(metadata["sessions"][-1])


def through_the_loop(planned_as: Any, captures: Any) -> dict[str, Any]:
    """The slabs of one configuration through the program of another, into nothing."""
    from jax_extract.extraction.loop import STEPS_IN_MEMORY, run_parts
    from jax_extract.extraction.prepare import Job
    from jax_extract.store.budget import ByteBudget

    parts, shapes = planned(planned_as)
    job = Job.open(captures)
    program = job.program(job.weights(), shapes)
    budget = ByteBudget(STEPS_IN_MEMORY * job.bytes_on_host(shapes))
    return _told(dataclasses.asdict(run_parts(parts, program, Nowhere(), budget)))


def barest(config: Any) -> Any:
    return dataclasses.replace(config, layers_to_extract=(max(config.layers_to_extract),), positions="last")


def plan(config: Any) -> dict[str, Any]:
    """What is not in any speed: how many programs there are, and what compiling them takes, one after the other."""
    from jax_extract.extraction.prepare import Job

    shapes = planned(config)[1]
    job = Job.open(config)
    program = job.program(job.weights(), shapes)
    started = time.perf_counter()
    for shape in shapes:
        program.compiled(shape)
    return {
        "shapes": len(shapes),
        "compile_seconds": time.perf_counter() - started,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def planned(config: Any) -> tuple[list[Any], Any]:
    """The parts of a configuration, and the slab shapes that they need, as `Job.bytes_on_host` takes them."""
    from jax_extract.extraction.prepare import Job
    from jax_extract.inputs.planning.windows import shapes_of
    from jax_extract.inputs.sources import open_source
    from jax_extract.inputs.tokenize import InputCounts
    from jax_extract.inputs.wrapping import Wrapping

    job = Job.open(config)
    source = open_source(
        config.tasks_file,
        None,
        n_tasks=None,
        n_samples=None,
        encoder=config.grid_encoder,
        seed=0,
        split=None,
        dataset_config=None,
        text_column=None,
    )
    windows = job.windows(source.samples(), job.plan_settings(config), Wrapping(), InputCounts())
    parts = [part for window in windows for part in window.parts]
    return parts, shapes_of(parts)


class Nowhere:
    """A sink, and a part, that drops the rows."""

    def begin(self, _content: object) -> Nowhere:
        return self

    def append(self, _blocks: object, _kept: object, done: Any) -> None:
        done()

    def commit(self) -> None: ...

    def close(self) -> None: ...

    def cancel(self) -> None: ...


def _told(session: dict[str, Any]) -> dict[str, Any]:
    keys = ("tokens", "slab_tokens", "seconds", "waited", "writer_busy")
    return {key: session[key] for key in keys if key in session}


# --------------------------------------------------------------------------------------- first batch


def first_batch(started: float, words: Sequence[str]) -> int:
    """The command as a user gives it, ended when the first batch's activations are there.

    `started` is the monotonic clock when this process was made, which on Linux all processes share.
    """
    import jax

    from jax_extract import cli
    from jax_extract.extraction.program import CaptureProgram

    run = CaptureProgram.run

    def and_end(program: Any, *inputs: Any) -> None:
        on_its_way = time.monotonic()
        jax.block_until_ready(run(program, *inputs))
        captured = time.monotonic() - started
        told = {"on_its_way": on_its_way - started, "captured": captured, "processor": time.process_time()}
        print(json.dumps(told), flush=True)
        os._exit(0)

    CaptureProgram.run = and_end
    return cli.main(["extract", *words])


if __name__ == "__main__":
    sys.exit(main())
