"""Rows that any Python iterator gives, batch by batch: another model's hooks, a data loader, a generator.

In: an iterable of batches [b, width] or [b, layers, width], of any length each. Out: a `Source`, in the order in which
they come. Of what comes first, as much as scales are made of, blocks are held out; it is kept in memory, all else is
not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jax_extract.errors import UserError
from jax_extract.sae.sources import HeldOut
from jax_extract.sae.sources_array import BLOCK, as_rows, digest_of, sites_of

_FIRST = 1 << 16  # rows that are kept
_NAME = "a batch of the iterator"


class IteratorSource:
    """Begun anew where it ends, if it can be: a list or a data loader can, a generator cannot."""

    def __init__(self, batches: Iterable[Any], batch: int, held_out: HeldOut, training_rows: int) -> None:
        """Takes the first rows at once, and no more than are needed; UserError where they are none."""
        self.rows = training_rows
        self._batches, self._batch = batches, batch
        wanted = min(_FIRST, training_rows + round(training_rows * held_out.share / (1 - held_out.share)) + BLOCK)
        self._rest = _rows_of(batches)
        found, total = [], 0
        for rows in self._rest:
            found.append(rows)
            total += len(rows)
            if total >= wanted:
                break
        if not found:
            raise UserError("the iterator gives no batch; give one that has rows")
        self._begins_with = digest_of(found[0])
        first = np.concatenate(found)
        blocks = np.arange(len(first)) // BLOCK
        aside = held_out(blocks)
        if not aside.any() or aside.all():
            raise UserError(
                f"held_out {held_out.share} of the first {len(first)} rows is none of them or all; give more rows"
            )
        self._first, self._aside, self._blocks = first[~aside], first[aside], (blocks[~aside], blocks[aside])
        self.sites, self.digest = sites_of(first), digest_of(first)

    @property
    def about(self) -> dict[str, Any]:
        return {"model_name": None, "positions": None, "hook_names": {}, "array": "an iterator"}

    def some(self, held_out: bool, count: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self._aside if held_out else self._first
        return rows[:count], self._blocks[int(held_out)][:count]

    def reader(self) -> IteratorReader:
        return IteratorReader(self._flow(), self._batch, self.digest, self.rows)

    def _flow(self) -> Iterator[np.ndarray]:
        """All that is trained on; an iterable that can be begun anew is, and nothing is held out of it then twice."""
        yield self._first
        yield from self._rest
        skipped = len(self._first) + len(self._aside)
        while True:
            count = 0
            for rows in _rows_of(self._batches):
                if not count:
                    if digest_of(rows) != self._begins_with:
                        raise UserError(
                            "the iterable gives its rows in another order the second time, so rows that are held out "
                            "would be trained on; give training_rows that it has, or one that keeps its order"
                        )
                    yield self._first
                fresh = rows[max(0, skipped - count) :]
                count += len(rows)
                if len(fresh):
                    yield fresh
            if not count:
                return


class IteratorReader:
    """Batches of one size."""

    def __init__(self, flow: Iterator[np.ndarray], batch: int, digest: str, wanted: int) -> None:
        self._flow, self._batch, self._digest, self._wanted = flow, batch, digest, wanted
        self._given = 0
        self._waiting: list[np.ndarray] = []

    def read(self) -> np.ndarray:
        found = self._take(self._batch)
        self._given += len(found)
        return found

    def get_state(self) -> dict[str, Any]:
        return {"iterator": self._digest, "given": self._given}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Reads on to that row; UserError where it is behind, or of another iterator."""
        if state.get("iterator") != self._digest:
            raise UserError("the state is of another iterator; give one that gives the same rows")
        if (ahead := int(state["given"]) - self._given) < 0:
            raise UserError("an iterator cannot go back; give a new one")
        while ahead:
            ahead -= len(self._take(min(ahead, self._batch)))
        self._given = int(state["given"])

    def close(self) -> None:
        self._waiting.clear()

    def _take(self, count: int) -> np.ndarray:
        while sum(map(len, self._waiting)) < count:
            rows = next(self._flow, None)
            if rows is None:
                raise UserError(
                    f"the iterator ended after {self._given:,} rows, and training_rows asks for {self._wanted:,}; "
                    "give fewer, or a list or a data loader, which can be begun anew"
                )
            self._waiting.append(rows)
        together = np.concatenate(self._waiting)
        self._waiting = [together[count:]]
        return together[:count]


def _rows_of(batches: Iterable[Any]) -> Iterator[np.ndarray]:
    """[b, layers, width] of each; UserError where one is no array of rows."""
    shape: tuple[int, ...] | None = None
    for given in batches:
        # A data loader over one tensor gives lists of one.
        batch: Any = given[0] if isinstance(given, list | tuple) and len(given) == 1 else given
        rows = batch.detach().cpu() if hasattr(batch, "detach") else batch
        if str(getattr(rows, "dtype", "")) == "torch.bfloat16":
            rows = rows.float()
        found = as_rows(np.asarray(rows), _NAME)
        shape = shape or found.shape[1:]
        if found.shape[1:] != shape:
            raise UserError(
                f"{_NAME} has rows of {list(found.shape[1:])}, and those before of {list(shape)}; give one shape"
            )
        yield found
