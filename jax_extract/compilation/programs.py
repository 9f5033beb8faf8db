"""The production program, compiled for a slice, and what the compiler says of it.

In: a model's configuration, a capture plan, a mesh of a `Slice`, a layout, a slab shape. Out: `Compiled`: bytes on a
chip, collectives, output shards, counted work. Nothing is run and no weight exists.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from jax_extract.compilation.hlo import Collective, collectives
from jax_extract.devices.planner import ModelCounts
from jax_extract.devices.sharding import Layout
from jax_extract.extraction.jax_backend import compute_numerics, with_attention
from jax_extract.extraction.program import capture_function, slab_inputs
from jax_extract.inputs.planning.slabs import SlabShape
from jax_extract.weights.load import laid_out, parameter_shapes
from models.capture_plan import CapturePlan
from models.layers import Numerics
from models.ports import Port


@dataclass(frozen=True)
class Subject:
    """What is compiled, but for its slab shape and layout.

    Attributes:
      rows_travel: whether every device is given the captures of all; see `extraction.program`.
    """

    port: Port
    config: Any
    plan: CapturePlan
    mesh: Mesh
    dtype: str
    rows_travel: bool = False

    @property
    def blocks(self) -> int:
        return self.plan.blocks_needed(self.config.num_hidden_layers)

    @property
    def structure(self) -> dict[str, Any]:
        """The parameters as shapes."""
        return parameter_shapes(self.port, self.config, self.blocks, self.dtype)

    @property
    def counts(self) -> ModelCounts:
        return ModelCounts.of(self.structure, self.config, self.blocks)

    @property
    def numerics(self) -> Numerics:
        return with_attention(compute_numerics(self.dtype), self.mesh, self.config)


@dataclass(frozen=True)
class Compiled:
    """Attributes, all but the last three of one chip, in bytes:
    arguments: parameters and tokens.
    captures: what the step gives.
    temporaries, code: what computing takes besides.
    moved: what crosses devices.
    foreign: collectives whose result is neither a parameter nor a capture that travels; empty where nothing else
      crosses devices.
    output_shards, unique_shards: of all captures: how many there are, how many hold different rows.
    work: products that the program counts over those that its rows need; None where the compiler does not count them.
    """

    shape: SlabShape
    arguments: int
    captures: int
    temporaries: int
    code: int
    moved: tuple[Collective, ...]
    foreign: tuple[str, ...]
    output_shards: int
    unique_shards: int
    work: float | None

    def memory(self, steps_held: int) -> int:
        """At the peak, with the captures of so many steps."""
        return self.arguments + self.temporaries + self.code + steps_held * self.captures


def compile_program(subject: Subject, layout: Layout, shape: SlabShape) -> Compiled | None:
    """None where the compiler finds that it does not fit the chip's memory."""
    params = laid_out(subject.structure, subject.mesh, layout)
    specs = jax.tree.map(lambda parameter: parameter.sharding.spec, params)
    function = capture_function(
        subject.port, subject.config, subject.plan, subject.mesh, subject.numerics, specs, subject.rows_travel
    )
    lowered = function.lower(params, *slab_inputs(subject.mesh, shape), ())
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return None
        raise
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    moved = tuple(collectives(text))
    travelling = jax.tree.leaves(lowered.out_info) if subject.rows_travel else []
    shards = _shard_indices(lowered.out_info, compiled.output_shardings)
    return Compiled(
        shape=shape,
        arguments=memory.argument_size_in_bytes,
        captures=memory.output_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        moved=moved,
        foreign=foreign_collectives(moved, [*jax.tree.leaves(subject.structure), *travelling]),
        output_shards=len(shards),
        unique_shards=len(set(shards)),
        work=_work(compiled, text, subject, shape),
    )


def _shard_indices(outputs: Any, shardings: Any) -> list[str]:
    """Which part of which capture each device holds, as text."""
    return [
        f"{jax.tree_util.keystr(path)} {index}"
        for (path, output), sharding in zip(
            jax.tree_util.tree_leaves_with_path(outputs), jax.tree.leaves(shardings), strict=True
        )
        for index in sharding.devices_indices_map(output.shape).values()
    ]


def foreign_collectives(moved: Sequence[Collective], known: Any) -> tuple[str, ...]:
    """Collectives that are no gathers of a known value, or of one layer of it; `known` is a tree of shaped values."""
    shapes = {_plain(value.shape) for value in jax.tree.leaves(known)}
    shapes |= {_plain(value.shape[1:]) for value in jax.tree.leaves(known)}
    strange = [c for c in moved if c.kind != "all-gather" or _plain(c.shape) not in shapes]
    return tuple(sorted({f"{c.kind} of {c.shape}" for c in strange}))


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _work(compiled: Any, text: str, subject: Subject, shape: SlabShape) -> float | None:
    """The compiler counts a loop's body once; attention in a kernel is not in its figure at all."""
    if subject.numerics.attention == "blockwise" or not subject.blocks:
        return None
    costs = compiled.cost_analysis()
    counted = (costs[0] if isinstance(costs, list) else costs).get("flops", 0.0)
    times = subject.blocks if re.search(r" while\(", text) else 1
    return counted * times / subject.counts.product_flops(shape.tokens)
