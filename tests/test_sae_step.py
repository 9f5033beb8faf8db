"""A step of every architecture is that of SAELens from the same weights on the same rows, and so are two hundred.

Guarded: each loss, every updated tensor by its Frobenius norm, which latents are dead, the auxiliary loss of dead
latents, the averaged threshold, schedules; that several SAEs of one compiled step are each trained alone; that
baselines keep what they are to keep. What devices make of a shared batch is in test_sae_training.py.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sae_cases import (
    CASES,
    D_IN,
    D_SAE,
    DEAD_AFTER,
    DECAY,
    RATE,
    STEPS,
    WARM_UP,
    SaeCase,
    rows,
    their_trainer,
    weights_of,
)

from jax_extract.sae.architecture import Architecture
from jax_extract.sae.parameters import first_parameters
from jax_extract.sae.step import FREE, HELD, LENGTHS, Choice, Schedule, State, train_step, train_steps

ONE_STEP, MANY_STEPS = 1e-5, 1e-3  # relative


def choice(k: float = 0.0, sparsity: float = 0.0, scale: float = 1.0, **changes: Any) -> Choice:
    f = jnp.float32
    found = Choice(
        jnp.int32(0),
        jnp.int32(0),
        jnp.array([scale] * 2, f),
        f(k),
        f(sparsity),
        f(RATE),
        jnp.int32(FREE),
        jnp.int32(FREE),
    )
    return found._replace(**changes)


def off(got: Any, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_a_step_and_two_hundred_are_those_of_saelens(case: SaeCase) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the other library
        theirs = their_trainer(case)
    state = State.start(weights_of(theirs.sae))
    schedule = Schedule(STEPS, WARM_UP, DECAY, case.warm_up, DEAD_AFTER)
    step = jax.jit(partial(train_step, case.architecture_of(), schedule))
    were_dead = 0
    for number, batch in enumerate(rows(STEPS)):
        dead = int(theirs.dead_neurons.sum())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = theirs.step(torch.from_numpy(batch))
        theirs.n_training_steps += 1
        state, measured, made = step(state, choice(case.k, case.sparsity), batch[:, None])
        assert int(measured.dead) == dead or number > STEPS // 2, "which latents are dead"
        were_dead = max(were_dead, dead)
        loss = float(expected.loss.detach())
        assert abs(float(measured.loss) - loss) <= (ONE_STEP if number < 6 else MANY_STEPS) * loss, number
        if number < 6:
            assert made.losses.keys() == expected.losses.keys()
            for name, value in expected.losses.items():
                part = float(value.detach())
                assert abs(float(made.losses[name]) - part) <= ONE_STEP * max(1.0, abs(part)), name
            for name, value in weights_of(theirs.sae).items():
                assert off(state.params[name], value) <= ONE_STEP, (name, number)
    if case.architecture in ("topk", "batchtopk", "matryoshka_batchtopk"):
        assert were_dead > D_IN // 2, "the auxiliary loss must have had more to choose from than it takes"
    if hasattr(theirs.sae, "topk_threshold"):
        assert float(state.threshold) == pytest.approx(theirs.sae.topk_threshold.item(), rel=MANY_STEPS)


def test_saes_of_one_compiled_step_are_each_trained_alone() -> None:
    """Other rates, sparsities, layers and seeds, and baselines, stacked."""
    architecture, schedule = Architecture("batchtopk", D_IN, D_IN, D_SAE), Schedule(10, dead_after=3)
    data = np.stack([rows(4), rows(4, seed=1)], axis=2)  # [batches, rows, layers, width]
    choices = [
        choice(4.0),
        choice(9.0, source=jnp.int32(1), scales=jnp.array([1.0, 0.5], jnp.float32)),
        choice(4.0, learning_rate=jnp.float32(1e-2)),
        choice(4.0, decoder=jnp.int32(HELD)),
    ]
    alone = [State.start(first_parameters(architecture, seed)) for seed in (0, 1, 2, 0)]
    stacked: State = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    together: Choice = jax.tree.map(lambda *leaves: jnp.stack(leaves), *choices)
    one, all_of_them = (jax.jit(partial(f, architecture, schedule)) for f in (train_step, train_steps))
    for batch in data:
        stacked, measured = all_of_them(stacked, together, batch)
        for i, each in enumerate(choices):
            alone[i], by_itself, _ = one(alone[i], each, batch)
            assert float(measured.loss[i]) == pytest.approx(float(by_itself.loss), rel=1e-6)
    for i, state in enumerate(alone):
        for name, value in state.params.items():
            assert off(stacked.params[name][i], np.asarray(value)) <= 1e-5, (i, name)


def test_baselines_keep_the_directions_that_they_are_to_keep() -> None:
    architecture, schedule = Architecture("batchtopk", D_IN, D_IN, D_SAE), Schedule(10)
    first = first_parameters(architecture, 0)

    def trained(**held: int) -> dict[str, np.ndarray]:
        state = State.start(first)
        step = jax.jit(partial(train_step, architecture, schedule))
        for batch in rows(5):
            state, *_ = step(
                state, choice(4.0, **{name: jnp.int32(value) for name, value in held.items()}), batch[:, None]
            )
        return {name: np.asarray(value) for name, value in state.params.items()}

    frozen = trained(decoder=HELD)
    np.testing.assert_array_equal(frozen["W_dec"], first["W_dec"])
    assert off(frozen["W_enc"], first["W_enc"]) > 1e-2
    random = trained(encoder=LENGTHS, decoder=LENGTHS)
    for name, axis in (("W_enc", 0), ("W_dec", 1)):
        was, now = first[name], random[name]
        cosines = (was * now).sum(axis) / np.linalg.norm(was, axis=axis) / np.linalg.norm(now, axis=axis)
        np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-5)
        assert off(now, was) > 1e-2, "lengths are trained"


@pytest.mark.parametrize("name", ["batchtopk", "standard"])
def test_a_scale_of_the_rows_is_the_same_as_rows_of_that_scale(name: str) -> None:
    architecture, schedule = Architecture(name, D_IN, D_IN, D_SAE), Schedule(10)
    step = jax.jit(partial(train_step, architecture, schedule))
    start = State.start(first_parameters(architecture, 0))
    [batch] = rows(1)
    scaled, *_ = step(start, choice(4.0, 0.5, scale=0.25), batch[:, None])
    other, *_ = step(start, choice(4.0, 0.5), batch[:, None] * np.float32(0.25))
    for key, value in other.params.items():
        assert off(scaled.params[key], np.asarray(value)) <= 1e-6, key
