"""Which slabs are computed together: the steps of one program on all its devices.

In: parts in plan order, hosts, devices of each. Out: `Step`s: every device computes a slab of one shape, and every
part belongs to one host, which stores its rows. Where rows reach every host, any device computes any slab; else a
host computes those of its own parts. Every host works out the same steps from the same parts.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from jax_extract.inputs.planning.slabs import Slab, SlabShape
from jax_extract.inputs.planning.windows import Arrangement, Part


@dataclass(frozen=True)
class Taker:
    """A part that takes rows of a slab, and the host that stores it."""

    part: Part
    host: int


@dataclass(frozen=True)
class Work:
    """One slab, and the parts that take its rows, in plan order; rows of other parts are there already."""

    arrangement: Arrangement
    slab: Slab
    takers: tuple[Taker, ...]

    @property
    def tokens(self) -> int:
        """Of the samples that somebody takes."""
        first, last = self.slab.first, self.slab.first + self.slab.count
        lengths = self.arrangement.lengths
        return sum(int(lengths[max(first, t.part.start) : min(last, t.part.stop)].sum()) for t in self.takers)


@dataclass(frozen=True)
class Step:
    """Attributes:
    shape: of every slab.
    work: of each host, the slabs of its devices; fewer than devices where there are no more of the shape.
    """

    shape: SlabShape
    work: tuple[tuple[Work, ...], ...]


def steps(parts: Iterable[Part], hosts: int, devices: int, rows_travel: bool) -> Iterator[Step]:
    """Lazily, a window at a time.

    Args:
      devices: of one host.
      rows_travel: whether captured rows reach every host, and not only the one whose device computes them.
    """
    if hosts == 1 or rows_travel:
        return _anywhere(parts, hosts, devices)
    return _at_home(parts, hosts, devices)


def _anywhere(parts: Iterable[Part], hosts: int, devices: int) -> Iterator[Step]:
    """Slabs as they come, on whichever device: a step ends where it is full, or the shape changes."""
    together: list[Work] = []

    def step() -> Step:
        dealt = tuple(tuple(together[i * devices : (i + 1) * devices]) for i in range(hosts))
        return Step(together[0].slab.shape, dealt)

    for work in _works(_stored_evenly(parts, hosts)):
        if together and (len(together) == hosts * devices or work.slab.shape != together[0].slab.shape):
            yield step()
            together = []
        together.append(work)
    if together:
        yield step()


def _stored_evenly(parts: Iterable[Part], hosts: int) -> Iterator[Taker]:
    """Each part goes to the host that has the fewest tokens to store."""
    load = [0] * hosts
    for part in parts:
        host = load.index(min(load))
        load[host] += part.tokens if hosts > 1 else 0
        yield Taker(part, host)


def _works(takers: Iterable[Taker]) -> Iterator[Work]:
    """The slabs of these parts; one that consecutive parts share comes once."""
    work: Work | None = None
    for taker in takers:
        arrangement = taker.part.arrangement
        for number in arrangement.slabs_of(taker.part.start, taker.part.stop):
            slab = arrangement.slabs[number]
            if work and work.slab is slab and work.takers[-1].part.stop == taker.part.start:
                work = Work(arrangement, slab, (*work.takers, taker))
                continue
            if work:
                yield work
            work = Work(arrangement, slab, (taker,))
    if work:
        yield work


def _at_home(parts: Iterable[Part], hosts: int, devices: int) -> Iterator[Step]:
    """Every host computes the slabs of its own parts; of each shape all have about as many."""
    for _, window in itertools.groupby(parts, key=lambda part: id(part.arrangement)):
        shares = _shared_out(list(window), hosts, devices)
        queues = [deque(_works(Taker(part, host) for part in share)) for host, share in enumerate(shares)]
        while any(queues):
            shape = max(queue[0].slab.shape for queue in queues if queue)
            work: list[list[Work]] = [[] for _ in queues]
            for mine, queue in zip(work, queues, strict=True):
                while len(mine) < devices and queue and queue[0].slab.shape == shape:
                    mine.append(queue.popleft())
            yield Step(shape, tuple(map(tuple, work)))


def _shared_out(parts: Sequence[Part], hosts: int, devices: int) -> list[list[Part]]:
    """The parts of each host, in plan order.

    Parts that share a slab stay together, as long as they are not more than a step of a host; those with most slabs
    are given away first, each to the host with the fewest slabs of its shape.
    """
    units: list[list[Part]] = []
    slabs: list[Counter[SlabShape]] = []
    end = -1
    for part in parts:
        numbers = part.arrangement.slabs_of(part.start, part.stop)
        shapes = Counter(part.arrangement.slabs[i].shape for i in numbers)
        if units and numbers[0] == end and sum((slabs[-1] + shapes).values()) - 1 <= devices:
            units[-1].append(part)
            slabs[-1] += shapes
            slabs[-1][part.arrangement.slabs[end].shape] -= 1  # which both counted
        else:
            units.append([part])
            slabs.append(shapes)
        end = numbers[-1]
    held: list[Counter[SlabShape]] = [Counter() for _ in range(hosts)]
    owned: list[list[int]] = [[] for _ in range(hosts)]
    for number in sorted(range(len(units)), key=lambda i: (-sum(slabs[i].values()), i)):
        shape = max(slabs[number])
        host = min(range(hosts), key=lambda h: (held[h][shape], sum(held[h].values()), h))
        held[host] += slabs[number]
        owned[host].append(number)
    return [[part for number in sorted(numbers) for part in units[number]] for numbers in owned]
