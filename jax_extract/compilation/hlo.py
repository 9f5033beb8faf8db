"""What crosses devices, read from the text of a compiled program (XLA's HLO).

In: the text. Out: `Collective`s with their bytes a step, loops counted as often as they run. One collective that the
compiler has spread over several fusions, to overlap it with computing, has one channel in all of them, and counts once.
Several collectives of one computation may have one channel too, and each counts.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "ragged-all-to-all",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "send",
    "recv",
)
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "s64": 64, "u64": 64}  # else the digits of the name
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(rf"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ({'|'.join(_KINDS)})(?:-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations|branch_computations)=(\{[^}]*\}|%?[\w.-]+)")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_BOUND = re.compile(r"constant\((\d+)\)")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])")


@dataclass(frozen=True)
class Collective:
    """Attributes:
    kind: such as `all-gather`.
    shape: of its result on one device.
    bytes: of that result.
    group: devices that take part together.
    times: how often it runs in a step.
    """

    kind: str
    shape: tuple[int, ...]
    bytes: int
    group: int
    times: int

    @property
    def received(self) -> float:
        """Bytes that one device hears from others in a step, of a gather; of another kind, at most so many."""
        own = 1 / self.group if self.kind == "all-gather" else 0
        return self.times * self.bytes * (1 - own)


def collectives(text: str) -> list[Collective]:
    """Every collective of a program.

    Raises:
      ValueError: a loop around a collective does not say how often it runs.
    """
    computations = dict(_computations(text))
    times = _times_of(computations)
    found: dict[object, Collective] = {}
    for name, lines in computations.items():
        alike: Counter[object] = Counter()  # of this computation
        for line in lines:
            if not (match := _INSTRUCTION.match(line)):
                continue
            channel = re.search(r"channel_id=(\d+)", line)
            shape, size = _result(match[1])
            groups = _GROUPS.search(line)
            group = (len(groups[1].split(",")) if groups[1] else int(groups[2])) if groups else 1
            collective = Collective(match[2], shape, size, group, times(name))
            known = (channel[1], match[2], shape, group) if channel else (name, line)
            found[known, alike[known]] = collective
            alike[known] += 1
    return list(found.values())


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """(name, lines), the entry under its own name."""
    name, lines = "", []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name, lines = match[1], []
            if line.startswith("ENTRY"):
                yield "ENTRY", [f"  calls=%{name}"]
        elif line == "}":
            yield name, lines
        else:
            lines.append(line)


def _times_of(computations: Mapping[str, list[str]]) -> Callable[[str], int]:
    """How often a computation runs in a step."""
    callers: dict[str, list[tuple[str, str]]] = {name: [] for name in computations}
    for name, lines in computations.items():
        for line in lines:
            for called in _CALLED.findall(line):
                for callee in re.findall(r"[\w.-]+", called):
                    if callee in callers:
                        callers[callee].append((name, line))

    @functools.cache
    def times(name: str) -> int:
        if name == "ENTRY":
            return 1
        return sum(times(caller) * _trip_count(line, computations) for caller, line in callers[name])

    return times


def _trip_count(line: str, computations: Mapping[str, list[str]]) -> int:
    """How often an instruction runs what it calls; a loop from 0 up to a constant, as `lax.scan` makes it."""
    if " while(" not in line:
        return 1
    if match := _TRIPS.search(line):
        return int(match[1])
    condition = re.search(r"condition=%?([\w.-]+)", line)
    body = "\n".join(computations.get(condition[1], []) if condition else [])
    bounds = _BOUND.findall(body)
    if "direction=LT" not in body or len(bounds) != 1:
        raise ValueError(f"how often a loop runs is not to be read: {line.strip()[:200]}")
    return int(bounds[0])


def _result(text: str) -> tuple[tuple[int, ...], int]:
    """Shape and bytes of a result; of a pair of operand and result, those of the larger."""
    shapes = []
    for kind, dims in _SHAPE.findall(text):
        shape = tuple(int(n) for n in dims.split(",") if n)
        bits = _BITS.get(kind) or int(re.sub(r"\D", "", kind) or 8)
        shapes.append((math.prod(shape) * bits // 8, shape))
    size, shape = max(shapes)
    return shape, size
