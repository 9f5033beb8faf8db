"""The folders of trained models: `{method}_{time}/`, whole when metadata.json is there.

In: what a training is of. Out: a new folder, or the one that an interrupted training of the same left. Inside:
config.yaml (first), checkpoint-N/ (while training), final_model/, predictions.jsonl and metadata.json (last, at once).
Nothing here imports torch, so that whatever reads trained models can find them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from jax_extract.errors import UserError, damage_is_told
from jax_extract.inputs.benchmarks import BENCHMARKS
from jax_extract.pytorch.finetuning.config import LARGEST_SEED
from jax_extract.store.ledger import to_json
from jax_extract.store.storage.failpoints import step
from jax_extract.store.storage.local import Directory

CONFIG_FILE, METADATA_FILE, PREDICTIONS_FILE = "config.yaml", "metadata.json", "predictions.jsonl"
FINAL_MODEL = "final_model"
METHODS = ("full_finetune", "lora")
FORMAT = 1

_UNFINISHED_MODEL = f"{FINAL_MODEL}.partial"
_LOCK = ".lock"
_WHOLE = "whole.json"  # in a checkpoint: its files and their sizes, written when all are on the disk
_TIME = "%Y%m%d_%H%M%S"
_FOLDER = re.compile(rf"({'|'.join(METHODS)})_\d{{8}}_\d{{6}}")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class TrainedModel:
    """A whole folder: what was trained, and where it is."""

    folder: Path
    method: str
    task: str
    seed: int
    metadata: Mapping[str, Any]

    @property
    def final_model(self) -> Path:
        return self.folder / FINAL_MODEL


def open_trained(folder: Path) -> TrainedModel:
    """The trained model of a folder; UserError where it is half-saved or damaged."""
    again = "give the command that made it again, and it goes on"
    if not (folder / METADATA_FILE).is_file():
        raise UserError(f"{folder} is half-saved: it has no {METADATA_FILE}; {again}")
    with damage_is_told(str(folder / METADATA_FILE), "restore it from a copy, or train again"):
        metadata = json.loads((folder / METADATA_FILE).read_text(encoding="utf-8"))
        model = _trained(folder, metadata)
        sizes = _sizes(metadata[FINAL_MODEL])
    for name, size in sizes.items():
        file = model.final_model / name
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(f"{file} is not the file of {size:,} bytes that was saved; restore it, or train again")
    return model


def _trained(folder: Path, metadata: Mapping[str, Any]) -> TrainedModel:
    """What metadata.json says, and folders are named by; ValueError where no training could have said it."""
    for name, known in (("method", METHODS), ("task", tuple(benchmark.name for benchmark in BENCHMARKS))):
        if metadata[name] not in known:
            raise ValueError(f"{name} is {metadata[name]!r:.80}, none of {', '.join(known)}")
    seed = metadata["seed"]
    if type(seed) is not int or not 0 <= seed <= LARGEST_SEED:  # True is an int too
        raise ValueError(f"seed is {seed!r:.80}, no whole number from 0 to {LARGEST_SEED}")
    return TrainedModel(folder, metadata["method"], metadata["task"], seed, metadata)


def _sizes(files: Mapping[str, Any]) -> Mapping[str, int]:
    """The saved files and their sizes; ValueError where it is none, or one lies elsewhere."""
    if not files:
        raise ValueError(f"{FINAL_MODEL} names no file")
    for name, size in files.items():
        if name in ("", "..") or Path(name).name != name or type(size) is not int or size < 0:
            raise ValueError(f"{FINAL_MODEL} has {name!r:.80}: {size!r:.40}, no file's name and size")
    return files


def trained_models(results: Path) -> list[TrainedModel]:
    """All whole ones of a results folder, by name; half-saved ones are passed over."""
    return [open_trained(folder) for folder in _folders(results) if (folder / METADATA_FILE).is_file()]


def half_saved_models(results: Path) -> list[Path]:
    """The folders of trainings that are not done, by name."""
    return [folder for folder in _folders(results) if not (folder / METADATA_FILE).is_file()]


def whole_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints of a training that are whole, by step."""
    steps = sorted(int(found[1]) for path in folder.iterdir() if (found := _CHECKPOINT.fullmatch(path.name)))
    paths = {step: folder / f"checkpoint-{step}" for step in steps}
    return {step: path for step, path in paths.items() if _is_whole(path)}


def refuse_half_saved(model_path: Path) -> None:
    """UserError where a model lies in the folder of a training that is not done."""
    for folder in (model_path, model_path.absolute().parent):
        if (folder / CONFIG_FILE).is_file() and _FOLDER.fullmatch(folder.absolute().name):
            open_trained(folder)


def _folders(results: Path) -> Iterator[Path]:
    """Links to folders among them: one may have been moved to a larger disk."""
    if results.is_dir():
        yield from (path for path in sorted(results.iterdir()) if _FOLDER.fullmatch(path.name) and path.is_dir())


