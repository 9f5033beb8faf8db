"""Compiles what `sae train --online` runs beside the forward, for a slice without a TPU; run by test_sae_tpu.py.

In: a topology's name. Out: JSON on standard output: of each program its memory on a chip and what crosses chips.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp

from jax_extract.compilation.topology import open_slice
from jax_extract.devices.mesh import make_mesh
from jax_extract.sae.architecture import Architecture
from jax_extract.sae.online.ring import RingPrograms
from jax_extract.sae.parameters import first_parameters
from jax_extract.sae.step import Choice, Schedule, State
from jax_extract.sae.training import step_program
from jax_extract.store.parts import Site
from models.capture_plan import CapturePlan
from models.positions import Positions

WIDTH, LATENTS, BATCH, SLOTS, LAYERS, ROOM = 128, 1_024, 8_192, 512, 2, 256
_COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_SHAPE = re.compile(r"\b[a-z]+(\d+)\[([\d,]*)\]")


def main(topology: str) -> None:
    found = open_slice(topology)
    mesh = make_mesh(found.axes, found.devices)
    chips = mesh.size
    shape = jax.ShapeDtypeStruct
    sites = [Site("after_block", layer, WIDTH) for layer in range(LAYERS)]
    ring = RingPrograms(CapturePlan((("after_block", (0, 1)),), Positions("all"), "float32"), sites, mesh)
    rows = shape((chips * SLOTS, LAYERS, WIDTH), jnp.float32)
    captured = (shape((LAYERS, chips * 8, ROOM // 8, WIDTH), jnp.float32),)
    numbers, drawn = shape((chips * ROOM,), jnp.int32), shape((BATCH,), jnp.int32)
    facts = {
        "put": facts_of(ring.put.lower(rows, captured, numbers, numbers).compile()),
        "draw": facts_of(ring.draw.lower(rows, drawn, drawn).compile()),
    }
    for name in ("batchtopk", "standard"):
        architecture = Architecture(name, WIDTH, WIDTH, LATENTS)
        first = {key: shape(value.shape, value.dtype) for key, value in first_parameters(architecture, 0).items()}
        state = jax.eval_shape(State.start, first)
        states = jax.tree.map(lambda leaf: shape((1, *leaf.shape), leaf.dtype), state)
        of_one: Any = [shape((1,), jnp.int32)] * 2 + [shape((1, LAYERS), jnp.float32)]
        of_one += [shape((1,), jnp.float32)] * 3 + [shape((1,), jnp.int32)] * 2
        step = step_program(architecture, Schedule(100), mesh)
        facts[name] = facts_of(
            step.lower(states, Choice(*of_one), shape((BATCH, LAYERS, WIDTH), jnp.float32)).compile()
        )
    json.dump(facts, sys.stdout)


def facts_of(compiled: Any) -> dict[str, Any]:
    memory = compiled.memory_analysis()
    moved: Counter[str] = Counter()
    largest = 0
    for result, kind in _COLLECTIVE.findall(compiled.as_text()):
        moved[kind] += 1
        for bits, axes in _SHAPE.findall(result):
            size = int(bits) // 8
            for axis in filter(None, axes.split(",")):
                size *= int(axis)
            largest = max(largest, size)
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return {"memory": peak, "moved": dict(moved), "largest": largest, "temporaries": memory.temp_size_in_bytes}


if __name__ == "__main__":
    main(sys.argv[1])
