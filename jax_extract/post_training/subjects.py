"""Whose representations are wanted: the models of a results folder, their checkpoints, and what they were trained from.

In: a `PostTrainingConfig`. Out: `Subject`s, the base model first, each with its weights and the prompts of its task.
Everything is checked here that can be without reading prompts: no model half-saved, none twice, all of a task with the
same prompts, all from one base model, and that where it is said to be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax_extract.errors import UserError, damage_is_told, user_path
from jax_extract.inputs.benchmarks import MAX_LENGTH, VALIDATION_SAMPLES
from jax_extract.inputs.benchmarks_prompts import ANSWER_TOKENS
from jax_extract.post_training.config import PostTrainingConfig
from jax_extract.post_training.names import BASE, FINAL_STEP, Name
from jax_extract.pytorch.finetuning.base_model import describe_base
from jax_extract.pytorch.finetuning.folder import (
    METADATA_FILE,
    TrainedModel,
    half_saved_models,
    refuse_half_saved,
    trained_models,
    whole_checkpoints,
)
from jax_extract.weights.checkpoint import read_json
from jax_extract.weights.opening import open_checkpoint

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Prompts:
    """Which samples of a task's validation split, and how long their prompts may be.

    Attributes:
      file: a local one instead of the hub's.
      revision: on the hub.
      asked_for: so many from the first, or all where there are fewer.
      max_length: of a prompt with its answer, in tokens.
    """

    task: str
    file: str | None
    revision: str | None
    asked_for: int
    max_length: int

    def __str__(self) -> str:
        source = self.file or f"the hub's{f' at {self.revision}' if self.revision else ''}"
        return f"{source}, {self.asked_for} samples, --max_length {self.max_length}"


@dataclass(frozen=True)
class Subject:
    """One set of representations to come.

    Attributes:
      step: of the training; 0 where it ended.
      model_path: a folder or hub id with the model's weights, or its base model's.
      revision: of a hub id.
      adapter: the folder of an adapter to them.
      said: what metadata.json should say of it; plain values.
    """

    name: Name
    step: int
    model_path: str
    revision: str | None
    adapter: str | None
    prompts: Prompts
    said: Mapping[str, Any]


def find_subjects(config: PostTrainingConfig) -> list[Subject]:
    """What is to be done, in order. UserError where it cannot be."""
    if config.model_path is not None:
        trained = [_elsewhere(config)]
    else:
        models = _chosen(config)
        base = _base_of(models, config)
        trained = [subject for model in models for subject in _subjects(model, base, config)]
    _require_same_prompts(trained)
    return [*(_base_subjects(trained, config) if config.base else ()), *trained]


# ------------------------------------------------------------------------------------ models of a results folder


def _chosen(config: PostTrainingConfig) -> list[TrainedModel]:
    results = config.results
    if not results.is_dir():
        raise UserError(f"there is no folder {results}; train models with jax-extract finetune, or name --results_dir")
    if not config.skip_half_saved and (unfinished := half_saved_models(results)):
        raise UserError(
            f"{unfinished[0]} is half-saved: it has no {METADATA_FILE}; give the command that made it again, and it "
            "goes on, or pass over it with --skip_half_saved True"
        )
    there = trained_models(results)
    if not there:
        raise UserError(f"{results} holds no trained model; train some with jax-extract finetune")
    _require_known(config.models, there)
    chosen = [model for model in there if _is_wanted(model, config)]
    if not chosen:
        names = ", ".join(sorted({str(_name(model)) for model in there}))
        raise UserError(f"no model of {results} is of these --tasks, --methods and --seeds; it holds {names}")
    by_name: dict[Name, TrainedModel] = {}
    for model in chosen:
        if other := by_name.get(_name(model)):
            raise UserError(
                f"{other.folder} and {model.folder} are both {_name(model)}; choose one by its folder with --models, "
                "or move the other away"
            )
        by_name[_name(model)] = model
    return sorted(chosen, key=lambda model: (model.task, model.method, model.seed))


def _name(model: TrainedModel) -> Name:
    return Name(model.method, model.task, model.seed)


def _is_wanted(model: TrainedModel, config: PostTrainingConfig) -> bool:
    for wanted, value in (
        (config.wanted_tasks, model.task),
        (config.methods, model.method),
        (config.seeds, model.seed),
    ):
        if wanted is not None and value not in wanted:
            return False
    return config.models is None or any(_is_called(model, word) for word in config.models)


def _is_called(model: TrainedModel, word: str) -> bool:
    """Whether a word of --models is it: by its name in either order, or by its folder's."""
    return Name.parse(word) == _name(model) or Path(word).name == model.folder.name


