"""Which ids there were, in eight bytes each.

In: ids, a chunk at a time. Out: the first that was there before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Names:
    """Ids are known by Python's 64-bit hash, of another seed in each process.

    Of n ids that all differ two are taken for one with a chance of n² / 2^65: of a hundred million once in 3,700 times,
    and not again when the command is.
    """

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []  # each at least twice as long as the next

    def first_repeated(self, names: Sequence[str]) -> int | None:
        """Takes ids; the place of the first that repeats one, of these or of those before."""
        hashes = np.fromiter(map(hash, names), np.int64, len(names))
        order = np.argsort(hashes, kind="stable")
        own = hashes[order]
        repeated = np.zeros(len(own), bool)
        repeated[1:] = own[1:] == own[:-1]
        for known in self._sorted:
            repeated |= known[np.minimum(np.searchsorted(known, own), len(known) - 1)] == own
        if len(own):
            self._sorted.append(own)
        while len(self._sorted) > 1 and len(self._sorted[-2]) < 2 * len(self._sorted[-1]):
            merged = np.concatenate([self._sorted.pop(-2), self._sorted.pop()])
            merged.sort(kind="stable")  # two runs in order are merged
            self._sorted.append(merged)
        return int(order[repeated].min()) if repeated.any() else None
