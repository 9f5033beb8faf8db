"""What the devices of a plan compute, and which share of it is of use.

In: steps. Out: `StepCounts`: real tokens, padding within rows, devices without a slab, and the pairs that attention
computes of two different samples. The one place that counts them: the plan's line, metadata.json, `estimate`,
`compile` and the benchmarks all show these figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from jax_extract.extraction.schedule import Step
from jax_extract.inputs.planning.slabs import SlabShape


@dataclass
class StepCounts:
    """Attributes:
    devices: of all hosts.
    attention_block: attention computes pairs of a query and a key in squares of so many; 0 where it computes those of
      each sample alone.
    steps: of each slab shape.
    slabs: that hold samples.
    tokens: real ones.
    slab_tokens: of all devices in all steps.
    idle_tokens: of these, those of devices without a slab.
    own_pairs: of a query and a key that it sees: n (n + 1) / 2 of a sample of n tokens.
    pairs: that attention computes in the slabs.
    idle_host_steps: steps of a host none of whose devices has a slab, over all hosts.
    """

    devices: int
    attention_block: int = 0
    steps: Counter[SlabShape] = field(default_factory=Counter)
    slabs: int = 0
    tokens: int = 0
    slab_tokens: int = 0
    idle_tokens: int = 0
    own_pairs: int = 0
    pairs: int = 0
    idle_host_steps: int = 0

    @classmethod
    def of(cls, steps: Iterable[Step], devices: int, attention_block: int = 0) -> StepCounts:
        counts = cls(devices, attention_block)
        for step in steps:
            counts.add(step)
        return counts

    def add(self, step: Step) -> None:
        works = [work for of_host in step.work for work in of_host]
        self.steps[step.shape] += 1
        self.slabs += len(works)
        self.slab_tokens += self.devices * step.shape.tokens
        self.idle_tokens += (self.devices - len(works)) * step.shape.tokens
        self.idle_host_steps += sum(not of_host for of_host in step.work)
        for work in works:
            first, last = work.slab.first, work.slab.first + work.slab.count
            lengths = work.arrangement.lengths[first:last]
            self.tokens += work.tokens
            self.own_pairs += int(np.sum(lengths * (lengths + 1)) // 2)
        row_pairs = causal_pairs(step.shape.length, self.attention_block) if self.attention_block else 0
        self.pairs += self.devices * step.shape.rows * row_pairs

    @property
    def real_share(self) -> float:
        """Of the computed tokens."""
        return self.tokens / self.slab_tokens if self.slab_tokens else 1.0

    @property
    def idle_share(self) -> float:
        return self.idle_tokens / self.slab_tokens if self.slab_tokens else 0.0

    @property
    def padding_share(self) -> float:
        """Within the rows of slabs, rows without a sample included."""
        return 1 - self.real_share - self.idle_share

    def useful_share(self, pair_cost: float) -> float:
        """Of the floating-point work, attention included, where a pair costs so many tokens' products."""
        if not self.slab_tokens:
            return 1.0
        pairs = self.pairs if self.attention_block else self.own_pairs
        return (self.tokens + pair_cost * self.own_pairs) / (self.slab_tokens + pair_cost * pairs)

    def foreign_share(self, pair_cost: float) -> float:
        """Of the floating-point work, what attention computes of two samples, or above the diagonal, or of padding."""
        if not self.attention_block or not self.slab_tokens:
            return 0.0
        return pair_cost * (self.pairs - self.own_pairs) / (self.slab_tokens + pair_cost * self.pairs)


def causal_pairs(length: int, block: int) -> int:
    """Pairs that attention computes in a row: squares of `block` queries and keys on and below the diagonal."""
    blocks = -(-length // block)
    return blocks * (blocks + 1) // 2 * block * block
