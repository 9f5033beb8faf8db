"""The plan of a run on a slice, made without its devices, and what the slice computes of it.

In: a `Job` on the slice, and how many tokens each sample has. Out: a `RunPlan`: the batches and parts that the run will
have, and its steps counted by slab shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jax_extract.compilation.config import CompileConfig
from jax_extract.extraction.accounting import StepCounts
from jax_extract.extraction.prepare import Job
from jax_extract.inputs.columns import Texts
from jax_extract.inputs.planning.slabs import SlabShape
from jax_extract.inputs.planning.windows import WINDOW_SAMPLES, Part, plan_tables
from jax_extract.inputs.token_table import TokenTable


@dataclass(frozen=True)
class RunPlan:
    """Attributes:
    parts: in plan order.
    counts: of all of them on the whole slice.
    rows: of one site, that are stored.
    """

    parts: tuple[Part, ...]
    counts: StepCounts
    rows: int

    @property
    def samples(self) -> int:
        return sum(map(len, self.parts))

    @property
    def tokens(self) -> int:
        """Real ones."""
        return self.counts.tokens

    @property
    def shapes(self) -> tuple[SlabShape, ...]:
        """Those in use, the one that carries most tokens first."""
        steps = self.counts.steps
        return tuple(sorted(steps, key=lambda shape: (steps[shape] * shape.tokens, shape), reverse=True))


def plan_run(config: CompileConfig, job: Job, lengths: np.ndarray) -> RunPlan:
    """Plans as the run will, which asks samples for nothing but their lengths (int64 [samples], from 1 token on)."""
    settings = job.plan_settings(config.as_extraction())
    parts = tuple(part for window in plan_tables(_tables(lengths), settings) for part in window.parts)
    return RunPlan(parts, job.step_counts(parts), int(job.plan.positions.rows_of(lengths).sum()))


def _tables(lengths: np.ndarray) -> Iterator[tuple[TokenTable, bool]]:
    """Windows of samples that have these lengths, and tokens that take no memory; with each whether it is the last."""
    for first in range(0, len(lengths), WINDOW_SAMPLES):
        window = lengths[first : first + WINDOW_SAMPLES]
        offsets = np.append(0, np.cumsum(window))
        indices = np.arange(first, first + len(window))
        tokens, texts = np.broadcast_to(np.int32(0), offsets[-1]), Texts.of([""] * len(window))
        table = TokenTable(tokens, offsets, indices, window, texts, texts)
        yield table, first + WINDOW_SAMPLES >= len(lengths)
