"""Interventions of a batch whose rows have edits of their own.

In: for each row a sample and its edits. Out: as few `Intervention`s as do them all: one for each kind of change at a
hook point, as often as a row has it, in the order in which the edits of every row act.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_extract.forward.batches import rounded
from jax_extract.forward.edits import Edits, Resolved
from jax_extract.inputs.token_table import TokenizedSample
from models.hooks import depth
from models.interventions import UNCHANGED, Intervention, Kind


class EditedRow(NamedTuple):
    """A sample, and what is changed of it."""

    sample: TokenizedSample
    edits: Edits


def first_block(edits: Edits) -> int:
    """The lowest block that must run again; as many as the model has where none must."""
    if edits.lowest is None:
        return edits.blocks
    layer, _ = edits.lowest
    if edits.lowest == depth("after_block", layer):
        layer += 1
    return min(max(layer, 0), edits.blocks)  # embeddings lie before the first, the final norm behind the last


def interventions_of(rows: Sequence[EditedRow], columns: int, in_place: bool = False) -> tuple[Intervention, ...]:
    """Of a batch of these rows, each a sample from column 0 on.

    Args:
      in_place: edits behind a block act in it, and not before the next one: for what looks at what they leave there.
    """
    slots: list[_Slot] = []
    for number, row in enumerate(rows):
        last: dict[str, int] = {}  # by hook point, the slot that acted last
        for one, hook, layers in _acting(row.edits, in_place):
            if not one.concerns(row.sample):
                continue
            signature = _signature(one, hook)
            after = last.get(hook, -1)
            fitting = (i for i, slot in enumerate(slots) if i > after and slot.signature == signature)
            if (place := next(fitting, None)) is None:
                place = len(slots)
                slots.append(_Slot(signature, hook, one.kind))
            slots[place].take(number, row.sample, one, layers)
            last[hook] = place
    blocks = rows[0].edits.blocks
    return tuple(slot.intervention(len(rows), columns, blocks) for slot in slots)


def _acting(edits: Edits, in_place: bool) -> Iterator[tuple[Resolved, str, tuple[int, ...]]]:
    """Edits with where they act: behind a block is before the next one, so that the block itself need not run.

    There they come before those that were given for what enters the next one.
    """
    for one in sorted(edits.each, key=lambda one: one.hook != "after_block"):
        if one.hook == "after_block" and not in_place:
            yield one, "residual_before", tuple(layer + 1 for layer in one.layers)
        else:
            yield one, one.hook, one.layers


def _signature(one: Resolved, hook: str) -> Any:
    if not callable(one.edit.change):
        return hook, one.kind
    leaves, structure = jax.tree.flatten(one.operand_of_function)
    return hook, one.kind, structure, tuple((np.shape(leaf), np.result_type(leaf)) for leaf in leaves)


@dataclass
class _Slot:
    """One intervention that comes to be.

    Attributes:
      layers: by row.
      columns: by row, the tokens that are changed.
      numbers: by row, which rows of the operand they get.
      given: rows of the operand.
      known: where the rows of an edit's own array lie among them.
      operands: by row, of a function.
    """

    signature: Any
    hook: str
    kind: Kind
    layers: dict[int, tuple[int, ...]] = field(default_factory=dict)
    columns: dict[int, np.ndarray] = field(default_factory=dict)
    numbers: dict[int, np.ndarray] = field(default_factory=dict)
    given: list[np.ndarray] = field(default_factory=list)
    known: dict[int, int] = field(default_factory=dict)
    operands: dict[int, Any] = field(default_factory=dict)

    def take(self, row: int, sample: TokenizedSample, one: Resolved, layers: tuple[int, ...]) -> None:
        self.layers[row] = layers
        self.columns[row] = one.positions(sample)
        self.numbers[row] = np.zeros(len(self.columns[row]), np.int32)
        if callable(self.kind):
            self.operands[row] = one.operand_of_function
        elif self.kind != "zero":
            operand = one.operand_of(sample)
            if (begin := self.known.get(id(one.rows))) is None or one.rows is None:
                begin = sum(map(len, self.given))
                self.given.append(operand)
                if one.rows is not None:
                    self.known[id(one.rows)] = begin
            each = np.arange(len(operand)) if len(operand) > 1 else np.zeros(len(self.columns[row]), np.int64)
            self.numbers[row] = (begin + each).astype(np.int32)

    def intervention(self, rows: int, columns: int, blocks: int) -> Intervention:
        layers, numbers = np.zeros((rows, blocks + 1), bool), np.full((rows, columns), UNCHANGED, np.int32)
        for row, chosen in self.layers.items():
            layers[row, list(chosen)] = True
            numbers[row, self.columns[row]] = self.numbers[row]
        if callable(self.kind):
            operand, shared = self._operands(rows)
            return Intervention(self.hook, self.kind, layers, numbers, operand, shared)
        return Intervention(self.hook, self.kind, layers, numbers, self._rows())

    def _rows(self) -> np.ndarray | None:
        """[n, width] with n a power of two, so that few numbers are compiled for."""
        if not self.given:
            return None
        rows = np.concatenate(self.given)
        size = max(2, rounded(len(rows)))  # one row would be taken for all tokens alike
        return np.concatenate([rows, np.zeros((size - len(rows), rows.shape[1]), np.float32)])

    def _operands(self, rows: int) -> tuple[Any, tuple[bool, ...]]:
        """Leaves that are one and the same array are given once, as those of a whole autoencoder are."""
        flat = {row: jax.tree.leaves(operand) for row, operand in self.operands.items()}
        first = next(iter(flat.values()))
        structure = jax.tree.structure(next(iter(self.operands.values())))
        shared = tuple(all(each[i] is leaf for each in flat.values()) for i, leaf in enumerate(first))
        leaves = [
            leaf if alike else np.stack([np.asarray(flat.get(row, first)[i]) for row in range(rows)])
            for i, (leaf, alike) in enumerate(zip(first, shared, strict=True))
        ]
        return jax.tree.unflatten(structure, leaves), shared
