"""What one forward of the door gave.

In: arrays of a program, samples. Out: `Outcome`, in the order of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jax_extract.store.reader import Run


@dataclass(frozen=True, eq=False, repr=False)
class ScoredAnswer:
    """How likely a model finds an answer that it is given.

    Attributes:
      token_ids: int32 [tokens] of the answer.
      log_probabilities: float32 [tokens], of each behind the prompt and the tokens before it, in nats.
    """

    token_ids: np.ndarray
    log_probabilities: np.ndarray

    @property
    def log_probability(self) -> float:
        """Of the whole answer: their sum."""
        return float(self.log_probabilities.sum(dtype=np.float64))

    def __repr__(self) -> str:
        return f"ScoredAnswer({len(self.token_ids)} tokens, log-probability {self.log_probability:.4f})"


@dataclass(frozen=True, eq=False, repr=False)
class Outcome:
    """Attributes:
    run: the activations that were kept, as `extract` gives them.
    logits: of each input float32 [positions, vocabulary], in the order in which the positions were asked for; empty
      where none were.
    answers: of each input; empty where none were given.
    """

    run: Run
    logits: Sequence[np.ndarray]
    answers: Sequence[ScoredAnswer]

    def __repr__(self) -> str:
        said = [f"{len(self.run)} samples"]
        if self.run.sites:
            said.append(
                f"{', '.join(self.run.hook_points)}" + (f" at layers {self.run.layers}" if self.run.layers else "")
            )
        if self.logits:
            said.append("logits")
        if self.answers:
            said.append("answers")
        return f"Outcome({'; '.join(said)})"


@dataclass(frozen=True, eq=False, repr=False)
class EditEffects:
    """Attributes:
    values: [edits, texts, …], the metric under each edit; where it returns several arrays, each of them.
    without: [texts, …], the metric without any.
    """

    values: Any
    without: Any

    @property
    def effects(self) -> Any:
        """[edits, texts, …]: what each edit changes."""
        return jax.tree.map(lambda under, without: under - without[None], self.values, self.without)

    def __repr__(self) -> str:
        edits, texts = next((values.shape[:2] for values in jax.tree.leaves(self.values)), (0, 0))
        return f"EditEffects({edits} edits of {texts} texts)"


@dataclass(frozen=True, eq=False, repr=False)
class Gradients:
    """Attributes:
    run: as a run of activations is read, but its rows are the gradient of the metric of their sample.
    values: float32 [texts], the metric.
    """

    run: Run
    values: np.ndarray

    def __repr__(self) -> str:
        return f"Gradients({len(self.run)} samples; {', '.join(self.run.hook_points)} at layers {self.run.layers})"
