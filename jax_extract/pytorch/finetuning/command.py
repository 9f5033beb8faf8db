"""`jax-extract finetune`: from a base model and a task to `results/{method}_{time}/final_model`.

In: a `FinetuneConfig`. Out: the folder, whole when its metadata.json is there, and the lines that a person sees. All
that can be refused is refused before the model is loaded; the same command again goes on from the last checkpoint, and
says so where all is done.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from jax_extract.errors import UserError
from jax_extract.inputs.benchmarks import TRAIN, VALIDATION, Example
from jax_extract.inputs.benchmarks_rows import read_examples
from jax_extract.pytorch.finetuning.base_model import absolute, describe_base
from jax_extract.pytorch.finetuning.config import FinetuneConfig
from jax_extract.pytorch.finetuning.folder import FINAL_MODEL, Results, open_trained, refuse_half_saved
from jax_extract.pytorch.finetuning.processes import Processes, SharedRefusal, is_main, rank
from jax_extract.terminal import Terminal, duration_text
from jax_extract.weights.checkpoint import Checkpoint
from jax_extract.weights.folder import SafetensorsCheckpoint
from jax_extract.weights.opening import open_checkpoint

_PACKAGES = ("accelerate", "datasets", "jax_extract", "peft", "tokenizers", "torch", "transformers")
_POSITIONS = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True)
class _Job:
    """What is trained on what, found and checked.

    Attributes:
      base: the model's type, digest and commit.
      training, validation: `TrainingExamples` and a list of `Scored`; their module imports torch.
    """

    config: FinetuneConfig
    base: dict[str, Any]
    tokenizer: Any
    encoder: Any
    training: Any
    validation: list[Any]

    def identity(self, processes: Processes) -> dict[str, Any]:
        """What decides the outcome; a training of another one goes into a folder of its own."""
        from jax_extract.pytorch.finetuning.examples import digest_of

        return {
            **self.config.deciding(),
            "base_model": self.base["digest"],
            "examples": digest_of(self.training, self.validation),
            "processes": processes.count,
        }


def finetune_command(config: FinetuneConfig) -> int:
    """Trains, scores and saves; only the main process speaks, but for what another one alone is refused for."""
    try:
        finetune(config, Terminal(silent=not is_main()))
    except SharedRefusal:
        if is_main():
            raise
        return 2
    except UserError as error:
        if is_main():
            raise
        raise UserError(f"process {rank()}: {error}") from None
    return 0


def finetune(config: FinetuneConfig, terminal: Terminal | None = None) -> Path:
    """The folder of the trained model; nothing is done where it is there.

    Raises:
      UserError: a mistake that the user can mend.
    """
    terminal = terminal or Terminal()
    config.check()
    checkpoint = _checkpoint(config)
    config = replace(config, device=_device(config.device))
    config = replace(config, dtype=_dtype(config))
    _quiet()
    job = _job(config, checkpoint)
    processes = Processes(cpu=config.device == "cpu")
    _tell(job, checkpoint, terminal)
    with contextlib.ExitStack() as held:
        path, start = processes.from_main(lambda: _open_results(job, processes, held))
        results = Results(path)
        if results.is_whole:
            trained = open_trained(path)
            terminal.line("done", f"already: {trained.final_model}, {_scores_text(trained.metadata['scores'])}")
        else:
            _train(job, results, start, processes, terminal)
    processes.leave()
    return path


# ------------------------------------------------------------------------------------------------ what is checked


def _checkpoint(config: FinetuneConfig) -> SafetensorsCheckpoint:
    refuse_half_saved(Path(config.model_path).expanduser())
    checkpoint = open_checkpoint(config.model_path, config.revision)
    if not isinstance(checkpoint, SafetensorsCheckpoint):
        raise UserError(f"model {config.model_path!r} is no folder with safetensors, which training needs; give one")
    text = checkpoint.config.get("text_config") or checkpoint.config
    most = min((text[name] for name in _POSITIONS if isinstance(text.get(name), int)), default=config.max_length)
    if most < config.max_length:
        raise UserError(f"--max_length {config.max_length} is more than the {most} positions of the model; lower it")
    return checkpoint


def _device(asked: str | None) -> str:
    for package in ("torch", "peft", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"jax-extract finetune needs {package}, which is not installed; pip install -e '.[torch]'")
    import torch

    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        built = "sees no NVIDIA GPU here" if torch.version.cuda else "was installed without CUDA"
        raise UserError(f"--device cuda was asked for, and torch {built}; give --device cpu, or mend the installation")
    return asked or ("cuda" if there else "cpu")


def _dtype(config: FinetuneConfig) -> Literal["float32", "bfloat16"]:
    """Of matrix products; the default said aloud is the same training."""
    import torch

    if config.dtype is not None:
        return config.dtype
    cuda = config.device == "cuda"
    return "bfloat16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


def _job(config: FinetuneConfig, checkpoint: SafetensorsCheckpoint) -> _Job:
    from jax_extract.pytorch.finetuning.examples import Encoder

    benchmark = config.benchmark
    train = read_examples(benchmark, TRAIN, config.train_file, config.train_samples, config.dataset_revision)
    validation = _validation(config)
    tokenizer = checkpoint.tokenizer()
    encoder = Encoder(tokenizer, benchmark, config.max_length)
    job = _Job(
        config, describe_base(checkpoint), tokenizer, encoder, encoder.training(train), encoder.scored(validation)
    )
    _refuse_strange_tokens(job, checkpoint)
    return job


def _validation(config: FinetuneConfig) -> list[Example]:
    found = read_examples(
        config.benchmark, VALIDATION, config.validation_file, config.validation_samples, config.dataset_revision
    )
    labels = {example.label for example in found}
    if config.benchmark.label_words and len(labels) == 1:
        raise UserError(
            f"all {len(found)} validation examples have the label {labels.pop()}, so no accuracy would say anything; "
            "give a validation file with both"
        )
    return found


def _refuse_strange_tokens(job: _Job, checkpoint: Checkpoint) -> None:
    text = checkpoint.config.get("text_config") or checkpoint.config
    known = text.get("vocab_size")
    largest = max(int(tokens.ids.max()) for tokens in job.training.tokens)
    largest = max(largest, *(max(scored.prompt, default=0) for scored in job.validation), job.encoder.end)
    if isinstance(known, int) and largest >= known:
        raise UserError(
            f"the tokenizer of {checkpoint.source} makes token {largest} and the model knows {known}; give the "
            "tokenizer that belongs to it"
        )


def _open_results(job: _Job, processes: Processes, held: contextlib.ExitStack) -> tuple[Path, int | None]:
    """The folder, locked until `held` is closed, and the step to go on from."""
    config = job.config
    root = Path(config.output_dir).expanduser()
    results = Results.open(root, config.method, config.options(), job.identity(processes))
    held.enter_context(results.claim())
    if not results.is_whole:
        return results.path, results.last_checkpoint()
    if not config.keep_checkpoints:  # a process that was killed when all was there but this
        results.remove_checkpoints()
    return results.path, None


# -------------------------------------------------------------------------------------------------- what is done


def _train(job: _Job, results: Results, start: int | None, processes: Processes, terminal: Terminal) -> None:
    from jax_extract.pytorch.finetuning.scoring import SCORED_IN, answer, scores
    from jax_extract.pytorch.finetuning.training import Training, load_model, parameters

    config, began = job.config, time.monotonic()
    model = load_model(config, job.base["revision"])
    trained, all_parameters = parameters(model)
    terminal.line("method", f"{_method_text(config)}: {trained:,} of {all_parameters:,} parameters are trained")
    terminal.line("folder", str(results.path))
    training = Training(
        model, job.tokenizer, config, job.training.tokens, job.encoder.padding, results, processes, terminal
    )
    model = training.run(None if start is None else results.checkpoint(start))
    # Every process answers a share.
    mine = range(processes.index, len(job.validation), processes.count)
    answered = answer(model, config.benchmark, job.encoder, [job.validation[i] for i in mine])
    by_place = dict(processes.gathered(list(zip(mine, answered, strict=True))))
    in_order = [by_place[i] for i in range(len(job.validation))]
    found = scores(config.benchmark, job.validation, in_order)
    if processes.is_main:
        with results.final_model() as folder:
            _save(model, job.tokenizer, folder)
        results.finish(
            {
                **_described(job, processes),
                "base_model": {**job.base, "parameters": all_parameters - (trained if config.method == "lora" else 0)},
                "trained_parameters": trained,
                "computed_in": config.dtype,
                "scored_in": SCORED_IN,
                "steps": training.steps,
                "losses": training.losses,
                "resumed_from_step": start,
                "seconds": round(time.monotonic() - began, 1),
                "scores": found,
            },
            b"".join(each.to_line() for each in in_order),
        )
        if not config.keep_checkpoints:
            results.remove_checkpoints()
    if losses := training.losses:
        (first, high), (last, low) = losses[0], losses[-1]
        terminal.line("loss", f"{high:.4f} in the first {first:,} steps, {low:.4f} in those up to {last:,}")
    terminal.line("scores", _scores_text(found))
    took = duration_text(time.monotonic() - began)
    terminal.line("done", f"{training.steps:,} steps in {took}: {results.path / FINAL_MODEL}")
    processes.wait()


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    options: dict[str, Any] = {}
    if hasattr(model, "peft_config"):
        options["save_embedding_layers"] = False  # they are the base model's; to find that out, peft would ask the hub
    model.save_pretrained(folder, **options)
    (folder / "README.md").unlink(missing_ok=True)  # peft's, an empty form
    tokenizer.save_pretrained(folder)


def _described(job: _Job, processes: Processes) -> dict[str, Any]:
    config, training, used = job.config, job.training, len(job.validation)
    benchmark = config.benchmark
    hub = {"dataset": benchmark.dataset, "config": benchmark.dataset_config, "revision": config.dataset_revision}
    train = {
        "source": hub if config.train_file is None else absolute(config.train_file),
        "examples": len(training.tokens),
    }
    validation = {
        "source": hub if config.validation_file is None else absolute(config.validation_file),
        "asked_for": config.validation_samples,
        "used": used,
        "whole_split": used < config.validation_samples,
    }
    return {
        "method": config.method,
        "task": benchmark.name,
        "seed": config.seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "max_length": config.max_length,
        "train": {
            **train,
            "left_out": {"answer_cut_off": training.cut_answers, "answer_too_long": training.long_answers},
        },
        "validation": validation,
        "template": benchmark.template,
        "label_words": list(benchmark.label_words),
        "device": config.device,
        "processes": processes.count,
        "versions": _versions(_PACKAGES),
    }


def _versions(packages: Sequence[str]) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


# -------------------------------------------------------------------------------------------------- what is said


def _tell(job: _Job, checkpoint: Checkpoint, terminal: Terminal) -> None:
    config, training = job.config, job.training
    source = Path(config.model_path).name
    terminal.line("model", f"{source} ({checkpoint.config.get('model_type')}) on {config.device}")
    left_out = training.cut_answers + training.long_answers
    fewer = f", {left_out:,} left out because their answers do not fit" if left_out else ""
    used = f"{len(job.validation):,} for validation"
    if len(job.validation) < config.validation_samples:
        used += f" (all there are; {config.validation_samples:,} were asked for)"
    terminal.line("task", f"{config.benchmark.name}: {len(training.tokens):,} examples for training{fewer}, {used}")


def _method_text(config: FinetuneConfig) -> str:
    if config.method == "full_finetune":
        return f"full_finetune, seed {config.seed}"
    modules = ", ".join(config.lora_target_modules or ("all linear layers",))
    return f"lora, seed {config.seed}, rank {config.lora_rank}, alpha {config.lora_alpha:g}, on {modules}"


def _scores_text(found: dict[str, Any]) -> str:
    right = f"{found['right']:,} of {found['samples']:,}"
    if "accuracy" in found:
        said, chance = f"accuracy {found['accuracy']:.3f} ({right})", "the commonest class"
    else:
        said, chance = f"exact match {found['exact_match']:.3f} ({right}), F1 {found['f1']:.3f}", '"unanswerable"'
    return f"{said}; always {chance} gives {found['majority_share']:.3f}, p = {found['p_value']:.2g}"
