"""One process of `test_tpu_compiler`: compiles production programs for a slice, and says what the compiler said.

    python tests/tpu_compiler_worker.py v5e:8x8

Prints a JSON object, case -> facts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from typing import Any

from jax_extract.compilation.command import Report, compile_for
from jax_extract.compilation.config import CompileConfig
from jax_extract.compilation.models import open_config
from jax_extract.compilation.programs import Subject, compile_program
from jax_extract.compilation.topology import open_slice
from jax_extract.devices import libtpu
from jax_extract.devices.mesh import make_mesh
from jax_extract.devices.planner import STEPS_HELD, Request, choose_layout, layout_cost
from jax_extract.devices.sharding import Layout
from jax_extract.extraction.program import captured_bytes
from jax_extract.inputs.planning.slabs import SlabShape
from models.capture_plan import CapturePlan
from models.positions import Positions

DEFAULT_LAYERS = tuple(range(10, 24))
DOCUMENTED = "qwen2.5-0.5b, layers 10-23"
# A compilation takes a quarter of a minute of a core, so each is another shape: the documented command, with rows of
# several samples whose last tokens travel; all layers of the largest model (smaller ones, and its layers 10-23, need
# less of everything), the port with the most kinds of layers, and, of EVERY_FAMILY, every other port.
CASES = {
    DOCUMENTED: ("qwen2.5-0.5b", DEFAULT_LAYERS, 2_048),
    "qwen2.5-7b, all layers": ("qwen2.5-7b", tuple(range(28)), 2_048),
    **{
        f"{model}, some layers": (model, tuple(range(10, 18)), tokens)
        for model, tokens in (("gpt2-medium", 1_024), ("pythia-1.4b", 2_048), ("gemma-2-2b", 2_048), ("phi-2", 2_048))
        if model == "gemma-2-2b" or os.environ.get("EVERY_FAMILY")
    },
}
SAMPLES_A_ROW = 16


def facts(topology: str, case: str) -> dict[str, Any]:
    model, layers, tokens = CASES[case]
    config = CompileConfig(
        model_path=model,
        topology=topology,
        layers_to_extract=layers,
        positions="last" if case == DOCUMENTED else "all",
        capture_dtype="bfloat16",
        max_seq_length=tokens,
        mesh_shape="8,8",
        search=False,
        layout="gathered",
    )
    started = time.perf_counter()
    report = packed(config) if case == DOCUMENTED else compile_for(config)
    compiled = report.compiled
    assert compiled is not None, "does not fit"
    arriving_captures = report.subject.rows_travel * compiled.captures * (1 - 1 / report.chips)
    return {
        "seconds": time.perf_counter() - started,
        "slab": list(report.shape),
        "tokens": tokens,
        "attention": report.subject.numerics.attention,
        "blocks": report.subject.blocks,
        "chip_memory": report.slice.chip.memory_bytes,
        "memory": compiled.memory(STEPS_HELD),
        "foretold_memory": report.cost.memory,
        "travels": report.subject.rows_travel,
        "captures": compiled.captures,
        "moved": [dataclasses.asdict(collective) for collective in compiled.moved],
        "received": sum(collective.received for collective in compiled.moved),
        "foretold_received": report.cost.moved + arriving_captures,
        "foreign": compiled.foreign,
        "output_shards": compiled.output_shards,
        "unique_shards": compiled.unique_shards,
        "work": compiled.work,
        "work_of_one": work_of_one(report) if case == DOCUMENTED else None,
    }


def packed(config: CompileConfig) -> Report:
    """Rows of several samples, whose captures go to every chip."""
    port, model = open_config(config.model_path, None)
    found = open_slice(config.topology)
    plan = CapturePlan(
        (("after_block", config.layers_to_extract or ()),), Positions.parse(config.positions), config.capture_dtype
    )
    subject = Subject(port, model, plan, make_mesh((8, 8), found.devices), config.dtype, rows_travel=True)
    shape = SlabShape(config.max_seq_length or 0, 8, SAMPLES_A_ROW)
    captures = len(found.devices) * captured_bytes(plan, model, shape, "tpu", rows_travel=True)
    request = Request(subject.counts, found.chip, 8, 8, shape.rows, shape.length, captures)
    cost = layout_cost(Layout.GATHERED, request)
    compiled = compile_program(subject, Layout.GATHERED, shape)
    return Report(config, found, subject, choose_layout(request), cost, shape, compiled, None)


def work_of_one(report: Report) -> float | None:
    """The same for one sequence on a single chip, which has all parameters."""
    mesh = make_mesh(None, report.slice.devices[:1])
    subject = dataclasses.replace(report.subject, mesh=mesh, rows_travel=False)
    alone = compile_program(subject, Layout.REPLICATED, report.shape._replace(rows=1))
    return alone.work if alone else None


def main(topology: str) -> None:
    libtpu.silence()
    found = {case: facts(topology, case) for case in CASES}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
