"""Extraction, whole: a configuration in, a run directory out; or texts in, a run in memory out.

In: `ExtractConfig`, or a model and texts. Out: committed shards with metadata.json, or a `Run`. The two
share everything from the plan to the compiled program; only the sink differs.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jax_extract import prepare
from jax_extract.config import ExtractConfig, to_yaml
from jax_extract.errors import UserError
from jax_extract.inputs.plan import Part, PlanSettings, Window, plan_windows
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.sources import Source, open_source
from jax_extract.inputs.tokenize import InputCounts, TokenizedSample, tokenize, tokenizer_digest
from jax_extract.loop import LoopStatistics, run_parts
from jax_extract.store.filesystem import Directory
from jax_extract.store.formats import SUFFIXES
from jax_extract.store.ledger import RUN_FILE, Key, Ledger, erase
from jax_extract.store.memory import MemorySink
from jax_extract.store.parts import Site
from jax_extract.store.reader import Run
from jax_extract.store.writer import PartWriter
from jax_extract.terminal import Terminal, bytes_text, plural, ranges_text, share_text
from jax_extract.weights.load import Weights
from models.hooks import DEFAULT_HOOK_POINT, CapturePlan
from models.layers import Numerics

CONFIG_FILE = "_run/config.yaml"
_PACKAGES = ("jax_extract", "jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers", "safetensors")


@dataclass(frozen=True)
class _Job:
    """Everything decided before the first weight is read."""

    model: prepare.OpenModel
    plan: CapturePlan
    sites: Sequence[Site]
    mesh: Mesh
    numerics: Numerics
    max_length: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over all sites."""
        return sum(site.width for site in self.sites) * (4 if self.plan.dtype == "float32" else 2)

    def weights(self) -> Weights:
        blocks = self.plan.blocks_needed(self.model.config.num_hidden_layers)
        return Weights(self.model.checkpoint, self.model.port, self.model.config, blocks)


def extract_to_directory(config: ExtractConfig, terminal: Terminal | None = None) -> dict[str, Any]:
    """Runs or resumes an extraction; returns what metadata.json says.

    Raises:
      UserError: anything the user can mend; nothing that was committed is lost.
    """
    config.check()
    terminal = terminal or Terminal()
    model = prepare.OpenModel.open(config.model_path, config.revision)
    source = open_source(
        config.tasks_file,
        config.dataset,
        n_tasks=config.n_tasks,
        n_samples=config.n_samples,
        encoder=config.grid_encoder,
        seed=config.seed,
        split=config.split,
        dataset_config=config.dataset_config,
        text_column=config.text_column,
    )
    job = _job(
        model,
        layers=config.layers_to_extract,
        hook_points=config.hook_points,
        positions=config.positions,
        dtype=config.dtype,
        capture_dtype=config.capture_dtype,
        mesh_shape=config.mesh_shape,
        max_seq_length=config.max_seq_length,
    )
    directory = Directory(Path(config.activations_dir))
    if directory.root.exists() and not directory.root.is_dir():
        raise UserError(f"--activations_dir {config.activations_dir!r} is a file; name a directory")
    _describe(job, config, terminal)
    weights = job.weights()
    found = Ledger.open(directory) if directory.exists(RUN_FILE) and not config.overwrite else None
    frozen = found.run["identity"]["plan_settings"] if found else None
    settings = _settings(job, batch_size=config.batch_size, slab_tokens=config.slab_tokens, frozen=frozen)
    run = _run_of(config, job, weights, settings)
    if found:
        found.require_same(run["identity"], run["numerics"], config.allow_numeric_change)
    counts = InputCounts()
    windows = _windows(source, job, settings, config.chat_template, counts)
    if source.finite:  # a complete plan, before the first step
        windows = list(windows)
        if not windows:
            raise UserError(f"{source.name} gave no sample with a token; there is nothing to extract")
        if found:  # whose inputs must be these, be it finished or not
            for window in windows:
                found.keep_plan(window.number, _plan_json(window, counts))
    committed = found.committed() if found else {}
    if committed:
        samples = sum(record["samples"] for record in committed.values())
        terminal.line("resume", f"{plural(samples, 'sample')} are committed already")
    total = _announce(source, windows, counts, job, directory, committed, terminal)
    ledger = found or _start(config, directory, run)  # only now, when nothing is left to refuse
    attempt = uuid.uuid4().hex[:12]
    sink = PartWriter(ledger, job.sites, config.shard_format, config.capture_dtype, attempt)
    statistics = LoopStatistics()
    if total is None or total > 0:
        pending = _pending(windows, committed, ledger, counts)
        statistics = _run(job, weights, pending, sink, terminal, total)
    if not source.finite and not counts.samples:
        raise UserError(f"{source.name} gave no sample with a token; there is nothing to extract")
    ledger.end_session(attempt, {**dataclasses.asdict(statistics), "mesh": dict(job.mesh.shape)})
    metadata = ledger.write_metadata()
    _summarize(metadata, statistics, config.activations_dir, terminal)
    return metadata


