"""Which parts are still to be done, and by whom.

In: the plan, the records, and, of several independent workers, which one this is. Out: parts. A worker
takes every n-th part of the plan, then whatever is still without a record, from where the others come
last: records are create-only, so a part that is done twice is there once, and a worker that dies is
missed by nobody.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jax_extract.errors import UserError
from jax_extract.inputs.planning.windows import Part, Window
from jax_extract.store.ledger import Key, Ledger
from jax_extract.store.survey import survey

_CHUNK = 4_096  # parts among which a worker chooses where to steal


@dataclass(frozen=True)
class CommittedPart:
    samples: int
    plan: str


Committed = Mapping[Key, CommittedPart]


def read_committed(ledger: Ledger) -> list[list[Any]]:
    """What is committed, as plain JSON; UserError where a record is damaged or its files are not there."""
    found = survey(ledger)
    for name, wrong in found.torn.items():
        if name in found.unreadable:
            raise UserError(wrong)
        raise UserError(
            f"{ledger.storage.where(name)} does not hold: {wrong}; restore it from a copy, or give up that part with "
            f"jax-extract sweep {ledger.storage} --damaged and compute it again"
        )
    return [[*key, record["samples"], record["plan"]] for key, record in found.committed.items()]


def parse_committed(said: Iterable[Iterable[Any]]) -> Committed:
    return {(batch, part): CommittedPart(samples, plan) for batch, part, samples, plan in said}


def pending_parts(
    windows: Iterable[Window],
    committed: Committed,
    keep_plan: Callable[[Window], None],
    takes: Callable[[int], bool] = lambda _: True,
) -> Iterator[Part]:
    """Parts without a record, in plan order; every window's plan is kept before its first part runs.

    `takes` chooses by a part's number in the whole plan, counted from 0.
    """
    numbers = itertools.count()
    for window in windows:
        keep_plan(window)
        for part, number in zip(window.parts, numbers, strict=False):
            if part.key in committed:
                if committed[part.key].plan != part.digest:
                    raise UserError(
                        f"part {part.key} is committed under another plan; restore the run's records from a copy, "
                        "or start anew with --overwrite"
                    )
            elif takes(number):
                yield part


@dataclass(frozen=True)
class Worker:
    """Worker `index` of `count` that work on one run, each with its own devices."""

    index: int = 0
    count: int = 1

    def owns(self, number: int) -> bool:
        """Whether a part is of this worker's own stripe, by its number in the plan."""
        return number % self.count == self.index

    def steal(self, parts: Iterable[Part], ledger: Ledger) -> Iterator[Part]:
        """Those of the parts that nobody has committed when their turn comes.

        Owners come from the front, so thieves come from the back, each from a place of its own.
        """
        stream = iter(parts)
        while left := list(itertools.islice(stream, _CHUNK))[::-1]:
            start = len(left) * self.index // self.count
            for part in left[start:] + left[:start]:
                if not ledger.is_committed(part.key):
                    yield part


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
                "samples": len(part.samples),
                "tokens": part.tokens,
                "slabs": [slab.as_json() for slab in part.slabs],
                "digest": part.digest,
            }
            for part in window.parts
        ],
        "input": dict(counts),
    }