class Results:
    """The folder of one training."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._directory = Directory(path)

    @classmethod
    def open(cls, results: Path, method: str, options: Mapping[str, Any], identity: Mapping[str, Any]) -> Results:
        """The folder of the training with this identity, or a new one.

        Args:
          options: all of the command's, for who reads config.yaml.
          identity: what decides the outcome; plain values.

        Raises:
          UserError: it is half-saved and elsewhere: to go on removes files, which is not done through a link.
        """
        Directory(results).require_usable()
        wanted = json.loads(json.dumps(identity))
        for folder in _folders(results):
            if folder.name.startswith(f"{method}_") and _identity(folder) == wanted:
                found = cls(folder)
                found._require_removable()
                return found
        made = cls(_new_folder(results, method))
        content = yaml.safe_dump({"options": dict(options), "identity": wanted}, sort_keys=False)
        made._directory.write(CONFIG_FILE, content.encode())
        return made

    @property
    def is_whole(self) -> bool:
        return (self.path / METADATA_FILE).is_file()

    def _require_removable(self) -> None:
        if self.path.is_symlink() and not self.is_whole:
            raise UserError(
                f"{self.path} is a link to a half-saved training in {self.path.resolve()}, which is not gone on with "
                "through a link; move it back in the link's place, or choose another --output_dir"
            )

    def claim(self) -> Any:
        """Keeps other processes out as long as what is returned is open; UserError where one is in there."""
        lock = (self.path / _LOCK).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UserError(
                f"another process is training in {self.path}; wait until it has ended, or choose another --output_dir"
            ) from None
        return lock

    # ------------------------------------------------------------------------------------------- checkpoints

    def mark(self, number: int) -> None:
        """Makes the checkpoint of a step count: from here on, training goes on from it."""
        folder = self.path / f"checkpoint-{number}"
        sizes = _synced(folder)
        with step("finetune.mark"):
            Directory(folder).replace(_WHOLE, to_json({"files": sizes}))

    def last_checkpoint(self) -> int | None:
        """The step of the last whole checkpoint; what is newer, and not whole, is removed."""
        steps = sorted(int(found[1]) for path in self.path.iterdir() if (found := _CHECKPOINT.fullmatch(path.name)))
        while steps:
            if _is_whole(folder := self.path / f"checkpoint-{steps[-1]}"):
                return steps[-1]
            shutil.rmtree(folder)
            steps.pop()
        return None

    def checkpoint(self, number: int) -> Path:
        return self.path / f"checkpoint-{number}"

    def remove_checkpoints(self) -> None:
        """Nothing where the folder is a link: what lies elsewhere is not ours to remove."""
        if self.path.is_symlink():
            return
        for path in list(self.path.iterdir()):
            if _CHECKPOINT.fullmatch(path.name) and not path.is_symlink():
                shutil.rmtree(path)

    # ----------------------------------------------------------------------------------------------- results

    @contextlib.contextmanager
    def final_model(self) -> Iterator[Path]:
        """An empty folder to save a model in; it takes its name when all its files are on the disk."""
        unfinished, final = self.path / _UNFINISHED_MODEL, self.path / FINAL_MODEL
        for leftover in (unfinished, final):  # of an attempt that was killed before its metadata.json
            if leftover.exists():
                shutil.rmtree(leftover)
        unfinished.mkdir()
        yield unfinished
        _synced(unfinished)
        with step("finetune.name_model"):
            unfinished.rename(final)
        self._directory.sync()

    def finish(self, metadata: Mapping[str, Any], predictions: bytes) -> None:
        """From here on the folder is whole."""
        final = self.path / FINAL_MODEL
        sizes = {path.name: path.stat().st_size for path in sorted(final.iterdir()) if path.is_file()}
        self._directory.replace(PREDICTIONS_FILE, predictions)
        with step("finetune.finish"):
            self._directory.replace(METADATA_FILE, to_json({"format": FORMAT, **metadata, FINAL_MODEL: sizes}))


def _identity(folder: Path) -> Any:
    """None where there is nothing to be read: config.yaml is there whole, or not at all."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        content = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return content.get("identity") if isinstance(content, dict) else None
    return None


def _new_folder(results: Path, method: str) -> Path:
    """Named by the time; a second later where another training began in the same one."""
    Directory(results).make()
    time = datetime.now(UTC)
    while True:
        path = results / f"{method}_{time.strftime(_TIME)}"
        try:
            path.mkdir()
        except FileExistsError:
            time += timedelta(seconds=1)
            continue
        except OSError as error:
            raise UserError(f"directory {path} cannot be made: {error.strerror}") from None
        Directory(results).sync()
        return path


def _synced(folder: Path) -> dict[str, int]:
    """The sizes of a folder's files, when all are on the disk."""
    sizes: dict[str, int] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != _WHOLE:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                sizes[path.name] = os.fstat(file.fileno()).st_size
    Directory(folder).sync()
    return sizes


def _is_whole(folder: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        sizes = json.loads((folder / _WHOLE).read_text(encoding="utf-8"))["files"]
        return all((folder / Path(name).name).stat().st_size == size for name, size in sizes.items())
    return False
