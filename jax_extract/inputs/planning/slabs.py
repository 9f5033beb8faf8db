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

from jax_extract.inputs.token_table import TokenizedSample
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
      hosts: processes of the program that starts the run. In version 1 they compute a part each, and sit out what
        others compute in another shape, so with many of them a shape must serve more parts.
      packed: a slab is a single row, in which samples lie one behind the other.
      max_shard_bytes: size of one shard's array at which a batch is cut into parts.
      version: 1 of runs whose slabs hold samples of one batch alone (`within_batches`); 2 since slabs are filled
        whatever batch a sample is stored in (`rows`). What follows is read by version 2 alone.
      devices: for which slabs come in whole steps: `lanes` finds it, from the samples and not from the machine.
      devices_of_host: of the mesh that starts the run; as many slabs make a part at most where `rows_stay`.
      samples_a_row: most samples of a row; 0 for any number.
      pair_cost: what attention costs for one query and one key, where a token's products cost 1; 0 where it
        computes no pair of two samples, so that the plan cannot change it.
      attention_block: attention computes pairs in squares of so many queries and keys.
      rows_stay: rows are stored by the host that computes them, so a part's slabs belong to one host.
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
    version: int = 1
    devices: int = 1
    devices_of_host: int = 1
    samples_a_row: int = 0
    pair_cost: float = 0.0
    attention_block: int = 1
    rows_stay: bool = False

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
        said = {**dataclasses.asdict(self), "positions": str(self.positions)}
        del said["devices"]
        if self.version == 1:  # as such runs have it
            for name in SINCE_VERSION_2:
                del said[name]
        return said


SINCE_VERSION_2 = (
    "version",
    "devices_of_host",
    "samples_a_row",
    "pair_cost",
    "attention_block",
    "rows_stay",
)


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
