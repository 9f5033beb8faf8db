"""How samples lie in the batches of a forward that is called again and again: in few shapes, so that hardly any is new.

In: lengths of samples. Out: `Batch`es of rows in which samples lie one behind the other, every device with as many
rows. An extraction chooses shapes that suit its whole input (`inputs.planning`); here there may be five short texts,
and five others with the next call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jax_extract.devices.platform import PlatformDefaults

_SHORTEST = 16  # columns
_FINER = 128  # columns from which there are four lengths to an octave instead of two
_FULL = 512  # columns from which longer rows bring nothing


@dataclass(frozen=True)
class Batch:
    """Attributes:
    columns: of a row.
    rows: of all devices; the i-th device has the i-th share of them.
    samples: most of a row.
    members: (row, column of the first token, number of the sample), row by row in order.
    """

    columns: int
    rows: int
    samples: int
    members: tuple[tuple[int, int, int], ...]

    def tokens(self, token_ids: Sequence[np.ndarray]) -> np.ndarray:
        """int32 [rows, columns] of the samples' token ids; 0 where there is none."""
        tokens = np.zeros((self.rows, self.columns), np.int32)
        for row, column, sample in self.members:
            tokens[row, column : column + len(token_ids[sample])] = token_ids[sample]
        return tokens

    def lengths(self, token_ids: Sequence[np.ndarray]) -> np.ndarray:
        """int32 [rows, samples], tokens of the samples of each row; 0 where there is none."""
        lengths = np.zeros((self.rows, self.samples), np.int32)
        places = [0] * self.rows
        for row, _, sample in self.members:
            lengths[row, places[row]] = len(token_ids[sample])
            places[row] += 1
        return lengths

    def spread(self, of_samples: Sequence[np.ndarray], shift: bool = False) -> np.ndarray:
        """int32 [rows, most of a row]: numbers of the samples of each row, one behind the other; the rest is 0.

        Args:
          of_samples: int [k] of each sample.
          shift: they are positions, and become columns.
        """
        found: list[list[int]] = [[] for _ in range(self.rows)]
        for row, column, sample in self.members:
            found[row] += [int(number) + shift * column for number in of_samples[sample]]
        spread = np.zeros((self.rows, rounded(max(map(len, found)))), np.int32)
        for row, numbers in zip(spread, found, strict=True):
            row[: len(numbers)] = numbers
        return spread

    def gathered(self, values: np.ndarray, counts: Sequence[int]) -> list[tuple[int, np.ndarray]]:
        """(sample, its values) of [rows, most of a row, …], in which each sample has so many."""
        begun = [0] * self.rows
        found = []
        for row, _, sample in self.members:
            found.append((sample, values[row, begun[row] : begun[row] + counts[sample]]))
            begun[row] += counts[sample]
        return found


def batches_of(lengths: Sequence[int], devices: int, defaults: PlatformDefaults, most_tokens: int) -> list[Batch]:
    """The longest samples first.

    Args:
      most_tokens: of a batch's rows on one device, where a single row is not longer.
    """
    if not len(lengths):
        return []
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    longest = lengths[order[0]]
    fair = -(-sum(lengths) // devices)
    at_most_one = defaults.samples_a_row == 1
    columns = columns_of(longest if at_most_one else max(longest, min(fair, _FULL, most_tokens)), defaults)
    rows = _rows(order, lengths, columns, 1 if at_most_one else defaults.samples_a_row or len(order))
    size = devices * min(rounded(-(-len(rows) // devices)), power_below(max(1, most_tokens // columns)))
    found = []
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        most = rounded(max(map(len, some)))
        members = [(row, column, sample) for row, samples in enumerate(some) for column, sample in samples]
        found.append(Batch(columns, size, most, tuple(members)))
    return found


def rounded(count: int) -> int:
    """A power of two, at least 1."""
    return 1 << max(0, count - 1).bit_length()


def power_below(count: int) -> int:
    return 1 << (count.bit_length() - 1)


def columns_of(length: int, defaults: PlatformDefaults) -> int:
    """In steps of half the power of two below it, or of a quarter where padding costs more than another program."""
    columns = max(_SHORTEST, defaults.length_multiple)
    if columns < length:
        below = power_below(length - 1)
        step = below // (2 if below < _FINER else 4)
        columns = -(-length // step) * step
    return -(-columns // defaults.length_multiple) * defaults.length_multiple


def _rows(order: Sequence[int], lengths: Sequence[int], columns: int, most: int) -> list[list[tuple[int, int]]]:
    """(column, sample) of each row: each sample in the first row that has room for it."""
    rows: list[list[tuple[int, int]]] = []
    filled: list[int] = []
    for sample in order:
        length = lengths[sample]
        fitting = (i for i, end in enumerate(filled) if end + length <= columns and len(rows[i]) < most)
        if (row := next(fitting, None)) is None:
            row = len(rows)
            rows.append([])
            filled.append(0)
        rows[row].append((filled[row], sample))
        filled[row] += length
    return rows
