"""What `jax-extract estimate` tells a person, the conclusion last.

In: an `Estimate`. Out: labelled lines on a `Terminal`.
"""

from __future__ import annotations

from jax_extract.estimation.figures import Estimate
from jax_extract.estimation.output import Output
from jax_extract.extraction.summary import each_text
from jax_extract.store.formats import SUFFIXES
from jax_extract.store.parts import Site
from jax_extract.store.storage.verbs import BUCKET_SCHEME
from jax_extract.terminal import Terminal, bytes_text, duration_text, plural, ranges_text, share_text

_BOUND = {"computing": "computing", "writing": "writing", "reading": "reading and tokenising the input"}
_FASTER_READING = "more processor cores a host, or more hosts of one program, shorten it"


def tell(found: Estimate, terminal: Terminal) -> None:
    """What a person wants to know, the conclusion last."""
    output, work = found.output, found.work
    if work.committed_samples:
        terminal.line("resume", f"{plural(work.committed_samples, 'sample')} committed already and not counted")
    if found.config.max_new_tokens is not None:
        terminal.line("note", "answering takes its own time, which is not counted")
    if not output.parts:
        terminal.line("estimate", "everything is committed already; nothing to do")
        return
    if work.covers == "million":
        terminal.line("covers", "1,000,000 tokens like those of the first window; how many there are nobody knows")
    elif work.covers == "foretold":
        terminal.line("covers", f"{plural(output.samples, 'sample')}, as the first window foretells them")
    terminal.line(
        "output",
        f"{plural(output.samples, 'sample')}, {plural(output.rows, 'row')} "
        f"{each_text((site.hook, site.layer) for site in output.site_bytes)}: {bytes_text(output.shard_bytes)} in "
        f"{plural(output.shards, SUFFIXES[found.config.shard_format] + ' file')}, the largest "
        f"{bytes_text(output.largest_shard)}",
    )
    terminal.line(
        "files",
        f"{bytes_text(output.file_bytes)} in {plural(output.objects, 'file')}, with token ids, checksums, records",
    )
    a_sample = output.shard_bytes / output.samples
    terminal.line(
        "sample",
        f"{bytes_text(a_sample)} a sample"
        + (
            ""
            if found.config.one_file_per_layer
            else f"; {bytes_text(a_sample * work.samples_per_batch)} a batch of "
            f"{plural(work.samples_per_batch, 'sample')}"
        ),
    )
    for row in _table(output):
        terminal.line("", row)
    terminal.line("room", _room_text(found))
    assert found.compute is not None
    terminal.line("read", _reading_text(found))
    terminal.line(
        "compute",
        f"{duration_text(found.computing_seconds)}, {output.tokens / found.computing_seconds:,.0f} tokens/s"
        f"{_shared_text(found.workers, 'workers')}; before that "
        f"{duration_text(found.program_seconds)} to load the weights and compile {plural(len(work.steps), 'program')} "
        f"(timed: {plural(found.compute.tried, 'step')} of {plural(len(found.compute.step_seconds), 'shape')})",
    )
    rates = ", ".join(f"{bytes_text(probe.bytes_per_second)}/s into {name}" for name, probe in found.writes.items())
    terminal.line(
        "write",
        f"{duration_text(found.writing_seconds)}: {rates}{_shared_text(found.writers, 'processes')}",
    )
    terminal.line("bound", _bound_text(found))
    per = " for 1,000,000 tokens" if work.covers == "million" else ""
    terminal.line(
        "estimate",
        f"{duration_text(found.seconds)}, {bytes_text(output.file_bytes)} in {plural(output.objects, 'file')}{per}",
    )


def _table(output: Output) -> list[str]:
    """One line a hook point; its layers are all of one size."""
    lines = [f"{'hook point':<16} {'layers':<12} {'a row':>9} {'a sample':>9} {'a layer':>9} {'together':>9}"]
    hooks: dict[str, list[Site]] = {}
    for site in output.site_bytes:
        hooks.setdefault(site.hook, []).append(site)
    for hook, sites in hooks.items():
        size = output.site_bytes[sites[0]]
        layers = ranges_text([site.layer for site in sites if site.layer is not None])
        row = output.row_bytes / output.rows * sites[0].width / sum(site.width for site in output.site_bytes)
        sizes = (row, size / output.samples, size, sum(output.site_bytes[site] for site in sites))
        lines.append(f"{hook:<16} {layers:<12} " + " ".join(f"{bytes_text(n):>9}" for n in sizes))
    return lines


def _room_text(found: Estimate) -> str:
    config, output = found.config, found.output
    if found.free is None:
        known = config.activations_dir.startswith(BUCKET_SCHEME)
        return f"{config.activations_dir} {'has no limit' if known else 'does not say how much room it has'}"
    if found.work.covers == "million":
        tokens = found.free / output.file_bytes
        return f"{config.activations_dir} has {bytes_text(found.free)} free, enough for {tokens:,.1f} million tokens"
    return f"{config.activations_dir} has {bytes_text(found.free)} free: it fits"


def _shared_text(count: int, noun: str) -> str:
    return f" by {count} {noun}, as if each were like this one" if count > 1 else ""


def _reading_text(found: Estimate) -> str:
    """How long the input takes, and when."""
    reading = found.reading
    when = {
        "before": "before the first step",
        "beside": "while what came before is computed",
        "between": "in turn with computing",
    }[reading.when]
    each = ", by every worker" if found.workers > 1 else ""
    return (
        f"{duration_text(found.reading_seconds)} to read, tokenise and plan the input {when}{each}: "
        f"{reading.tokens_per_second:,.0f} tokens/s"
    )


def _bound_text(found: Estimate) -> str:
    """Which stage takes longest, what the others take, and what would help."""
    said = ", ".join(f"{stage} takes {duration_text(seconds)}" for stage, seconds in found.stages.items())
    advice = {"writing": _advice(found), "reading": [_FASTER_READING]}.get(found.bound, [])
    return "; ".join([f"by {_BOUND[found.bound]}: {said}", *advice])


def _advice(found: Estimate) -> list[str]:
    """What would make the writing shorter; of the slower place."""
    output = found.output
    slowest = max(found.writes.values(), key=lambda probe: probe.seconds(output.file_bytes, output.objects))
    if slowest.seconds(0, output.objects) > slowest.seconds(output.file_bytes, 0):
        return ["most of it goes into the number of files: a larger --batch_size makes fewer"]
    advice = []
    if found.config.capture_dtype == "float32":
        advice.append("--capture_dtype bfloat16 halves it")
    if (rows := output.rows / output.samples) > 1:
        advice.append(f"--positions last keeps {share_text(1 / rows)} of the rows")
    return advice
