"""The windows of a run's input, in their order: from what is kept of them, and from the source.

In: a source, a job, what is kept. Out: `Planned` windows, from the first one at each call. Where all of a window is
kept, nothing of it is read or tokenised again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from jax_extract.errors import UserError
from jax_extract.extraction.kept_windows import KeptWindow, Planned
from jax_extract.extraction.prepare import Job
from jax_extract.inputs.planning.slabs import PlanSettings
from jax_extract.inputs.planning.windows import WindowPlanner
from jax_extract.inputs.sources import Source
from jax_extract.inputs.tokenize import Continued
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
        """Lazily; of a finite input they are planned once, all of them before the first is given."""
        if not self.source.finite:
            return self._of_stream()
        if self._all is None:
            self._all = self._from_kept() or list(self._from_source())
        return iter(self._all)

    def _from_kept(self) -> list[Planned] | None:
        """All windows, where they are kept whole and are laid out as they would be today."""
        if not self.kept or not self.kept[-1].is_last:
            return None
        planner = WindowPlanner(self.settings)
        found = [kept.planned(planner, self.job.new_counts(self.settings)) for kept in self.kept]
        return None if None in found else [planned for planned in found if planned]

    def _from_source(self) -> Iterator[Planned]:
        """Each with what was counted when it was planned: the input is read on before a window is given."""
        counts = self.job.new_counts(self.settings)
        samples = self.source.samples()
        windows = self.job.windows(samples, self.settings, self.wrapping, counts, self.continued, self.share)
        if self.source.finite:
            all_windows = list(windows)
            return (Planned.now(window, counts) for window in all_windows)
        planned = (Planned.now(window, counts) for window in windows)
        # What processes exchange is for one thread; without that the next window is made while one is computed.
        return planned if self.share else ahead(planned)

    def _of_stream(self) -> Iterator[Planned]:
        planner = WindowPlanner(self.settings)
        given = 0
        for number, kept in enumerate(self.kept):
            if number and number in self.done:
                kept.pass_over(planner)
            elif planned := kept.planned(planner, self.job.new_counts(self.settings)):
                if number not in self.done:
                    yield planned
            else:
                break
            given += 1
            if kept.is_last:
                return
        for planned in self._from_source():
            number = planned.window.number
            if 0 < given == number + 1 and planned.window.digest != self.kept[number].digest:
                raise UserError(
                    f"{self.source.name} gives other samples than those that the run was begun with; restore the "
                    "inputs, choose another --activations_dir, or start anew with --overwrite"
                )
            if number >= given:
                yield planned
