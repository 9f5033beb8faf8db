"""Extraction, whole: a configuration in, a run directory out; or texts in, a run in memory out.

In: `ExtractConfig`, or a model and texts. Out: committed shards with metadata.json, or a `Run`. The two
share everything from the plan to the compiled program; only the sink differs.
"""

from __future__ import annotations

import dataclasses
import itertools
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jax_extract.config import ExtractConfig, to_yaml
from jax_extract.errors import UserError, user_path
from jax_extract.inputs.plan import Part, PlanSettings, Window
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.sources import Source, open_source
from jax_extract.inputs.text import checked_id, checked_text
from jax_extract.inputs.tokenize import InputCounts, tokenizer_digest
from jax_extract.loop import LoopStatistics, run_parts
from jax_extract.prepare import Job, numerics_fingerprint
from jax_extract.store.filesystem import Directory, require_open_files
from jax_extract.store.ledger import RUN_FILE, Key, Ledger, erase
from jax_extract.store.memory import MemorySink
from jax_extract.store.reader import Run
from jax_extract.store.writer import PartSink, PartWriter
from jax_extract.summary import tell_input, tell_plan, tell_request, tell_result
from jax_extract.terminal import Terminal, bytes_text, plural
from jax_extract.weights.load import Weights
from models.hooks import DEFAULT_HOOK_POINT

CONFIG_FILE = "_run/config.yaml"


def extract_to_directory(config: ExtractConfig, terminal: Terminal | None = None) -> dict[str, Any]:
    """Runs or resumes an extraction; returns what metadata.json says.

    Everything that can be refused is refused before anything is written.

    Raises:
      UserError: anything the user can mend; nothing that was committed is lost.
    """
    config.check()
    terminal = terminal or Terminal()
    source = _open_source(config)
    job = Job.open(config)
    directory = Directory(user_path(config.activations_dir, "--activations_dir"))
    directory.require_usable()
    require_open_files(len(job.sites))
    tell_request(job, config, terminal)

    weights = job.weights()
    found = Ledger.open(directory) if directory.exists(RUN_FILE) and not config.overwrite else None
    settings = job.plan_settings(config, found.run["identity"]["plan_settings"] if found else None)
    run = _run_of(config, job, weights, settings)
    if found:
        found.require_same(run["identity"], run["numerics"], config.allow_numeric_change)
    committed = found.committed() if found else {}
    if found:
        found.require_files(committed)

    counts = InputCounts()
    windows: Iterable[Window] = job.windows(source.samples(), settings, config.chat_template, counts)
    tokens = None
    if source.finite:  # a complete plan, before the first step
        windows = list(windows)
        tokens = _check_plan(windows, counts, source, job, directory, found, committed, terminal)
    else:  # a window, so that an input that cannot be read is refused before anything is written
        tell_input(source, counts, job, terminal)
        stream = iter(windows)
        windows = itertools.chain(list(itertools.islice(stream, 1)), stream)
        _require_samples(counts, source)

    ledger = found or _start(config, directory, run)
    if committed:
        samples = sum(record["samples"] for record in committed.values())
        terminal.line("resume", f"{plural(samples, 'sample')} are committed already")
    attempt = uuid.uuid4().hex[:12]
    statistics = LoopStatistics()
    if tokens != 0:
        pending = _pending(windows, committed, ledger, counts)
        sink = PartWriter(ledger, job.sites, config.shard_format, config.capture_dtype, attempt)
        statistics = _run(job, weights, pending, sink, terminal, tokens)
    ledger.end_session(attempt, {**dataclasses.asdict(statistics), "mesh": dict(job.mesh.shape)})
    metadata = ledger.write_metadata()
    tell_result(metadata, statistics, config.activations_dir, terminal)
    return metadata


def extract(
    model: str,
    texts: Sequence[str] | Mapping[str, str],
    *,
    layers: Iterable[int] | int | None = None,
    hook_points: Iterable[str] = (DEFAULT_HOOK_POINT,),
    positions: str = "last",
    progress: bool = False,
    **options: Any,
) -> Run:
    """Extracts activations without files, for a notebook; same program and same rows as the command.

    Args:
      model: Hugging Face folder, hub id or .gguf file.
      texts: prompts, with ids where it is a mapping; else the ids are "0", "1", ….
      layers, hook_points, positions: as the flags of the command.
      progress: show the lines and the bar of the command.
      options: further fields of `ExtractConfig`: dtype, capture_dtype, batch_size, mesh_shape,
        max_seq_length, slab_tokens, chat_template, revision.

    Returns:
      A `Run` in memory: `run.sample("0").get(layer=12)` -> [positions, width].

    Raises:
      UserError: anything about the request that cannot be done.
    """
    if isinstance(texts, str):
        raise UserError("texts is a single string; give a list of strings, or a mapping of ids to strings")
    if unknown := sorted(set(options) - _NOTEBOOK_OPTIONS):
        raise UserError(
            f"extract has no option {unknown[0]!r}; its options are: {', '.join(sorted(_NOTEBOOK_OPTIONS))}"
        )
    chosen = (layers,) if isinstance(layers, int) else None if layers is None else tuple(int(i) for i in layers)
    config = ExtractConfig(
        model_path=str(model),
        layers_to_extract=chosen,
        hook_points=(hook_points,) if isinstance(hook_points, str) else tuple(hook_points),
        positions=positions,
        **options,
    )
    config.check()
    job = Job.open(config)
    counts = InputCounts()
    named = texts.items() if isinstance(texts, Mapping) else ((str(i), text) for i, text in enumerate(texts))
    samples = (Sample(checked_id(i, "a sample"), checked_text(text, f"text {i!r}")) for i, text in named)
    windows = list(job.windows(samples, job.plan_settings(config), config.chat_template, counts))
    if not windows:
        raise UserError("none of the texts has a token; there is nothing to extract")
    sink = MemorySink(job.sites, config.capture_dtype)
    pending = (part for window in windows for part in window.parts)
    statistics = _run(job, job.weights(), pending, sink, Terminal(silent=not progress), counts.tokens)
    metadata = {
        **job.identity(),
        **job.description(),
        "total_samples": counts.samples,
        "total_tokens": counts.tokens,
        "input": dataclasses.asdict(counts),
        "numerics": numerics_fingerprint(job.numerics),
        "sessions": [dataclasses.asdict(statistics)],
    }
    return Run(metadata, job.sites, sink.parts)


