"""The training loop: from a state and the steps that are left to the state after the last one.

In: a `TrainProgram`, batches, what is to be told, evaluated and saved when. Out: the last state and what was logged.
The losses stay on the device until a line is due, so that no step waits for the host.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax import Array

from jax_extract.devices.exhaustion import refusing_exhaustion
from jax_extract.errors import UserError
from jax_extract.extraction.preemption import on_preemption
from jax_extract.inputs.walk_dataset import Walks
from jax_extract.progress import COMPILING
from jax_extract.store.storage import failpoints
from jax_extract.terminal import Terminal
from jax_extract.training.batches import Batches, evaluation_batches
from jax_extract.training.step import TrainProgram, TrainState

_TRAINING = "training"
Log = list[dict[str, Any]]
Save = Callable[[int, TrainState, Log, list[float]], None]


@dataclass(frozen=True)
class Every:
    """So many steps lie between two of each."""

    logging: int
    evaluation: int
    saving: int


@dataclass
class TrainLoop:
    """Attributes:
    entropy: nats a transition that no model can go below, of the evaluation's walks.
    learning_rate: of step 0; falls linearly to 0.
    save: writes a checkpoint of a step: its state, the log, and the losses that no line of the log has yet.
    pending: those of the checkpoint that is gone on from.
    """

    program: TrainProgram
    batches: Batches
    validation: Walks
    entropy: float
    learning_rate: float
    every: Every
    save: Save
    terminal: Terminal
    log: Log = field(default_factory=list)
    pending: list[float] = field(default_factory=list)
    _asked: threading.Event = field(default_factory=threading.Event)
    _safe: threading.Event = field(default_factory=threading.Event)
    _saved: int = 0

    @refusing_exhaustion()
    def run(self, state: TrainState, done: int) -> tuple[TrainState, float]:
        """Goes on from a state after so many steps; the last state, and its loss on the walks of the evaluation."""
        self._saved = done
        losses: list[Array | float] = [*self.pending]
        last = None
        tokens = int(self.batches.walks.lengths.sum()) * self.batches.epochs
        with (
            on_preemption(self._wind_up),
            self.terminal.progress(tokens - tokens * done // self.batches.steps, _TRAINING) as bar,
        ):
            bar.say(COMPILING)
            for step, (walks, lengths) in enumerate(self.batches.from_step(done), done + 1):
                with failpoints.step("training.step"):
                    state, loss = self.program.step(state, walks, lengths)
                bar.say(_TRAINING)
                losses.append(loss)
                bar.update(int(lengths.sum()))
                if step % self.every.logging == 0 or step == self.batches.steps:
                    self._tell_training(step, _finite(losses, step))
                    losses.clear()
                if step % self.every.evaluation == 0 or step == self.batches.steps:
                    last = self._evaluate(step, state)
                if (step % self.every.saving == 0 and step < self.batches.steps) or self._asked.is_set():
                    self.save(step, state, self.log, _finite(losses, step))
                    self._saved = step
                self._end_if_asked()
            self._safe.set()
        return state, self.validation_loss(state) if last is None else last

    def validation_loss(self, state: TrainState) -> float:
        """Mean nats a prediction."""
        pairs = evaluation_batches(self.validation, self.batches.rows, self.batches.multiple)
        sums = [self.program.evaluate(state.params, tokens, lengths) for tokens, lengths in pairs]
        return float(np.sum([np.asarray(each, np.float64) for each in sums]) / self.validation.transitions)

    def _tell_training(self, step: int, losses: list[float]) -> None:
        loss = float(np.mean(losses))
        rate = self.learning_rate * (1 - step / self.batches.steps)
        self.log.append({"step": step, "epoch": self._epoch(step), "loss": loss, "learning_rate": rate})
        self.terminal.line(
            "train",
            f"step {step:,} of {self.batches.steps:,}: loss {loss:.4f}, walk entropy {self.entropy:.4f}, "
            f"learning rate {rate:.3g}",
        )

    def _evaluate(self, step: int, state: TrainState) -> float:
        (loss,) = _finite([self.validation_loss(state)], step)
        self.log.append({"step": step, "epoch": self._epoch(step), "eval_loss": loss, "walk_entropy": self.entropy})
        self.terminal.line(
            "evaluate",
            f"step {step:,} of {self.batches.steps:,}: validation loss {loss:.4f}, walk entropy {self.entropy:.4f}, "
            f"{above_text(loss, self.entropy)}",
        )
        return loss

    def _epoch(self, step: int) -> float:
        return round(step / self.batches.steps_an_epoch, 4)

    def _wind_up(self, seconds: float) -> str:
        """SIGTERM: the main thread saves after the step that it is at."""
        self._asked.set()
        self._safe.wait(seconds)
        return f"the checkpoint of step {self._saved} is there" if self._saved else "no step was saved yet"

    def _end_if_asked(self) -> None:
        if self._asked.is_set():
            self._safe.set()
            time.sleep(60)  # the watcher of the signal ends the process meanwhile


def _finite(losses: list[Array | float], last: int) -> list[float]:
    """Losses of the steps up to `last`, on the host; UserError where one is no number any more."""
    found = [float(each) for each in losses]
    for step, loss in enumerate(found, last - len(found) + 1):
        if not math.isfinite(loss):
            raise diverged(f"the loss is {loss}", step)
    return found


def diverged(what: str, step: int) -> UserError:
    return UserError(f"{what} at step {step}, so training does not converge; give a smaller --learning_rate")


def above_text(loss: float, entropy: float) -> str:
    """How far a loss is from what no model can go below."""
    if entropy <= 0:
        return f"{loss:.4f} above it"
    share = loss / entropy - 1
    return f"{abs(share):.2%} {'above' if share >= 0 else 'below'} it"
