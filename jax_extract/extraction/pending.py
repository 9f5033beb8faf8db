"""Which parts are still to be done, and by whom.

In: the plan, the records, and, of several independent workers, which one this is. Out: parts. A worker takes a stretch
of each window, all of them about as many tokens, then whatever is still without a record, from where the others come
last: records are create-only, so a part that is done twice is there once, and a worker that dies is missed by nobody.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_extract.errors import UserError
from jax_extract.inputs.planning.windows import Part, Window
from jax_extract.store.ledger import Key, Ledger, Record
from jax_extract.store.survey import entries_of, files_of, wrong_with


@dataclass(frozen=True)
class CommittedPart:
    samples: int
    plan: str


Committed = Mapping[Key, CommittedPart]


def read_committed(ledger: Ledger) -> list[list[Any]]:
    """What is committed, as plain JSON; UserError where a record is damaged or its files are not there."""
    entries, found = entries_of(ledger.storage), []

    def wrong(record: Record) -> str | None:
        return next(filter(None, (wrong_with(file, record, entries) for file in files_of(record))), None)

    for name, record in ledger.each_record():
        if isinstance(record, str):
            raise UserError(record)
        if wrong(record):
            entries = entries_of(ledger.storage)  # of a part that was committed meanwhile
            if said := wrong(record):
                raise UserError(
                    f"{ledger.storage.where(name)} does not hold: {said}; restore it from a copy, or give up that part "
                    f"with jax-extract sweep {ledger.storage} --damaged and compute it again"
                )
        found.append([record["batch"], record["part"], record["samples"], record["plan"]])
    return sorted(found)


def parse_committed(said: Iterable[Iterable[Any]]) -> Committed:
    return {(batch, part): CommittedPart(samples, plan) for batch, part, samples, plan in said}


def pending_parts(
    windows: Iterable[Window],
    committed: Committed,
    keep_plan: Callable[[Window], None],
    chosen: Callable[[Sequence[Part]], Iterable[Part]] = iter,
) -> Iterator[Part]:
    """Parts without a record, in plan order; every window's plan is kept before its first part runs.

    `chosen` says which parts of a window are wanted, and in which order.
    """
    for window in windows:
        keep_plan(window)
        for part in window.parts:
            if part.key in committed and committed[part.key].plan != part.digest:
                raise UserError(
                    f"part {part.key} is committed under another plan; restore the run's records from a copy, "
                    "or start anew with --overwrite"
                )
        yield from (part for part in chosen(window.parts) if part.key not in committed)


@dataclass(frozen=True)
class Worker:
    """Worker `index` of `count` that work on one run, each with its own devices."""

    index: int = 0
    count: int = 1

    def own(self, parts: Sequence[Part]) -> Sequence[Part]:
        """This worker's stretch of a window."""
        first, last = self._stretches(parts)[self.index]
        return parts[first:last]

    def to_steal(self, parts: Sequence[Part], devices: int, is_committed: Callable[[Part], bool]) -> Iterator[Part]:
        """Parts of a window that nobody has committed when their turn comes.

        Owners come from the front of their stretches, so thieves come from the back, each into another stretch
        first, and take as many parts at once, in plan order, as fill a step of so many devices.
        """
        stretches = self._stretches(parts)
        for first, last in [*stretches[self.index + 1 :], *stretches[: self.index + 1]]:
            end = last
            while end > first:
                start = end - 1
                while start > first and sum(len(part.slabs) for part in parts[start:end]) < devices:
                    start -= 1
                yield from (part for part in parts[start:end] if not is_committed(part))
                end = start

    def _stretches(self, parts: Sequence[Part]) -> list[tuple[int, int]]:
        """Of each worker, the parts it begins with: all about as many tokens."""
        tokens = np.cumsum([part.tokens for part in parts])
        bounds = np.searchsorted(tokens, np.arange(self.count + 1) * tokens[-1] / self.count).tolist()
        bounds[-1] = len(parts)
        return list(itertools.pairwise(bounds))


def plan_json(window: Window, counts: Mapping[str, Any]) -> dict[str, Any]:
    """What the ledger keeps of a window's plan."""
    return {
        "window": window.number,
        "last": window.is_last,
        "digest": window.digest,
        "shapes": window.shapes,
        "parts": [
            {
                "batch": part.batch,
                "part": part.part,
                "parts_in_batch": part.parts_in_batch,
                "samples": len(part),
                "tokens": part.tokens,
                "slabs": [slab.as_json() for slab in part.slabs],
                "digest": part.digest,
            }
            for part in window.parts
        ],
        "input": dict(counts),
    }
