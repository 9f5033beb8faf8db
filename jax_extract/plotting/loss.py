"""Picture: the loss of a training on walks, against the entropy of the walk, which no model can go below.

In: the log of trainer_state.json. Out: `LossCurve`, and a figure: the loss, and how far it is above the entropy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jax_extract.plotting.style import COLOURS, INK, QUIET, grid, log_axis, new_figure, styled


@dataclass(frozen=True, eq=False)
class LossCurve:
    """Losses are in nats a prediction.

    Attributes:
      steps, losses: of the training; a loss is the mean since the line before.
      evaluated, evaluation_losses: of the walks of the evaluation.
      entropy: of the walk, nats a step; NaN where nothing was evaluated.
      guessing: the loss of a guess among all nodes.
    """

    steps: np.ndarray
    losses: np.ndarray
    evaluated: np.ndarray
    evaluation_losses: np.ndarray
    entropy: float
    guessing: float

    @classmethod
    def of(cls, log: Sequence[Mapping[str, Any]], vocab_size: int) -> LossCurve:
        trained = np.array([(entry["step"], entry["loss"]) for entry in log if "loss" in entry], np.float64)
        tried = np.array([(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry], np.float64)
        entropy = next((float(entry["walk_entropy"]) for entry in reversed(log) if "walk_entropy" in entry), math.nan)
        (steps, losses), (evaluated, found) = trained.reshape(-1, 2).T, tried.reshape(-1, 2).T
        return cls(steps, losses, evaluated, found, entropy, math.log(vocab_size))


def draw_loss(curve: LossCurve, caption: str) -> Figure:
    with styled():
        figure = new_figure("Loss against the entropy of the walk", caption, 9.6, 4.0)
        left, right = figure.subplots(1, 2)
        for axes, below in ((left, 0.0), (right, curve.entropy)):
            axes.plot(curve.steps, curve.losses - below, color=COLOURS[5], linewidth=1.2, label="training loss")
            axes.plot(
                *(curve.evaluated, curve.evaluation_losses - below),
                color=COLOURS[0],
                marker="o",
                markersize=4,
                label="validation loss",
            )
            axes.set_xlabel("step")
            grid(axes)
        left.axhline(curve.guessing, color=QUIET, linestyle=":", label=f"guessing a node, {curve.guessing:.4f}")
        if math.isfinite(curve.entropy):
            left.axhline(
                curve.entropy, color=INK, linestyle=(0, (4, 2)), label=f"entropy of the walk, {curve.entropy:.4f}"
            )
        left.set_ylim(bottom=0)
        left.set_title("loss")
        left.set_ylabel("nats a prediction")
        left.legend(loc="lower left")
        log_axis(right, "y", np.concatenate([curve.losses, curve.evaluation_losses]) - curve.entropy)
        right.set_title("loss above the entropy of the walk")
        right.set_ylabel("nats a prediction (log scale)")
        right.legend()
    return figure
