"""Of each latent the few activations that are kept of a stream of them: the largest, or random ones.

In: activations as they come, each with a priority. Out: of each latent those of the highest priority. A priority that
is the activation itself keeps the largest; a random one keeps a uniform sample (bottom-k sampling). Memory is that of
what is kept, and of some that wait.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

_WAITING = 1 << 21  # entries


@dataclass(frozen=True, eq=False)
class Entries:
    """Attributes:
    latent: int64 [n]; row: int64 [n], of the stream; value: float32 [n], activations.
    priority: float32 [n].
    """

    latent: np.ndarray
    row: np.ndarray
    value: np.ndarray
    priority: np.ndarray

    def __len__(self) -> int:
        return len(self.latent)

    def some(self, which: np.ndarray) -> Entries:
        """Those at these places, or where a mask is true."""
        return Entries(self.latent[which], self.row[which], self.value[which], self.priority[which])

    def highest(self, most: int) -> Entries:
        """Of each latent so many of the highest priority, in descending order; latents ascend."""
        order = np.lexsort((-self.priority, self.latent))
        latent = self.latent[order]
        begins = np.flatnonzero(np.diff(latent, prepend=-1))
        rank = np.arange(len(latent)) - np.repeat(begins, np.diff(np.append(begins, len(latent))))
        return self.some(order[rank < most])


def together(parts: list[Entries]) -> Entries:
    columns = zip(*((part.latent, part.row, part.value, part.priority) for part in parts), strict=True)
    return Entries(*(np.concatenate(column) for column in columns))


@dataclass
class Kept:
    """Attributes:
    most: entries of each latent.
    """

    latents: int
    most: int
    _waiting: list[Entries] = field(default_factory=list)
    _least: np.ndarray | None = None  # float32 [latents], a priority that an entry must pass to be kept

    def add(self, entries: Entries) -> None:
        if not self.most:
            return
        if self._least is not None:
            entries = entries.some(entries.priority > self._least[entries.latent])
        self._waiting.append(entries)
        if sum(map(len, self._waiting)) > _WAITING + self.latents * self.most:
            self.entries()

    def entries(self) -> Entries:
        """What is kept so far; see `Entries.highest`."""
        nothing = Entries(*(np.zeros(0, kind) for kind in (np.int64, np.int64, np.float32, np.float32)))
        found = together([nothing, *self._waiting]).highest(self.most)
        self._waiting = [found]
        least = np.full(self.latents, -np.inf, np.float32)
        counts = np.bincount(found.latent, minlength=self.latents)
        ends = np.cumsum(counts) - 1
        full = counts == self.most
        least[full] = found.priority[ends[full]] if self.most else np.inf
        self._least = least
        return found
