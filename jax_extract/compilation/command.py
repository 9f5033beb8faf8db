"""`jax-extract compile`: what a run will need on a TPU slice, from the slice's own compiler, before it is paid for.

In: `CompileConfig`. Out: a `Report`: what a chip's memory holds, the largest batch that fits, what crosses chips, and
from counted work the time and the cost, with the assumptions that they rest on. Runs on any Linux machine, and takes no
device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from jax_extract.compilation.config import CompileConfig
from jax_extract.compilation.models import open_config
from jax_extract.compilation.programs import Compiled, Subject, compile_program
from jax_extract.compilation.topology import Slice, open_slice
from jax_extract.devices import platform
from jax_extract.devices.layouts_explained import explain
from jax_extract.devices.mesh import make_mesh, parse_mesh_shape, platform_of
from jax_extract.devices.planner import (
    MEMORY_MARGIN,
    STEPS_HELD,
    Decision,
    LayoutCost,
    Request,
    choose_layout,
    layout_cost,
)
from jax_extract.devices.sharding import Layout
from jax_extract.errors import UserError
from jax_extract.extraction.capture import capture_plan, sequence_limit
from jax_extract.extraction.program import captured_bytes
from jax_extract.extraction.summary import captures_text
from jax_extract.inputs.planning.slabs import SlabShape
from jax_extract.terminal import Terminal, bytes_text, duration_text, milliseconds_text, plural, share_text
from jax_extract.weights.open_model import OpenModel

_TRIES = 4  # programs that the search for the largest batch compiles, besides the first
_MOST_ROWS = 4_096
_NO_CHECKPOINT: Any = None


@dataclass(frozen=True)
class Report:
    """Attributes:
    compiled: the program asked for; None where it does not fit.
    largest: the largest slab found to fit; None where none was looked for, or none fits.
    """

    config: CompileConfig
    slice: Slice
    subject: Subject
    decision: Decision
    cost: LayoutCost
    shape: SlabShape
    compiled: Compiled | None
    largest: Compiled | None

    @property
    def room(self) -> float:
        """Bytes of a chip's memory that may be taken."""
        return (1 - MEMORY_MARGIN) * self.slice.chip.memory_bytes

    @property
    def chips(self) -> int:
        return len(self.slice.devices)

    @property
    def step_tokens(self) -> int:
        """Of all chips."""
        return self.chips * self.shape.tokens

    @property
    def host_bytes(self) -> float:
        """That reach one host in a step; a host has as many chips as the others."""
        return self.compiled.captures * self.chips / self.slice.hosts if self.compiled else 0.0

    @property
    def host_seconds(self) -> float:
        return self.host_bytes / (self.config.host_gb_per_second * 1e9)

    @property
    def seconds(self) -> float:
        """Of a step: computing and writing go on at the same time."""
        return max(self.cost.seconds, self.host_seconds)

    @property
    def bound(self) -> str:
        return "host output" if self.host_seconds > self.cost.seconds else self.cost.bound

    @property
    def run_hours(self) -> float | None:
        return self.config.tokens / self.step_tokens * self.seconds / 3_600 if self.config.tokens else None


def compile_command(config: CompileConfig, terminal: Terminal | None = None) -> Report:
    """The command.

    Raises:
      UserError: the request fits neither the model nor the slice, or there is no compiler here.
    """
    jax.config.update("jax_platforms", "cpu")  # this machine's own chips stay free
    terminal = terminal or Terminal()

    report = compile_for(config, lambda chosen: _tell_chosen(chosen, terminal))
    tell(report, terminal)
    return report


def compile_for(config: CompileConfig, told: Callable[[Report], None] = lambda _: None) -> Report:
    """Chooses a layout, compiles, looks for the largest batch; `told` hears what was chosen before that takes time."""
    config.check()
    port, model = open_config(config.model_path, config.revision)
    plan = capture_plan(
        OpenModel(_NO_CHECKPOINT, port, model),
        config.layers_to_extract,
        config.hook_points,
        config.positions,
        config.capture_dtype,
    )
    shape = _slab_shape(config, model)
    found = open_slice(config.topology)
    subject = Subject(port, model, plan, _mesh(config, found), config.dtype)
    request = _request(subject, found, shape)
    decision = choose_layout(request, config.share_of_peak)
    cost = layout_cost(_layout(config, decision), request, config.share_of_peak)
    report = Report(config, found, subject, decision, cost, shape, None, None)
    told(report)
    report = dataclasses.replace(report, compiled=compile_program(subject, _layout(config, decision), shape))
    return dataclasses.replace(report, largest=_largest(report)) if config.search else report


