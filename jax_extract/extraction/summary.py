"""What the command tells a person, before and after: request, input, plan, result.

In: the job, the input's counts, the plan, what came of it. Out: labelled lines on a `Terminal`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from jax_extract.config import ExtractConfig
from jax_extract.devices.layouts_explained import explain
from jax_extract.devices.planner import SHARE_OF_PEAK
from jax_extract.devices.platform import device_kind
from jax_extract.devices.sharding import Layout
from jax_extract.extraction.accounting import StepCounts, TokenShares
from jax_extract.extraction.jax_backend import JaxBackend
from jax_extract.extraction.loop import LoopStatistics
from jax_extract.extraction.prepare import Job
from jax_extract.inputs.contexts import ContextCounts
from jax_extract.inputs.planning.slabs import Shapes
from jax_extract.inputs.planning.windows import Part, shapes_of
from jax_extract.inputs.sources import Source
from jax_extract.inputs.tokenize import InputCounts
from jax_extract.store.finite import FLOAT16_ENDS
from jax_extract.store.formats import SUFFIXES
from jax_extract.terminal import Terminal, bytes_text, plural, ranges_text, share_text
from jax_extract.weights.open_model import OpenModel
from models.capture_plan import CapturePlan
from models.ports import Port

_LEFT_OUT_NAMED = 3
IDLE_TOLD = 0.1  # of what devices compute: more than that has a line of its own


def tell_request(job: Job, config: ExtractConfig, processes: int, terminal: Terminal) -> None:
    tell_model(job, processes, terminal)
    for note in job.model.notes:
        terminal.line("note", note)
    terminal.line(
        "capture",
        f"{captures_text(job.plan)}, as {config.shard_format} "
        f"into {config.activations_dir}/" + (f", then {config.gcs_bucket}" if config.gcs_bucket else ""),
    )
    _tell_contexts(job, config, terminal)


def _tell_contexts(job: Job, config: ExtractConfig, terminal: Terminal) -> None:
    """Where the default finds no token to put anywhere."""
    wanted, form = (config.context_start, config.context_separator), job.contexts
    if form and None in wanted and getattr(job.model.tokenizer, "bos_token_id", None) is None:
        terminal.line(
            "note",
            "this model's tokenizer has no BOS token, so none is put before contexts or between texts; "
            "--context_separator eos puts its end token between texts",
        )


def tell_model(job: Job, processes: int, terminal: Terminal) -> None:
    model, backend, mesh = job.model.config, job.backend, job.backend.mesh_shape
    library = "" if backend.name == "jax" else f" with {backend.name}"
    terminal.line(
        "model",
        f"{job.model.name} ({model.model_type}, {model.num_hidden_layers} layers, d_model {model.hidden_size})"
        + (f" with the adapter {adapter}" if (adapter := job.model.checkpoint.adapter) else "")
        + " in "
        f"{backend.dtype}{library} on {plural(backend.devices, backend.device_kind + ' device')}"
        + (f" of {plural(processes, 'host')}" if processes > 1 else "")
        + f", mesh {mesh['data']},{mesh['model']}",
    )
    tell_model_notes(job.model, terminal)
    if note := slower_text(job):
        terminal.line("note", note)


def slower_text(job: Job) -> str | None:
    """Where JAX would do the same faster."""
    if job.backend.name != "torch" or job.backend.device_kind != "cpu" or not isinstance(job.model.family, Port):
        return None
    return (
        "--backend jax has a port of this model: on two processor cores it was 1.02 to 2.25 times as fast as Hugging "
        "Face's own forward, most where prompts differ in length (docs/performance.md)"
    )


def tell_model_notes(model: OpenModel, terminal: Terminal) -> None:
    """What a model's files say that is no error; one line, because a line told twice is told once."""
    if model.notes:
        terminal.line("note", "; ".join(model.notes))


def captures_text(plan: CapturePlan) -> str:
    """Which rows are kept, and in which dtype."""
    hooks = "; ".join(
        f"{hook} at layers {ranges_text(layers)} ({len(layers)})" if layers else hook for hook, layers in plan.layers
    )
    return f"{hooks}; positions {plan.positions}, {plan.dtype}"


def each_text(sites: Iterable[tuple[str, int | None]]) -> str:
    """Of what there are so many rows each: `a layer`, `a hook point` or `a layer and hook point`."""
    there = list(sites)
    if all(layer is None for _, layer in there):
        return "a hook point"
    return "a layer" if len({hook for hook, _ in there}) == 1 else "a layer and hook point"


