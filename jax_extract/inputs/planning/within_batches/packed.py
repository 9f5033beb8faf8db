"""Slabs whose samples lie one behind the other in a single row, all slabs of nearly the same length.

In: a window of samples. Out: shapes and batches of filled slabs. Samples are dealt into hands of `batch_size`
so that all hands have nearly the same number of tokens, and a hand that is too large for a slab is split into
equal ones: then one or two compiled shapes serve all, and only the differences between slabs are padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jax_extract.inputs.planning.slabs import (
    SLAB_OVERHEAD_TOKENS,
    FilledSlab,
    PlanSettings,
    Shapes,
    SlabShape,
    cheapest_runs,
)
from jax_extract.inputs.token_table import TokenizedSample

_UNEVEN = 0.005  # hands that differ by less than this are even
_MOST_SWAPS = 4_096
_MOST_PARTNERS = 8  # hands that the largest one is compared with
_WAYS = 4  # of splitting a hand that are compared where the shapes are given
# Later windows of a stream have slightly other sums; a shape that is this much too long still fits them.
_STREAM_ROOM = 0.015

Hand = list[TokenizedSample]


def packed_batches(
    samples: list[TokenizedSample], settings: PlanSettings, shapes: Shapes, more_to_come: bool
) -> tuple[Shapes, list[list[FilledSlab]]]:
    """Largest shapes first, of equal ones the longest sample; `shapes` are those of the windows before, if any."""
    ordered = sorted(samples, key=lambda s: (-s.length, s.sample_index))
    hands = _deal(ordered, settings.rows)
    if shapes:
        most = settings.most_tokens(settings.max_length)
        split = [_cheapest(itertools.islice(_splits(hand, most), _WAYS), shapes) for hand in hands]
        filled = _filled(split, shapes)
    else:
        shapes, filled = packed_slabs(hands, settings, more_to_come)
    full = len(samples) // settings.rows
    filled = sorted(filled[:full], key=_largest, reverse=True) + filled[full:]
    size = settings.samples_per_batch // settings.rows
    return shapes, [[slab for hand in filled[at : at + size] for slab in hand] for at in range(0, len(filled), size)]


def packed_slabs(
    hands: list[Hand], settings: PlanSettings, more_to_come: bool = False
) -> tuple[Shapes, list[list[FilledSlab]]]:
    """Hands as they are given, each in slabs of its own."""
    most = settings.most_tokens(max(sample.length for hand in hands for sample in hand))
    split = [next(_splits(hand, most)) for hand in hands]
    shapes = _choose_shapes([_tokens(slab) for hand in split for slab in hand], settings, more_to_come)
    return shapes, _filled(split, shapes)


def _filled(split: list[list[Hand]], shapes: Shapes) -> list[list[FilledSlab]]:
    return [[(_fitting(shapes, _tokens(slab)), [slab]) for slab in hand] for hand in split]


def _tokens(hand: Iterable[TokenizedSample]) -> int:
    return sum(sample.length for sample in hand)


def _largest(filled: list[FilledSlab]) -> tuple[SlabShape, int]:
    """Of a hand's slabs: the largest shape, and the longest sample."""
    return max(shape for shape, _ in filled), max(sample.length for _, rows in filled for row in rows for sample in row)


def _fitting(shapes: Shapes, tokens: int) -> SlabShape:
    return next(shape for shape in shapes if shape.length >= tokens)


