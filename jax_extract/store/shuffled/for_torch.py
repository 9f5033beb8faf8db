"""Shuffled batches for torch: an `IterableDataset` whose tensors share the memory of the arrays.

In: a run and settings. Out: dictionaries of tensors; the rows are divided among the workers of a `DataLoader` on
top of the shard in the settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from jax_extract.store.file_part import StoredPart
from jax_extract.store.shuffled.rows import ShuffledBatch, ShuffledRows, ShuffleSettings
from jax_extract.store.torch_tensors import tensor_of

Tensors = dict[str, torch.Tensor]


class ShuffledDataset(IterableDataset[Tensors]):
    """A run's rows in random order; give it to a `DataLoader` with `batch_size=None`, because it makes batches itself.

    Each of n workers reads its n-th of this process's shard and has an n-th of `buffer_bytes`. Workers that are
    started anew get the parts' commit records, not their rows; a run in memory is copied to them.
    """

    def __init__(self, parts: Sequence[StoredPart], settings: ShuffleSettings) -> None:
        self.parts = parts
        self.settings = settings

    def __iter__(self) -> TorchBatches:
        settings = self.settings
        if (worker := get_worker_info()) is not None:
            index, count = settings.shard
            settings = dataclasses.replace(
                settings,
                shard=(index * worker.num_workers + worker.id, count * worker.num_workers),
                buffer_bytes=settings.buffer_bytes // worker.num_workers,
            )
        return TorchBatches(ShuffledRows(self.parts, settings))


class TorchBatches(Iterator[Tensors]):
    """What a `ShuffledDataset` iterates over: `activations`, `sample_indices` int64, `positions` and `token_ids` int32.

    `state_dict` and `load_state_dict` are the names by which torchdata's `StatefulDataLoader` asks.
    """

    def __init__(self, batches: ShuffledRows) -> None:
        self._batches = batches
        self.get_state = self.state_dict = batches.get_state

    def __next__(self) -> Tensors:
        return tensors(next(self._batches))

    def set_state(self, state: Mapping[str, Any]) -> None:
        """As `ShuffledRows.set_state`."""
        self._batches.set_state(state)

    load_state_dict = set_state

    def close(self) -> None:
        """As `ShuffledRows.close`."""
        self._batches.close()


def tensors(batch: ShuffledBatch) -> Tensors:
    """A batch as tensors on the same memory."""
    return {
        "activations": tensor_of(batch.activations),
        "sample_indices": torch.from_numpy(batch.sample_indices),
        "positions": torch.from_numpy(batch.positions),
        "token_ids": torch.from_numpy(batch.token_ids),
    }
