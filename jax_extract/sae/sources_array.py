"""Rows that came from elsewhere: an array, or a file of one.

In: rows [n, width] or [n, layers, width]. Out: a `Source`, in an order that the seed decides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import ml_dtypes
import numpy as np

from jax_extract.errors import UserError, user_path
from jax_extract.sae.sources import HeldOut, Reader
from jax_extract.store.formats import open_shard, read_shard
from jax_extract.store.parts import Site
from jax_extract.store.shuffled.order import random_order

BLOCK = 64  # rows that are held out together: neighbours are often of one text
_DIMENSIONS = (2, 3)  # [rows, width] or [rows, layers, width]
ARRAYS = (".npy", ".npz", ".safetensors", ".pt")


def as_rows(array: np.ndarray, name: str) -> np.ndarray:
    """[n, layers, width]; UserError where it is no array of rows."""
    if array.dtype == np.dtype("V2"):  # what NumPy makes of bfloat16 in a file
        array = array.view(ml_dtypes.bfloat16)
    if array.ndim not in _DIMENSIONS or array.dtype.kind not in "fV" or not array.size:
        raise UserError(
            f"{name} has the shape {list(array.shape)} and the dtype {array.dtype}; expected floating-point rows "
            "[rows, width] or [rows, layers, width]"
        )
    return array[:, None] if array.ndim == min(_DIMENSIONS) else array


def sites_of(rows: np.ndarray) -> tuple[Site, ...]:
    """Of rows [n, layers, width]."""
    return tuple(Site("rows", layer, rows.shape[2]) for layer in range(rows.shape[1]))


def digest_of(rows: np.ndarray) -> str:
    """Of their shape, their dtype, and a thousand of them."""
    some = np.ascontiguousarray(rows[:: max(1, len(rows) // 1_000)])
    found = hashlib.sha256(repr((rows.shape, str(rows.dtype))).encode())
    found.update(some.view(np.uint8).data)
    return found.hexdigest()[:32]


class ArraySource:
    """Rows [n, width] or [n, layers, width] from elsewhere; what is held out are blocks of neighbours."""

    def __init__(self, array: np.ndarray, batch: int, seed: int, held_out: HeldOut, name: str = "an array") -> None:
        self._array = as_rows(array, name)
        self._batch, self._seed, self._name = batch, seed, name
        self._blocks = np.arange(len(array)) // BLOCK
        chosen = held_out(np.arange(self._blocks[-1] + 1))[self._blocks]
        self._aside, self._trained = np.flatnonzero(chosen), np.flatnonzero(~chosen)
        if len(self._trained) < batch:
            raise UserError(f"{name} has {len(self._trained)} rows to train on, which makes no batch of {batch}")
        if not len(self._aside):
            raise UserError(f"{name} is too short to hold out a share of {held_out.share} of it; give more rows")
        self.sites = sites_of(self._array)

    @property
    def rows(self) -> int:
        return len(self._trained) // self._batch * self._batch

    @property
    def digest(self) -> str:
        return digest_of(self._array)

    @property
    def about(self) -> dict[str, Any]:
        return {"model_name": None, "positions": None, "hook_names": {}, "array": self._name}

    def reader(self) -> Reader:
        return _ArrayReader(self._array, self._trained, self._batch, self._seed, self.digest)

    def some(self, held_out: bool, count: int) -> tuple[np.ndarray, np.ndarray]:
        among = self._aside if held_out else self._trained
        chosen = np.sort(among[random_order(len(among), self._seed)[:count]])
        return np.asarray(self._array[chosen]), self._blocks[chosen]


class _ArrayReader:
    """Batches of an array; every epoch has another order and leaves out what makes no whole batch."""

    def __init__(self, array: np.ndarray, among: np.ndarray, batch: int, seed: int, digest: str) -> None:
        self._array, self._among, self._batch, self._seed = array, among, batch, seed
        self._digest = digest
        self._epoch = self._at = 0
        self._order: tuple[int, np.ndarray] | None = None

    def read(self) -> np.ndarray:
        if self._at + self._batch > len(self._among):
            self._epoch, self._at = self._epoch + 1, 0
        if self._order is None or self._order[0] != self._epoch:
            self._order = self._epoch, self._among[random_order(len(self._among), self._seed, self._epoch)]
        chosen = self._order[1][self._at : self._at + self._batch]
        self._at += self._batch
        return np.asarray(self._array[chosen])

    def get_state(self) -> dict[str, Any]:
        return {"array": self._digest, "epoch": self._epoch, "at": self._at}

    def set_state(self, state: Mapping[str, Any]) -> None:
        if state.get("array") != self._digest:
            raise UserError("the state is of other rows than these; give the array that was trained on")
        self._epoch, self._at = int(state["epoch"]), int(state["at"])

    def close(self) -> None:
        self._order = None


def is_array_file(path: str | Path) -> bool:
    """Whether a path names a file of rows, and not a run."""
    return PurePath(str(path)).suffix in ARRAYS


def read_array(path: str | Path) -> np.ndarray:
    """The rows of a file: .npy, or `activations`, or the only array, of .npz, .safetensors and .pt.

    Raises:
      UserError: there is none, it holds several arrays of other names, or anything that is no array.
    """
    if PurePath(str(path)).suffix == ".npy":
        file = user_path(str(path), "--activations")
        if not file.is_file():
            raise UserError(f"there is no file {file}; give a run, or a file of rows")
        try:
            return np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{file} was not read ({error}); a .npy file holds one array of numbers") from None
    with open_shard(path) as opened:
        return read_shard(opened, path)["activations"]
