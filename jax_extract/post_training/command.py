"""`jax-extract representations`: from a results folder of trained models to a folder of representations for each.

In: a `PostTrainingConfig`. Out: `{method}_{task}_seed{n}/step_000000/layer_0.pt` … for every model, adapter weights
beside them, and `base_representations/{task}/step_000000` for the base model. Models, prompts and devices are checked
before the first forward; what is whole already is passed over, so that the same command goes on after any interruption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax_extract.errors import UserError, damage_is_told
from jax_extract.inputs.benchmarks import VALIDATION, benchmark_named
from jax_extract.inputs.benchmarks_prompts import prompt_samples, prompt_token_counter
from jax_extract.inputs.benchmarks_rows import read_examples
from jax_extract.inputs.samples import Sample
from jax_extract.post_training.config import PostTrainingConfig
from jax_extract.post_training.extractors import LoRARepresentationExtractor, RepresentationExtractor
from jax_extract.post_training.names import BASE, representations_in, step_folder
from jax_extract.post_training.pooling import DEFAULT_POOLING, begun_with
from jax_extract.post_training.subjects import Prompts, Subject, find_subjects
from jax_extract.pytorch.finetuning.folder import half_saved_models
from jax_extract.store.reader import open_activations
from jax_extract.terminal import PartOfBar, Terminal, bytes_text, plural


@dataclass(frozen=True)
class _Task:
    """The prompts of a task: read, fitted, counted.

    Attributes:
      tokens: of all prompts together.
    """

    prompts: Prompts
    samples: Sequence[Sample]
    tokens: int

    def said(self) -> dict[str, Any]:
        """For metadata.json."""
        benchmark, used = benchmark_named(self.prompts.task), len(self.samples)
        hub = {"dataset": benchmark.dataset, "config": benchmark.dataset_config, "revision": self.prompts.revision}
        return {
            "validation": {
                "source": self.prompts.file or hub,
                "asked_for": self.prompts.asked_for,
                "used": used,
                "whole_split": used < self.prompts.asked_for,
            },
            "max_length": self.prompts.max_length,
            "template": benchmark.template,
        }

    def __str__(self) -> str:
        asked = self.prompts.asked_for
        whole = f" (all there are; {asked:,} were asked for)" if len(self.samples) < asked else ""
        return f"{self.prompts.task} with {plural(len(self.samples), 'sample')}{whole}"


def representations(config: PostTrainingConfig, terminal: Terminal | None = None) -> list[Path]:
    """The folders of all that was asked for, the base model's first.

    Raises:
      UserError: anything the user can mend; what is committed stays.
    """
    config.check()
    terminal = terminal or Terminal()
    subjects = find_subjects(config)
    begun = None
    if config.pooling is None:
        if not config.overwrite:
            begun = begun_with(
                each.folder for root in (config.output, config.base_output) for each in representations_in(root)
            )
        config = replace(config, pooling=begun or DEFAULT_POOLING)
    extractors = [_extractor(subject, config) for subject in subjects]
    folders = [_folder(subject, config) for subject in subjects]
    for subject, extractor in zip(subjects, extractors, strict=True):
        if (length := subject.prompts.max_length) > extractor.most_tokens:
            raise UserError(
                f"--max_length {length} is more than the {extractor.most_tokens} positions of the model; lower it"
            )
        extractor.check()
    for subject, extractor, folder in zip(subjects, extractors, folders, strict=True):
        if not config.overwrite and (folder / "_run" / "run.json").is_file():
            with damage_is_told(f"the run in {folder}", "compute it anew with --overwrite True"):
                _refuse_other(folder, subject, extractor)
    tasks = _tasks(subjects, extractors)
    trained = sum(subject.name.method != BASE for subject in subjects)
    base = " and their base model" if trained < len(subjects) else ""
    terminal.line("models", f"{trained}{base}, {extractors[0].description()}")
    if begun is not None and begun != DEFAULT_POOLING:
        terminal.line(
            "note",
            f"the rows are --pooling {begun}, as those that are there; new folders have {DEFAULT_POOLING}",
        )
    if note := extractors[0].note():
        terminal.line("note", note)
    if config.skip_half_saved and (passed_over := half_saved_models(config.results)):
        terminal.line("half-saved", f"passed over: {', '.join(folder.name for folder in passed_over)}")
    terminal.line("tasks", "; ".join(map(str, tasks.values())))
    with terminal.progress(sum(tasks[subject.name.task].tokens for subject in subjects)) as bar:
        there, written, undefined = 0, 0, 0
        for number, (subject, extractor, folder) in enumerate(zip(subjects, extractors, folders, strict=True), 1):
            task = tasks[subject.name.task]
            bar.say(f"{_called(subject)} ({number} of {len(subjects)})")
            before = bar.n
            metadata = extractor.save(
                task.samples,
                folder,
                about={**_said(subject), **task.said()},
                overwrite=config.overwrite,
                terminal=PartOfBar(bar),
            )
            if bar.n == before:  # it was there already
                bar.total -= task.tokens
                there += 1
            written += metadata["total_bytes"]
            undefined += metadata["not_finite_rows"]
    if undefined:
        terminal.line("warning", f"{plural(undefined, 'row')} hold infinite or undefined values")
    already = f"; {there} of them were there already" if there else ""
    terminal.line("done", f"{plural(len(folders), 'folder')} of {bytes_text(written)}{already}")
    terminal.line("output", f"{config.output}/" + (f" and {config.base_output}/" if base else ""))
    return folders


def _called(subject: Subject) -> str:
    name = f"{BASE} {subject.name}" if subject.name.method == BASE else str(subject.name)
    return f"{name}, step {subject.step:,}" if subject.step else name


def _folder(subject: Subject, config: PostTrainingConfig) -> Path:
    root = config.base_output if subject.name.method == BASE else config.output
    return root / str(subject.name) / step_folder(subject.step)


def _extractor(subject: Subject, config: PostTrainingConfig) -> RepresentationExtractor:
    options: dict[str, Any] = {
        "revision": subject.revision,
        "pooling": config.pooling,
        "max_length": subject.prompts.max_length,
        "batch_size": config.batch_size,
        "backend": config.backend,
        "device": config.device,
        "dtype": config.dtype,
        "capture_dtype": config.capture_dtype,
    }
    if subject.adapter is None:
        return RepresentationExtractor(subject.model_path, **options)
    return LoRARepresentationExtractor(subject.model_path, subject.adapter, **options)


def _tasks(subjects: Sequence[Subject], extractors: Sequence[RepresentationExtractor]) -> dict[str, _Task]:
    """Prompts depend on the tokenizer, which training leaves as it is: the first model's will do for all of a task."""
    tasks: dict[str, _Task] = {}
    for subject, extractor in zip(subjects, extractors, strict=True):
        prompts = subject.prompts
        if prompts.task in tasks:
            continue
        count, benchmark = prompt_token_counter(extractor.tokenizer()), benchmark_named(prompts.task)
        examples = read_examples(benchmark, VALIDATION, prompts.file, prompts.asked_for, prompts.revision)
        samples = list(prompt_samples(benchmark, examples, count, prompts.max_length))
        tasks[prompts.task] = _Task(prompts, samples, sum(count(sample.text) for sample in samples))
    return tasks


