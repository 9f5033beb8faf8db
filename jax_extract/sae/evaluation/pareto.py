"""Which SAEs of a sweep no other one beats: fewer active latents at no less explained variance.

In: points. Out: those on the front.
"""

from __future__ import annotations

from collections.abc import Sequence


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The numbers of the points (cost, gain) that no other point beats, by ascending cost.

    A point is beaten by one that costs no more and gains no less, and differs.
    """
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not found or points[i][1] > points[found[-1]][1]:
            found.append(i)
    return found
