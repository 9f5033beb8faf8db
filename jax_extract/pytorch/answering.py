"""Answers of Hugging Face's model in PyTorch, under edits, one prompt at a time.

In: prompts, how long answers may be, how tokens are chosen, edits. Out: `Answer`s, in the order of the prompts.
Tokens are chosen by the code that chooses them for the compiled steps, so that draws are the same.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import torch
from transformers import DynamicCache

from jax_extract.forward.edits import Edits, Placed
from jax_extract.generation.answers import Answer
from jax_extract.generation.program import NO_TOKEN
from jax_extract.generation.sampling import Sampling
from jax_extract.generation.steps import answer_of, stop_tokens
from jax_extract.inputs.token_table import TokenizedSample
from jax_extract.pytorch.changing import changed
from jax_extract.pytorch.forward import TorchForward
from jax_extract.pytorch.loading import forget_lengths
from jax_extract.weights.open_model import OpenModel


class TorchAnswers:
    def __init__(self, model: OpenModel, forward: TorchForward) -> None:
        self._model, self._forward = model, forward
        self._stops = stop_tokens(model)
        takes = inspect.signature(forward.base.forward).parameters
        self._argument = "cache" if "cache" in takes else "past_key_values"  # as transformers before 5.23 calls it

    def answers(self, prompts: Sequence[TokenizedSample], most: int, sampling: Sampling, edits: Edits) -> list[Answer]:
        return [self._answer(prompt, most, sampling, edits) for prompt in prompts]

    def _answer(self, prompt: TokenizedSample, most: int, sampling: Sampling, edits: Edits) -> Answer:
        placed = [Placed(0, 0, prompt)]
        made = edits.interventions(placed, (1, prompt.length))
        following = edits.while_answering(placed, 1, most)
        tokens = np.full(most, NO_TOKEN, np.int32)
        forget_lengths(self._forward.base)
        remembered = {self._argument: DynamicCache(config=self._forward.base.config)}
        new = prompt.token_ids
        for step in range(most):
            with torch.inference_mode(), changed(self._forward.base, self._forward.modules, made):
                given = torch.from_numpy(new.astype(np.int64))[None].to(self._forward.device)
                result = self._forward.base(input_ids=given, **remembered, use_cache=True)
                logits = self._forward.logits(result.last_hidden_state[:, -1:])[:, 0].float().cpu().numpy()
            whose, seed = jnp.array([prompt.sample_index], jnp.int32), jnp.uint32(sampling.seed)
            unseeded = dataclasses.replace(sampling, seed=0)
            tokens[step] = int(unseeded.choose(jnp.asarray(logits), whose, jnp.int32(step), seed)[0])
            if tokens[step] in self._stops:
                break
            new = tokens[step : step + 1]
            made = tuple(dataclasses.replace(each, rows=each.rows[:, step : step + 1]) for each in following)
        return answer_of(self._model, self._stops, prompt, tokens)