def extract(
    model: str,
    texts: Sequence[str] | Mapping[str, str],
    *,
    layers: Iterable[int] | None = None,
    hook_points: Iterable[str] = (DEFAULT_HOOK_POINT,),
    positions: str = "last",
    dtype: str | None = None,
    capture_dtype: str = "float32",
    batch_size: int = 8,
    mesh_shape: str | None = None,
    max_seq_length: int | None = None,
    chat_template: bool = False,
    revision: str | None = None,
    progress: bool = False,
) -> Run:
    """Extracts activations without files, for a notebook; same program and same rows as the command.

    Args:
      model: Hugging Face folder, hub id or .gguf file.
      texts: prompts, with ids where it is a mapping; else the ids are "0", "1", ….
      layers, hook_points, positions, dtype, capture_dtype, batch_size, mesh_shape, max_seq_length,
        chat_template, revision: as the flags of the command (see `ExtractConfig`).
      progress: show the lines and the bar of the command.

    Returns:
      A `Run` in memory: `run.sample("0").get(layer=12)` -> [positions, width].

    Raises:
      UserError: anything about the request that cannot be done.
    """
    if isinstance(texts, str):
        raise UserError("texts is a single string; give a list of strings, or a mapping of ids to strings")
    named = dict(texts) if isinstance(texts, Mapping) else {str(i): text for i, text in enumerate(texts)}
    if capture_dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"capture_dtype {capture_dtype!r} is none of float32, bfloat16, float16")
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"dtype {dtype!r} is neither float32 nor bfloat16")
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} must be at least 1")
    terminal = Terminal(silent=not progress)
    job = _job(
        prepare.OpenModel.open(model, revision),
        layers=layers,
        hook_points=hook_points,
        positions=positions,
        dtype=dtype,
        capture_dtype=capture_dtype,
        mesh_shape=mesh_shape,
        max_seq_length=max_seq_length,
    )
    settings = _settings(job, batch_size=batch_size, slab_tokens=None)
    counts = InputCounts()
    source = Source("texts", "text", finite=True, samples=lambda: (Sample(i, text) for i, text in named.items()))
    windows = list(_windows(source, job, settings, chat_template, counts))
    if not windows:
        raise UserError("none of the texts has a token; there is nothing to extract")
    sink = MemorySink(job.sites, capture_dtype)
    pending = (part for window in windows for part in window.parts)
    statistics = _run(job, job.weights(), pending, sink, terminal, counts.tokens)
    metadata = {
        **_identity_of_capture(job),
        **_description(job),
        "total_samples": counts.samples,
        "total_tokens": counts.tokens,
        "input": dataclasses.asdict(counts),
        "numerics": prepare.numerics_fingerprint(job.numerics),
        "sessions": [dataclasses.asdict(statistics)],
    }
    return Run(metadata, job.sites, sink.parts)


