"""Which shapes slabs have, and how many steps of each: what costs the devices the least.

In: how long samples are, and the settings of a plan. Out: `Stage`s, the longest rows first. Rows of a stage are filled
(`filling`) until no sample is left that the next, shorter rows cannot hold; then the stage is rounded up to whole
steps of all devices, whose further rows take shorter samples. So the spare room of long rows is where short samples
go, and only the last stage can leave room. Lengths are found by trying: a trial takes about a millisecond, as it
counts samples by length and, where there are many, takes every so-manieth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jax_extract.inputs.planning.filling import Rows, Supply
from jax_extract.inputs.planning.slabs import SLAB_OVERHEAD_TOKENS, PlanSettings, Shapes

_TRIED_SAMPLES = 2_048  # of all, while lengths are sought
_MOST_TRIALS = 400
_MORE_STEPS = 8  # that a stage may have beyond the fewest, in slabs of fewer rows
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
    """What slabs may be, where the longest sample has `longest` tokens."""

    settings: PlanSettings
    longest: int

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
        multiple = self.settings.length_multiple
        return max(self.shortest_row, self.tokens // multiple * multiple)

    @property
    def samples_a_row(self) -> int:
        return self.settings.samples_a_row or _ANY_NUMBER

    def rows(self, length: int) -> int:
        """Most rows of a slab."""
        return 1 if self.settings.packed else max(1, min(self.settings.rows, self.tokens // length))

    def row_cost(self, length: int) -> int:
        """What a row costs, in tokens: its products, and attention in squares of queries and keys."""
        if not self.settings.pair_cost:
            return length
        block = min(self.settings.attention_block, length)
        blocks = -(-length // block)
        return length + round(self.settings.pair_cost * block * block * (blocks * (blocks + 1) // 2))


class Trials:
    """Stages of rows of given lengths, and what they cost.

    Where there are many samples, some are tried in the place of all: `stages` has the right number of steps, but
    `filled` only those.
    """

    def __init__(self, lengths: np.ndarray, limits: Limits, given: Shapes = (), most: int = _ANY_NUMBER) -> None:
        """`lengths`: int64 [samples], ascending."""
        self.limits = limits
        self._given = {shape.length: shape for shape in given}
        self._of = len(lengths)
        self._tried = min(most, self._of)
        # The longest is one of them, and the others lie in the middle of those that they stand for.
        chosen = np.append((2 * np.arange(self._tried - 1) + 1) * self._of // (2 * self._tried), self._of - 1)
        self._supply = Supply(lengths[chosen])
        self._costs: dict[Lengths, int] = {}

    def cost(self, lengths: Lengths) -> int:
        """Tokens that devices compute, those that sit out included, and what the compilations are worth."""
        if lengths not in self._costs:
            stages = self.stages(lengths)
            self._costs[lengths] = sum(map(self._stage_cost, stages)) + self._compiling * len(stages)
        return self._costs[lengths]

    @property
    def trials(self) -> int:
        return len(self._costs)

    @property
    def tokens(self) -> int:
        return self._supply.all_tokens * self._of // self._tried

    @property
    def _compiling(self) -> int:
        return 0 if self._given else self.limits.settings.compile_tokens

    def _stage_cost(self, stage: Stage) -> int:
        slab = stage.rows * self.limits.row_cost(stage.length) + SLAB_OVERHEAD_TOKENS
        return stage.steps * self.limits.settings.devices * slab

    def stages(self, lengths: Lengths) -> list[Stage]:
        """Of the rows of these lengths those that are needed."""
        supply, devices = self._supply, self.limits.settings.devices
        supply.restore()
        stages: list[Stage] = []
        for length, following in zip(lengths, (*lengths[1:], 0), strict=True):
            if supply.longest <= following:
                continue
            given = self._given.get(length)
            samples = given.samples if given else self.limits.samples_a_row
            tokens = min(length, self.limits.tokens)
            filled = supply.fill(tokens, samples, _ANY_NUMBER, above=following)
            needed = -(-sum(rows.number for rows in filled) * self._of // self._tried)
            rows = given.rows if given else self._rows(length, needed, following, lengths[-1] if supply.tokens else 0)
            steps = -(-needed // (devices * rows))
            spare = (steps * devices * rows - needed) * self._tried // self._of
            filled += supply.fill(tokens, samples, spare)
            stages.append(Stage(length, rows, steps, tuple(filled)))
        return stages

    def _rows(self, length: int, needed: int, following: int, last: int) -> int:
        """Rows of a slab, so that the rows that are needed fill steps of all devices.

        Further rows cost what they hold less than rows of the last stage would for the same samples (`last`: their
        length; 0 where there are no more samples).
        """
        devices = self.limits.settings.devices
        held = following if self.limits.samples_a_row == 1 else length
        further = self.limits.row_cost(length) * max(last, 1) - (self.limits.row_cost(last) * held if last else 0)
        fewest = -(-needed // (devices * self.limits.rows(length)))

        def cost(steps: int) -> int:
            rows = -(-needed // (devices * steps))
            return steps * devices * SLAB_OVERHEAD_TOKENS * max(last, 1) + (steps * devices * rows - needed) * further

        return -(-needed // (devices * min(range(fewest, fewest + _MORE_STEPS), key=cost)))


def cheapest_lengths(lengths: np.ndarray, limits: Limits, most: int) -> Lengths:
    """Lengths of rows, at most so many, that hold samples of these lengths (int64 [samples], ascending)."""
    trials = Trials(lengths, limits, most=_TRIED_SAMPLES)
    best = min(_single(trials), key=trials.cost)
    while True:
        before = best
        for change in _changes(best, limits, most):
            if trials.cost(change) < trials.cost(best):
                best = change
            if trials.trials >= _MOST_TRIALS:
                return best
        if best == before:
            return best


def cheapest_of_given(lengths: np.ndarray, limits: Limits, shapes: Shapes) -> Lengths:
    """Those of given shapes in which samples of these lengths (int64 [samples], ascending) cost least."""
    trials = Trials(lengths, limits, shapes, _TRIED_SAMPLES)
    best = tuple(sorted((shape.length for shape in shapes), reverse=True))
    while len(best) > 1:
        without = [best[:i] + best[i + 1 :] for i in range(len(best)) if i or best[1] >= limits.longest]
        fewer = min(without, key=trials.cost)
        if trials.cost(fewer) > trials.cost(best):
            return best
        best = fewer
    return best


def _single(trials: Trials) -> Iterator[Lengths]:
    """Rows of one length: the shortest, the longest, and those that share samples out evenly over few rows a device."""
    limits = trials.limits
    settings = limits.settings
    yield (limits.shortest_row,)
    yield (limits.longest_row,)
    share = -(-trials.tokens // settings.devices)
    fewest = -(-share // limits.longest_row)
    for rows in range(fewest, fewest + 2 * settings.rows):
        even = settings.padded(-(-share // rows))
        for length in (even, even + settings.length_multiple):
            if limits.shortest_row <= length <= limits.longest_row:
                yield (length,)


def _changes(lengths: Lengths, limits: Limits, most: int) -> Iterator[Lengths]:
    """Without one of them, with one more, or with one a little longer or shorter."""
    multiple = limits.settings.length_multiple
    for i in range(1, len(lengths)):
        yield lengths[:i] + lengths[i + 1 :]
    if len(lengths) < most:
        further = {limits.settings.padded(limits.shortest_row * 13**i // 16**i) for i in range(1, 20)}
        for length in sorted(further - set(lengths), reverse=True):
            yield tuple(sorted((*lengths, length), reverse=True))
    for i, length in enumerate(lengths):
        step = multiple
        while step <= max(length // 4, multiple):
            for other in (length + step, length - step):
                if (
                    limits.shortest_row if i == 0 else multiple
                ) <= other <= limits.longest_row and other not in lengths:
                    yield tuple(sorted((*lengths[:i], other, *lengths[i + 1 :]), reverse=True))
            step *= 2