def tell_input(source: Source, counts: InputCounts, job: Job, terminal: Terminal) -> None:
    if not source.finite:
        joined = f" and joined into contexts of {plural(job.contexts.tokens, 'token')}" if job.contexts else ""
        terminal.line("input", f"{source.name}, read as a stream{joined}")
        return
    cut = ""
    if counts.truncated_samples:
        cut = f"; {plural(counts.truncated_samples, 'sample')} truncated to {plural(job.prompt_length, 'token')}"
    if counts.empty_samples:
        noun = "text" if job.contexts else "sample"
        cut += f"; {plural(counts.empty_samples, noun)} without a token left out"
    if left_out := len(source.left_out):
        named = ", ".join(source.left_out[:_LEFT_OUT_NAMED]) + (", …" if left_out > _LEFT_OUT_NAMED else "")
        cut += f"; {plural(left_out, 'unusable task')} left out: {named}"
    read, longest = plural(counts.samples, "sample"), f", longest {counts.longest_sample:,}"
    if isinstance(counts, ContextCounts):
        read = f"{plural(counts.documents, 'text')} in {plural(counts.samples, 'context')}"
        longest = f" ({counts.added_tokens:,} of them before contexts and between texts)"
    terminal.line("input", f"{PurePath(source.name).name}: {read}, {plural(counts.tokens, 'token')}{longest}{cut}")
    for note in source.notes:
        terminal.line("note", note)
    tell_notes(counts, job, terminal)


def tell_notes(counts: InputCounts, job: Job, terminal: Terminal) -> None:
    """What became of the texts without anybody asking for it."""
    for note in _notes(counts, job):
        terminal.line("note", note)


def _notes(counts: InputCounts, job: Job) -> Iterator[str]:
    yield from job.model.tokenizer_notes
    if count := counts.opened_samples:
        begin = "begins" if count == 1 else "begin"
        yield (
            f"{plural(count, 'sample')} {begin} with {counts.opening} already and got no second one; "
            "--add_special_tokens True adds it all the same"
        )
    if counts.clock_text is not None:
        yield f"the chat template writes the date; this run keeps {counts.clock_text!r}, of when it was begun"


def tell_plan(parts: Sequence[Part], counts: StepCounts, terminal: Terminal, fewer: str = "") -> None:
    """`counts` are those of all parts on the devices that are there; `fewer` as `idle_text` takes it."""
    shapes, batches = shapes_of(parts), parts[-1].batch
    files = "" if len(parts) == batches else f" in {plural(len(parts), 'file')} a layer"
    terminal.line(
        "plan",
        f"{plural(batches, 'batch')}{files}, rows of up to {plural(max(shapes).length, 'token')} in "
        f"{plural(len(shapes), 'shape')}; {shares_text(counts.shares, counts.devices > 1)}{unseen_text(counts)}",
    )
    if counts.shares.idle > IDLE_TOLD:
        terminal.line("note", idle_text(counts, sum(map(len, parts)), fewer))


def tell_without_rows(parts: Sequence[Part], job: Job, terminal: Terminal) -> None:
    """How many samples nothing is kept of."""
    positions = job.plan.positions
    if short := sum(int((positions.rows_of(part.lengths) == 0).sum()) for part in parts):
        gives = "has no token at positions {} and gives" if short == 1 else "have no token at positions {} and give"
        terminal.line("note", f"{plural(short, 'sample')} {gives.format(positions)} no row")


def shares_text(shares: TokenShares, several_devices: bool) -> str:
    """`real 97.1%, padding within rows 1.9%, idle devices 1.0%`: of the tokens that devices compute."""
    return f"real {share_text(shares.real)}, {_lost_text(shares, several_devices)}"


def _lost_text(shares: TokenShares, several_devices: bool) -> str:
    idle = f", idle devices {share_text(shares.idle)}" if several_devices else ""
    return f"padding within rows {share_text(shares.padding)}{idle}"


def unseen_text(counts: StepCounts) -> str:
    """What attention computes of two samples, where it computes any of it; to be put behind the shares."""
    unseen = counts.unseen_share
    return f"; attention across samples {share_text(unseen)} of the work" if unseen else ""


def idle_text(counts: StepCounts, samples: int, fewer: str = "") -> str:
    """Why devices are idle, and what would help; `fewer` is the flag that takes fewer devices, where there is one."""
    enough = math.ceil(counts.devices * (1 - counts.shares.idle))
    flag = f" ({fewer})" if fewer else ""
    return (
        f"idle devices {share_text(counts.shares.idle)}: {plural(samples, 'sample')} of these lengths do not fill "
        f"{plural(counts.devices, 'device')}; about {enough} would be as fast{flag}, and more samples (--n_samples) "
        "fill more"
    )


