"""What the store is told of a part, and what a shard is called.

In: nothing. Out: `PartContent` and `Site`, the plain values that writer, memory store and reader share,
and the one place that makes and recognises shard file names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Site:
    """One captured tensor: a hook point at a layer (None where the point has no layer), rows of `width`."""

    hook: str
    layer: int | None
    width: int

    @property
    def key(self) -> tuple[str, int | None]:
        return self.hook, self.layer

    def shard_name(self, batch: int, part: int, parts_in_batch: int, suffix: str, is_whole: bool = False) -> str:
        """`layer_10_batch_000001.pkl`; another hook point is named, a batch of several parts numbered.

        Args:
          is_whole: the shard holds everything of its site, and is called `layer_10.pt`.
        """
        hook = "" if self.hook == "after_block" else f"_{self.hook}"
        site = self.hook if self.layer is None else f"layer_{self.layer}{hook}"
        if is_whole:
            return f"{_WHOLE_NAMES.get(site, site)}.{suffix}"
        numbered = f"_part_{part:03d}" if parts_in_batch > 1 else ""
        return f"{site}_batch_{batch:06d}{numbered}.{suffix}"


_WHOLE_NAMES = {"final_norm": "final_hidden_states"}
_HOOK_OF = {name: hook for hook, name in _WHOLE_NAMES.items()}
_SHARD_NAME = re.compile(
    r"(?:layer_(?P<layer>\d+)(?:_(?P<hook>[a-z_]+?))?|(?P<single>embeddings|final_norm|final_hidden_states))"
    r"(?:_batch_(?P<batch>\d{6,})(?:_part_\d{3,})?)?(?:_attempt_[0-9a-f]+)?\.(?P<suffix>pkl|npz|safetensors|pt)"
)


@dataclass(frozen=True)
class ShardName:
    """What a shard's file name says; `is_whole` where it is the only one of its site, and has no number."""

    hook: str
    layer: int | None
    batch: int
    format: str
    is_whole: bool

    @classmethod
    def parse(cls, name: str) -> ShardName | None:
        """None where the name is no shard's."""
        if not (match := _SHARD_NAME.fullmatch(name)):
            return None
        shard_format = {"pkl": "pickle"}.get(match["suffix"], match["suffix"])
        layer = None if match["single"] else int(match["layer"])
        hook = _HOOK_OF.get(match["single"], match["single"]) or match["hook"] or "after_block"
        return cls(hook, layer, int(match["batch"] or 1), shard_format, is_whole=match["batch"] is None)


@dataclass(frozen=True, eq=False)
class PartContent:
    """The samples of one part in the row order of its shards.

    Attributes:
      batch, part, parts_in_batch: place in the plan; batch and part count from 1.
      sample_indices: int64 [samples], place in the original input.
      sample_ids: names, in the same order.
      token_ids: per sample int32 [length].
      positions: per sample int32 [rows], the token position of each row (-1: a mean).
      full_lengths: int64 [samples], tokens before truncation.
      meta: per sample JSON values of its source.
      plan: digest of the part's place in the plan.
    """

    batch: int
    part: int
    parts_in_batch: int
    sample_indices: np.ndarray
    sample_ids: tuple[str, ...]
    token_ids: tuple[np.ndarray, ...]
    positions: tuple[np.ndarray, ...]
    full_lengths: np.ndarray
    meta: tuple[Mapping[str, Any], ...]
    plan: str

    @property
    def key(self) -> tuple[int, int]:
        return self.batch, self.part

    @cached_property
    def row_offsets(self) -> np.ndarray:
        """int64 [samples + 1]: sample i has rows row_offsets[i] to row_offsets[i + 1]."""
        return offsets([len(p) for p in self.positions])

    @property
    def rows(self) -> int:
        return int(self.row_offsets[-1])

    @property
    def tokens(self) -> int:
        return sum(len(t) for t in self.token_ids)


def offsets(lengths: list[int]) -> np.ndarray:
    """int64 [n + 1] running sums from 0."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
