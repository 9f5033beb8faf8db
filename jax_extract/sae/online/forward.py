"""The forward steps that rows come from, in an order that the seed decides and that no mesh changes.

In: a job, its input, which samples are trained on. Out: `Slabs` of one pass over the input after the other, and their
captures, on the devices.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jax import Array

from jax_extract.config import ExtractConfig
from jax_extract.errors import UserError
from jax_extract.extraction.loop import packed
from jax_extract.extraction.prepare import Job, wrapping_of
from jax_extract.extraction.program import CaptureProgram
from jax_extract.extraction.schedule import Work, steps
from jax_extract.inputs.planning.slabs import PlanSettings, SlabShape
from jax_extract.inputs.planning.windows import Window, plan_tables
from jax_extract.inputs.sources import Source
from jax_extract.inputs.token_table import TokenTable, windows_of
from jax_extract.inputs.wrapping import Kept
from jax_extract.store.shuffled.order import random_order

Samples = Callable[[np.ndarray], np.ndarray]  # int64 [samples], places in the input -> bool [samples]


@dataclass(frozen=True, eq=False)
class Slab:
    """What one device computes at once.

    Attributes:
      number: of the pass, from 0.
      counts: int64 [rows], captured rows of each row of the slab.
      samples: int64 [captured rows], the place in the input of each one's sample.
    """

    number: int
    work: Work
    counts: np.ndarray
    samples: np.ndarray


@dataclass(eq=False)
class Forward:
    """Attributes:
    job: what is captured; one pass is over all its input.
    seed: of the order of slabs, which every pass has anew.
    kept: so that a training that is gone on with has the same tokens on another day.
    """

    job: Job
    config: ExtractConfig
    source: Source
    seed: int
    say: Callable[[str], None]
    kept: Kept = field(default_factory=Kept.from_now_on)

    @cached_property
    def settings(self) -> PlanSettings:
        """Of a plan that is the same on any number of devices."""
        settings = self.job.plan_settings(self.config)
        return dataclasses.replace(settings, hosts=1, devices_of_host=1, samples_per_batch=self.config.batch_size)

    def slabs(self, samples: Samples, epoch: int, at_once: int | None = None) -> Iterator[Slab]:
        """Of the samples that are wanted, in the order of one pass; `at_once` are planned together."""
        number = 0
        for count, window in enumerate(self._windows(samples, at_once)):
            works = [step.work[0][0] for step in steps(window.parts, 1, 1, rows_travel=False)]
            for place in random_order(len(works), self.seed, (epoch << 20) + count).tolist():
                yield self._slab(number, works[place])
                number += 1

    @cached_property
    def _first(self) -> Window:
        """Of all samples; its shapes are those of all windows."""
        first = next(self._windows(lambda samples: np.ones(len(samples), bool)), None)
        if first is None:
            raise UserError("none of the texts has a token; there is nothing to train on")
        return first

    @property
    def truncated(self) -> tuple[int, int]:
        """How many of the first samples were cut at the longest that there may be, and how many these are."""
        table = self._first.arrangement.table
        return int((table.full_lengths > table.lengths).sum()), len(table)

    @cached_property
    def program(self) -> CaptureProgram:
        shapes = self._first.shapes
        program: Any = self.job.program(self.job.weights(), shapes, shapes[:1], self.say)
        return program

    @cached_property
    def most_rows(self) -> int:
        """Captured rows of a slab, at most."""
        return max(self.room(shape) for shape in self._first.shapes)

    def room(self, shape: SlabShape) -> int:
        """Rows that a device's captures of a slab have room for."""
        return shape.rows * self.job.plan.positions.slots(shape.length, shape.samples)

    def compute(
        self, slabs: Sequence[Slab], room: Sequence[int] | None = None
    ) -> Iterator[tuple[dict[int, Slab], Mapping[str, Array]]]:
        """Captures of slabs, as many of one shape together as there are devices, and which device has which slab.

        Args:
          room: of each device, slots that are free: those with most get the fullest slabs. It may change meanwhile.
        """
        devices = self.program.devices
        by_shape: dict[SlabShape, list[Slab]] = {}
        for slab in slabs:
            by_shape.setdefault(slab.work.slab.shape, []).append(slab)
        for shape, alike in by_shape.items():
            for start in range(0, len(alike), devices):
                some = sorted(alike[start : start + devices], key=lambda slab: -len(slab.samples))
                order = range(devices) if room is None else np.argsort([-free for free in room], kind="stable").tolist()
                together = dict(zip(order, some, strict=False))
                works = [together[i].work if i in together else None for i in range(devices)]
                yield together, self.program.start(*packed(shape, works, self.program))

    def _windows(self, samples: Samples, at_once: int | None = None) -> Iterator[Window]:
        tables = self.job.tables(
            self.source.samples(),
            wrapping_of(self.config, self.kept),
            self.job.new_counts(self.settings),
        )
        wanted = (_wanted(table, samples) for table in tables)
        most = min(at_once or self.job.window_samples, self.job.window_samples)
        return plan_tables(windows_of((table for table in wanted if len(table)), most), self.settings)

    def _slab(self, number: int, work: Work) -> Slab:
        slab, positions = work.slab, self.job.plan.positions
        places = slice(slab.first, slab.first + slab.count)
        each = positions.rows_of(work.arrangement.lengths[places])
        ends = np.cumsum(slab.counts)
        before = np.concatenate([[0], np.cumsum(each)])
        counts = np.array([before[end] - before[end - count] for end, count in zip(ends, slab.counts, strict=True)])
        table = work.arrangement.table
        return Slab(number, work, counts, np.repeat(table.sample_indices[work.arrangement.order[places]], each))


def _wanted(table: TokenTable, samples: Samples) -> TokenTable:
    chosen = samples(table.sample_indices) & (table.lengths > 0)
    return table if chosen.all() else table.take(np.flatnonzero(chosen))


def chunks(slabs: Iterator[Slab], size: int) -> Iterator[list[Slab]]:
    return iter(lambda: list(itertools.islice(slabs, size)), [])