_UNCOUNTED = {
    Layout.REPLICATED: "the devices of a process share one copy",
    Layout.GATHERED: "cut over the model axis, if it has more than one place",
}


def tell_layout(job: Job, weights: Any, shapes: Shapes, terminal: Terminal) -> None:
    """How parameters will lie on the mesh, and what was counted for it."""
    backend = job.backend
    if not isinstance(backend, JaxBackend):
        terminal.line("layout", f"whole on {backend.device_kind}")
        return
    if (decision := backend.layout(job.model, job.plan, weights, shapes)) is None:
        layout = backend.uncounted_layout
        terminal.line(
            "layout",
            f"{layout.value}: {_UNCOUNTED[layout]}; nothing was counted, because only TPU chips are known here and "
            f"this is {device_kind()} (jax-extract compile --explain counts for TPU slices)",
        )
        return
    terminal.line("layout", f"{decision.layout.value}: {decision.reason}")
    for row in explain(decision, backend.counts(job.model, weights), backend.mesh_shape["model"], SHARE_OF_PEAK):
        terminal.line("", row)


def tell_result(metadata: Mapping[str, Any], statistics: LoopStatistics, place: object, terminal: Terminal) -> None:
    if statistics.parts:
        sessions = metadata["sessions"]
        several_devices = any(math.prod(session.get("mesh", {}).values()) > 1 for session in sessions)
        shares = TokenShares.of(statistics.tokens, statistics.slab_tokens, statistics.idle_tokens)
        terminal.line(
            "done",
            f"{plural(statistics.samples, 'sample')}, {plural(statistics.tokens, 'token')} in "
            f"{statistics.seconds:.1f} s: {statistics.tokens / statistics.seconds:,.0f} tokens/s, "
            f"{statistics.compile_seconds:.1f} s compiling; {_lost_text(shares, several_devices)}",
        )
        terminal.line("stages", stages_text(statistics))
        if any(session.get("processes", 1) > 1 for session in sessions):
            terminal.line("hosts", hosts_text(statistics))
    else:
        terminal.line("done", "everything was committed already; nothing to do")
    shards = sum(len(batch["files"]) for batch in metadata["batches"])
    terminal.line(
        "output",
        f"{plural(metadata['total_samples'], 'sample')}, {plural(metadata['total_rows'], 'row')} "
        f"{each_text((site['hook'], site['layer']) for site in metadata['sites'])}, "
        f"{plural(shards, SUFFIXES[metadata['shard_format']] + ' file')}, {bytes_text(metadata['total_bytes'])} "
        f"in {place}/",
    )
    if bad := metadata["not_finite_rows"]:
        mend = FLOAT16_ENDS if metadata["capture_dtype"] == "float16" else "see jax-extract inspect"
        terminal.line("warning", f"{plural(bad, 'row')} hold infinite or undefined values; {mend}")
    if cut := (metadata["input"] or {}).get("truncated_samples"):
        terminal.line(
            "note",
            f"{plural(cut, 'sample')} truncated to fit --max_seq_length {metadata['plan_settings']['max_length']:,}",
        )
    terminal.line("read it", f"jax-extract inspect {place}")


_STAGES = {"device": "computing", "writer": "writing", "input": "reading the input"}


def stages_text(statistics: LoopStatistics) -> str:
    """Which stage the others waited for, and by how much."""
    waited, seconds = statistics.waited, statistics.seconds
    slowest = max(waited, key=lambda stage: waited[stage])
    others = ", ".join(f"{waited[stage]:.1f} s for {_STAGES[stage]}" for stage in _STAGES if stage != slowest)
    return f"bound by {_STAGES[slowest]}: {waited[slowest]:.1f} of {seconds:.1f} s spent waiting for it, {others}"


def hosts_text(statistics: LoopStatistics) -> str:
    """Whether a host of a program sat out steps in which others computed; of the one that sat out most."""
    if not statistics.idle_steps:
        return f"{plural(statistics.steps, 'step')}; every host had something to compute in each"
    return (
        f"{plural(statistics.steps, 'step')}; the host that sat out most had nothing to compute in "
        f"{statistics.idle_steps} of them ({share_text(statistics.idle_steps / statistics.steps)})"
    )
