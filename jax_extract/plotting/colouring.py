"""What rows are coloured by: their tokens, their positions, or a field of their samples.

In: labels or numbers of rows. Out: `Colouring`: a few groups, the others together, or a number a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jax_extract.errors import UserError
from jax_extract.plotting.config import POSITION, TOKEN
from jax_extract.plotting.reading import SampledRows
from jax_extract.store.parts import NO_TOKEN

MOST_GROUPS = 7  # as there are colours and markers that can be told apart
TokenTexts = Callable[[np.ndarray], Sequence[str]]


@dataclass(frozen=True, eq=False)
class Colouring:
    """Attributes:
    name: what the colours are.
    groups: names, the most frequent first; of numbers there are none.
    group_of: int64 [rows], into `groups`; -1 for others. Empty for numbers.
    values: float64 [rows], NaN where there is none; empty for groups.
    """

    name: str
    groups: tuple[str, ...]
    group_of: np.ndarray
    values: np.ndarray

    @classmethod
    def of_labels(cls, name: str, labels: Sequence[str | None]) -> Colouring:
        """The most frequent labels are groups; None is none of them."""
        counted = Counter(label for label in labels if label is not None)
        groups = [label for label, _ in counted.most_common(MOST_GROUPS)]
        place = {label: number for number, label in enumerate(groups)}
        group_of = np.array([-1 if label is None else place.get(label, -1) for label in labels], np.int64)
        return cls(name, tuple(groups), group_of, np.zeros(0))

    @classmethod
    def of_values(cls, name: str, values: np.ndarray) -> Colouring:
        return cls(name, (), np.zeros(0, np.int64), np.asarray(values, np.float64))

    def of_rows(self, kept: np.ndarray) -> Colouring:
        """The same of some of the rows."""
        if self.groups:
            return replace(self, group_of=self.group_of[kept])
        return replace(self, values=self.values[kept])


def colouring_of(asked: str | None, sampled: SampledRows, token_texts: TokenTexts) -> Colouring | None:
    """By token where nothing is asked for; None where rows are means then, which have none.

    Raises:
      UserError: no sample has such a field, or rows that are means are to be coloured by token or position.
    """
    means = bool(len(sampled)) and bool((sampled.token_ids == NO_TOKEN).all())
    if means and asked in (None, TOKEN, POSITION):
        if asked is None:
            return None
        raise UserError(f"--color_by {asked}: every row is the mean of a sample; colour by one of {_fields(sampled)}")
    if asked in (None, TOKEN):
        return Colouring.of_labels(TOKEN, list(token_texts(sampled.token_ids)))
    if asked == POSITION:
        return Colouring.of_values(POSITION, sampled.positions)
    return _by_field(str(asked), sampled)


def _by_field(name: str, sampled: SampledRows) -> Colouring:
    values = [_value(meta, name) for meta in sampled.metas]
    if all(value is None for value in values):
        raise UserError(
            f"--color_by {name!r}: no sample has such a field; give {TOKEN}, {POSITION}, or one of {_fields(sampled)}"
        )
    numbers = all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values if value is not None
    )
    if numbers and len({value for value in values if value is not None}) > MOST_GROUPS:
        of_samples = np.array([np.nan if value is None else value for value in values], np.float64)
        return Colouring.of_values(name, of_samples[sampled.sample_of_row])
    said = [None if value is None else str(value) for value in values]
    return Colouring.of_labels(name, [said[sample] for sample in sampled.sample_of_row])


def _value(meta: Mapping[str, Any], name: str) -> Any:
    return meta.get("fields", {}).get(name, meta.get(name))


def _fields(sampled: SampledRows) -> str:
    found = {name for meta in sampled.metas for name in (*meta.get("fields", {}), *meta) if name != "fields"}
    return f"its fields: {', '.join(sorted(found))}" if found else "its fields, of which the run holds none"
