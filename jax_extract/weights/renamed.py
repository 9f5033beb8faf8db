"""A checkpoint whose tensors go by other names, some of them left out.

In: a `Checkpoint`, which names stand for which, and another config.json where it has one. Out: a `Checkpoint`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jax_extract.weights.checkpoint import Checkpoint


class RenamedCheckpoint:
    """Tensors are read from the one within, and are there by the names they have in it."""

    def __init__(self, whole: Checkpoint, stored: Mapping[str, str], config: dict[str, Any] | None = None) -> None:
        """`stored`: name here -> name there."""
        self.source, self.revision, self.adapter = whole.source, whole.revision, whole.adapter
        self.generation, self.notes = whole.generation, whole.notes
        self.config = whole.config if config is None else config
        self._whole = whole
        self._stored = dict(stored)

    def names(self) -> frozenset[str]:
        return frozenset(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._whole.shape(self._stored[name])

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        return self._whole.read(self._stored[name], rows)

    def digest(self, names: Iterable[str]) -> str:
        return self._whole.digest({self._stored[name] for name in names})

    def tokenizer(self) -> Any:
        return self._whole.tokenizer()
