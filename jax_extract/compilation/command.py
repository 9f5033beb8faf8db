"""`jax-extract compile`: what a run will need on a TPU slice, from the slice's own compiler, before it is paid for.

In: `CompileConfig`. Out: a `Report`: what a chip's memory holds, what crosses chips, and from the planned steps of the
run's own samples and counted work the time and the cost, with the assumptions that they rest on. Runs on any Linux
machine, and takes no device.
"""

from __future__ import annotations

import dataclasses
import math
import time

import jax
from jax.sharding import Mesh

from jax_extract.compilation.config import CompileConfig
from jax_extract.compilation.input_lengths import read_lengths
from jax_extract.compilation.largest import largest_that_fits
from jax_extract.compilation.models import open_model
from jax_extract.compilation.programs import Compiled, Subject, compile_program
from jax_extract.compilation.report import Report
from jax_extract.compilation.run_plan import plan_run
from jax_extract.compilation.slice_job import slice_job
from jax_extract.compilation.telling import tell, tell_chosen, tell_request, tell_slabs
from jax_extract.compilation.topology import Slice, open_slice
from jax_extract.devices import platform
from jax_extract.devices.mesh import make_mesh, parse_mesh_shape, platform_of
from jax_extract.devices.planner import Decision, Request, choose_layout, layout_cost
from jax_extract.devices.sharding import Layout
from jax_extract.errors import UserError
from jax_extract.extraction.capture import capture_plan, sequence_limit
from jax_extract.extraction.program import captured_bytes
from jax_extract.inputs.planning.slabs import SlabShape
from jax_extract.terminal import Terminal
from models.accelerated_attention import attention_block


def compile_command(config: CompileConfig, terminal: Terminal | None = None) -> Report:
    """The command.

    Raises:
      UserError: the request fits neither the model nor the slice, the input cannot be read, or there is no compiler.
    """
    jax.config.update("jax_platforms", "cpu")  # this machine's own chips stay free
    return compile_for(config, terminal or Terminal())


def compile_for(config: CompileConfig, terminal: Terminal | None = None) -> Report:
    """Plans, chooses a layout, compiles; tells each as soon as it is known, for compiling takes time."""
    terminal = terminal or Terminal(silent=True)
    config.check()
    model = open_model(config.model_path, config.revision)
    plan = capture_plan(
        model,
        config.layers_to_extract,
        config.hook_points,
        config.positions,
        config.capture_dtype,
        config.attention_pattern_tokens,
    )
    max_length = sequence_limit(config.max_seq_length, model.config)
    found = open_slice(config.topology)
    mesh = _mesh(config, found)
    job = slice_job(config, model, plan, mesh, max_length)
    subject = Subject(model.port, model.config, plan, mesh, config.dtype)
    tell_request(config, found, subject, terminal)
    lengths = read_lengths(config, job, terminal)
    planned = None if lengths is None else plan_run(config, job, lengths)
    shapes = planned.shapes if planned else (_full_slab(config, max_length),)
    subject = dataclasses.replace(subject, rows_travel=job.backend.rows_travel(plan, model, shapes))
    # As an extraction does: parameters lie as suits the largest shape.
    decision = choose_layout(_request(subject, found, max(shapes, key=_tokens)), config.share_of_peak)
    layout = _layout(config, decision)
    costs = {shape: layout_cost(layout, _request(subject, found, shape), config.share_of_peak) for shape in shapes}
    report = Report(
        config, found, subject, decision, costs[shapes[0]], shapes[0], None, None, planned=planned, costs=costs
    )
    tell_slabs(report, terminal)
    tell_chosen(report, terminal)
    report = _compiled(report, layout)
    tell(report, terminal)
    return report


def _compiled(report: Report, layout: Layout) -> Report:
    """With the programs that were asked for."""
    config, seconds = report.config, []

    def compile_timed(shape: SlabShape, layout: Layout = layout) -> Compiled | None:
        started = time.process_time()  # which others on this machine do not lengthen
        compiled = compile_program(report.subject, layout, shape)
        seconds.append(time.process_time() - started)
        return compiled

    def compile_anew(shape: SlabShape) -> Compiled | None:
        """An extraction with such slabs would choose its layout anew, and so must this."""
        decision = choose_layout(_request(report.subject, report.slice, shape), config.share_of_peak)
        return compile_timed(shape, _layout(config, decision))

    report = dataclasses.replace(report, compiled=compile_timed(report.shape))
    if config.search and report.planned:
        others = {shape: compile_timed(shape) for shape in report.planned.shapes[1:]}
        report = dataclasses.replace(report, others=others)
    elif config.search:
        report = dataclasses.replace(report, largest=largest_that_fits(report, compile_anew))
    return dataclasses.replace(report, compile_seconds=max(seconds))


def _request(subject: Subject, found: Slice, shape: SlabShape) -> Request:
    """What the planner is asked, as an extraction asks it."""
    places, travel = subject.mesh.shape, subject.rows_travel
    captures = captured_bytes(subject.plan, subject.config, shape, platform_of(subject.mesh), travel)
    return Request(
        counts=subject.counts,
        chip=found.chip,
        data=places["data"],
        model=places["model"],
        rows=shape.rows,
        length=shape.length,
        capture_bytes=captures * (subject.mesh.size if travel else 1),
        attention_block=attention_block(shape.length) if subject.numerics.attention == "splash" else 1,
    )


def _tokens(shape: SlabShape) -> int:
    return shape.tokens


def _layout(config: CompileConfig, decision: Decision) -> Layout:
    return decision.layout if config.layout == "auto" else Layout(config.layout)


def _mesh(config: CompileConfig, found: Slice) -> Mesh:
    shape = parse_mesh_shape(config.mesh_shape) if config.mesh_shape else None
    if shape and math.prod(shape) != len(found.devices):
        raise UserError(
            f"--mesh_shape {shape[0]},{shape[1]} has {math.prod(shape)} places but {found.name} has "
            f"{len(found.devices)} chips; write two numbers whose product is that, such as "
            f"{found.axes[0]},{found.axes[1]}"
        )
    return make_mesh(shape, found.devices)


def _full_slab(config: CompileConfig, max_length: int) -> SlabShape:
    """A slab of samples of the greatest length, without padding."""
    defaults = platform.TPU
    length = -(-max_length // defaults.length_multiple) * defaults.length_multiple
    most = (config.slab_tokens or defaults.slab_tokens) // length
    return SlabShape(length, max(1, min(config.batch_size, most)), 1)
