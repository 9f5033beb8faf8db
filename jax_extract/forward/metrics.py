"""What a forward is judged by: one number a sample, of its logits.

In: answers, tokens or a function. Out: a `Metric`; for given samples, what a compiled program needs to compute it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_extract.errors import UserError
from jax_extract.forward.batches import rounded
from jax_extract.forward.functions import name_of
from jax_extract.forward.program import answer_log_probabilities, taken
from models.decoder import Decoder
from models.ports import Parameters

Function = Callable[[Array], Any]


@dataclass(frozen=True, eq=False)
class Metric:
    """A number a sample.

    Attributes:
      kind: `answer`, the log-probability of an answer behind the text, in nats; `difference`, the logit of one token
        less that of another behind the text; or a pure JAX function of the logits float32 [vocabulary] behind the text.
      first, second: answers or tokens, one for all texts or one for each.
    """

    kind: str | Function
    first: Any = None
    second: Any = None


def answer_log_probability(answers: Any) -> Metric:
    """The log-probability of an answer behind each text, in nats, summed over its tokens.

    Args:
      answers: a string or token ids for all texts, or a sequence with one for each. An answer that begins a word begins
        with a space.
    """
    return Metric("answer", answers)


def logit_difference(right: Any, wrong: Any) -> Metric:
    """The logit of one token less that of another, behind each text.

    Args:
      right, wrong: a string of one token or a token id for all texts, or a sequence with one for each.
    """
    return Metric("difference", right, wrong)


class MetricInputs(NamedTuple):
    """Attributes:
    columns: int32 [b, k], whose logits are looked at.
    tokens: int32 [b, k]: of `answer` each token; of `difference` the two, whose column is the same.
    counts: float32 [b, k]: 0 where there is none.
    """

    columns: Any
    tokens: Any
    counts: Any


def metric_inputs(columns: Sequence[np.ndarray], tokens: Sequence[np.ndarray]) -> MetricInputs:
    """Of each row its columns and tokens, padded to a power of two."""
    size = rounded(max(len(some) for some in (*columns, *tokens)))
    padded = [np.zeros((len(columns), size), dtype) for dtype in (np.int32, np.int32, np.float32)]
    for row, (at, some) in enumerate(zip(columns, tokens, strict=True)):
        padded[0][row, : len(at)] = at
        padded[1][row, : len(some)] = some
        padded[2][row, : len(at)] = 1
    return MetricInputs(*padded)


def measured(kind: str | Function, decoder: Decoder, params: Parameters, x: Array, inputs: MetricInputs) -> Any:
    """The metric of each row, float32 [b], or what a function gives.

    Args:
      x: float32 [b, t, d], behind the final norm.
    """
    if kind == "answer":
        each = answer_log_probabilities(decoder, params, x, inputs.columns, inputs.tokens)
        return jnp.sum(each * inputs.counts, axis=1)
    logits = decoder.logits(params, taken(x, inputs.columns[:, :1]))[:, 0]
    if kind == "difference":
        both = jnp.take_along_axis(logits, inputs.tokens, axis=1)
        return both[:, 0] - both[:, 1]
    assert callable(kind)
    return of_each(kind, logits)


def of_each(function: Function, logits: Array) -> Any:
    """What a function makes of each of logits [b, vocabulary]; a caller's is written for JAX's own rules of promotion.

    Raises:
      UserError: it gives no array.
    """

    def checked(row: Array) -> Any:
        found = function(row)
        leaves = jax.tree.leaves(found)
        if not leaves or not all(isinstance(leaf, jax.Array | np.ndarray | np.number | float | int) for leaf in leaves):
            raise UserError(
                f"the function {name_of(function)!r} of logits returns {type(found).__name__}; return a number or an "
                "array, or several"
            )
        return jax.tree.map(jnp.asarray, found)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.vmap(checked)(logits)


def require_one_number(function: Any, values: Any, count: int) -> None:
    """UserError where there is no gradient of what a function gave for so many texts."""
    if getattr(values, "shape", None) != (count,) or not jnp.issubdtype(values.dtype, jnp.floating):
        raise UserError(
            f"the function {name_of(function)!r} must return one number for a gradient; return a scalar in float32"
        )
