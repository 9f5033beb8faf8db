"""A metric, as the samples that it judges and what it looks at in each.

In: prompts, a `Metric`. Out: samples, with answers behind them where the metric is about answers, and `Measured`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_extract.errors import UserError
from jax_extract.forward.functions import name_of, takes
from jax_extract.forward.metrics import Function, Metric
from jax_extract.forward.sweeps import Measured
from jax_extract.inputs.token_table import TokenizedSample
from jax_extract.interactive.requests import for_each, is_token_ids, with_answers
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
        if not takes(metric, 1):
            raise UserError(
                f"the metric {name_of(metric)!r} must take the logits [vocabulary] behind a text, and no more"
            )
        metric = Metric(metric)
    if metric.kind == "answer":
        alike = isinstance(metric.first, str) or is_token_ids(metric.first)
        samples, answers = with_answers(prompts, _for_each(metric.first, alike, prompts), model)
        columns = [np.arange(p.length, s.length) - 1 for p, s in zip(prompts, samples, strict=True)]
        return samples, Measured("answer", columns, answers)
    last = [np.array([prompt.length - 1]) for prompt in prompts]
    if metric.kind == "difference":
        given = [(each, isinstance(each, str) or _is_number(each)) for each in (metric.first, metric.second)]
        both = zip(*(_for_each(tokens, alike, prompts) for tokens, alike in given), strict=True)
        tokens = [np.array([_token(one, model) for one in pair]) for pair in both]
        return list(prompts), Measured("difference", last, tokens)
    return list(prompts), Measured(metric.kind, last, [np.zeros(1, np.int64)] * len(prompts))


def _for_each(given: Any, alike: bool, prompts: Sequence[TokenizedSample]) -> list[Any]:
    """One for each text: the one there is, or as many as there are."""
    return [given] * len(prompts) if alike else for_each(given, prompts, "answers or tokens of the metric")


def _is_number(given: Any) -> bool:
    """Whether it is a whole one, an array or tensor without axes among them."""
    return hasattr(given, "__index__") and not isinstance(given, bool) and getattr(given, "ndim", 0) == 0


def _token(given: Any, model: OpenModel) -> int:
    if _is_number(given):
        try:
            given = operator.index(given)
        except TypeError:
            raise UserError(f"logit_difference compares tokens, words or their ids, not {given!r:.60}") from None
        if not 0 <= given < model.config.vocab_size:
            raise UserError(f"token {given} is none of the model's 0 to {model.config.vocab_size - 1}")
        return given
    if not isinstance(given, str):
        raise UserError(f"logit_difference compares tokens, words or their ids, not {given!r:.60}")
    tokens = model.tokenizer(given, add_special_tokens=False)["input_ids"]
    if len(tokens) != 1:
        raise UserError(
            f"{given!r:.60} is {len(tokens)} tokens and logit_difference compares single ones; give a word that is one "
            "(many begin with a space), or a token id"
        )
    return int(tokens[0])
