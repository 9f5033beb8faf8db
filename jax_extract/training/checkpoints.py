"""Checkpoints that are whole or not there, and that say how they came to be and how to go on.

In: what fills a folder, where a training is, the optimizer's state. Out: checkpoint-STEP/, in which trainer_state.json
names every other file with its size and checksum; and, when training goes on, the newest of them, checked. A folder
whose trainer_state.json names no files, such as one of transformers' Trainer, is none of ours and is never touched; nor
is one in which a file lies that we did not write.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_extract.errors import UserError, damage_is_told
from jax_extract.store.folders import remove_folder, write_file, write_folder
from jax_extract.store.storage.verbs import checked_name, crc32c

STATE_FILE = "trainer_state.json"
OPTIMIZER_FOLDER = "optimizer"
HERE = "."  # of `Kind.final`
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
      pending_losses: what the steps since the last line of the log measured.
      data: where in the data the next step begins, in JSON; None where the step alone says it.
    """

    global_step: int
    max_steps: int
    epoch: float
    log_history: list[dict[str, Any]]
    settings: dict[str, Any]
    numerics: dict[str, Any]
    pending_losses: list[Any]
    data: dict[str, Any] | None = None


@dataclass(frozen=True)
class Kind:
    """What a command trains, as far as its folders tell it from others.

    Attributes:
      command: that writes them, such as `jax-extract train`.
      what: a folder holds, in a word.
      files: that none of its folders goes without.
      final: name of the folder with the end of a training; `HERE` where that is the output folder itself, which holds a
        folder for each thing that was trained.
      elsewhere, anew, nevertheless: how the user gives another folder, begins again, and goes on with other numerics.
      mappings: settings that are some, in JSON.
      other: what is there and what was asked for, where one setting (its name, its two values) is not the same.
    """

    command: str
    what: str
    files: frozenset[str]
    final: str
    elsewhere: str
    anew: str
    nevertheless: str
    mappings: frozenset[str]
    other: Callable[[str, Any, Any], str]


def save(
    target: Path,
    state: TrainerState,
    fill: Callable[[Path], None],
    save_optimizer: Callable[[Path], None] | None = None,
) -> None:
    """Writes a folder that `fill` fills, with what resuming needs where `save_optimizer` is given."""

    def fill_all(folder: Path) -> None:
        fill(folder)
        if save_optimizer is not None:
            save_optimizer(folder / OPTIMIZER_FOLDER)
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        _write_state(folder / STATE_FILE, state, folder, files)

    write_folder(target, fill_all)


def save_here(output: Path, state: TrainerState, folders: Mapping[str, Callable[[Path], None]]) -> None:
    """The end of a training of several things: a folder of each, then the state that names all their files."""
    for name, fill in folders.items():
        if (output / name).is_dir():  # of an attempt that was killed before it wrote the state
            remove_folder(output / name)
        write_folder(output / name, fill)
    files = [path for name in folders for path in sorted((output / name).rglob("*")) if path.is_file()]
    write_file(output / STATE_FILE, lambda path: _write_state(path, state, output, files))


