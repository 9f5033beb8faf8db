"""What representations are called, and where they lie.

In: a method, a task, a seed, a step. Out: `full_finetune_mrpc_seed42/step_000000`, and back; on reading, the task may
come first too, as in `mrpc_full_finetune_seed42`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jax_extract.errors import UserError
from jax_extract.inputs.benchmarks import BENCHMARKS
from jax_extract.pytorch.finetuning.folder import METHODS
from jax_extract.store.reader import Run, open_activations

BASE = "base"  # the method of a model that was not trained
FINAL_STEP = 0  # where the model lies that a training ended with; checkpoints have their own steps

_METHODS, _TASKS = "|".join(METHODS), "|".join(benchmark.name for benchmark in BENCHMARKS)
_NAME = re.compile(
    rf"(?:(?P<method>{_METHODS})_(?P<task>{_TASKS})|(?P<task_first>{_TASKS})_(?P<method_last>{_METHODS}))"
    r"_seed(?P<seed>\d{1,10})"
)
_STEP = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class Name:
    """Whose representations: `full_finetune_mrpc_seed42`; of a base model the task alone, `mrpc`, and no seed."""

    method: str
    task: str
    seed: int | None

    @classmethod
    def parse(cls, text: str) -> Name | None:
        """In either order; None for what is no such name."""
        if any(text == benchmark.name for benchmark in BENCHMARKS):
            return cls(BASE, text, None)
        if not (found := _NAME.fullmatch(text)):
            return None
        method, task = found["method"] or found["method_last"], found["task"] or found["task_first"]
        return cls(method, task, int(found["seed"]))

    def __str__(self) -> str:
        return self.task if self.method == BASE else f"{self.method}_{self.task}_seed{self.seed}"


@dataclass(frozen=True)
class Representations:
    """A folder of representations: of which model, and of which step of its training (0: as it ended)."""

    folder: Path
    name: Name
    step: int

    def open(self) -> Run:
        """The rows; UserError where they are damaged."""
        return open_activations(str(self.folder))


def step_folder(step: int) -> str:
    return f"step_{step:06d}"


def find_representations(root: str | Path) -> list[Representations]:
    """What lies in a folder of phase 3, by method, task, seed and step; names in either order.

    Args:
      root: the folder that the command wrote to, or the results folder above it.

    Raises:
      UserError: there is no such folder, nothing in it, or two folders are of the same model, in either order.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; extract representations first, or name the folder that has them")
    found: dict[tuple[Name, int], Representations] = {}
    inner = (root / "phase3_representations" / "representations", root / "representations")
    there = next((all_of for place in (root, *inner) if (all_of := list(representations_in(place)))), None)
    if there is None:
        raise UserError(f"{root} holds no representations; name the --output_dir of jax-extract representations")
    for each in there:
        if other := found.get((each.name, each.step)):
            raise UserError(
                f"{each.folder.parent} and {other.folder.parent} are of the same model; move one of them away"
            )
        found[each.name, each.step] = each
    return sorted(found.values(), key=lambda each: (each.name.method, each.name.task, each.name.seed or 0, each.step))


def representations_in(root: Path) -> Iterator[Representations]:
    """What lies in a folder itself, by name, finished or not; nothing where there is no such folder."""
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if (name := Name.parse(folder.name)) is None or not folder.is_dir():
            continue
        for inner in sorted(folder.iterdir()):
            if (step := _STEP.fullmatch(inner.name)) and inner.is_dir():
                yield Representations(inner, name, int(step[1]))
