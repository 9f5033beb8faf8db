"""How long a run will take, from what is left to do and from what short tries took.

In: `Work`, probes. Out: an `Estimate`: seconds of starting, reading, computing and writing, and which of them bounds
the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jax_extract.config import ExtractConfig
from jax_extract.estimation.output import Output
from jax_extract.estimation.probe import ComputeProbe, WriteProbe
from jax_extract.inputs.planning.slabs import SlabShape


@dataclass(frozen=True)
class Work:
    """What is left to do.

    Attributes:
      steps: of each slab shape, on all devices of a program.
      covers: what it is the work of: the rest of the run (`run`), that of an input of known length as a part of it
        foretells it (`foretold`), or that of a million tokens of an input whose length nobody knows (`million`).
      committed_samples: which are there already, and not counted.
      samples_per_batch: what file names count.
    """

    output: Output
    steps: Mapping[SlabShape, float]
    covers: str
    committed_samples: int
    samples_per_batch: int


@dataclass(frozen=True)
class ReadProbe:
    """Attributes:
    seconds: for reading, tokenising and planning, as this host does it in the run.
    tokens: of the samples that were read.
    when: a run does it. `before` its first step, all of it at once; `beside` the computing of what came before, of a
      stream; `between`, of a stream that several processes tokenise together, in turn with the computing.
    """

    seconds: float
    tokens: int
    when: Literal["before", "beside", "between"]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Estimate:
    """Attributes:
    reading: of the input, or of as much of it as was read.
    compute: None where nothing is left to do.
    writes: place -> what was measured there, in the order in which bytes pass; empty where nothing is left.
    workers: independent workers that share the computing.
    writers: processes that write side by side, each with a disk or a connection of its own.
    free: room where shards are written first; None where there is no limit, or none is told.
    """

    config: ExtractConfig
    work: Work
    reading: ReadProbe
    compute: ComputeProbe | None
    writes: Mapping[str, WriteProbe]
    workers: int
    writers: int
    free: int | None

    @property
    def output(self) -> Output:
        return self.work.output

    @property
    def program_seconds(self) -> float:
        """Loading and compiling, which every worker does."""
        if self.compute is None:
            return 0.0
        return self.compute.start_seconds(len(self.work.steps))

    @property
    def reading_seconds(self) -> float:
        """Of the whole input, which independent workers each read, and hosts of one program share as they did here."""
        if self.compute is None:
            return 0.0
        of_all = 1.0 if self.reading.when == "before" else self.output.tokens / self.reading.tokens
        return self.reading.seconds * of_all

    @property
    def start_seconds(self) -> float:
        """Until the first step."""
        return self.program_seconds + (self.reading_seconds if self.reading.when == "before" else 0.0)

    @property
    def computing_seconds(self) -> float:
        return self.compute.seconds(self.work.steps) / self.workers if self.compute else 0.0

    @property
    def writing_seconds(self) -> float:
        """Of the slower place, where parts pass through two."""
        output = self.output
        return max(
            (probe.seconds(output.file_bytes, output.objects) / self.writers for probe in self.writes.values()),
            default=0.0,
        )

    @property
    def stages(self) -> Mapping[str, float]:
        """What a run does besides starting -> seconds."""
        return {
            "computing": self.computing_seconds,
            "writing": self.writing_seconds,
            "reading": self.reading_seconds,
        }

    @property
    def bound(self) -> str:
        """The stage that takes longest."""
        return max(self.stages, key=lambda stage: self.stages[stage])

    @property
    def seconds(self) -> float:
        """Of the whole run: computing and writing go on at the same time, and reading where it is beside them."""
        together = max(self.computing_seconds, self.writing_seconds)
        if self.reading.when == "beside":
            return self.start_seconds + max(together, self.reading_seconds)
        return self.program_seconds + self.reading_seconds + together
