"""Stages: steps of one shape that all devices take together, and what they cost.

In: how many samples there are of each length, and lengths of rows. Out: `Stage`s, the longest rows first. Rows of a
stage are filled until no sample is left that the next, shorter rows cannot hold; then the stage is rounded up to whole
steps of all devices, and its further rows take shorter samples. So the spare room of long rows is where short samples
go, and only the last stage can leave room.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from jax_extract.inputs.planning.filling import Rows, Supply
from jax_extract.inputs.planning.slabs import SLAB_OVERHEAD_TOKENS, PlanSettings, Shapes
from models.accelerated_attention import computed_pairs

_MORE_STEPS = 8  # that a stage may have beyond the fewest, in slabs of fewer rows
# Times the samples that a row holds on average: programs keep room for the most that a row may hold, and where rows
# travel to other hosts, so much travels.
_CROWDED = 3
_ANY_NUMBER = 2**31

Lengths = tuple[int, ...]  # of rows, descending


@dataclass(frozen=True)
class Stage:
    """Steps of one shape, one behind the other.

    Attributes:
      length, rows: of each slab; a device computes one a step.
      steps: of all devices.
      filled: rows that hold samples, in order, at most steps x devices x rows.
    """

    length: int
    rows: int
    steps: int
    filled: tuple[Rows, ...]

    @property
    def samples(self) -> int:
        """The most samples of a row."""
        return max(rows.samples for rows in self.filled)


@dataclass(frozen=True)
class Limits:
    """What slabs may be, where the longest sample has `longest` tokens, and the mean one `mean`."""

    settings: PlanSettings
    longest: int
    mean: float

    @cached_property
    def shortest_row(self) -> int:
        """That holds every sample."""
        return self.settings.padded(self.longest)

    @cached_property
    def tokens(self) -> int:
        """Most tokens of a slab, unless it holds a single sample. Fewer rows (`batch_size`) mean less memory."""
        return min(self.settings.most_tokens(self.shortest_row), self.settings.rows * self.shortest_row)

    @cached_property
    def longest_row(self) -> int:
        if self.settings.samples_a_row == 1:
            return self.shortest_row
        multiple = self.settings.length_multiple
        return max(self.shortest_row, self.tokens // multiple * multiple)

    def samples_a_row(self, length: int) -> int:
        """Most samples of a row: the number that is given, or a power of two, at most `_CROWDED` times the average.

        A slab of a single row may hold any number: what is kept for it is not multiplied by rows.
        """
        if self.settings.packed:
            return self.settings.samples_a_row or _ANY_NUMBER
        crowded = max(2, int(_CROWDED * length / self.mean))
        return self.settings.samples_a_row or 1 << (crowded.bit_length() - 1)

    def whole_blocks(self, lengths: Lengths) -> Lengths:
        """Rows that attention computes in whole blocks: lengths above one are multiples of it, where they may be."""
        block, most = self.settings.attention_block, max(self.tokens, self.shortest_row)
        rounded = (-(-length // block) * block if length > block else length for length in lengths)
        fitting = {whole if whole <= most else length for whole, length in zip(rounded, lengths, strict=True)}
        return tuple(sorted(fitting, reverse=True))

    @property
    def tokens_a_row(self) -> int:
        """Most tokens of several samples in a row: as many as a shard has rows for."""
        if self.settings.positions.one_row_per_sample:
            return _ANY_NUMBER
        return self.settings.max_shard_bytes // self.settings.bytes_per_row

    def rows(self, length: int) -> int:
        """Most rows of a slab."""
        return 1 if self.settings.packed else max(1, min(self.settings.rows, self.tokens // length))

    def row_cost(self, length: int) -> int:
        """What a row costs, in tokens: its products and its attention."""
        if not self.settings.pair_cost:
            return length
        pairs = computed_pairs(length, min(self.settings.attention_block, length))
        return length + round(self.settings.pair_cost * pairs)

    def cost(self, stages: Iterable[Stage]) -> int:
        """Tokens that all devices compute, those that sit out included."""
        return self.settings.devices * sum(
            stage.steps * (stage.rows * self.row_cost(stage.length) + SLAB_OVERHEAD_TOKENS) for stage in stages
        )


def stages_of(lengths: Lengths, supply: Supply, limits: Limits, given: Shapes = ()) -> list[Stage]:
    """Places the whole supply in rows of these lengths; those that are not needed have no stage.

    Args:
      given: shapes of these lengths, where they are not free.
    """
    devices = limits.settings.devices
    fixed = {shape.length: shape for shape in given}
    stages: list[Stage] = []
    supply.restore()
    for length, following in zip(lengths, (*lengths[1:], 0), strict=True):
        if supply.longest <= following:
            continue
        shape = fixed.get(length)
        samples = shape.samples if shape else limits.samples_a_row(length)
        tokens = min(length, limits.tokens_a_row)
        filled = supply.fill(tokens, samples, _ANY_NUMBER, above=following)
        needed = sum(rows.number for rows in filled)
        rows = shape.rows if shape else _rows(length, needed, following, lengths[-1] if supply.tokens else 0, limits)
        steps = -(-needed // (devices * rows))
        filled += supply.fill(tokens, samples, steps * devices * rows - needed)
        stages.append(Stage(length, rows, steps, tuple(filled)))
    return stages


def _rows(length: int, needed: int, following: int, last: int, limits: Limits) -> int:
    """Rows of a slab, such that those that are needed fill steps of all devices.

    Args:
      length, needed: of the stage's rows.
      following: length of the next stage's.
      last: length of the last stage's, which would otherwise take the samples that further rows of this stage take; 0
        where no samples are left for them.
    """
    devices = limits.settings.devices
    held = following if limits.settings.samples_a_row == 1 else length
    scale = max(last, 1)
    further = limits.row_cost(length) * scale - (limits.row_cost(last) * held if last else 0)
    fewest = -(-needed // (devices * limits.rows(length)))

    def cost(steps: int) -> int:
        rows = -(-needed // (devices * steps))
        return steps * devices * SLAB_OVERHEAD_TOKENS * scale + (steps * devices * rows - needed) * further

    return -(-needed // (devices * min(range(fewest, fewest + _MORE_STEPS), key=cost)))
