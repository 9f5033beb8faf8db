"""Answers of a loaded model.

In: prompts, how long answers may be, how tokens are chosen, edits. Out: `Answer`s, in the order of the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jax_extract.extraction.jax_backend import JaxBackend
from jax_extract.forward.edits import Edits
from jax_extract.generation.answers import Answer, batches_of
from jax_extract.generation.program import AnswerProgram
from jax_extract.generation.reading import readings
from jax_extract.generation.sampling import Sampling
from jax_extract.generation.steps import answer_of, answered, stop_tokens
from jax_extract.inputs.planning.slabs import PlanSettings
from jax_extract.inputs.token_table import TokenizedSample
from jax_extract.weights.open_model import OpenModel
from models.ports import Parameters, longest_sample
from models.positions import Positions

_ROWS = 8  # of answers, a device


class AnsweringModel(Protocol):
    def answers(
        self, prompts: Sequence[TokenizedSample], most: int, sampling: Sampling, edits: Edits
    ) -> list[Answer]: ...


class CompiledAnswers:
    """By the compiled steps of `jax-extract generate`, one program for each way of choosing tokens."""

    def __init__(self, model: OpenModel, backend: JaxBackend, params: Parameters) -> None:
        self._model, self._backend, self._params = model, backend, params
        self._programs: dict[Sampling, AnswerProgram] = {}
        self._stops = stop_tokens(model)

    def answers(self, prompts: Sequence[TokenizedSample], most: int, sampling: Sampling, edits: Edits) -> list[Answer]:
        program = self._program(sampling)
        allowed = longest_sample(self._model.config)
        batches = batches_of(prompts, _ROWS * self._backend.devices, allowed)
        defaults = self._backend.defaults
        settings = PlanSettings(
            samples_per_batch=_ROWS * self._backend.devices,
            rows=_ROWS,
            slab_tokens=defaults.slab_tokens,
            length_multiple=defaults.length_multiple,
            max_length=allowed,
            positions=Positions("last"),
            bytes_per_row=4 * self._model.config.hidden_size,
            packed=defaults.packed,
        )
        found: dict[int, Answer] = {}
        for batch, reading in zip(batches, readings(batches, self._backend.devices, settings), strict=True):
            tokens = np.concatenate(list(answered(program, reading, batch.columns, most, edits)), axis=1)[:, :most]
            for place, prompt in reading.prompts():
                found[prompt.sample_index] = answer_of(self._model, self._stops, prompt, tokens[place])
        return [found[prompt.sample_index] for prompt in prompts]

    def _program(self, sampling: Sampling) -> AnswerProgram:
        if sampling not in self._programs:
            numerics = self._backend.numerics_of_answers(self._model)
            port, config, mesh = self._model.port, self._model.config, self._backend.mesh
            made = AnswerProgram(port, config, self._params, mesh, numerics, sampling, self._stops)
            self._programs[sampling] = made
        return self._programs[sampling]
