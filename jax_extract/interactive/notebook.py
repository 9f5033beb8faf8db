"""Extraction for a notebook: texts in, a run in memory out.

In: a model and texts. Out: a `Run`. Everything from the plan to the compiled program is that of the
command; only the sink differs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from jax_extract.config import ExtractConfig
from jax_extract.errors import UserError
from jax_extract.extraction.backend import Program, Say
from jax_extract.extraction.command import run_of
from jax_extract.extraction.loop import STEPS_IN_MEMORY, LoopStatistics, run_parts
from jax_extract.extraction.pending import plan_json
from jax_extract.extraction.prepare import Job, wrapping_of
from jax_extract.inputs.planning.slabs import Shapes, SlabShape
from jax_extract.inputs.planning.windows import shapes_of
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.text import named_texts
from jax_extract.inputs.wrapping import Kept
from jax_extract.layer_words import Layers, layer_words
from jax_extract.progress import LOADING
from jax_extract.store.budget import ByteBudget
from jax_extract.store.memory import MemorySink
from jax_extract.store.reader import Run
from jax_extract.store.saving import Provenance
from jax_extract.terminal import Terminal
from jax_extract.weights.live import LiveCheckpoint, describe_live_models, is_live_model
from models.hooks import DEFAULT_HOOK_POINT


def extract(
    model: Any,
    texts: Sequence[str] | Mapping[str, str],
    *,
    layers: Layers | None = None,
    hook_points: Iterable[str] = (DEFAULT_HOOK_POINT,),
    positions: str = "last",
    progress: bool = False,
    tokenizer: Any = None,
    **options: Any,
) -> Run:
    """Extracts activations without files, for a notebook; same program and same rows as the command.

    Args:
      model: Hugging Face folder, hub id or .gguf file; or a model of transformers that is in memory, whose tensors are
        used as they are now.
      texts: prompts, with ids where it is a mapping; else the ids are "0", "1", ….
      layers: 12, -1 (the last), "10-23" (both among them), "all", or a list of these; by default 10 to 23, or what the
        model has of them.
      hook_points, positions: as the flags of the command.
      progress: show the lines and the bar of the command.
      tokenizer: of a model in memory that did not come from a folder.
      options: further fields of `ExtractConfig`: dtype, capture_dtype, batch_size, mesh_shape,
        max_seq_length, slab_tokens, attention_pattern_tokens, chat_template, system_prompt, chat_template_kwargs (a
        dictionary will do), add_special_tokens, context_tokens, context_start, context_separator, revision.

    Returns:
      A `Run` in memory: `run[0].get(layer=12)` -> [positions, width]; `run.save(folder)` writes it.

    Raises:
      UserError: anything about the request that cannot be done.
    """
    checkpoint = live_checkpoint(model, tokenizer)
    source = checkpoint.source if checkpoint else str(model)
    config = extract_config(source, layers, hook_points, positions, options)
    job = Job.open(config, checkpoint)

    def program(shapes: Shapes, say: Say) -> Program:
        return job.program(job.weights(), shapes, say=say)

    return extracted(job, config, named_texts(texts), progress, program)


def extract_config(
    model: str,
    layers: Layers | None,
    hook_points: Iterable[str],
    positions: str,
    options: Mapping[str, Any],
    known: frozenset[str] | None = None,
) -> ExtractConfig:
    """UserError where an option is none of the `known` ones."""
    known = NOTEBOOK_OPTIONS if known is None else known
    if unknown := sorted(set(options) - known):
        raise UserError(f"extract has no option {unknown[0]!r}; its options are: {', '.join(sorted(known))}")
    config = ExtractConfig(
        model_path=model,
        layers_to_extract=layer_words(layers, "layers"),
        hook_points=(hook_points,) if isinstance(hook_points, str) else tuple(hook_points),
        positions=positions,
        **options,
    )
    config.check()
    return config


def extracted(
    job: Job,
    config: ExtractConfig,
    samples: Iterable[Sample],
    progress: bool,
    make_program: Callable[[Shapes, Say], Program],
) -> Run:
    """A run in memory; the program is made when the shapes of its slabs are known."""
    settings = job.plan_settings(config)
    counts = job.new_counts(settings)
    windows = list(job.windows(samples, settings, wrapping_of(config, Kept.from_now_on()), counts))
    if not windows:
        raise UserError("none of the texts has a token; there is nothing to extract")
    if job.edits:
        job.edits.check(sample for window in windows for sample in window.arrangement.table)
    sink = MemorySink(job.sites, config.capture_dtype)
    pending = [part for window in windows for part in window.parts]
    shapes = shapes_of(pending)
    budget = ByteBudget(STEPS_IN_MEMORY * job.bytes_on_host(shapes))
    terminal = Terminal(silent=not progress)
    with terminal.waiting(LOADING) as waiting:
        program = make_program(windows[0].shapes, waiting.say)
    cost = job.step_cost
    with (
        contextlib.closing(program),
        terminal.progress(counts.tokens, cost=cost.of_all(job.step_counts(pending).steps)) as bar,
    ):

        def advance(so_far: LoopStatistics, shape: SlabShape) -> None:
            bar.spend(so_far.tokens - bar.n, cost(shape), so_far.seconds)

        statistics = run_parts(pending, program, sink, budget, advance, bar.say)
    metadata = {
        **job.identity(),
        **job.description(),
        "total_samples": counts.samples,
        "total_tokens": counts.tokens,
        "input": counts.as_json(),
        "numerics": job.backend.fingerprint(),
        "sessions": [session := dataclasses.asdict(statistics)],
    }
    provenance = Provenance(
        describe=partial(run_of, config, job, job.weights(), settings),
        plans=[plan_json(window, counts.as_json()) for window in windows],
        session={**session, "mesh": dict(job.backend.mesh_shape), "processes": 1, "numerics": metadata["numerics"]},
    )
    return Run(metadata, job.sites, sink.parts, provenance)


def live_checkpoint(model: Any, tokenizer: Any) -> LiveCheckpoint | None:
    """Of a model in memory; None where `model` is the name of one."""
    if is_live_model(model):
        return LiveCheckpoint(model, tokenizer)
    if not isinstance(model, str | os.PathLike):
        raise UserError(describe_live_models(model))
    if tokenizer is not None:
        raise UserError(
            "tokenizer is for a model in memory; a folder, hub id or .gguf file has its own, so leave it out"
        )
    return None


NOTEBOOK_OPTIONS = frozenset(
    (
        "adapter backend device dtype capture_dtype batch_size mesh_shape max_seq_length slab_tokens "
        "attention_pattern_tokens chat_template system_prompt chat_template_kwargs add_special_tokens context_tokens "
        "context_start context_separator revision"
    ).split()
)
