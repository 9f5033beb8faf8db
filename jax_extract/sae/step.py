"""One step of training: a batch of rows in, better weights out; for one SAE, or for several of one shape in turn.

In: `State`s stacked over SAEs, rows of all layers, `Schedule`. Out: states a step further, and what was measured. The
optimizer is Adam on gradients of norm 1 at most, as SAELens has it; schedules are functions of the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_extract.sae.architecture import OVER_BATCH, Architecture
from jax_extract.sae.gradients import Knobs, Step, step_of

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # of Adam, as in torch
_LARGEST_GRADIENT = 1.0  # norm
_BARELY = 1e-6  # torch adds it to the norm that it divides by
FREE, HELD, LENGTHS = range(3)  # of `Choice`
_THRESHOLD_RATE = 0.01  # of the moving average of a batch's smallest chosen activation


@dataclass(frozen=True)
class Schedule:
    """How numbers move over a training, in steps.

    Attributes:
      steps: in all.
      warm_up: in which the learning rate rises from 0, linearly.
      decay: the last ones, in which it falls to 0, linearly.
      sparsity_warm_up: in which the factor of the sparsity loss rises from 0.
      dead_after: a latent that has not fired for more than so many is dead.
    """

    steps: int
    warm_up: int = 0
    decay: int = 0
    sparsity_warm_up: int = 0
    dead_after: int = 1_000

    def rate(self, step: Array) -> Array:
        """float32 [], of the learning rate in a step counted from 0."""
        done = step.astype(jnp.float32)
        up = jnp.minimum(1.0, (done + 1) / self.warm_up) if self.warm_up else jnp.float32(1)
        left = self.steps - done
        return up * (jnp.minimum(1.0, left / self.decay) if self.decay else jnp.float32(1))

    def sparsity(self, step: Array) -> Array:
        if not self.sparsity_warm_up:
            return jnp.float32(1)
        return jnp.minimum(1.0, step.astype(jnp.float32) / self.sparsity_warm_up)


class Choice(NamedTuple):
    """What differs between SAEs of one shape; arrays [s] over SAEs, or of one.

    Attributes:
      source, target: int32, which layer is encoded and which reconstructed; of a crosscoder all are.
      scales: float32 [layers], which rows of each are multiplied by.
      k, sparsity: as of `Knobs`, at the end of their warm-up.
      learning_rate: float32.
      encoder, decoder: int32, what of them is trained: all (`FREE`), nothing (`HELD`), or the length of every direction
        (`LENGTHS`).
    """

    source: Array
    target: Array
    scales: Array
    k: Array
    sparsity: Array
    learning_rate: Array
    encoder: Array
    decoder: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that a step changes of an SAE; leaves are stacked over SAEs of one shape.

    Attributes:
      params: float32 arrays under SAELens' names.
      first, second: Adam's moments of each.
      step: int32, steps that are done.
      silent: int32 [d_sae], steps since each latent fired.
      threshold, rest: float32, the moving average of `Step.chosen`, and what float32 does not hold of it.
      guess: float32, the last `Step.chosen`.
    """

    params: dict[str, Array]
    first: dict[str, Array]
    second: dict[str, Array]
    step: Array
    silent: Array
    threshold: Array
    rest: Array
    guess: Array

    @classmethod
    def start(cls, params: Mapping[str, Any]) -> State:
        zeros = {name: jnp.zeros_like(value) for name, value in params.items()}
        d_sae = params["W_dec"].shape[0]
        nothing = jnp.float32(0)
        return cls(
            {name: jnp.asarray(value) for name, value in params.items()},
            zeros,
            {name: jnp.zeros_like(value) for name, value in params.items()},
            jnp.int32(0),
            jnp.zeros(d_sae, jnp.int32),
            nothing,
            nothing,
            nothing,
        )


class Measured(NamedTuple):
    """Of one step.

    Attributes:
      loss, mse: float32.
      l0: float32, mean number of latents of a row that are active.
      variance: float32, mean squared distance of a row from the batch's mean.
      dead: int32, latents that are.
      fired: int32 [d_sae], rows in which each was active.
    """

    loss: Array
    mse: Array
    l0: Array
    variance: Array
    dead: Array
    fired: Array


