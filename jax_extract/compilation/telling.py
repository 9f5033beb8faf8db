"""What `jax-extract compile` tells a person: the request, the plan, what the compiler said, seconds and cost.

In: a `Report`, as far as it is filled. Out: labelled lines on a `Terminal`, the conclusion last.
"""

from __future__ import annotations

from jax_extract.compilation.config import CompileConfig
from jax_extract.compilation.largest import TRIES
from jax_extract.compilation.programs import Compiled, Subject
from jax_extract.compilation.report import Report
from jax_extract.compilation.topology import Slice
from jax_extract.devices.layouts_explained import explain
from jax_extract.devices.planner import MEMORY_MARGIN, STEPS_HELD
from jax_extract.extraction.summary import captures_text, tell_plan
from jax_extract.inputs.planning.slabs import SlabShape
from jax_extract.terminal import Terminal, bytes_text, duration_text, milliseconds_text, plural, share_text


def tell_request(config: CompileConfig, found: Slice, subject: Subject, terminal: Terminal) -> None:
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
        f"mesh {axes['data']},{axes['model']}",
    )


def tell_slabs(report: Report, terminal: Terminal) -> None:
    """What will be computed: the steps of the plan by slab shape, or that there is none."""
    if report.planned is None:
        terminal.line(
            "plan",
            f"none: figures are for full slabs, {_slab_text(report.shape)} a chip; --tasks_file FILE, or --lengths "
            "FILE with token counts, plans your samples and counts padding, idle chips and output",
        )
        return
    tell_plan(report.planned.parts, report.planned.counts, terminal, fewer="a smaller --topology")
    steps, all_tokens = report.planned.counts.steps, report.planned.counts.slab_tokens
    terminal.line("", f"{'slab of a chip':<18} {'samples a row':>13} {'steps':>9} {'of tokens':>10} {'a step':>10}")
    for shape in report.planned.shapes:
        share = report.chips * steps[shape] * shape.tokens / all_tokens
        terminal.line(
            "",
            f"{_slab_text(shape):<18} {'up to ' + str(shape.samples):>13} {steps[shape]:>9,} {share_text(share):>10} "
            f"{milliseconds_text(report.step_seconds(shape)):>10}",
        )


def tell_chosen(report: Report, terminal: Terminal) -> None:
    """The layout, and what will be compiled."""
    config, subject = report.config, report.subject
    chosen = "as asked" if config.layout != "auto" else report.decision.reason
    terminal.line("layout", f"{report.cost.name}: {chosen}")
    if config.explain:
        for row in explain(report.decision, subject.counts, subject.mesh.shape["model"], config.share_of_peak):
            terminal.line("", row)
    programs, more = 1, ""
    if config.search and report.planned:
        programs = len(report.planned.shapes)
    elif config.search:
        more = f", then up to {TRIES} more for the largest batch"
    terminal.line("compiles", f"{plural(programs, 'program')}{more}; each takes from ten seconds to a minute")


def tell(report: Report, terminal: Terminal) -> None:
    config, compiled, chip = report.config, report.compiled, report.slice.chip
    if compiled is None:
        terminal.line("memory", f"does not fit the {bytes_text(chip.memory_bytes)} of a chip")
    else:
        _tell_compiled(report, compiled, terminal)
    if report.planned:
        _tell_others(report, terminal)
    elif config.search:
        _tell_largest(report, terminal)
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
    terminal.line("moves", _moves_text(report, compiled))
    unique = f"{compiled.unique_shards} of {compiled.output_shards} shards of captures are unique"
    if report.subject.rows_travel:
        unique = f"every chip has the captured rows of all {report.chips}, so any host can store those of any sample"
    terminal.line("outputs", unique)
    inflation = (
        f"; the program counts {compiled.work:.4f} times the products that its rows need" if compiled.work else ""
    )
    flops = report.cost.compute_seconds * report.config.share_of_peak * chip.peak_flops
    terminal.line("work", f"{flops / 1e12:.3g} TFLOP a chip and step{inflation}")


def _moves_text(report: Report, compiled: Compiled) -> str:
    """What arrives at a chip in a step."""
    rows = report.travelling_bytes(compiled.shape)
    moved = {
        "of parameters": sum(collective.received for collective in compiled.moved) - rows,
        "of captured rows": rows,
    }
    said = " and ".join(f"{bytes_text(size)} {what}" for what, size in moved.items() if size > 0) or "nothing"
    foreign = f"; NOT only these: {', '.join(compiled.foreign)}" if compiled.foreign else ""
    return f"{said} to a chip and step{foreign}"


