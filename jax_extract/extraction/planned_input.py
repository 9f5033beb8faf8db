"""The windows of a run's input, in their order: from what is kept of them, and from the source.

In: a source, a job, what is kept. Out: `Planned` windows, from the first one at each call. Where all of a window is
kept, nothing of it is read or tokenised again.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from jax_extract.extraction.kept_windows import KeptTables, KeptWindow, Planned
from jax_extract.extraction.prepare import Job
from jax_extract.inputs.planning.slabs import PlanSettings
from jax_extract.inputs.planning.windows import WindowPlanner
from jax_extract.inputs.sources import Source
from jax_extract.inputs.token_table import TokenTable, windows_of
from jax_extract.inputs.tokenize import Continued, InputCounts
from jax_extract.inputs.tokenizing.ahead import ahead
from jax_extract.inputs.tokenizing.share import Share
from jax_extract.inputs.wrapping import Wrapping


@dataclass
class PlannedInput:
    """Attributes:
    continued: gives a sample with what follows its prompt, where something does.
    kept: windows from the first one on.
    done: numbers of those of which nothing is to be computed any more; of a stream they are passed over.
    share: of this process, where several tokenise together what is not kept.
    """

    source: Source
    job: Job
    settings: PlanSettings
    wrapping: Wrapping
    continued: Continued | None = None
    kept: Sequence[KeptWindow] = ()
    done: Collection[int] = ()
    share: Share | None = None
    _all: list[Planned] | None = field(default=None, repr=False)

    def windows(self) -> Iterator[Planned]:
        """Lazily; of a finite input they are planned once, all of them before the first is given.

        Of a stream the next window is made while one is in use.
        """
        if not self.source.finite:
            # What processes exchange is for one thread.
            return self._planned() if self.share else ahead(self._planned())
        if self._all is None:
            found = list(self._planned())
            # The input is known as a whole before any of them is used.
            self._all = [Planned(window, found[-1].counts) for window, _ in found]
        return iter(self._all)

    def _planned(self) -> Iterator[Planned]:
        """The windows that are kept, then those that come from the source."""
        planner = WindowPlanner(self.settings)
        for number, kept in enumerate(self.kept):
            if number and number in self._passed:
                kept.pass_over(planner)
            elif planned := kept.planned(planner, self._new_counts()):
                if number not in self._passed:
                    yield planned
            else:  # another version lays windows out in another way, which will be compared with the plan
                return (yield from itertools.islice(self._from_source(WindowPlanner(self.settings)), number, None))
        if not self.kept or not self.kept[-1].is_last:
            yield from self._from_source(planner, KeptTables(self.kept))

    @property
    def _passed(self) -> Collection[int]:
        """Numbers of windows that nobody asks for any more."""
        return () if self.source.finite else self.done

    def _from_source(self, planner: WindowPlanner, known: Sequence[TokenTable] = ()) -> Iterator[Planned]:
        """Windows behind those that are known, each with what was counted until it was planned."""
        counts = self._new_counts()
        tables = self.job.tables(self.source.samples(), self.wrapping, counts, self.continued, self.share, known)
        for table, is_last in windows_of(tables, self.job.window_samples):
            yield Planned.now(planner.window(table, is_last), counts)

    def _new_counts(self) -> InputCounts:
        return self.job.new_counts(self.settings)
