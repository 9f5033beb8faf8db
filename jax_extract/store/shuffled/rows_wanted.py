"""Which rows of a run are wanted for training: by their positions, and by the tokens that they are of.

In: a choice as a user writes it, and the content of parts. Out: for each part, which of its rows are kept, in a bit a
row. The choice is made before the order, so that an epoch of what is kept is as exact as one of all rows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_extract.errors import UserError
from jax_extract.store.parts import PartContent

_SPELT = re.compile(r"all|last|(first|from|every):(\d{1,9})|at:(\d{1,9}(?:,\d{1,9})*)")
_KINDS = "all, last, first:n, from:k, every:k, at:i,j,… (counted from 0), or a function of positions"

PositionFilter = Callable[[np.ndarray], np.ndarray]  # int32 [rows] -> bool [rows]
SampleFilter = Callable[[np.ndarray], np.ndarray]  # int64 [samples] -> bool [samples]


@dataclass(frozen=True)
class RowsWanted:
    """Attributes:
    positions: as `--positions` spells them, or a function that is given positions, int32 [rows], and says which are
      wanted, bool [rows]; None for all.
    without_tokens: rows of these tokens are left out.
    samples: a function that is given sample indices, int64 [samples], and says which are wanted, bool [samples].
    """

    positions: str | PositionFilter | None = None
    without_tokens: tuple[int, ...] = ()
    samples: SampleFilter | None = None

    @classmethod
    def of(cls, positions: Any, without_tokens: Any, samples: Any = None) -> RowsWanted | None:
        """The choice that these words make, None for all rows; UserError where they make none.

        Args:
          without_tokens: token ids, or a tokenizer, all special tokens of which are meant.
        """
        if isinstance(positions, str):
            match = _SPELT.fullmatch(positions)
            if not match or (match[1] in ("first", "every") and int(match[2]) < 1):
                raise UserError(f"positions={positions!r} is no choice of positions; expected one of: {_KINDS}")
        elif positions is not None and not callable(positions):
            raise UserError(f"positions={positions!r} is no choice of positions; expected one of: {_KINDS}")
        tokens: Any = getattr(without_tokens, "all_special_ids", without_tokens)
        if isinstance(tokens, str) or not isinstance(tokens, Iterable | None):
            raise UserError(f"without_tokens={without_tokens!r:.60} must be token ids, or a tokenizer")
        ids = [] if tokens is None else [*tokens]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int | np.integer) or token < 0:
                raise UserError(
                    f"without_tokens holds {token!r:.60}, which is no token id; give whole numbers from 0 on"
                )
        if samples is not None and not callable(samples):
            raise UserError(f"samples={samples!r:.60} must be a function of sample indices, or left out")
        if positions in (None, "all") and not ids and samples is None:
            return None
        choice: Any = None if positions == "all" else positions
        of_samples: Any = samples
        return cls(choice, tuple(sorted({int(token) for token in ids})), of_samples)

    def kept(self, content: PartContent) -> np.ndarray:
        """bool [rows] of a part.

        Raises:
          UserError: positions are chosen and rows are means, which have none; or the function does not answer.
        """
        positions = content.row_positions
        kept = np.ones(len(positions), bool)
        if self.positions is not None and len(positions):
            if (positions < 0).any():
                raise UserError(
                    f"positions={self.positions!r} has no meaning for this run: its rows are means over all tokens of "
                    "their samples; leave it out"
                )
            lengths = np.array([len(tokens) for tokens in content.token_ids])
            kept &= self.at(positions, np.repeat(lengths, np.diff(content.row_offsets)) - 1)
        if self.samples is not None:
            kept &= np.repeat(_answer(self.samples, content.sample_indices, "samples"), np.diff(content.row_offsets))
        if self.without_tokens:
            kept &= ~np.isin(content.row_token_ids, np.array(self.without_tokens))
        return kept

    def at(self, positions: np.ndarray, last: np.ndarray) -> np.ndarray:
        """bool [rows] of positions int32 [rows] alone; `last` is that of the last token of each row's sample."""
        if not isinstance(self.positions, str):
            return (
                np.ones(len(positions), bool)
                if self.positions is None
                else _answer(self.positions, positions, "positions")
            )
        kind, _, number = self.positions.partition(":")
        if kind == "last":
            return positions == last
        if kind == "at":
            return np.isin(positions, np.array(number.split(","), np.int64))
        if kind == "every":
            return positions % int(number) == 0
        return positions < int(number) if kind == "first" else positions >= int(number)

    def to_state(self) -> dict[str, Any]:
        """As JSON; what a function chooses shows in the rows that are kept."""
        positions = self.positions if isinstance(self.positions, str | None) else "a function"
        said: dict[str, Any] = {"positions": positions, "without_tokens": list(self.without_tokens)}
        return said if self.samples is None else {**said, "samples": "a function"}


def _answer(function: Callable[[np.ndarray], np.ndarray], asked: np.ndarray, what: str) -> np.ndarray:
    """bool, one for each of what was asked; UserError where the function gives something else."""
    answer = np.asarray(function(asked))
    if answer.shape != asked.shape or answer.dtype != bool:
        raise UserError(
            f"{what} must give one truth value for each of {len(asked)} {what}; the function gave "
            f"{answer.dtype} of shape {list(answer.shape)}"
        )
    return answer


class KeptRows:
    """The rows of each part that are kept, counted through from 0; an eighth of a byte for each row of the run.

    Attributes:
      part_rows: how many are kept of each part.
      digest: of all of them.
    """

    def __init__(self, wanted: RowsWanted, contents: Iterable[PartContent]) -> None:
        """`contents`: of all parts, one after the other."""
        self.part_rows: list[int] = []
        self._bits: list[np.ndarray] = []
        self._total: list[int] = []
        total = hashlib.sha256()
        for content in contents:
            kept = wanted.kept(content)
            self._bits.append(np.packbits(kept))
            self._total.append(len(kept))
            self.part_rows.append(int(kept.sum()))
            total.update(self._bits[-1].data)
        self.digest = total.hexdigest()[:32]

    def rows(self, part: int, start: int, stop: int) -> np.ndarray:
        """int64: where the kept rows [start, stop) of a part lie among all its rows."""
        return self._all(part)[start:stop]

    def before(self, part: int, bounds: np.ndarray) -> np.ndarray:
        """int64 [bounds]: how many rows of a part are kept before each of these."""
        return np.searchsorted(self._all(part), bounds)

    def _all(self, part: int) -> np.ndarray:
        return np.flatnonzero(np.unpackbits(self._bits[part], count=self._total[part]))
