"""Slabs, what one device computes at once, and the few shapes they have.

In: settings of a plan and the cost of serving runs of samples by one shape. Out: `Slab`, `SlabShape`, and
the choice of shapes by dynamic programming.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from jax_extract.inputs.tokenize import TokenizedSample
from models.positions import Positions

MAX_SHARD_BYTES = 256_000_000
WHOLE_INPUT = 2**31  # samples, where one batch holds everything
# What starting a slab costs, in tokens: it reads every parameter once. Keeps slabs from becoming tiny.
SLAB_OVERHEAD_TOKENS = 64


class SlabShape(NamedTuple):
    """What is compiled: a program for so many tokens a row, rows, and samples in a row at most."""

    length: int
    rows: int
    samples: int

    @property
    def tokens(self) -> int:
        return self.length * self.rows


Shapes = tuple[SlabShape, ...]  # ascending
FilledSlab = tuple[SlabShape, list[list[TokenizedSample]]]  # and the samples of each row


@dataclass(frozen=True)
class Slab:
    """Samples of a part, from its `first` on: `counts[i]` of them lie one behind the other in row i."""

    shape: SlabShape
    first: int
    counts: tuple[int, ...]

    @cached_property
    def count(self) -> int:
        return sum(self.counts)

    def as_json(self) -> list[Any]:
        return [list(self.shape), self.first, list(self.counts)]

    @classmethod
    def from_json(cls, said: Any) -> Slab:
        shape, first, counts = said
        return cls(SlabShape(*shape), first, tuple(counts))


@dataclass(frozen=True)
class PlanSettings:
    """What the plan depends on besides the samples; frozen in run.json.

    Attributes:
      samples_per_batch: `batch_size` x devices of the mesh that starts the run.
      rows: most samples of a slab (`batch_size`).
      slab_tokens: most tokens of a slab, where a single sample is not longer.
      length_multiple: padded lengths are multiples of this.
      max_length: longest sample, in tokens.
      compile_tokens: what one more slab shape must save to be worth compiling.
      max_shapes: how many slab shapes may be used at most.
      positions: which positions are stored.
      bytes_per_row: of the widest hook point, in the stored dtype.
      hosts: processes of the program that starts the run. They compute a part each, and sit out what others
        compute in another shape, so with many of them a shape must serve more parts.
      packed: samples lie one behind the other in a single row; else each has a row of its own.
      max_shard_bytes: size of one shard's array at which a batch is cut into parts.
    """

    samples_per_batch: int
    rows: int
    slab_tokens: int
    length_multiple: int
    max_length: int
    positions: Positions
    bytes_per_row: int
    compile_tokens: int = 0
    max_shapes: int = 8
    hosts: int = 1
    packed: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES

    def most_tokens(self, longest: int = 0) -> int:
        """Of a slab with several samples, where the longest sample has so many.

        No part can be smaller than a slab, and a part's shards have a limit.
        """
        most = max(self.slab_tokens, longest)
        return most if self.positions.one_row_per_sample else min(most, self.max_shard_bytes // self.bytes_per_row)

    @property
    def slabs_at_once(self) -> int:
        """Of a batch, as many as the devices compute together; where one batch holds everything, that is not known."""
        return 1 if self.samples_per_batch > WHOLE_INPUT // 2 else max(1, self.samples_per_batch // self.rows)

    def padded(self, length: int) -> int:
        return -(-length // self.length_multiple) * self.length_multiple

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "positions": str(self.positions)}


def cheapest_runs(cost: np.ndarray, most: int, price: float) -> list[tuple[int, int]]:
    """Cuts 0 … n into runs so that the sum of their costs and of `price` a run is least; exact.

    Args:
      cost: [n, n + 1], of the run [i, j); inf where there is none.
      most: runs at most.
    """
    n = len(cost)
    best = np.full(n + 1, np.inf)
    best[0] = 0.0
    choices: list[np.ndarray] = []
    totals: list[float] = []
    for _ in range(min(max(1, most), n)):
        through = best[:n, None] + cost
        choices.append(through.argmin(axis=0))
        best = through.min(axis=0)
        totals.append(float(best[n]) + len(choices) * price)
    runs, end = [], n
    for choice in reversed(choices[: int(np.argmin(totals)) + 1]):
        start = int(choice[end])
        runs.append((start, end))
        end = start
    return runs[::-1]
