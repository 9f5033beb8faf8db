"""The k-th largest value of a batch, found by counting, is the one that sorting finds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_extract.sae.selection import active, counted, kth_largest_of_all, kth_largest_of_rows, smallest_chosen

_of_all = jax.jit(kth_largest_of_all)
ROWS, WIDTH = 32, 48


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e4, 1e30]),
    k=st.integers(1, ROWS * WIDTH),
    guess=st.sampled_from([0.0, 1e-38, 1.0, 3e38]),
    ties=st.booleans(),
)
def test_the_kth_largest_is_that_of_sorting_wherever_it_was_guessed(
    seed: int, scale: float, k: int, guess: float, ties: bool
) -> None:
    values = np.random.default_rng(seed).standard_normal((ROWS, WIDTH)).astype(np.float32)
    values = (np.round(values, 1) if ties else values) * np.float32(scale)
    weights = np.random.default_rng(seed + 1).uniform(0.5, 2, WIDTH).astype(np.float32)
    found = float(_of_all(values, weights, jnp.int32(k), jnp.float32(guess)))
    is_chosen = active(jnp.asarray(values), jnp.asarray(weights), jnp.float32(found))
    smallest = float(smallest_chosen(jnp.asarray(values), jnp.asarray(weights), is_chosen))
    values = values * weights
    positive = np.sort(values[values > 0])[::-1]
    chosen = values[np.asarray(is_chosen)]
    assert smallest == chosen.min()
    np.testing.assert_array_equal(counted(is_chosen), np.asarray(is_chosen).sum(axis=0))
    if k >= len(positive):
        assert len(chosen) == len(positive)
    else:  # it may lie below the k-th, but no other value does
        assert np.float32(positive[k - 1]) >= np.float32(found)
        assert chosen.min() == positive[k - 1]
        assert len(chosen) == (values >= positive[k - 1]).sum()


def test_a_good_guess_is_found_again_in_few_passes() -> None:
    values = np.random.default_rng(0).standard_normal((512, 1_024)).astype(np.float32)
    exact = np.sort(values.ravel())[::-1][5_119]

    def passes(guess: float) -> int:
        """How often the values are looked at."""
        looked: list[int] = []
        with jax.disable_jit():
            from jax_extract.sae import selection

            original = selection._at_least

            def counting(values: jax.Array, weights: jax.Array, probes: jax.Array) -> jax.Array:
                looked.append(len(probes))
                return original(values, weights, probes)

            selection._at_least = counting  # type: ignore[assignment]
            try:
                kth_largest_of_all(jnp.asarray(values), jnp.ones(1_024), jnp.int32(5_120), jnp.float32(guess))
            finally:
                selection._at_least = original  # type: ignore[assignment]
        return len(looked)

    assert passes(float(exact) * 1.001) <= 4
    assert passes(float(exact) * 1.1) <= 5
    assert passes(0.0) <= 12


@pytest.mark.parametrize("k", [1, 5, WIDTH])
def test_the_kth_largest_of_each_row_is_that_of_sorting(k: int) -> None:
    values = np.random.default_rng(1).standard_normal((ROWS, WIDTH)).astype(np.float32)
    found = np.asarray(kth_largest_of_rows(jnp.asarray(values), k))[:, 0]
    np.testing.assert_array_equal(found, np.sort(values, axis=1)[:, -k])