def _write_state(path: Path, state: TrainerState, folder: Path, files: Iterable[Path]) -> None:
    said = {**vars(state), "files": {str(file.relative_to(folder)): _measured(file) for file in files}}
    path.write_text(json.dumps(said, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def checkpoint_folder(output: Path, step: int) -> Path:
    return output / f"checkpoint-{step}"


def saved_steps(output: Path) -> list[int]:
    """Steps that have a checkpoint, ascending."""
    found = (_CHECKPOINT.fullmatch(path.name) for path in output.glob("checkpoint-*") if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def read_state(kind: Kind, folder: Path, mend: str) -> TrainerState:
    """What a folder says of itself, every file of it checked; UserError that ends in `mend` where it is not whole."""
    state, files = _said(kind, folder, mend)
    for name, expected in files.items():
        path = folder / checked_name(name, folder)
        if not path.is_file():
            raise UserError(f"{folder} lacks {name}; {mend}, {kind.anew}")
        if (found := _measured(path)) != expected:
            what = f"has {found['bytes']:,} of {expected['bytes']:,} bytes"
            what = what if found["bytes"] != expected["bytes"] else "is not as it was written"
            raise UserError(f"{folder} is damaged: {name} {what}; {mend}, {kind.anew}")
    return state


def require_free(kind: Kind, output: Path) -> None:
    """UserError where a file, or a link to nothing, has the name of a folder that training writes."""
    for path in _targets(kind, output):
        if not path.is_dir():
            raise UserError(f"{path} is no folder, and training writes one of that name; move it away")


def remove_training(kind: Kind, output: Path) -> None:
    """Removes checkpoints and the final model that training here has written; all of them, or nothing."""
    folders = _targets(kind, output)
    for folder in folders:
        _require_ours(kind, folder)
    ended = _ended_here(kind, output)
    if kind.final == HERE:
        (output / STATE_FILE).unlink(missing_ok=True)
    for folder in (*folders, *ended):
        remove_folder(folder)


def _targets(kind: Kind, output: Path) -> list[Path]:
    """Whatever has the name of a folder that training writes, links to nothing too."""
    checkpoints = [path for path in sorted(output.glob("checkpoint-*")) if _CHECKPOINT.fullmatch(path.name)]
    ends = [output / kind.final] if kind.final != HERE else []
    return [path for path in (*ends, *checkpoints) if os.path.lexists(path)]


def _require_ours(kind: Kind, folder: Path) -> None:
    mend = "move it away, so that nothing of yours is removed"
    if folder.is_symlink():
        raise UserError(f"{folder} is a link, which {kind.command} does not write; {mend}")
    _, files = _said(kind, folder, mend)
    _require_only(kind, folder, folder.rglob("*"), files, mend)


def _require_only(kind: Kind, folder: Path, paths: Iterable[Path], files: Mapping[str, Any], mend: str) -> None:
    for path in sorted(paths):
        name = str(path.relative_to(folder))
        if (path.is_symlink() or not path.is_dir()) and name not in files and name != STATE_FILE:
            raise UserError(f"{path} was not written by {kind.command}; {mend}")


def _ended_here(kind: Kind, output: Path) -> list[Path]:
    """The folders of a training whose end is the output folder; UserError where another's file lies in one."""
    if kind.final != HERE or not (output / STATE_FILE).is_file():
        return []
    mend = "move it away, so that nothing of yours is removed"
    _, files = _said(kind, output, mend)
    names = dict.fromkeys(checked_name(name, output).split("/")[0] for name in files)
    folders = [output / name for name in names if (output / name).is_dir()]
    for folder in folders:
        _require_only(kind, output, folder.rglob("*"), files, mend)
    return folders


def _said(kind: Kind, folder: Path, mend: str) -> tuple[TrainerState, dict[str, dict[str, int]]]:
    """The state of a folder, and size and checksum of its files; UserError where it says none that can be ours."""
    path = folder / STATE_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {STATE_FILE}, so it is no whole {kind.what} of {kind.command}; {mend}")
    with damage_is_told(str(path), mend):
        said = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        if isinstance(said, dict) and not {"files", "settings"} <= said.keys():
            raise UserError(
                f"{folder} was not written by {kind.command}, as its {STATE_FILE} shows; move it away, or "
                f"{kind.elsewhere}"
            )
        files = said.pop("files")
        state = TrainerState(**said)
        if not _is_state(kind, state) or not _is_files(kind, files, not _CHECKPOINT.fullmatch(folder.name)):
            raise ValueError(f"it is not what {kind.command} writes")
    return state, files


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _is_state(kind: Kind, state: TrainerState) -> bool:
    numbers = [state.epoch, *_flat(state.pending_losses)]
    for entry in state.log_history:
        numbers += entry.values()
    return (
        all(isinstance(named, dict) for named in (state.settings, state.numerics))
        and all(isinstance(state.settings.get(name), dict) for name in kind.mappings)
        and all(type(step) is int and step > 0 for step in (state.global_step, state.max_steps))
        and all(type(number) in (int, float) for number in numbers)
        and isinstance(state.data, dict | None)
    )


def _flat(values: Any) -> Iterator[Any]:
    """Of a list of lists."""
    for value in values:
        if isinstance(value, list):
            yield from _flat(value)
        else:
            yield value


def _is_files(kind: Kind, files: Any, is_final: bool) -> bool:
    """Whether these are names with sizes and checksums, and those among them that no such folder goes without."""
    optimizer = any(name.startswith(f"{OPTIMIZER_FOLDER}/") for name in files)
    measured = all(isinstance(of, dict) and set(of) == {"bytes", "crc32c"} for of in files.values())
    numbers = measured and all(type(number) is int for of in files.values() for number in of.values())
    names = {name.rpartition("/")[2] for name in files} if kind.final == HERE else files.keys()
    return numbers and kind.files <= names and (is_final or optimizer)


def _measured(path: Path) -> dict[str, int]:
    content = path.read_bytes()
    return {"bytes": len(content), "crc32c": crc32c(content)}
