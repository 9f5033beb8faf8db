"""How prompts are read before they are answered: in slabs as an extraction computes, hardly any of it padding.

In: batches of prompts, how many devices there are, settings of slabs. Out: for each batch the arrays of each step.
Prompts of nearly one length are dealt out over the devices, whose slabs then have one shape in every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jax_extract.forward.edits import Placed
from jax_extract.generation.answers import Batch
from jax_extract.inputs.planning.slabs import FilledSlab, PlanSettings, SlabShape
from jax_extract.inputs.planning.windows import slabs_of
from jax_extract.inputs.token_table import TokenizedSample
from models.positions import Positions


@dataclass(frozen=True)
class Slabs:
    """One step: a slab of each device.

    Attributes:
      tokens: int32 [devices * b, t].
      lengths: int32 [devices * b, n], real tokens of the prompts that lie in each row, one behind the other.
      rows: int32 [devices * b, n], of the device's answers, whose prompts these are; one beyond where none is.
      placed: where each prompt lies.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    placed: tuple[Placed, ...]


@dataclass(frozen=True)
class Reading:
    """A batch, dealt out.

    Attributes:
      dealt: by row of answers, the prompt of each device; the last one may have fewer.
      filled: slabs, each of the first device's prompts, which are the longest of their rows.
      rows: of answers that each device has.
    """

    dealt: tuple[tuple[TokenizedSample, ...], ...]
    filled: list[FilledSlab]
    devices: int
    rows: int

    def place(self, device: int, row: int) -> int:
        """Among the rows of all devices."""
        return device * self.rows + row

    def prompts(self) -> Iterator[tuple[int, TokenizedSample]]:
        """(place, prompt) of each."""
        for row, prompts in enumerate(self.dealt):
            for device, prompt in enumerate(prompts):
                yield self.place(device, row), prompt

    def steps(self) -> Iterator[Slabs]:
        row_of = {prompts[0].sample_index: row for row, prompts in enumerate(self.dealt)}
        for shape, firsts in self.filled:
            rows = [[row_of[prompt.sample_index] for prompt in some] for some in firsts]
            yield self._slabs(shape, rows)

    def _slabs(self, shape: SlabShape, rows: list[list[int]]) -> Slabs:
        b = self.devices * shape.rows
        tokens, lengths = np.zeros((b, shape.length), np.int32), np.zeros((b, shape.samples), np.int32)
        whose = np.full((b, shape.samples), self.rows, np.int32)
        placed: list[Placed] = []
        for device in range(self.devices):
            for i, some in enumerate(rows, device * shape.rows):
                end = 0
                for n, row in enumerate(some):
                    if device >= len(self.dealt[row]):
                        continue
                    prompt = self.dealt[row][device]
                    tokens[i, end : end + prompt.length] = prompt.token_ids
                    lengths[i, n], whose[i, n] = prompt.length, row
                    placed.append(Placed(i, end, prompt))
                    end += prompt.length
        return Slabs(tokens, lengths, whose, tuple(placed))


def readings(batches: Sequence[Batch], devices: int, settings: PlanSettings) -> list[Reading]:
    """How each batch is read; the shapes suit them all.

    Args:
      settings: of the slabs; those of an extraction will do.
    """
    dealt = [tuple(batch.samples[i : i + devices] for i in range(0, len(batch.samples), devices)) for batch in batches]
    rows = max(map(len, dealt))
    longest = [[prompts[0] for prompts in some] for some in dealt]
    settings = replace(settings, samples_per_batch=rows, rows=rows, positions=Positions("last"))
    _, filled = slabs_of(longest, settings)
    return [Reading(some, slabs, devices, rows) for some, slabs in zip(dealt, filled, strict=True)]
