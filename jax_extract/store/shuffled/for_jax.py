"""Shuffled batches as JAX arrays, one batch ahead of the step that uses them.

In: a `ShuffledRows` and a sharding. Out: the same batches with their activations on the devices, while the
next batch is already on its way there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jax_extract.store.shuffled.rows import ShuffledBatch, ShuffledRows


class DeviceBatches(Iterator[ShuffledBatch]):
    """Batches whose `activations` are `jax.Array`s; whose rows they are stays in NumPy arrays of this process.

    On several processes each reads its own shard and gives its rows to the global array, which then has
    `rows` x processes of them.
    """

    def __init__(self, batches: ShuffledRows, sharding: jax.sharding.Sharding) -> None:
        self._batches = batches
        self._sharding = sharding
        self._state = batches.get_state()
        self._ahead: tuple[ShuffledBatch, dict[str, Any]] | None = None

    def __next__(self) -> ShuffledBatch:
        current = self._ahead or self._put()
        if current is None:
            raise StopIteration
        self._ahead = self._put()
        batch, self._state = current
        return batch

    def _put(self) -> tuple[ShuffledBatch, dict[str, Any]] | None:
        """The next batch, on its way to the devices, and the state behind it; None behind the last."""
        batch = next(self._batches, None)
        if batch is None:
            return None
        array: Any = jax.make_array_from_process_local_data(self._sharding, batch.activations)
        return dataclasses.replace(batch, activations=array), self._batches.get_state()

    def get_state(self) -> dict[str, Any]:
        """The place behind the batch that was handed out last, not behind the one that is ahead."""
        return self._state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """As `ShuffledRows.set_state`."""
        self._batches.set_state(state)
        self._state, self._ahead = self._batches.get_state(), None

    def close(self) -> None:
        """As `ShuffledRows.close`; the batch that is ahead is let go."""
        self.set_state(self._state)

    def __enter__(self) -> DeviceBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