def _require_known(wanted: Sequence[str] | None, there: Iterable[TrainedModel]) -> None:
    there = list(there)
    for word in wanted or ():
        if not any(_is_called(model, word) for model in there):
            names = ", ".join(sorted(f"{_name(model)} ({model.folder.name})" for model in there))
            raise UserError(f"--models {word!r} is none of {names}")


@dataclass(frozen=True)
class _Base:
    model_path: str
    revision: str | None


def _base_of(models: Sequence[TrainedModel], config: PostTrainingConfig) -> _Base:
    """The one base model of all; UserError where there are several, or it is not where it should be."""
    first = models[0]
    said = {model.folder: _base_said(model) for model in models}
    for folder, other in said.items():
        if other["digest"] != said[first.folder]["digest"]:
            raise UserError(
                f"{first.folder} and {folder} were trained from different base models "
                f"({said[first.folder]['model_path']} and {other['model_path']}); choose those of one with --models"
            )
    base = said[first.folder]
    path, revision = (base["model_path"], base["revision"]) if config.base_model is None else (config.base_model, None)
    if not config.base and all(model.method != "lora" for model in models):
        return _Base(path, revision)  # which nobody needs
    try:
        checkpoint = open_checkpoint(path, revision)
    except UserError as error:
        if config.base_model is not None:
            raise
        raise UserError(
            f"the base model of {first.folder}, {path}, cannot be opened ({error}); say with --base_model where it is"
        ) from None
    if describe_base(checkpoint)["digest"] != base["digest"]:
        raise UserError(
            f"{path} is not the model that {first.folder} was trained from: its configuration or weights are others; "
            "give that one as --base_model"
        )
    return _Base(path, checkpoint.revision)


def _base_said(model: TrainedModel) -> dict[str, Any]:
    with damage_is_told(str(model.folder / METADATA_FILE), "restore it from a copy, or train again"):
        base = model.metadata["base_model"]
        return {
            "model_path": str(base["model_path"]),
            "revision": base["revision"] and str(base["revision"]),
            "digest": base["digest"],
        }


def _subjects(model: TrainedModel, base: _Base, config: PostTrainingConfig) -> Iterator[Subject]:
    """The model as its training ended, and its checkpoints where they are asked for."""
    prompts = _prompts(model, config)
    folders = {FINAL_STEP: model.final_model}
    if config.checkpoints:
        found = whole_checkpoints(model.folder)
        if not found:
            raise UserError(
                f"{model.folder} holds no checkpoint; train it with --keep_checkpoints True into another --output_dir, "
                "or leave --checkpoints out"
            )
        folders |= found
    for step, folder in sorted(folders.items()):
        said = {
            "training": str(model.folder),
            "trained_steps": model.metadata.get("steps") if step == FINAL_STEP else step,
            "scores": model.metadata.get("scores") if step == FINAL_STEP else None,
            "base_model": model.metadata.get("base_model"),
        }
        where = (str(folder), None, None) if model.method != "lora" else (base.model_path, base.revision, str(folder))
        yield Subject(_name(model), step, *where, prompts, said)


