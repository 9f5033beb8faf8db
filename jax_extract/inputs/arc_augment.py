"""Augmentations of ARC tasks that can be undone exactly: turns and mirrorings, colours, order of the pairs.

In: a task, the run's seed and the number of the augmentation.
Out: an `Augmentation`, the same on every machine and with every library version, so that a sample can be
made again from its name alone. Number 0 changes nothing. The augmentations of a task are counted and the
numbers walk them in a pseudo-random order, hence no two numbers meet until all have been used (at least
29 million a task; independent draws would repeat themselves: one run of 50,000 samples in fifty).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jax_extract.errors import UserError
from jax_extract.inputs.arc_task import COLOURS, ArcTask, Grid

DIHEDRALS = 8
FEISTEL_ROUNDS = 6


@dataclass(frozen=True)
class Augmentation:
    """A reversible change of a whole task.

    Attributes:
      dihedral: element 0 to 7 of D4: transposed first from 4 on, then `dihedral % 4` quarter turns
        anticlockwise.
      colours: colour c becomes `colours[c]`; a permutation of 0 to 9.
      pair_order: train pair i is the original's pair `pair_order[i]`; a permutation.
    """

    dihedral: int
    colours: tuple[int, ...]
    pair_order: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dihedral not in range(DIHEDRALS):
            raise UserError(f"The dihedral {self.dihedral!r} is none of 0 to {DIHEDRALS - 1}.")
        if sorted(self.colours) != list(range(COLOURS)):
            raise UserError(f"The colours {self.colours!r} are no permutation of 0 to {COLOURS - 1}.")
        if sorted(self.pair_order) != list(range(len(self.pair_order))):
            raise UserError(f"The pair order {self.pair_order!r} is no permutation of 0 to n-1.")

    def apply_grid(self, grid: Grid) -> Grid:
        """The augmented grid; a new array, [columns, rows] where the turn swaps the sides."""
        transposed = grid.T if self.dihedral >= DIHEDRALS // 2 else grid
        return np.array(self.colours, dtype=np.int8)[np.rot90(transposed, self.dihedral % 4)]

    def invert_grid(self, grid: Grid) -> Grid:
        """The grid of which `grid` is the augmented one."""
        recoloured = np.argsort(self.colours).astype(np.int8)[grid]
        turned = np.rot90(recoloured, -(self.dihedral % 4))
        return turned.T if self.dihedral >= DIHEDRALS // 2 else turned

    def apply_task(self, task: ArcTask) -> ArcTask:
        """The augmented task, under its own task id; UserError if it has another number of train pairs."""
        self._check_pairs(task)
        pairs = [task.train[source] for source in self.pair_order]
        return replace(
            task,
            train=tuple((self.apply_grid(shown), self.apply_grid(answer)) for shown, answer in pairs),
            test=tuple(
                (self.apply_grid(asked), None if answer is None else self.apply_grid(answer))
                for asked, answer in task.test
            ),
        )

    def invert_task(self, task: ArcTask) -> ArcTask:
        """The task of which `task` is the augmented one; UserError as for `apply_task`."""
        self._check_pairs(task)
        pairs = [task.train[self.pair_order.index(target)] for target in range(len(task.train))]
        return replace(
            task,
            train=tuple((self.invert_grid(shown), self.invert_grid(answer)) for shown, answer in pairs),
            test=tuple(
                (self.invert_grid(asked), None if answer is None else self.invert_grid(answer))
                for asked, answer in task.test
            ),
        )

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, for a sample's `meta`."""
        return {"dihedral": self.dihedral, "colours": list(self.colours), "pair_order": list(self.pair_order)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Augmentation:
        """The augmentation that `as_json` wrote; UserError where `content` is none."""
        try:
            return cls(content["dihedral"], tuple(content["colours"]), tuple(content["pair_order"]))
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{dict(content)!r:.200} is no augmentation: expected dihedral (an integer) and colours and "
                "pair_order (lists of integers)."
            ) from error

    def _check_pairs(self, task: ArcTask) -> None:
        if len(self.pair_order) != len(task.train):
            raise UserError(
                f"The augmentation orders {len(self.pair_order)} train pairs and task {task.task_id} has "
                f"{len(task.train)}: apply it to the task it was made for."
            )


def augmentation(task: ArcTask, seed: int, number: int) -> Augmentation:
    """Augmentation `number` of `task` under `seed`; the identity for 0.

    Numbers give distinct augmentations until 8 * 10! * (train pairs)! are used up, then start anew. Two
    augmentations may still give one prompt, where a task is symmetric or lacks the colours exchanged.
    """
    ranks = DIHEDRALS * math.factorial(COLOURS) * math.factorial(len(task.train))
    rank = 0
    if number > 0:
        key = hashlib.sha256(f"{seed}/{task.task_id}".encode()).digest()
        # Rank 0 is the identity, which belongs to number 0 alone.
        rank = 1 + _shuffled((number - 1) % (ranks - 1), ranks - 1, key)
    rank, dihedral = divmod(rank, DIHEDRALS)
    pair_rank, colour_rank = divmod(rank, math.factorial(COLOURS))
    return Augmentation(
        dihedral, _permutation(colour_rank, range(COLOURS)), _permutation(pair_rank, range(len(task.train)))
    )


def _permutation(rank: int, items: Sequence[int]) -> tuple[int, ...]:
    """Permutation `rank` of `items`, read off in the factorial number system; 0 leaves the order."""
    left = list(items)
    chosen: list[int] = []
    while left:
        rank, position = divmod(rank, len(left))
        chosen.append(left.pop(position))
    return tuple(chosen)


def _shuffled(position: int, size: int, key: bytes) -> int:
    """Where a keyed pseudo-random permutation of range(size) puts `position`.

    A Feistel network permutes the next power of four; what lands beyond `size` is sent through again,
    which keeps the map one-to-one on range(size) (cycle walking: Black and Rogaway 2002, section 4).
    """
    half_bits = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half_bits) - 1
    while True:
        left, right = position >> half_bits, position & mask
        for turn in range(FEISTEL_ROUNDS):
            digest = hashlib.blake2b(f"{turn}/{right}".encode(), key=key, digest_size=16).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        position = left << half_bits | right
        if position < size:
            return position
