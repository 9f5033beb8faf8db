"""Many edits of some texts, each judged by one number.

In: samples, sets of edits, a metric. Out: its value for every set and sample, and without any. What runs of a batch
is the
blocks above its lowest edit, from the stream that enters them, which is computed once: edits are taken in the order of
their depth, and the stream goes on from one batch to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_extract.devices.platform import PlatformDefaults
from jax_extract.forward.batches import columns_of, power_below, rounded
from jax_extract.forward.edits import Edits
from jax_extract.forward.many_edits import EditedRow, first_block, interventions_of
from jax_extract.forward.metrics import Function, metric_inputs
from jax_extract.forward.suffix import Rows, Suffix
from jax_extract.inputs.token_table import TokenizedSample


class Measured(NamedTuple):
    """What a metric looks at.

    Attributes:
      kind: see `Metric`.
      columns: of each sample, int [k].
      tokens: of each sample, int [k].
    """

    kind: str | Function
    columns: Sequence[np.ndarray]
    tokens: Sequence[np.ndarray]


class Row(NamedTuple):
    """One sample under one set of edits; `edits` is its number, -1 for none."""

    first: int
    edits: int
    sample: int


def groups_of(
    samples: Sequence[TokenizedSample], defaults: PlatformDefaults, most_tokens: int
) -> Iterator[tuple[int, list[int]]]:
    """Samples whose streams are kept together, as (columns, their numbers), the longest first."""
    order = sorted(range(len(samples)), key=lambda i: (-samples[i].length, i))
    while order:
        columns = columns_of(samples[order[0]].length, defaults)
        alike = [i for i in order if columns_of(samples[i].length, defaults) == columns]
        alike = alike[: max(1, most_tokens // columns)]
        yield columns, alike
        order = [i for i in order if i not in set(alike)]


def measure(
    program: Suffix,
    samples: Sequence[TokenizedSample],
    sets: Sequence[Edits],
    measured: Measured,
    devices: int,
    defaults: PlatformDefaults,
) -> tuple[Any, Any]:
    """The metric of every set and sample, [sets, samples, …], and of every sample without edits, [samples, …]."""
    found: dict[tuple[int, int], Any] = {}
    nothing = Edits((), sets[0].blocks) if sets else None
    for columns, numbers in groups_of(samples, defaults, defaults.slab_tokens):
        group = [samples[i] for i in numbers]
        tokens, lengths = padded_texts(group, columns, devices)
        stream, reached = program.enter(tokens, lengths), 0
        rows = sorted(
            Row(first_block(edits), number, sample)
            for sample in range(len(group))
            for number, edits in [*enumerate(sets), *([(-1, nothing)] if nothing is not None else [])]
        )
        size = min(
            devices * power_below(max(1, defaults.slab_tokens // columns)), devices * rounded(-(-len(rows) // devices))
        )
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            stream = program.advance(stream, lengths, reached, batch[0].first)
            reached = batch[0].first
            edited = [EditedRow(group[row.sample], sets[row.edits] if row.edits >= 0 else _none(sets)) for row in batch]
            edited += [EditedRow(group[0], _none(sets))] * (size - len(batch))
            whose = [row.sample for row in batch] + [0] * (size - len(batch))
            given = rows_of(whose, group, numbers, measured)
            values = program.measure(measured.kind, stream, reached, given, interventions_of(edited, columns))
            for i, row in enumerate(batch):
                found[row.edits, numbers[row.sample]] = jax.tree.map(lambda v, i=i: v[i], values)
    every = [[found[number, i] for i in range(len(samples))] for number in range(len(sets))]
    plain = [found[-1, i] for i in range(len(samples))]
    together = [jax.tree.map(lambda *each: np.stack(each), *some) for some in every]
    return jax.tree.map(lambda *each: np.stack(each), *together), jax.tree.map(lambda *each: np.stack(each), *plain)


def _none(sets: Sequence[Edits]) -> Edits:
    return Edits((), sets[0].blocks)


def padded_texts(group: Sequence[TokenizedSample], columns: int, devices: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [m, columns] and [m], with as many texts of no token behind them as make a number that is seldom new."""
    count = devices * rounded(-(-len(group) // devices))
    tokens, lengths = np.zeros((count, columns), np.int32), np.zeros(count, np.int32)
    for i, sample in enumerate(group):
        tokens[i, : sample.length], lengths[i] = sample.token_ids, sample.length
    return tokens, lengths


def rows_of(whose: Sequence[int], group: Sequence[TokenizedSample], numbers: Sequence[int], measured: Measured) -> Rows:
    """Of a batch whose rows begin with these texts of a group; `numbers` are the group's among all samples."""
    lengths = np.array([group[i].length for i in whose], np.int32)
    columns = [measured.columns[numbers[i]] for i in whose]
    tokens = [measured.tokens[numbers[i]] for i in whose]
    return Rows(np.array(whose, np.int32), lengths, metric_inputs(columns, tokens))