def _prompts(model: TrainedModel, config: PostTrainingConfig) -> Prompts:
    """As the model was trained, but for what the flags say."""
    with damage_is_told(str(model.folder / METADATA_FILE), "restore it from a copy, or train again"):
        validation = model.metadata["validation"]
        source = validation["source"]
        file, revision = (source, None) if isinstance(source, str) else (None, source["revision"])
        trained = Prompts(model.task, file, revision, int(validation["asked_for"]), int(model.metadata["max_length"]))
        if trained.asked_for < 1 or trained.max_length < 2 * ANSWER_TOKENS:
            raise ValueError(f"{trained.asked_for} samples of {trained.max_length} tokens")
    if (
        config.data_dir is None
        and file is not None
        and not user_path(file, f"{model.folder}, validation data").is_file()
    ):
        raise UserError(
            f"{model.folder} was trained with the validation data {file}, which is not there; give --data_dir DIR with "
            f"{model.task}/validation.jsonl or .csv in it"
        )
    return _under(config, trained)


def _under(config: PostTrainingConfig, prompts: Prompts) -> Prompts:
    """With what the flags say."""
    if config.data_dir is not None:
        prompts = replace(prompts, file=str(_local_file(config.data_dir, prompts.task)), revision=None)
    return replace(
        prompts,
        asked_for=config.validation_samples or prompts.asked_for,
        max_length=config.max_length or prompts.max_length,
    )


def _local_file(data_dir: str, task: str) -> Path:
    folder = user_path(data_dir, "--data_dir") / task
    for suffix in (".jsonl", ".csv"):
        if (file := folder / f"validation{suffix}").is_file():
            return file
    raise UserError(f"--data_dir has neither {folder}/validation.jsonl nor .csv; it needs the data of every task")


def _require_same_prompts(subjects: Iterable[Subject]) -> None:
    first: dict[str, Subject] = {}
    for subject in subjects:
        other = first.setdefault(subject.prompts.task, subject)
        if _comparable(other.prompts) != _comparable(subject.prompts):
            raise UserError(
                f"{other.name} and {subject.name} were not trained with the same prompts ({other.prompts}; "
                f"{subject.prompts}), so that their rows could not be compared; choose with --models, or say for "
                "all of them --data_dir, --validation_samples and --max_length"
            )


def _comparable(prompts: Prompts) -> Prompts:
    file = prompts.file and str(Path(prompts.file).expanduser().resolve())
    return replace(prompts, file=file)


def _base_subjects(trained: Iterable[Subject], config: PostTrainingConfig) -> Iterator[Subject]:
    """The base model on every task, once."""
    seen: set[str] = set()
    for subject in trained:
        if subject.name.task in seen:
            continue
        seen.add(subject.name.task)
        base = subject.said["base_model"] or {}
        path, revision = config.base_model or base.get("model_path"), base.get("revision")
        if path is None:
            raise UserError(
                f"what {config.model_path} was trained from is not known; give --base_model, or leave it out with "
                "--base False"
            )
        revision = None if config.base_model else revision
        yield Subject(Name(BASE, subject.name.task, None), FINAL_STEP, path, revision, None, subject.prompts, {})


# ------------------------------------------------------------------------------------------------ a single model


def _elsewhere(config: PostTrainingConfig) -> Subject:
    """The model of --model_path, of which the flags say what it is."""
    assert config.model_path is not None and config.wanted_tasks and config.methods and config.seeds
    folder = user_path(config.model_path, "--model_path")
    refuse_half_saved(folder)
    name = Name(config.methods[0], config.wanted_tasks[0], config.seeds[0])
    prompts = _under(config, Prompts(name.task, None, None, VALIDATION_SAMPLES, MAX_LENGTH))
    base = config.base_model
    adapter = None
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").exists():
        if name.method != "lora":
            raise UserError(f"{folder} is an adapter, and --methods says {name.method}; give --methods lora")
        adapter = config.model_path
        base = base or read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise UserError(f"{folder} is an adapter and does not say of which model; give --base_model")
    said = {"training": config.model_path, "base_model": {"model_path": base, "revision": None} if base else None}
    return Subject(name, FINAL_STEP, base if adapter else config.model_path, None, adapter, prompts, said)  # type: ignore[arg-type] (checked)