_NOTEBOOK_OPTIONS = frozenset(
    "dtype capture_dtype batch_size mesh_shape max_seq_length slab_tokens chat_template revision".split()
)


def _open_source(config: ExtractConfig) -> Source:
    return open_source(
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


def _run_of(config: ExtractConfig, job: Job, weights: Weights, settings: PlanSettings) -> dict[str, Any]:
    """What run.json says of this run; decides whether a directory holds the same one."""
    return {
        "identity": {
            **job.identity(),
            "shard_format": config.shard_format,
            "chat_template": config.chat_template,
            "weights": weights.provenance(),
            "tokenizer_hash": tokenizer_digest(job.model.tokenizer),
            "plan_settings": settings.as_json(),
        },
        "numerics": numerics_fingerprint(job.numerics),
        "description": {
            **job.description(),
            "source": config.dataset or config.tasks_file,
            "mesh": dict(job.mesh.shape),
        },
    }


def _check_plan(
    windows: Sequence[Window],
    counts: InputCounts,
    source: Source,
    job: Job,
    directory: Directory,
    found: Ledger | None,
    committed: Mapping[Key, Any],
    terminal: Terminal,
) -> int:
    """Tells the plan; refuses inputs that are not the run's, and what cannot fit the disk. Returns the tokens to do."""
    _require_samples(counts, source)
    if found:  # whose inputs must be these, be it finished or not
        for _ in _pending(windows, committed, found, counts):
            pass
    tell_input(source, counts, job, terminal)
    if not any(job.plan.positions.rows(sample.length) for w in windows for p in w.parts for sample in p.samples):
        raise UserError(f"no sample is long enough for positions {job.plan.positions}; choose earlier ones")
    parts = [part for window in windows for part in window.parts]
    tell_plan(parts, job.mesh.size, terminal)
    pending = [part for part in parts if part.key not in committed]
    needed = job.bytes_stored(sample for part in pending for sample in part.samples)
    if needed > (free := directory.free_bytes()):
        raise UserError(
            f"the run needs {bytes_text(needed)} but {directory.root} has {bytes_text(free)} free; "
            "choose another --activations_dir, fewer layers, fewer --positions or a smaller --capture_dtype"
        )
    return sum(part.tokens for part in pending)


def _require_samples(counts: InputCounts, source: Source) -> None:
    if not counts.samples:
        raise UserError(f"{source.name} gave no sample with a token; there is nothing to extract")


def _start(config: ExtractConfig, directory: Directory, run: Mapping[str, Any]) -> Ledger:
    """A new run in the directory; with `overwrite` the one that is there goes first."""
    if directory.exists(RUN_FILE):
        erase(directory)
    directory.make("_run")
    again = dataclasses.replace(config, overwrite=False)  # fed back, it resumes
    directory.replace(CONFIG_FILE, to_yaml(again).encode())
    return Ledger.start(directory, run)


def _pending(
    windows: Iterable[Window], committed: Mapping[Key, Any], ledger: Ledger, counts: InputCounts
) -> Iterator[Part]:
    """Parts without a record, in plan order; every window's plan is kept before its first part runs."""
    for window in windows:
        ledger.keep_plan(window.number, _plan_json(window, counts))
        for part in window.parts:
            if part.key not in committed:
                yield part
            elif committed[part.key]["plan"] != part.digest:
                raise UserError(
                    f"{ledger.directory.root} holds part {part.key} of another plan; restore its records from a copy, "
                    "or start anew with --overwrite"
                )


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
    job: Job, weights: Weights, parts: Iterable[Part], sink: PartSink, terminal: Terminal, tokens: int | None
) -> LoopStatistics:
    program = job.program(weights)
    with terminal.progress(tokens) as bar:

        def advance(so_far: LoopStatistics) -> None:
            bar.update(so_far.tokens - bar.n)

        return run_parts(parts, program, sink, advance)