def train_step(
    architecture: Architecture, schedule: Schedule, state: State, choice: Choice, rows: Array
) -> tuple[State, Measured, Step]:
    """One step of one SAE.

    Args:
      rows: [b, layers, width], unscaled.
    """
    if architecture.layers > 1:
        x = (rows.astype(jnp.float32) * choice.scales[None, :, None]).reshape(rows.shape[0], -1)
    else:
        x = _layer(rows, choice.source) * choice.scales[choice.source]
    y = _layer(rows, choice.target) * choice.scales[choice.target] if architecture.is_transcoder else x
    params = state.params
    if architecture.name == "jumprelu":  # below zero it would let negative activations through
        params = {**params, "threshold": jnp.maximum(params["threshold"], 0)}
    dead = state.silent > schedule.dead_after
    knobs = Knobs(choice.k, choice.sparsity * schedule.sparsity(state.step))
    step = step_of(architecture, params, x, y, knobs, dead, state.guess)
    gradients = dict(step.gradients)
    for name, trained in (("W_enc", choice.encoder), ("W_dec", choice.decoder)):
        gradients[name] = gradients[name] * (trained != HELD).astype(jnp.float32)
    done = state.step + 1
    rate = choice.learning_rate * schedule.rate(state.step)
    before = params
    params, first, second = _adam(before, gradients, state.first, state.second, done, rate)
    for name, trained, axis in (("W_enc", choice.encoder, 0), ("W_dec", choice.decoder, 1)):
        params[name] = lax.cond(trained == LENGTHS, partial(_along, axis), _moved, before[name], params[name])
    silent = jnp.where(step.fired > 0, 0, state.silent + 1)
    threshold, rest = _averaged(architecture, state, step.chosen)
    guess = jnp.where(jnp.isfinite(step.chosen), step.chosen, state.guess)
    mean = jnp.mean(y, axis=0)
    measured = Measured(
        step.loss,
        step.error,
        jnp.sum(step.fired).astype(jnp.float32) / x.shape[0],
        jnp.sum(jnp.square(y - mean[None])) / x.shape[0],
        jnp.sum(dead, dtype=jnp.int32),
        step.fired,
    )
    return State(params, first, second, done, silent, threshold, rest, guess), measured, step


def _moved(_: Array, after: Array) -> Array:
    return after


def _along(axis: int, before: Array, after: Array) -> Array:
    """What is left of a change when each vector along an axis keeps its direction."""
    share = jnp.sum((after - before) * before, axis, keepdims=True) / jnp.sum(jnp.square(before), axis, keepdims=True)
    return before * (1 + share)


def _layer(rows: Array, layer: Array) -> Array:
    """float32 [b, width]."""
    return lax.dynamic_index_in_dim(rows, layer, axis=1, keepdims=False).astype(jnp.float32)


def train_steps(
    architecture: Architecture, schedule: Schedule, states: State, choices: Choice, rows: Array
) -> tuple[State, Measured]:
    """One step of each of several SAEs, whose leaves are stacked; one after the other, so that memory is that of
    one."""

    def one(_: None, each: tuple[State, Choice]) -> tuple[None, tuple[State, Measured]]:
        state, measured, _step = train_step(architecture, schedule, *each, rows)
        return None, (state, measured)

    return lax.scan(one, None, (states, choices))[1]


def _averaged(architecture: Architecture, state: State, chosen: Array) -> tuple[Array, Array]:
    """The moving average, by which a BatchTopK SAE becomes a JumpReLU one; to more digits than float32 has."""
    if architecture.name not in OVER_BATCH:
        return state.threshold, state.rest
    change = (
        jnp.where(jnp.isfinite(chosen), _THRESHOLD_RATE * ((chosen - state.threshold) - state.rest), 0) + state.rest
    )
    moved = state.threshold + change
    return lax.optimization_barrier((moved, change - (moved - state.threshold)))


def _adam(
    params: dict[str, Array],
    gradients: dict[str, Array],
    first: dict[str, Array],
    second: dict[str, Array],
    done: Array,
    rate: Array,
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """Kingma and Ba 2015, on gradients that are shrunk to a norm of 1 where theirs is larger."""
    norm = jnp.sqrt(sum((jnp.sum(jnp.square(g)) for g in gradients.values()), jnp.float32(0)))
    shrunk = jnp.minimum(1.0, _LARGEST_GRADIENT / (norm + _BARELY))
    count = done.astype(jnp.float32)
    bias1, bias2 = (-jnp.expm1(count * math.log(beta)) for beta in (_BETA1, _BETA2))  # 1 - β^t, to all its digits
    new: tuple[dict[str, Array], dict[str, Array], dict[str, Array]] = ({}, {}, {})
    for name, value in params.items():
        g = gradients[name] * shrunk
        m = _BETA1 * first[name] + (1 - _BETA1) * g
        v = _BETA2 * second[name] + (1 - _BETA2) * jnp.square(g)
        new[0][name] = value - rate / bias1 * m / (jnp.sqrt(v / bias2) + _EPSILON)
        new[1][name], new[2][name] = m, v
    return new
