"""What was counted and compiled for a slice, and the seconds and the bytes that follow from it.

In: counts of steps (`run_plan`), costs of a step (`devices.planner`), what the compiler said (`programs`). Out: a
`Report`. A run starts, reads its input, and then computes while it writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from jax_extract.compilation.config import CompileConfig
from jax_extract.compilation.programs import Compiled, Subject
from jax_extract.compilation.run_plan import RunPlan
from jax_extract.compilation.topology import Slice
from jax_extract.devices.mesh import platform_of
from jax_extract.devices.planner import MEMORY_MARGIN, Decision, LayoutCost
from jax_extract.extraction.capture import sites_of
from jax_extract.extraction.program import captured_bytes
from jax_extract.inputs.planning.slabs import SlabShape


@dataclass(frozen=True)
class Report:
    """Attributes:
    cost: of a step of `shape`.
    shape: of the slab that is compiled first: the one that carries most tokens of the run.
    compiled: the program for it; None where it does not fit.
    largest: the largest slab found to fit; None where none was looked for, or none fits.
    planned: of the run's own samples; None where none are given: then slabs are full.
    costs: of a step, of every shape of the plan.
    others: programs for the other shapes of the plan, as far as they were compiled; None where one does not fit.
    compile_seconds: that a processor of this machine works at the slowest program of those compiled; None without any.
    """

    config: CompileConfig
    slice: Slice
    subject: Subject
    decision: Decision
    cost: LayoutCost
    shape: SlabShape
    compiled: Compiled | None
    largest: Compiled | None
    planned: RunPlan | None = None
    costs: Mapping[SlabShape, LayoutCost] = field(default_factory=dict)
    others: Mapping[SlabShape, Compiled | None] = field(default_factory=dict)
    compile_seconds: float | None = None

    @property
    def room(self) -> float:
        """Bytes of a chip's memory that may be taken."""
        return (1 - MEMORY_MARGIN) * self.slice.chip.memory_bytes

    @property
    def chips(self) -> int:
        return len(self.slice.devices)

    # ------------------------------------------------------------------------------------- a step

    @property
    def step_tokens(self) -> int:
        """That all chips compute in a step of `shape`."""
        return self.chips * self.shape.tokens

    @property
    def row_bytes(self) -> int:
        """That are stored of one token, over all sites."""
        plan = self.subject.plan
        width = sum(site.width for site in sites_of(plan, self.subject.config))
        return width * (4 if plan.dtype == "float32" else 2)

    def travelling_bytes(self, shape: SlabShape) -> int:
        """Captures of the other chips, which each chip is given in a step where rows travel."""
        subject = self.subject
        if not subject.rows_travel:
            return 0
        own = captured_bytes(subject.plan, subject.config, shape, platform_of(subject.mesh), rows_travel=True)
        return (self.chips - 1) * own

    def travelling_seconds(self, shape: SlabShape) -> float:
        links = max(1, sum(size > 1 for size in self.subject.mesh.shape.values()))
        return self.travelling_bytes(shape) / (links * self.slice.chip.link_bytes_per_second)

    def step_seconds(self, shape: SlabShape) -> float:
        """Until its captures are where they are fetched from."""
        cost = self.costs.get(shape, self.cost)
        return cost.seconds + self.travelling_seconds(shape)

    # --------------------------------------------------------------------------------------- a run

    @property
    def tokens(self) -> float:
        """Real ones of the run; of one step where nobody says how many it has."""
        return self.planned.tokens if self.planned else self.config.tokens or self.step_tokens

    @property
    def steps(self) -> Mapping[SlabShape, float]:
        """Of the run, of each shape."""
        return self.planned.counts.steps if self.planned else {self.shape: self.tokens / self.step_tokens}

    @property
    def output_bytes(self) -> float:
        """That all hosts store, without what stands around rows."""
        if self.planned:
            return self.planned.rows * self.row_bytes
        rows = self.shape.rows * int(self.subject.plan.positions.rows_of(np.array(self.shape.length)))
        return self.steps[self.shape] * self.chips * rows * self.row_bytes

    @property
    def start_seconds(self) -> float:
        """For compiling, all programs at once: a host of a slice has a core for each. 0 where no run is planned."""
        return (self.compile_seconds or 0.0) if self.planned else 0.0

    @property
    def reading_seconds(self) -> float:
        """In which every host reads and tokenises its share."""
        return self.tokens / (self.slice.hosts * self.config.host_tokens_per_second)

    @property
    def computing_seconds(self) -> float:
        return sum(count * self.step_seconds(shape) for shape, count in self.steps.items())

    @property
    def output_seconds(self) -> float:
        """In which every host stores its share."""
        return self.output_bytes / self.slice.hosts / (self.config.host_gb_per_second * 1e9)

    @property
    def working_seconds(self) -> float:
        """From the first step on: computing and writing go on at the same time."""
        return max(self.computing_seconds, self.output_seconds)

    @property
    def seconds(self) -> float:
        return self.start_seconds + self.reading_seconds + self.working_seconds

    @property
    def bound(self) -> str:
        """What takes most of the run."""
        sizes = {
            "compiling": self.start_seconds,
            "reading and tokenising": self.reading_seconds,
            "host output": self.output_seconds,
            self.cost.bound: self.computing_seconds,
        }
        return max(sizes, key=lambda name: sizes[name])
