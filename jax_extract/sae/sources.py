"""Where rows come from: a run, or arrays from elsewhere; and which of them are held out.

In: a run and its layers, or an array. Out: a `Source`, whose readers give batches [b, layers, width] without end, in an
order that the seed decides, and which says what it holds by a digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np

from jax_extract.errors import UserError, user_path
from jax_extract.store.formats import open_shard, read_shard
from jax_extract.store.parts import Site
from jax_extract.store.reader import Run
from jax_extract.store.shuffled.order import random_order
from jax_extract.store.shuffled.rows import ShuffledRows

_AT_ONCE = 1 << 12  # rows that are read for `some`
_SPREAD = 1 << 32
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_BLOCK = 64  # rows of an array that are held out together: neighbours are often of one text
_DIMENSIONS = (2, 3)  # [rows, width] or [rows, layers, width]
ARRAYS = (".npy", ".npz", ".safetensors", ".pt")


class Reader(Protocol):
    """Batches of rows without end."""

    def read(self) -> np.ndarray:
        """[b, layers, width]."""
        ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: Mapping[str, Any], /) -> None: ...

    def close(self) -> None: ...


class Source(Protocol):
    """What is trained on."""

    @property
    def digest(self) -> str:
        """Of all that it holds."""
        ...

    @property
    def rows(self) -> int:
        """That an epoch of training has, at most."""
        ...

    @property
    def sites(self) -> Sequence[Site]:
        """Of each layer of a row."""
        ...

    @property
    def about(self) -> dict[str, Any]:
        """What is said of it in every SAE, in JSON."""
        ...

    def reader(self) -> Reader: ...

    def some(self, held_out: bool, count: int) -> tuple[np.ndarray, np.ndarray]:
        """[n, layers, width], up to so many rows that are held out, or are not; and int64 [n], their samples."""
        ...


class HeldOut:
    """Which samples are held out: a share of them, by a hash of their index, so that no sample is on both sides."""

    def __init__(self, share: float, seed: int) -> None:
        self.share, self.seed = share, seed

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """bool [n] of sample indices int64 [n]."""
        with np.errstate(over="ignore"):  # splitmix64 (Steele, Lea and Flood 2014)
            x = (samples.astype(np.uint64) + np.uint64(self.seed + 1) * _GOLDEN) * _GOLDEN
            for shift, factor in _MIXING:
                x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
            x ^= x >> np.uint64(31)
        return (x >> np.uint64(32)).astype(np.float64) < self.share * _SPREAD

    def trained_on(self, samples: np.ndarray) -> np.ndarray:
        return ~self(samples)


# --------------------------------------------------------------------------------------------------- a run


class RunSource:
    """Rows of a run at some positions."""

    def __init__(
        self, run: Run, sites: Sequence[Site], batch: int, seed: int, positions: str, held_out: HeldOut
    ) -> None:
        self.sites = tuple(sites)
        self._run, self._batch, self._seed = run, batch, seed
        self._positions, self._held_out = positions, held_out
        self._first = self._open(held_out.trained_on, batch)
        try:
            self._open(held_out, 1, drop_remainder=False)
        except UserError:
            raise UserError(
                f"--held_out {held_out.share} of the {len(run)} samples of this run holds out no row; give a larger "
                "share, another --seed, or more samples"
            ) from None

    @property
    def rows(self) -> int:
        return self._first.batches_per_epoch * self._batch

    @property
    def digest(self) -> str:
        return self._first.get_state()["run"]

    @property
    def about(self) -> dict[str, Any]:
        metadata = self._run.metadata
        alias = (metadata.get("model_hook_points") or {}).get(self.sites[0].hook) or ""
        return {
            "model_name": metadata.get("model_name"),
            "positions": self._positions,
            "hook_names": {str(site.layer): alias.replace("{i}", str(site.layer)) for site in self.sites},
        }

    def reader(self) -> Reader:
        return _RunReader(self._open(self._held_out.trained_on, self._batch))

    def some(self, held_out: bool, count: int) -> tuple[np.ndarray, np.ndarray]:
        samples = self._held_out if held_out else self._held_out.trained_on
        found, of, total = [], [], 0
        with self._open(samples, _AT_ONCE, drop_remainder=False) as reader:
            for batch in reader:
                found.append(batch.activations)
                of.append(batch.sample_indices)
                total += len(batch)
                if total >= count:
                    break
        return np.concatenate(found)[:count], np.concatenate(of)[:count]

    def _open(self, samples: Any, rows: int, drop_remainder: bool = True) -> ShuffledRows:
        layers: list[Any] = [site.layer for site in self.sites]
        return self._run.shuffled(
            layers,
            self.sites[0].hook,
            rows,
            self._seed,
            positions=self._positions,
            samples=samples,
            epochs=None if drop_remainder else 1,
            drop_remainder=drop_remainder,
        )


class _RunReader:
    def __init__(self, rows: ShuffledRows) -> None:
        self._rows = rows
        self.get_state, self.set_state, self.close = rows.get_state, rows.set_state, rows.close

    def read(self) -> np.ndarray:
        return next(self._rows).activations


# ----------------------------------------------------------------------------------------------- an array


class ArraySource:
    """Rows [n, width] or [n, layers, width] from elsewhere; what is held out are blocks of neighbours."""

    def __init__(self, array: np.ndarray, batch: int, seed: int, held_out: HeldOut, name: str = "an array") -> None:
        if array.ndim not in _DIMENSIONS or array.dtype.kind not in "fV" or not array.size:
            raise UserError(
                f"{name} has the shape {list(array.shape)} and the dtype {array.dtype}; expected floating-point rows "
                "[rows, width] or [rows, layers, width]"
            )
        self._array = array[:, None] if array.ndim == min(_DIMENSIONS) else array
        self._batch, self._seed, self._name = batch, seed, name
        self._blocks = np.arange(len(array)) // _BLOCK
        chosen = held_out(np.arange(self._blocks[-1] + 1))[self._blocks]
        self._aside, self._trained = np.flatnonzero(chosen), np.flatnonzero(~chosen)
        if len(self._trained) < batch:
            raise UserError(f"{name} has {len(self._trained)} rows to train on, which makes no batch of {batch}")
        if not len(self._aside):
            raise UserError(f"{name} is too short to hold out a share of {held_out.share} of it; give more rows")
        self.sites = tuple(Site("rows", layer, array.shape[-1]) for layer in range(self._array.shape[1]))

    @property
    def rows(self) -> int:
        return len(self._trained) // self._batch * self._batch

    @property
    def digest(self) -> str:
        some = np.ascontiguousarray(self._array[:: max(1, len(self._array) // 1_000)])
        found = hashlib.sha256(repr((self._array.shape, str(self._array.dtype))).encode())
        found.update(some.view(np.uint8).data)
        return found.hexdigest()[:32]

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
