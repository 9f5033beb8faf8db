"""A metric, as the samples that it judges and what it looks at in each.

In: prompts, a `Metric`. Out: samples, with answers behind them where the metric is about answers, and `Measured`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_extract.errors import UserError
from jax_extract.forward.metrics import Function, Metric
from jax_extract.forward.sweeps import Measured
from jax_extract.inputs.token_table import TokenizedSample
from jax_extract.interactive.requests import is_token_ids, with_answers
from jax_extract.weights.open_model import OpenModel


def judged(
    prompts: Sequence[TokenizedSample], metric: Metric | Function, model: OpenModel
) -> tuple[list[TokenizedSample], Measured]:
    """UserError where the metric is none, or lacks an answer or a token for a text."""
    if not isinstance(metric, Metric):
        if not callable(metric):
            raise UserError(
                "a metric is answer_log_probability(…), logit_difference(…) or a function of logits, not "
                f"{metric!r:.60}"
            )
        metric = Metric(metric)
    if metric.kind == "answer":
        alike = isinstance(metric.first, str) or is_token_ids(metric.first)
        samples, answers = with_answers(prompts, _for_each(metric.first, alike, len(prompts)), model)
        columns = [np.arange(p.length, s.length) - 1 for p, s in zip(prompts, samples, strict=True)]
        return samples, Measured("answer", columns, answers)
    last = [np.array([prompt.length - 1]) for prompt in prompts]
    if metric.kind == "difference":
        given = [(tokens, isinstance(tokens, str | int | np.integer)) for tokens in (metric.first, metric.second)]
        both = zip(*(_for_each(tokens, alike, len(prompts)) for tokens, alike in given), strict=True)
        tokens = [np.array([_token(one, model) for one in pair]) for pair in both]
        return list(prompts), Measured("difference", last, tokens)
    return list(prompts), Measured(metric.kind, last, [np.zeros(1, np.int64)] * len(prompts))


def _for_each(given: Any, alike: bool, count: int) -> list[Any]:
    """One for each text: the one there is, or as many as there are."""
    if alike:
        return [given] * count
    if len(given) != count:
        raise UserError(f"the metric has {len(given)} answers or tokens for {count} texts; give one for each, or one")
    return list(given)


def _token(given: Any, model: OpenModel) -> int:
    if isinstance(given, int | np.integer):
        if not 0 <= given < model.config.vocab_size:
            raise UserError(f"token {given} is none of the model's 0 to {model.config.vocab_size - 1}")
        return int(given)
    tokens = model.tokenizer(given, add_special_tokens=False)["input_ids"]
    if len(tokens) != 1:
        raise UserError(
            f"{given!r:.60} is {len(tokens)} tokens and logit_difference compares single ones; give a word that is one "
            "(many begin with a space), or a token id"
        )
    return int(tokens[0])
