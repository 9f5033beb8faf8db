"""checkpoint-STEP/ and final_model/: Hugging Face folders that also say how they came to be, and how to go on.

In: tensors, config.json, a vocabulary, the optimizer's state. Out: a folder that is whole or not there, in which
trainer_state.json names every other file with its size and checksum; and, when training goes on, the newest of them,
checked. A folder whose trainer_state.json names no files, such as one of transformers' Trainer, is none of ours and is
never touched; nor is one in which a file lies that we did not write.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_extract.errors import UserError, damage_is_told
from jax_extract.inputs.walk_tokenizer import write_tokenizer
from jax_extract.store.folders import remove_folder, write_folder
from jax_extract.store.storage.verbs import checked_name, crc32c
from jax_extract.weights.save import WEIGHTS_FILE, write_weights

STATE_FILE = "trainer_state.json"
OPTIMIZER_FOLDER = "optimizer"
FINAL_MODEL = "final_model"
ANEW = "or start anew with --overwrite True (OVERWRITE=true)"
_CHECKPOINT = re.compile(r"checkpoint-([1-9]\d{0,9})")


@dataclass(frozen=True)
class TrainerState:
    """What trainer_state.json says, beside its files; the first four under the names that transformers gives them.

    Attributes:
      global_step: steps that are done.
      max_steps: steps that all epochs have.
      epoch: epochs that are done, with a fraction.
      log_history: what was logged and evaluated so far.
      settings: what decides the weights.
      numerics: what decides their last bits.
      pending_losses: of the steps since the last line of the log, float32 values.
    """

    global_step: int
    max_steps: int
    epoch: float
    log_history: list[dict[str, Any]]
    settings: dict[str, Any]
    numerics: dict[str, Any]
    pending_losses: list[float]


@dataclass(frozen=True)
class SavedModel:
    """Everything of a model's folder but its weights."""

    config: Mapping[str, Any]
    vocabulary: Mapping[str, int]
    max_length: int


def save(
    target: Path,
    model: SavedModel,
    tensors: Mapping[str, np.ndarray],
    state: TrainerState,
    save_optimizer: Callable[[Path], None] | None = None,
) -> None:
    """Writes a model's folder, with what resuming needs where `save_optimizer` is given."""

    def fill(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(dict(model.config), indent=2) + "\n", encoding="utf-8")
        write_weights(folder, tensors)
        write_tokenizer(folder, model.vocabulary, model.max_length)
        if save_optimizer is not None:
            save_optimizer(folder / OPTIMIZER_FOLDER)
        files = {str(path.relative_to(folder)): _measured(path) for path in sorted(folder.rglob("*")) if path.is_file()}
        said = {**vars(state), "files": files}
        (folder / STATE_FILE).write_text(json.dumps(said, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    write_folder(target, fill)


def checkpoint_folder(output: Path, step: int) -> Path:
    return output / f"checkpoint-{step}"


def saved_steps(output: Path) -> list[int]:
    """Steps that have a checkpoint, ascending."""
    found = (_CHECKPOINT.fullmatch(path.name) for path in output.glob("checkpoint-*") if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def read_state(folder: Path, mend: str) -> TrainerState:
    """What a folder says of itself, every file of it checked; UserError that ends in `mend` where it is not whole."""
    state, files = _said(folder, mend)
    for name, expected in files.items():
        path = folder / checked_name(name, folder)
        if not path.is_file():
            raise UserError(f"{folder} lacks {name}; {mend}, {ANEW}")
        if (found := _measured(path)) != expected:
            what = f"has {found['bytes']:,} of {expected['bytes']:,} bytes"
            what = what if found["bytes"] != expected["bytes"] else "is not as it was written"
            raise UserError(f"{folder} is damaged: {name} {what}; {mend}, {ANEW}")
    return state


def require_free(output: Path) -> None:
    """UserError where a file, or a link to nothing, has the name of a folder that training writes."""
    for path in _targets(output):
        if not path.is_dir():
            raise UserError(f"{path} is no folder, and training writes one of that name; move it away")


def remove_training(output: Path) -> None:
    """Removes checkpoints and the final model that training here has written; all of them, or nothing."""
    folders = _targets(output)
    for folder in folders:
        _require_ours(folder)
    for folder in folders:
        remove_folder(folder)


def _targets(output: Path) -> list[Path]:
    """Whatever has the name of a folder that training writes, links to nothing too."""
    checkpoints = (path for path in sorted(output.glob("checkpoint-*")) if _CHECKPOINT.fullmatch(path.name))
    return [path for path in (output / FINAL_MODEL, *checkpoints) if os.path.lexists(path)]


def _require_ours(folder: Path) -> None:
    mend = "move it away, so that nothing of yours is removed"
    if folder.is_symlink():
        raise UserError(f"{folder} is a link, which jax-extract train does not write; {mend}")
    _, files = _said(folder, mend)
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if (path.is_symlink() or not path.is_dir()) and name not in files and name != STATE_FILE:
            raise UserError(f"{path} was not written by jax-extract train; {mend}")


def _said(folder: Path, mend: str) -> tuple[TrainerState, dict[str, dict[str, int]]]:
    """The state of a folder, and size and checksum of its files; UserError where it says none that can be ours."""
    path = folder / STATE_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {STATE_FILE}, so it is no whole model of jax-extract train; {mend}")
    with damage_is_told(str(path), mend):
        said = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        if isinstance(said, dict) and not {"files", "settings"} <= said.keys():
            raise UserError(
                f"{folder} was not written by jax-extract train, as its {STATE_FILE} shows; move it away, or give "
                "another --output_dir (OUTPUT_DIR or RUN_NAME)"
            )
        files = said.pop("files")
        state = TrainerState(**said)
        if not _is_state(state) or not _is_files(files, folder.name == FINAL_MODEL):
            raise ValueError("it is not what jax-extract train writes")
    return state, files


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _is_state(state: TrainerState) -> bool:
    numbers = [state.epoch, *state.pending_losses]
    for entry in state.log_history:
        numbers += entry.values()
    return (
        all(isinstance(named, dict) for named in (state.settings, state.settings.get("model_config"), state.numerics))
        and all(type(step) is int and step > 0 for step in (state.global_step, state.max_steps))
        and all(type(number) in (int, float) for number in numbers)
    )


def _is_files(files: Any, is_final: bool) -> bool:
    """Whether these are names with sizes and checksums, and those among them that no such folder goes without."""
    optimizer = any(name.startswith(f"{OPTIMIZER_FOLDER}/") for name in files)
    measured = all(isinstance(of, dict) and set(of) == {"bytes", "crc32c"} for of in files.values())
    numbers = measured and all(type(number) is int for of in files.values() for number in of.values())
    return numbers and {"config.json", WEIGHTS_FILE} <= files.keys() and (is_final or optimizer)


def _measured(path: Path) -> dict[str, int]:
    content = path.read_bytes()
    return {"bytes": len(content), "crc32c": crc32c(content)}