def _job(
    model: prepare.OpenModel,
    *,
    layers: Iterable[int] | None,
    hook_points: Iterable[str],
    positions: str,
    dtype: str | None,
    capture_dtype: str,
    mesh_shape: str | None,
    max_seq_length: int | None,
) -> _Job:
    plan = prepare.capture_plan(model, layers, hook_points, positions, capture_dtype)
    return _Job(
        model=model,
        plan=plan,
        sites=prepare.sites_of(plan, model.config),
        max_length=prepare.sequence_limit(max_seq_length, model.config),
        mesh=prepare.open_mesh(mesh_shape),
        numerics=prepare.compute_numerics(dtype),
    )


def _settings(job: _Job, **options: Any) -> PlanSettings:
    return prepare.plan_settings(job.plan, job.sites, devices=job.mesh.size, max_length=job.max_length, **options)


def _run_of(config: ExtractConfig, job: _Job, weights: Weights, settings: PlanSettings) -> dict[str, Any]:
    """What run.json says of this run; decides whether a directory holds the same one."""
    return {
        "identity": {
            **_identity_of_capture(job),
            "shard_format": config.shard_format,
            "chat_template": config.chat_template,
            "weights": weights.provenance(),
            "tokenizer_hash": tokenizer_digest(job.model.tokenizer),
            "plan_settings": settings.as_json(),
        },
        "numerics": prepare.numerics_fingerprint(job.numerics),
        "description": {
            **_description(job),
            "source": config.dataset or config.tasks_file,
            "mesh": dict(job.mesh.shape),
        },
    }


def _start(config: ExtractConfig, directory: Directory, run: Mapping[str, Any]) -> Ledger:
    """A new run in the directory; with `overwrite` the one that is there goes first."""
    if directory.exists(RUN_FILE):
        erase(directory)
    directory.make("_run")
    ledger = Ledger.start(directory, run)
    again = dataclasses.replace(config, overwrite=False)  # fed back, it resumes
    directory.replace(CONFIG_FILE, to_yaml(again).encode())
    return ledger


def _identity_of_capture(job: _Job) -> dict[str, Any]:
    return {
        "model_type": job.model.config.model_type,
        "sites": [dataclasses.asdict(site) for site in job.sites],
        "hook_points": [hook for hook, _ in job.plan.layers],
        "positions": str(job.plan.positions),
        "capture_dtype": job.plan.dtype,
    }


def _description(job: _Job) -> dict[str, Any]:
    return {
        "model_name": job.model.name,
        "model_path": job.model.checkpoint.source,
        "model_revision": job.model.checkpoint.revision,
        "hidden_dim": job.model.config.hidden_size,
        "num_hidden_layers": job.model.config.num_hidden_layers,
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
    }


def _windows(
    source: Source, job: _Job, settings: PlanSettings, chat_template: bool, counts: InputCounts
) -> Iterable[Window]:
    samples: Iterator[TokenizedSample] = tokenize(
        source.samples(), job.model.tokenizer, job.max_length, chat_template, counts, job.model.config.vocab_size
    )
    return plan_windows(samples, settings)


def _pending(
    windows: Iterable[Window], committed: Mapping[Key, Any], ledger: Ledger, counts: InputCounts
) -> Iterator[Part]:
    """Parts without a record, in plan order; every window's plan is kept before its first part runs."""
    for window in windows:
        ledger.keep_plan(window.number, _plan_json(window, counts))
        for part in window.parts:
            if part.key not in committed:
                yield part


def _plan_json(window: Window, counts: InputCounts) -> dict[str, Any]:
    return {
        "window": window.number,
        "digest": window.digest,
        "shapes": window.shapes,
        "parts": [
            {
                "batch": part.batch,
                "part": part.part,
                "samples": len(part.samples),
                "tokens": part.tokens,
                "slabs": [dataclasses.astuple(slab) for slab in part.slabs],
                "digest": part.digest,
            }
            for part in window.parts
        ],
        "input": dataclasses.asdict(counts),
    }


def _run(
    job: _Job, weights: Weights, parts: Iterable[Part], sink: Any, terminal: Terminal, total: int | None
) -> LoopStatistics:
    program = prepare.build_program(job.model, weights, job.plan, job.mesh, job.numerics)
    with terminal.progress(total) as bar:

        def advance(so_far: LoopStatistics) -> None:
            bar.update(so_far.tokens - bar.n)

        return run_parts(parts, program, sink, advance)