def _request(subject: Subject, found: Slice, shape: SlabShape) -> Request:
    """What the planner is asked, as an extraction asks it."""
    places = subject.mesh.shape
    captures = captured_bytes(subject.plan, subject.config, shape, platform_of(subject.mesh))
    return Request(subject.counts, found.chip, places["data"], places["model"], shape.rows, shape.length, captures)


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


def _slab_shape(config: CompileConfig, model: Any) -> SlabShape:
    """The slab of the longest samples, as the batch plan makes it."""
    defaults = platform.TPU
    length = -(-sequence_limit(config.max_seq_length, model) // defaults.length_multiple) * defaults.length_multiple
    most = (config.slab_tokens or defaults.slab_tokens) // length
    return SlabShape(length, max(1, min(config.batch_size, most)), 1)


def _largest(report: Report) -> Compiled | None:
    """The most rows that were compiled and fit: memory grows evenly with rows, so two programs foretell the third."""
    config, known = report.config, {report.shape.rows: report.compiled}
    for _ in range(_TRIES):
        if (rows := _foretold(known, report)) in known:
            break
        shape = report.shape._replace(rows=rows)
        # An extraction with so many rows would choose anew, and so must this.
        decision = choose_layout(_request(report.subject, report.slice, shape), config.share_of_peak)
        known[rows] = compile_program(report.subject, _layout(config, decision), shape)
    fitting = [found for found in known.values() if found and found.memory(STEPS_HELD) <= report.room]
    return max(fitting, key=lambda found: found.shape.rows, default=None)


def _foretold(known: dict[int, Compiled | None], report: Report) -> int:
    """The rows to try next."""
    measured = sorted((rows, found.memory(STEPS_HELD)) for rows, found in known.items() if found)
    too_many = min((rows for rows, found in known.items() if not found), default=_MOST_ROWS + 1)
    if not measured:
        return max(1, too_many // 2)
    (rows, memory), fixed = measured[-1], report.cost.stored
    slope = (memory - fixed) / rows
    if len(measured) > 1:
        (fewer, less) = measured[0]
        slope = (memory - less) / (rows - fewer)
        fixed = memory - slope * rows
    foretold = int((report.room - fixed) / slope)
    # What the compiler has refused says that the line bends before it.
    return max(1, foretold if foretold < too_many else (rows + too_many) // 2)


# ----------------------------------------------------------------------------------------- what is told


def _tell_chosen(report: Report, terminal: Terminal) -> None:
    """What is known before anything is compiled."""
    config, found, subject, shape = report.config, report.slice, report.subject, report.shape
    model, axes = subject.config, subject.mesh.shape
    terminal.line(
        "model",
        f"{config.model_path} ({model.model_type}, {model.num_hidden_layers} layers, of which {subject.blocks} run, "
        f"d_model {model.hidden_size}) in {subject.dtype}, attention {subject.numerics.attention}",
    )
    terminal.line("capture", captures_text(subject.plan))
    terminal.line(
        "slice",
        f"{found.name}: {plural(len(found.devices), 'chip')} on {plural(found.hosts, 'host')}, "
        f"mesh {axes['data']},{axes['model']}; "
        f"{plural(shape.rows, 'sequence')} of {shape.length:,} tokens a chip and step",
    )
    chosen = "as asked" if config.layout != "auto" else report.decision.reason
    terminal.line("layout", f"{report.cost.name}: {chosen}")
    if config.explain:
        for row in explain(report.decision, subject.counts, axes["model"], config.share_of_peak):
            terminal.line("", row)
    more = f", then up to {_TRIES} more for the largest batch" if config.search else ""
    terminal.line("compiles", f"one program{more}; each takes from ten seconds to a minute")


def tell(report: Report, terminal: Terminal) -> None:
    """What a person wants to know, the conclusion last."""
    config, compiled, chip = report.config, report.compiled, report.slice.chip
    if compiled is None:
        terminal.line("memory", f"does not fit the {bytes_text(chip.memory_bytes)} of a chip")
    else:
        _tell_compiled(report, compiled, terminal)
    if report.largest:
        rows = report.largest.shape.rows
        terminal.line(
            "largest",
            f"{plural(rows, 'sequence')} of {report.shape.length:,} tokens a chip "
            f"({bytes_text(report.largest.memory(STEPS_HELD))}): --batch_size {rows} "
            f"--slab_tokens {rows * report.shape.length}",
        )
    elif config.search:
        terminal.line(
            "largest", "no batch of this length fits; a longer model axis, or a shorter --max_seq_length, may"
        )
    if compiled:
        _tell_time(report, terminal)


def _tell_compiled(report: Report, compiled: Compiled, terminal: Terminal) -> None:
    chip, memory = report.slice.chip, compiled.memory(STEPS_HELD)
    free = 1 - memory / chip.memory_bytes
    margin = (
        f"{share_text(free)} free" if memory <= report.room else f"less than the {share_text(MEMORY_MARGIN)} to keep"
    )
    parts = {
        "parameters": compiled.arguments,
        f"captures of {STEPS_HELD} steps": STEPS_HELD * compiled.captures,
        "temporaries": compiled.temporaries,
        "code": compiled.code,
    }
    said = ", ".join(f"{what} {bytes_text(size)}" for what, size in parts.items())
    terminal.line("memory", f"{bytes_text(memory)} of {bytes_text(chip.memory_bytes)} a chip, {margin}: {said}")
    kinds: dict[str, float] = {}
    for collective in compiled.moved:
        kinds[collective.kind] = kinds.get(collective.kind, 0) + collective.received
    moved = ", ".join(f"{kind} {bytes_text(size)}" for kind, size in kinds.items()) or "nothing"
    only = f"; NOT only parameters: {', '.join(compiled.foreign)}" if compiled.foreign else ""
    terminal.line("moves", f"{moved} to a chip and step{only or ' (parameters only)' * bool(kinds)}")
    terminal.line("outputs", f"{compiled.unique_shards} of {compiled.output_shards} shards of captures are unique")
    counts, shape = report.subject.counts, compiled.shape
    inflation = (
        f"; the program counts {compiled.work:.4f} times the products that its rows need" if compiled.work else ""
    )
    terminal.line("work", f"{counts.flops(shape.rows, shape.length) / 1e12:.3g} TFLOP a chip and step{inflation}")


def _tell_time(report: Report, terminal: Terminal) -> None:
    config, cost = report.config, report.cost
    parts = {
        "computing": cost.compute_seconds,
        "HBM": cost.memory_seconds,
        "parameters": cost.moving_seconds + cost.waiting_seconds,
        f"{bytes_text(report.host_bytes)} to each host": report.host_seconds,
    }
    terminal.line(
        "step",
        f"{milliseconds_text(report.seconds)} for {report.step_tokens:,} tokens: "
        + ", ".join(f"{what} {milliseconds_text(seconds)}" for what, seconds in parts.items()),
    )
    terminal.line(
        "assumes",
        f"{share_text(config.share_of_peak)} of the published {report.slice.chip.peak_flops / 1e12:.0f} TFLOP/s, "
        f"{config.host_gb_per_second:g} GB/s out of a host, no padding; nothing of this was measured on a chip",
    )
    terminal.line("bound", f"by {report.bound}")
    terminal.line("speed", f"{report.step_tokens / report.seconds:,.0f} tokens/s")
    if report.run_hours is not None:
        chip_hours = report.run_hours * report.chips
        price = config.price_per_chip_hour
        paid = f", {chip_hours * price:,.2f} at {price:g} a chip and hour" if price else ""
        lasts = duration_text(report.run_hours * 3_600)
        terminal.line("run", f"{config.tokens:,} tokens: {lasts}, {chip_hours:,.3g} chip-hours{paid}")
