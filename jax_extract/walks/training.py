"""A small language model on walks, as the rhythm of a training sees it.

In: a `TrainProgram`, walks, what is saved how. Out: losses, beside the entropy that no model can go below; checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from jax import Array

from jax_extract.inputs.walk_dataset import Walks
from jax_extract.terminal import Terminal
from jax_extract.training.rhythm import Log, Measured, diverged
from jax_extract.walks.batches import Batches, evaluation_batches
from jax_extract.walks.step import TrainProgram, TrainState

Walked = tuple[np.ndarray, np.ndarray]  # int32 [a, b, t] tokens and [a, b] lengths


@dataclass
class WalkTraining:
    """Attributes:
    entropy: nats a transition that no model can go below, of the evaluation's walks.
    learning_rate: of step 0; falls linearly to 0.
    checkpoint: writes one of a step: its state, the log, and the losses that no line of the log has yet.
    """

    program: TrainProgram
    walks: Batches
    validation: Walks
    entropy: float
    learning_rate: float
    checkpoint: Callable[[int, TrainState, Log, list[float]], None]
    terminal: Terminal
    log: Log = field(default_factory=list)

    @property
    def unit(self) -> str:
        return " tokens"

    @property
    def steps(self) -> int:
        return self.walks.steps

    @property
    def units(self) -> int:
        return int(self.walks.walks.lengths.sum()) * self.walks.epochs

    def batches(self, done: int) -> Iterator[Walked]:
        return self.walks.from_step(done)

    def units_of(self, batch: Walked) -> int:
        return int(batch[1].sum())

    def step(self, state: TrainState, batch: Walked) -> tuple[TrainState, Array]:
        return self.program.step(state, *batch)

    def tell(self, step: int, measured: Measured) -> None:
        loss = float(np.mean(_finite(measured, step)))
        rate = self.learning_rate * (1 - step / self.steps)
        self.log.append({"step": step, "epoch": self._epoch(step), "loss": loss, "learning_rate": rate})
        self.terminal.line(
            "train",
            f"step {step:,} of {self.steps:,}: loss {loss:.4f}, walk entropy {self.entropy:.4f}, "
            f"learning rate {rate:.3g}",
        )

    def evaluate(self, step: int, state: TrainState) -> None:
        (loss,) = _finite([self.validation_loss(state)], step)
        self.log.append({"step": step, "epoch": self._epoch(step), "eval_loss": loss, "walk_entropy": self.entropy})
        self.terminal.line(
            "evaluate",
            f"step {step:,} of {self.steps:,}: validation loss {loss:.4f}, walk entropy {self.entropy:.4f}, "
            f"{above_text(loss, self.entropy)}",
        )

    def save(self, step: int, state: TrainState, measured: Measured) -> None:
        self.checkpoint(step, state, self.log, _finite(measured, step))

    def validation_loss(self, state: TrainState) -> float:
        """Mean nats a prediction."""
        pairs = evaluation_batches(self.validation, self.walks.rows, self.walks.multiple)
        sums = [self.program.evaluate(state.params, tokens, lengths) for tokens, lengths in pairs]
        return float(np.sum([np.asarray(each, np.float64) for each in sums]) / self.validation.transitions)

    def _epoch(self, step: int) -> float:
        return round(step / self.walks.steps_an_epoch, 4)


def _finite(losses: Measured, last: int) -> list[float]:
    """Losses of the steps up to `last`, on the host; UserError where one is no number any more."""
    found = [float(each) for each in losses]
    for step, loss in enumerate(found, last - len(found) + 1):
        if not math.isfinite(loss):
            raise diverged(f"the loss is {loss}", step)
    return found


def above_text(loss: float, entropy: float) -> str:
    """How far a loss is from what no model can go below."""
    if entropy <= 0:
        return f"{loss:.4f} above it"
    share = loss / entropy - 1
    return f"{abs(share):.2%} {'above' if share >= 0 else 'below'} it"
