"""The rhythm of a training: steps, and now and then a line, an evaluation, a checkpoint.

In: what is trained, a state, how many steps are done. Out: the state after the last step. What a step measures stays on
the device until a line is due, so that no step waits for the host.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from jax import Array

from jax_extract.devices.exhaustion import refusing_exhaustion
from jax_extract.errors import UserError
from jax_extract.preemption import on_preemption
from jax_extract.progress import COMPILING
from jax_extract.store.storage import failpoints
from jax_extract.terminal import Terminal

State = TypeVar("State")
Batch = TypeVar("Batch")
Log = list[dict[str, Any]]
Measured = list[Array | float]

_TRAINING = "training"


class Training(Protocol[State, Batch]):
    """What is trained, as its rhythm sees it."""

    @property
    def steps(self) -> int:
        """That it has in all."""
        ...

    @property
    def units(self) -> int:
        """What the progress bar counts, of all steps."""
        ...

    @property
    def unit(self) -> str:
        """Its name, behind a number: ` tokens`."""
        ...

    def batches(self, done: int) -> Iterator[Batch]:
        """Of the steps that follow when so many are done."""
        ...

    def units_of(self, batch: Batch) -> int: ...

    def step(self, state: State, batch: Batch) -> tuple[State, Array]:
        """The state a step further, and what was measured; returns before it is computed. `state` is used up."""
        ...

    def tell(self, step: int, measured: Measured) -> None:
        """A line about the steps since the last one, and an entry of the log; UserError where they do not converge."""
        ...

    def evaluate(self, step: int, state: State) -> None:
        """The same of an evaluation."""
        ...

    def save(self, step: int, state: State, measured: Measured) -> None:
        """A checkpoint; `measured` is what no line has told yet."""
        ...


@dataclass(frozen=True)
class Every:
    """So many steps lie between two of each."""

    logging: int
    evaluation: int
    saving: int


@dataclass
class Rhythm(Generic[State, Batch]):
    """Attributes:
    measured: what the checkpoint that is gone on from had not told yet.
    """

    training: Training[State, Batch]
    every: Every
    terminal: Terminal
    measured: Measured = field(default_factory=list)
    _asked: threading.Event = field(default_factory=threading.Event)
    _safe: threading.Event = field(default_factory=threading.Event)
    _saved: int = 0

    @refusing_exhaustion()
    def run(self, state: State, done: int) -> State:
        """Goes on from a state after so many steps to the last one."""
        training, every = self.training, self.every
        self._saved = done
        units = training.units - training.units * done // training.steps
        with (
            on_preemption(self._wind_up),
            self.terminal.progress(units, _TRAINING, training.unit) as bar,
        ):
            bar.say(COMPILING)
            for step, batch in enumerate(training.batches(done), done + 1):
                count = training.units_of(batch)
                with failpoints.step("training.step"):
                    state, found = training.step(state, batch)
                bar.say(_TRAINING)
                self.measured.append(found)
                bar.update(count)
                is_last = step == training.steps
                if step % every.logging == 0 or is_last:
                    training.tell(step, self.measured)
                    self.measured.clear()
                if step % every.evaluation == 0 or is_last:
                    training.evaluate(step, state)
                if (step % every.saving == 0 and not is_last) or self._asked.is_set():
                    training.save(step, state, self.measured)
                    self._saved = step
                self._end_if_asked()
            self._safe.set()
        return state

    def _wind_up(self, seconds: float) -> str:
        """SIGTERM: the main thread saves after the step that it is at."""
        self._asked.set()
        self._safe.wait(seconds)
        return f"the checkpoint of step {self._saved} is there" if self._saved else "no step was saved yet"

    def _end_if_asked(self) -> None:
        if self._asked.is_set():
            self._safe.set()
            time.sleep(60)  # the watcher of the signal ends the process meanwhile


def diverged(what: str, step: int) -> UserError:
    return UserError(f"{what} at step {step}, so training does not converge; give a smaller --learning_rate")