def _choose_shapes(tokens: list[int], settings: PlanSettings, more_to_come: bool) -> Shapes:
    """Lengths that serve slabs of so many tokens with the least padding; a shape must pay for its compilation."""
    largest = settings.padded(settings.most_tokens(settings.max_length))
    room = 1 + _STREAM_ROOM if more_to_come else 1
    roomy = [max(settings.padded(n), min(settings.padded(int(n * room)), largest)) for n in tokens]
    needs, counts = np.unique(-np.array(roomy), return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    slabs = (before[None, :] - before[:-1, None]).astype(float)
    cost = np.where(slabs > 0, slabs * (-needs[:, None] + SLAB_OVERHEAD_TOKENS), np.inf)
    runs = cheapest_runs(cost, settings.max_shapes - more_to_come, settings.compile_tokens)
    lengths = {int(-needs[start]) for start, _ in runs}
    if more_to_come:
        lengths.add(max(largest, settings.padded(settings.max_length)))
    return tuple(SlabShape(length, 1, settings.rows) for length in sorted(lengths))


# ------------------------------------------------------------------------------------------ dealing


def _deal(ordered: list[TokenizedSample], size: int) -> list[Hand]:
    """Hands of `size` samples with nearly equal sums; the last one has what is left over.

    Rounds in which the hand with the least takes the longest sample, then swaps that make the largest smaller.
    `ordered` is longest first.
    """
    left = len(ordered) % size
    # What is left over are samples of middling length, so that the others can be dealt evenly.
    at = (len(ordered) - left) // 2
    rest, ordered = ordered[at : at + left], ordered[:at] + ordered[at + left :]
    lengths = np.array([s.length for s in ordered], np.int64).reshape(size, -1)
    count = lengths.shape[1]
    hands = np.zeros((count, size), np.int64)
    sums = np.zeros(count, np.int64)
    for turn, round_lengths in enumerate(lengths):
        order = np.argsort(sums, kind="stable")
        hands[order, turn] = turn * count + np.arange(count)
        sums[order] += round_lengths
    _swap(hands, lengths.reshape(-1))
    return [[ordered[i] for i in hand] for hand in hands] + ([rest] if rest else [])


def _swap(hands: np.ndarray, lengths: np.ndarray) -> None:
    """Swaps samples between the largest hand and one of the smallest, as long as that makes the two more even."""
    sums = lengths[hands].sum(axis=1)
    settled = np.zeros(len(hands), bool)
    for _ in range(_MOST_SWAPS if hands.shape[1] > 1 else 0):
        if settled.all():
            return
        most = int(np.argmax(np.where(settled, -1, sums)))
        if sums[most] <= sums.mean() * (1 + _UNEVEN):
            return
        least = np.argsort(sums, kind="stable")[:_MOST_PARTNERS]
        gain, other, mine, theirs = max(_best_swap(hands, lengths, sums, most, int(other)) for other in least)
        if gain <= 0:
            settled[most] = True
            continue
        change = lengths[hands[most, mine]] - lengths[hands[other, theirs]]
        hands[most, mine], hands[other, theirs] = hands[other, theirs], hands[most, mine]
        sums[most] -= change
        sums[other] += change


def _best_swap(
    hands: np.ndarray, lengths: np.ndarray, sums: np.ndarray, most: int, other: int
) -> tuple[int, int, int, int]:
    """(how much smaller the larger of two hands becomes, the other hand, the sample of each that is swapped)."""
    gap = int(sums[most] - sums[other])
    held, offered = lengths[hands[most]], lengths[hands[other]]
    order = np.argsort(offered, kind="stable")
    # What is given should exceed what is taken by half the gap: the two nearest to that, of each given sample.
    at = np.searchsorted(offered[order], held - gap // 2)
    candidates = order[np.clip([at - 1, at], 0, len(order) - 1)]  # [2, samples]
    change = held[None, :] - offered[candidates]
    gains = np.minimum(change, gap - change)
    which, mine = np.unravel_index(int(np.argmax(gains)), gains.shape)
    return int(gains[which, mine]), other, int(mine), int(candidates[which, mine])


# ----------------------------------------------------------------------------------------- splitting


def _splits(hand: Hand, most: int) -> Iterator[list[Hand]]:
    """Ways to split a hand into even ones of at most so many tokens, the fewest first; a longer sample is alone."""
    parts = max(-(-_tokens(hand) // most), sum(2 * sample.length > most for sample in hand))
    while parts < len(hand):
        way = _split(hand, parts)
        if all(_tokens(part) <= most or len(part) == 1 for part in way):
            yield way
        parts += max(1, parts // 8)  # a large hand is not tried in every number
    yield [[sample] for sample in hand]


def _cheapest(ways: Iterable[list[Hand]], shapes: Shapes) -> list[Hand]:
    """That which computes the least in shapes that are given."""
    return min(ways, key=lambda way: sum(_fitting(shapes, _tokens(s)).length + SLAB_OVERHEAD_TOKENS for s in way))


def _split(hand: Hand, parts: int) -> list[Hand]:
    """The hand in so many nearly equal ones: halved again and again, each time as evenly as can be."""
    if parts <= 1 or len(hand) <= 1:
        return [hand]
    first = parts // 2
    chosen = _nearest_subset([s.length for s in hand], _tokens(hand) * first // parts)
    halves = (
        [s for s, c in zip(hand, chosen, strict=True) if not c],
        [s for s, c in zip(hand, chosen, strict=True) if c],
    )
    return [
        part for half, count in zip(halves, (parts - first, first), strict=True) if half for part in _split(half, count)
    ]


def _nearest_subset(lengths: Sequence[int], target: int) -> list[bool]:
    """Which of these to take so that their sum is as near to `target` as can be, and neither all nor none."""
    reached = [1]  # bit n: some of the first i have the sum n
    for length in lengths:
        reached.append(reached[-1] | reached[-1] << length)
    total = sum(lengths)
    sums = (n for d in range(total) for n in (target - d, target + d) if 0 < n < total and reached[-1] >> n & 1)
    wanted = next(sums)
    chosen = []
    for length, before in zip(reversed(lengths), reversed(reached[:-1]), strict=True):
        take = not before >> wanted & 1
        wanted -= length * take
        chosen.append(take)
    return chosen[::-1]
