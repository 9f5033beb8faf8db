"""Which slabs are computed together: the steps of one program on all its devices.

In: parts in plan order, hosts, devices of each. Out: `Step`s. A step gives every device one slab of one
shape, and every host slabs of its own parts alone, so that no captured row ever leaves its host. Every
host works out the same steps from the same parts; a host whose next slab has another shape sits a step
out. Longest slabs come first, as in the plan.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jax_extract.inputs.planning.slabs import Slab, SlabShape
from jax_extract.inputs.planning.windows import Part
from jax_extract.inputs.token_table import TokenizedSample


@dataclass(frozen=True)
class Work:
    """One slab of one part; the part begins with its first slab and is complete after its last."""

    part: Part
    slab: Slab

    @property
    def is_first(self) -> bool:
        return self.slab.first == 0

    @property
    def is_last(self) -> bool:
        return self.slab.first + self.slab.count == len(self.part.samples)

    @property
    def rows(self) -> list[tuple[TokenizedSample, ...]]:
        """The samples of each row of the slab; rows beyond these are dummies."""
        ends = list(itertools.accumulate(self.slab.counts, initial=self.slab.first))
        return [self.part.samples[start:end] for start, end in itertools.pairwise(ends)]


@dataclass(frozen=True)
class Step:
    """Attributes:
    shape: of every slab.
    work: of each host, the slabs of its devices; fewer than devices where there are no more of the shape.
    """

    shape: SlabShape
    work: tuple[tuple[Work, ...], ...]


def steps(parts: Iterable[Part], hosts: int, devices: int) -> Iterator[Step]:
    """Lazily: a part is asked for when a host has nothing else to do. `devices` are those of one host."""
    stream = iter(parts)
    queues: list[deque[Work]] = [deque() for _ in range(hosts)]

    def refill(queue: deque[Work]) -> bool:
        if not queue and (part := next(stream, None)) is not None:
            queue.extend(Work(part, slab) for slab in part.slabs)
        return bool(queue)

    while True:
        for queue in queues:
            refill(queue)
        if not any(queues):
            return
        shape = max(queue[0].slab.shape for queue in queues if queue)
        work: list[list[Work]] = [[] for _ in queues]
        for mine, queue in zip(work, queues, strict=True):
            while len(mine) < devices and refill(queue) and queue[0].slab.shape == shape:
                mine.append(queue.popleft())
        yield Step(shape, tuple(map(tuple, work)))


def tokens_computed(parts: Iterable[Part], hosts: int, devices: int) -> int:
    """Slab tokens of all steps, idle devices included."""
    return sum(hosts * devices * step.shape.tokens for step in steps(parts, hosts, devices))
