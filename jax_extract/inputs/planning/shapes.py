"""Which lengths rows have: those in which the devices compute the least.

In: how long samples are, and the settings of a plan. Out: at most `max_shapes` lengths. Dynamic programming proposes
some, as if rows could be filled exactly; from the best of them on, single lengths are changed as long as that helps.
What a choice costs is tried: its stages are made of samples counted by length, coarsely where there are many.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jax_extract.inputs.planning.filling import Supply
from jax_extract.inputs.planning.slabs import SLAB_OVERHEAD_TOKENS, Shapes, cheapest_runs
from jax_extract.inputs.planning.stages import Lengths, Limits, stages_of

_EXACT_LENGTHS = 512  # where samples have more, they are tried in coarse units
_UNITS = 256  # of the longest sample
_PROPOSED = 64  # lengths among which dynamic programming chooses
_MOST_TIMES = 16  # the longest sample in a row, and rows a device, that are looked at singly
_STARTS = 3
_TRIALS_OF_A_START = 150
_EXACT_TRIALS = 12


class Trials:
    """What lengths of rows cost, each tried once."""

    def __init__(self, lengths: np.ndarray, limits: Limits, given: Shapes = ()) -> None:
        """`lengths`: int64 [samples], ascending."""
        self._supply, self._limits, self._given = Supply(lengths), limits, given
        self._costs: dict[Lengths, int] = {}

    def cost(self, lengths: Lengths) -> int:
        """Tokens that devices compute, and those that compiling is worth."""
        if lengths not in self._costs:
            stages = stages_of(lengths, self._supply, self._limits, self._given)
            compiling = 0 if self._given else self._limits.settings.compile_tokens * len(stages)
            self._costs[lengths] = self._limits.cost(stages) + compiling
        return self._costs[lengths]

    def __len__(self) -> int:
        return len(self._costs)

    def best(self, number: int) -> list[Lengths]:
        return sorted(self._costs, key=lambda lengths: (self._costs[lengths], lengths))[:number]


def cheapest_lengths(lengths: np.ndarray, limits: Limits, most: int) -> Lengths:
    """Lengths of rows, at most so many, that hold samples of these lengths (int64 [samples], ascending)."""
    coarse = _coarse(lengths, limits)
    trials = Trials(coarse, limits)
    starts = {*_single(int(lengths.sum()), limits), *_proposed(lengths, limits, most)}
    for start in sorted(starts, key=lambda start: (trials.cost(start), start))[:_STARTS]:
        _improve(start, trials, limits, most)
    if coarse is lengths:
        return trials.best(1)[0]
    exact = Trials(lengths, limits)
    return min(trials.best(_EXACT_TRIALS), key=exact.cost)


def cheapest_of_given(lengths: np.ndarray, limits: Limits, shapes: Shapes) -> Lengths:
    """Those of given shapes in which samples of these lengths (int64 [samples], ascending) cost least."""
    trials = Trials(_coarse(lengths, limits), limits, shapes)
    best = tuple(sorted((shape.length for shape in shapes), reverse=True))
    while len(best) > 1:
        without = [best[:i] + best[i + 1 :] for i in range(len(best)) if i or best[1] >= limits.longest]
        fewer = min(without, key=trials.cost)
        if trials.cost(fewer) > trials.cost(best):
            return best
        best = fewer
    return best


def _coarse(lengths: np.ndarray, limits: Limits) -> np.ndarray:
    """The lengths in units so large that they have few values; their sum stays what it is."""
    settings = limits.settings
    if settings.samples_a_row == 1:  # nothing else matters
        return -(-lengths // settings.length_multiple) * settings.length_multiple
    unit = 1 << max(0, (limits.shortest_row // _UNITS).bit_length() - 1)
    if unit == 1 or np.count_nonzero(np.diff(lengths)) < _EXACT_LENGTHS:
        return lengths
    rounded = np.diff((np.cumsum(lengths) + unit // 2) // unit, prepend=0) * unit
    return np.sort(np.clip(rounded, unit, limits.shortest_row))


def _single(tokens: int, limits: Limits) -> Iterator[Lengths]:
    """Rows of one length: those that hold the longest sample a few times, and those that share samples out evenly over
    few rows a device."""
    settings = limits.settings
    yield (limits.longest_row,)
    for times in range(1, 1 + min(limits.longest_row // limits.longest, _MOST_TIMES)):
        yield (settings.padded(times * limits.longest),)
    share = -(-tokens // settings.devices)
    fewest = -(-share // limits.longest_row)
    for rows in range(fewest, fewest + 2 * min(settings.rows, _MOST_TIMES)):
        even = settings.padded(-(-share // rows))
        for length in (even, even + settings.length_multiple):
            if limits.shortest_row <= length <= limits.longest_row:
                yield (length,)


def _proposed(lengths: np.ndarray, limits: Limits, most: int) -> Iterator[Lengths]:
    """Lengths by dynamic programming, for some prices of what the spare room of long rows takes."""
    settings, longest = limits.settings, limits.shortest_row
    unit = -(-longest // _PROPOSED // settings.length_multiple) * settings.length_multiple
    rows = np.arange(longest, 0, -unit)
    row_costs = [limits.row_cost(int(n)) + SLAB_OVERHEAD_TOKENS / limits.rows(int(n)) for n in rows]
    fitting = np.append(np.searchsorted(lengths, rows, side="right"), 0)  # samples that rows of each length can hold
    halves = np.searchsorted(lengths, rows // 2, side="right")
    tokens = np.append(0, np.cumsum(lengths))[fitting]
    prices = {limits.row_cost(n) / n for n in (longest >> i for i in range(5)) if n}
    for price in sorted(prices) if settings.samples_a_row != 1 else [0.0]:
        cost = np.full((len(rows), len(rows) + 1), np.inf)
        for i, length in enumerate(rows):
            held = tokens[i] - tokens[i + 1 :]
            if settings.samples_a_row == 1:
                needed = fitting[i] - fitting[i + 1 :]
            else:
                needed = np.maximum(fitting[i] - np.maximum(halves[i], fitting[i + 1 :]), -(-held // length))
            needed = -(-needed // settings.devices) * settings.devices
            cost[i, i + 1 :] = needed * row_costs[i]
            cost[i, i + 1 : -1] -= price * (needed * length - held)[:-1]
        yield tuple(
            int(rows[i])
            for i, j in cheapest_runs(cost, most, settings.compile_tokens)
            if i == 0 or fitting[i] > fitting[j]
        )


def _improve(best: Lengths, trials: Trials, limits: Limits, most: int) -> None:
    """Tries changes of single lengths as long as that helps."""
    end = len(trials) + _TRIALS_OF_A_START
    before = None
    while before != best:
        before = best
        for change in _changes(best, limits, most):
            if trials.cost(change) < trials.cost(best):
                best = change
            if len(trials) >= end:
                return


def _changes(lengths: Lengths, limits: Limits, most: int) -> Iterator[Lengths]:
    """Without one of them, with one a little longer or shorter, or with one more."""
    multiple = limits.settings.length_multiple
    for i in range(1, len(lengths)):
        yield lengths[:i] + lengths[i + 1 :]
    for i, length in enumerate(lengths):
        step = multiple
        while step <= max(length // 4, multiple):
            for other in (length + step, length - step):
                if (
                    limits.shortest_row if i == 0 else multiple
                ) <= other <= limits.longest_row and other not in lengths:
                    yield _descending(*lengths[:i], other, *lengths[i + 1 :])
            step *= 2
    if len(lengths) < most:
        further = {limits.settings.padded(limits.shortest_row * 13**i // 16**i) for i in range(1, 20)}
        for length in sorted(further - set(lengths), reverse=True):
            yield _descending(*lengths, length)


def _descending(*lengths: int) -> Lengths:
    return tuple(sorted(lengths, reverse=True))
