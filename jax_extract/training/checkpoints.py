"""checkpoint-STEP/ and final_model/: Hugging Face folders that also say how they came to be, and how to go on.

In: tensors, config.json, a vocabulary, the optimizer's state. Out: a folder that is whole or not there, in which
trainer_state.json names every other file with its size and checksum; and, when training goes on, the newest of them,
checked. A folder without that file is none of ours and is never touched.
"""

from __future__ import annotations

import json
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
from jax_extract.weights.save import write_weights

STATE_FILE = "trainer_state.json"
OPTIMIZER_FOLDER = "optimizer"
FINAL_MODEL = "final_model"
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
    """

    global_step: int
    max_steps: int
    epoch: float
    log_history: list[dict[str, Any]]
    settings: dict[str, Any]
    numerics: dict[str, Any]


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
        (folder / STATE_FILE).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")

    write_folder(target, fill)


def checkpoint_folder(output: Path, step: int) -> Path:
    return output / f"checkpoint-{step}"


def saved_steps(output: Path) -> list[int]:
    """Steps that have a checkpoint, ascending."""
    found = (_CHECKPOINT.fullmatch(path.name) for path in output.glob("checkpoint-*") if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def read_state(folder: Path, mend: str) -> TrainerState:
    """What a folder says of itself, every file of it checked; UserError that ends in `mend` where it is not whole."""
    if not (folder / STATE_FILE).is_file():
        raise UserError(f"{folder} has no {STATE_FILE}, so it is no whole model of jax-extract train; {mend}")
    with damage_is_told(f"{folder / STATE_FILE}", mend):
        said = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        files = said.pop("files")
        state = TrainerState(**said)
        if not isinstance(files, dict) or not isinstance(state.settings, dict) or type(state.global_step) is not int:
            raise ValueError("it is not what jax-extract train writes")
    for name, expected in files.items():
        path = folder / checked_name(name, folder)
        if not path.is_file():
            raise UserError(f"{folder} lacks {name}; {mend}")
        if (found := _measured(path)) != expected:
            what = f"has {found['bytes']:,} of {expected['bytes']:,} bytes"
            what = what if found["bytes"] != expected["bytes"] else "is not as it was written"
            raise UserError(f"{folder} is damaged: {name} {what}; {mend}")
    return state


def remove_training(output: Path) -> None:
    """Removes checkpoints and the final model that training here has written; what is not ours stays."""
    for folder in (output / FINAL_MODEL, *(checkpoint_folder(output, step) for step in saved_steps(output))):
        if folder.is_symlink() or (folder.exists() and not (folder / STATE_FILE).is_file()):
            raise UserError(f"{folder} was not written by jax-extract train, so it is not removed; move it away")
        if folder.exists():
            remove_folder(folder)


def _measured(path: Path) -> dict[str, int]:
    content = path.read_bytes()
    return {"bytes": len(content), "crc32c": crc32c(content)}