# --------------------------------------------------------------------------------- what the user sees


def _describe(job: _Job, config: ExtractConfig, terminal: Terminal) -> None:
    model, mesh = job.model.config, job.mesh.shape
    device = job.mesh.devices.flat[0].device_kind
    terminal.line(
        "model",
        f"{job.model.name} ({model.model_type}, {model.num_hidden_layers} layers, d_model {model.hidden_size}) in "
        f"{job.numerics.dtype} on {plural(job.mesh.size, device + ' device')}, mesh {mesh['data']},{mesh['model']}",
    )
    captures = "; ".join(
        f"{hook} at layers {ranges_text(layers)} ({len(layers)})" if layers else hook
        for hook, layers in job.plan.layers
    )
    terminal.line(
        "capture",
        f"{captures}; positions {job.plan.positions}, {job.plan.dtype}, as {config.shard_format} "
        f"into {config.activations_dir}/",
    )


def _announce(
    source: Source,
    windows: Iterable[Window],
    counts: InputCounts,
    job: _Job,
    directory: Directory,
    committed: Mapping[Key, Any],
    terminal: Terminal,
) -> int | None:
    """Prints input and plan, refuses what cannot fit the disk; returns the real tokens that are left to do."""
    if not source.finite:
        terminal.line("input", f"{source.name}, read as a stream")
        return None
    cut = ""
    if counts.truncated_samples:
        cut = f"; {plural(counts.truncated_samples, 'sample')} truncated to {job.max_length:,} tokens"
    if counts.empty_samples:
        cut += f"; {plural(counts.empty_samples, 'sample')} without a token left out"
    terminal.line(
        "input",
        f"{source.name}: {plural(counts.samples, 'sample')}, {plural(counts.tokens, 'token')}, "
        f"longest {counts.longest_sample:,}{cut}",
    )
    parts = [part for window in windows for part in window.parts]
    pending = [part for part in parts if part.key not in committed]
    slab_tokens = sum(slab.rows * slab.length for part in parts for slab in part.slabs)
    shapes = {(slab.length, slab.rows) for part in parts for slab in part.slabs}
    terminal.line(
        "plan",
        f"{plural(parts[-1].batch, 'batch')} in {plural(len(parts), 'part')}, "
        f"{plural(len(shapes), 'slab shape')} up to {max(shapes)[0]} tokens, "
        f"padding {share_text(1 - sum(part.tokens for part in parts) / slab_tokens)}",
    )
    rows = sum(job.plan.positions.rows(sample.length) for part in pending for sample in part.samples)
    if (needed := rows * job.row_bytes) > (free := directory.free_bytes()):
        raise UserError(
            f"the run needs {bytes_text(needed)} but {directory.root} has {bytes_text(free)} free; "
            "choose another --activations_dir, fewer layers, fewer --positions or a smaller --capture_dtype"
        )
    return sum(part.tokens for part in pending)


def _summarize(
    metadata: Mapping[str, Any], statistics: LoopStatistics, activations_dir: str, terminal: Terminal
) -> None:
    if statistics.parts:
        speed = statistics.tokens / statistics.seconds
        terminal.line(
            "done",
            f"{plural(statistics.samples, 'sample')}, {plural(statistics.tokens, 'token')} in "
            f"{statistics.seconds:.1f} s: {speed:,.0f} tokens/s (and {statistics.compile_seconds:.1f} s compiling), "
            f"padding {share_text(1 - statistics.tokens / statistics.slab_tokens)}",
        )
    else:
        terminal.line("done", "everything was committed already; nothing to do")
    shards = sum(len(batch["files"]) for batch in metadata["batches"])
    terminal.line(
        "output",
        f"{plural(metadata['total_samples'], 'sample')}, {plural(metadata['total_rows'], 'row')} a site, "
        f"{plural(shards, SUFFIXES[metadata['shard_format']] + ' shard')}, {bytes_text(metadata['total_bytes'])} "
        f"in {activations_dir}/",
    )
    terminal.line("read it", f"jax-extract inspect {activations_dir}")