def _tell_others(report: Report, terminal: Terminal) -> None:
    """Whether the other programs of the plan fit."""
    if not report.others:
        return
    told = []
    for shape, compiled in report.others.items():
        fits = compiled is not None and compiled.memory(STEPS_HELD) <= report.room
        size = bytes_text(compiled.memory(STEPS_HELD)) if compiled else "more than a chip has"
        told.append(f"{_slab_text(shape)} {size}{'' if fits else ', which does NOT fit: give a smaller --slab_tokens'}")
    terminal.line("others", "; ".join(told))


def _tell_largest(report: Report, terminal: Terminal) -> None:
    if report.largest is None:
        terminal.line(
            "largest", "no batch of this length fits; a longer model axis, or a shorter --max_seq_length, may"
        )
        return
    rows, length = report.largest.shape.rows, report.shape.length
    terminal.line(
        "largest",
        f"{plural(rows, 'sequence')} of {length:,} tokens a chip ({bytes_text(report.largest.memory(STEPS_HELD))}): "
        f"--batch_size {rows} --slab_tokens {rows * length}",
    )


def _tell_time(report: Report, terminal: Terminal) -> None:
    config, cost = report.config, report.cost
    parts = {
        "computing": cost.compute_seconds,
        "HBM": cost.memory_seconds,
        "parameters": cost.moving_seconds + cost.waiting_seconds,
    }
    if report.subject.rows_travel:
        parts["captured rows"] = report.travelling_seconds(report.shape)
    terminal.line(
        "step",
        f"{milliseconds_text(report.step_seconds(report.shape))} for {report.step_tokens:,} tokens: "
        + ", ".join(f"{what} {milliseconds_text(seconds)}" for what, seconds in parts.items()),
    )
    terminal.line(
        "assumes",
        f"{share_text(config.share_of_peak)} of the published {report.slice.chip.peak_flops / 1e12:.0f} TFLOP/s; of a "
        f"host {config.host_gb_per_second:g} GB/s into disk or bucket, and {config.host_tokens_per_second:,.0f} "
        "tokens/s read and tokenised"
        + ("; programs compiled as fast as here, loaded weights not counted" if report.planned else "")
        + "; nothing of this was measured on a chip",
    )
    terminal.line("bound", f"by {report.bound}: {_stages_text(report)}")
    whole = f", {report.tokens / report.seconds:,.0f} over the whole run" if report.planned else ""
    terminal.line("speed", f"{report.tokens / report.working_seconds:,.0f} tokens/s{whole}")
    if report.planned or config.tokens:
        _tell_run(report, terminal)


def _stages_text(report: Report) -> str:
    """What the stages take; of the run, or of a step where nobody says how long the run is."""
    programs = plural(len(report.steps), "program")
    stages = {
        f"compiling {programs}": report.start_seconds,
        "reading and tokenising": report.reading_seconds,
        "computing": report.computing_seconds,
        f"{bytes_text(report.output_bytes / report.slice.hosts)} out of each host": report.output_seconds,
    }
    is_run = report.planned is not None or report.config.tokens
    said = duration_text if is_run else milliseconds_text
    return ", ".join(f"{stage} {said(seconds)}" for stage, seconds in stages.items() if seconds)


def _tell_run(report: Report, terminal: Terminal) -> None:
    chip_hours = report.seconds / 3_600 * report.chips
    price = report.config.price_per_chip_hour
    paid = f", {chip_hours * price:,.2f} at {price:g} a chip and hour" if price else ""
    samples = f"{plural(report.planned.samples, 'sample')}, " if report.planned else ""
    lasts = _lasts_text(report, report.seconds)
    terminal.line("run", f"{samples}{report.tokens:,.0f} tokens: {lasts}; {chip_hours:,.3g} chip-hours{paid}")
    if report.planned:
        compiled = _lasts_text(report, report.seconds - report.start_seconds)
        terminal.line("again", f"{compiled}, where its programs are in the compilation cache already")
        useful = report.planned.counts.useful_share
        terminal.line("useful", f"{share_text(useful)} of what the chips compute is for the tokens of samples")


def _lasts_text(report: Report, seconds: float) -> str:
    share = share_text(report.computing_seconds / seconds)
    return f"{duration_text(seconds)}, in {share} of which the chips compute"


def _slab_text(shape: SlabShape) -> str:
    return f"{shape.rows} x {shape.length:,} tokens"
