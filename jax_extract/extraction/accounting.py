"""What the devices of a plan compute, and which share of it is of use.

In: steps. Out: `StepCounts`: real tokens, padding within rows, devices without a slab, and the pairs that attention
computes of two different samples. The one place that counts them and gives them their names: the plan's line, `done`,
`estimate` and `compile` all show these figures, and metadata.json has what they are made of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from jax_extract.extraction.schedule import Step
from jax_extract.inputs.planning.slabs import SlabShape
from models.accelerated_attention import attention_block, computed_pairs, seen_pairs


class TokenShares(NamedTuple):
    """Of the tokens that all devices compute; together they are 1.

    Attributes:
      real: of samples.
      padding: within rows: what no sample fills, rows without a sample included.
      idle: of devices that have no slab in a step, while others have one.
    """

    real: float
    padding: float
    idle: float

    @classmethod
    def of(cls, tokens: int, slab_tokens: int, idle_tokens: int) -> TokenShares:
        """From counts: real ones, all, and those of idle devices."""
        if not slab_tokens:
            return cls(1.0, 0.0, 0.0)
        real, idle = tokens / slab_tokens, idle_tokens / slab_tokens
        return cls(real, 1 - real - idle, idle)


@dataclass
class StepCounts:
    """Attributes:
    devices: of all hosts.
    pair_cost: what attention costs for one query and one key, where a token's products cost 1; 0 where it computes
      no pair that no query sees.
    steps: of each slab shape.
    slabs: that hold samples.
    tokens: real ones.
    slab_tokens: of all devices in all steps.
    idle_tokens: of these, those of devices without a slab.
    seen_pairs: of a query and a key that it sees.
    computed_pairs: that attention computes, where it computes whole rows; else those that are seen.
    """

    devices: int
    pair_cost: float = 0.0
    steps: Counter[SlabShape] = field(default_factory=Counter)
    slabs: int = 0
    tokens: int = 0
    slab_tokens: int = 0
    idle_tokens: int = 0
    seen_pairs: int = 0
    computed_pairs: int = 0

    @classmethod
    def of(cls, steps: Iterable[Step], devices: int, pair_cost: float = 0.0) -> StepCounts:
        counts = cls(devices, pair_cost)
        for step in steps:
            counts.add(step)
        return counts

    def add(self, step: Step) -> None:
        works = [work for of_host in step.work for work in of_host]
        self.steps[step.shape] += 1
        self.slabs += len(works)
        self.slab_tokens += self.devices * step.shape.tokens
        self.idle_tokens += (self.devices - len(works)) * step.shape.tokens
        for work in works:
            first, last = work.slab.first, work.slab.first + work.slab.count
            self.tokens += work.tokens
            self.seen_pairs += seen_pairs(work.arrangement.lengths[first:last])
        if self.pair_cost:
            length = step.shape.length
            self.computed_pairs += self.devices * step.shape.rows * computed_pairs(length, attention_block(length))
        else:
            self.computed_pairs = self.seen_pairs

    @property
    def shares(self) -> TokenShares:
        return TokenShares.of(self.tokens, self.slab_tokens, self.idle_tokens)

    @property
    def useful_share(self) -> float:
        """Of the work of products and attention: real tokens, and the keys that they see."""
        return (self.tokens + self.pair_cost * self.seen_pairs) / self._work if self.slab_tokens else 1.0

    @property
    def unseen_share(self) -> float:
        """Of that work, pairs that attention computes and no query sees: mostly of two samples, and of padding."""
        unseen = self.computed_pairs - self.seen_pairs
        return self.pair_cost * unseen / self._work if self.slab_tokens else 0.0

    @property
    def _work(self) -> float:
        """In tokens' products."""
        return self.slab_tokens + self.pair_cost * self.computed_pairs