def _said(subject: Subject) -> dict[str, Any]:
    """Of the model, for metadata.json."""
    return {
        "method": subject.name.method,
        "task": subject.name.task,
        "seed": subject.name.seed,
        "step": subject.step,
        **subject.said,
    }


def _refuse_other(folder: Path, subject: Subject, extractor: RepresentationExtractor) -> None:
    """UserError where a folder holds something that rows of this command could not be compared with."""
    metadata: Mapping[str, Any] = open_activations(str(folder)).metadata
    anew = "compute all of them anew with --overwrite True, or choose another --output_dir and --base_dir"
    training = metadata.get("training")
    # By its name, which has the time in it: the results folder may have been named from elsewhere.
    if training is not None and Path(training).name != Path(str(subject.said.get("training"))).name:
        raise UserError(f"{folder} is of another training, {training}; {anew}")
    wanted = {"pooling": extractor.pooling, "max_length": subject.prompts.max_length}
    for name, value in {**wanted, "capture_dtype": extractor.capture_dtype}.items():
        if (there := metadata.get(name)) != value:
            raise UserError(
                f"{folder} was made with --{name} {there}, and this command says {value}; give --{name} {there}, or "
                f"{anew}"
            )
    dtype, backend = metadata["numerics"]["dtype"], metadata["numerics"].get("backend", "jax")
    if (dtype, backend) != (extractor.computed_in, extractor.backend):
        raise UserError(
            f"{folder} was computed in {dtype} with {backend}, and this command would use {extractor.computed_in} with "
            f"{extractor.backend}; give --dtype {dtype} --backend {backend}, or {anew}"
        )
