"""Where rows come from, as training sees it; and which of them are held out.

Out: `Source`, whose readers give batches [b, layers, width] without end, and which says what it holds by a digest.
Runs, arrays and iterators are such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jax_extract.store.parts import Site

_SPREAD = 1 << 32
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


class Reader(Protocol):
    """Batches of rows without end."""

    def read(self) -> np.ndarray:
        """[b, layers, width]."""
        ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: Mapping[str, Any], /) -> None: ...

    def close(self) -> None: ...


class Known(Protocol):
    """What is said of what is trained on."""

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


class Source(Known, Protocol):
    """What is trained on."""

    def reader(self) -> Reader: ...

    def some(self, held_out: bool, count: int) -> tuple[np.ndarray, np.ndarray]:
        """[n, layers, width], up to so many rows that are held out, or are not; and int64 [n], their samples."""
        ...


def key_of(site: Site) -> str:
    """A site in JSON."""
    return site.hook if site.layer is None else f"{site.hook}.{site.layer}"


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
