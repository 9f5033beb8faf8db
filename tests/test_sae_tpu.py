"""What `sae train --online` runs beside the forward, compiled for 64 chips by their own compiler; no TPU is needed.

Guarded: captured rows go into the ring without crossing chips; a batch crosses them once when it is drawn; of a step
nothing but sums over rows crosses, the largest of them one gradient; no chip holds another one's activations.
"""

from __future__ import annotations

from typing import Any

import pytest
from compiled_elsewhere import facts_of
from sae_tpu_worker import BATCH, LATENTS, LAYERS, ROOM, SLOTS, WIDTH

from jax_extract.devices import libtpu

CHIPS, FLOAT = 64, 4
GRADIENT = WIDTH * LATENTS * FLOAT
ACTIVATIONS = BATCH // CHIPS * LATENTS * FLOAT  # of a chip's share of a batch

pytestmark = pytest.mark.skipif(not libtpu.is_installed(), reason="libtpu is not installed: pip install -e '.[tpu]'")


@pytest.fixture(scope="module")
def programs() -> dict[str, dict[str, Any]]:
    """From a process of its own, which the compiler of another platform shares with nothing."""
    return facts_of("sae_tpu_worker.py")


def test_rows_reach_the_ring_without_crossing_chips(programs: dict[str, dict[str, Any]]) -> None:
    put = programs["put"]
    assert not put["moved"]
    ring, captures = SLOTS * LAYERS * WIDTH * FLOAT, LAYERS * ROOM * WIDTH * FLOAT
    assert put["memory"] <= ring + captures + 4 * ROOM * FLOAT, "the ring is changed where it lies"


def test_a_batch_crosses_chips_once(programs: dict[str, dict[str, Any]]) -> None:
    draw = programs["draw"]
    assert set(draw["moved"]) <= {"all-reduce", "reduce-scatter"} and sum(draw["moved"].values()) == 1
    assert draw["largest"] <= BATCH * LAYERS * WIDTH * FLOAT


@pytest.mark.parametrize("name", ["batchtopk", "standard"])
def test_of_a_step_sums_over_rows_cross_chips(name: str, programs: dict[str, dict[str, Any]]) -> None:
    step = programs[name]
    assert set(step["moved"]) == {"all-reduce"}
    assert step["largest"] == GRADIENT
    states = 3 * (2 * GRADIENT + (LATENTS + WIDTH) * FLOAT)
    rows = BATCH // CHIPS * LAYERS * WIDTH * FLOAT
    assert step["memory"] <= 1.05 * (states + rows) + 6 * ACTIVATIONS
