"""What the schedule of a pod promises, on the meshes that docs/decisions/whole-mesh-plan.md names.

In: lengths like GSM8K's. Out: the share of computed tokens that are real, counted without a device.
"""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.pod_plan import COUNTED, DISTRIBUTIONS, Mesh, row_of, settings_of
from jax_extract.devices.platform import TPU


@pytest.mark.parametrize("samples", [5_000, 50_000])
def test_the_rows_of_256_chips_travel_so_that_none_is_idle_for_long(samples: int) -> None:
    """Where they stay, at most a fifth of the tokens are real: 50,000 samples are 25 parts, on 64 hosts."""
    lengths = DISTRIBUTIONS["gsm8k-like"](np.random.default_rng(0), samples)
    mesh = Mesh.of_tpus(256)
    counted = dict(zip(COUNTED, row_of(lengths, settings_of(TPU, mesh), mesh), strict=True))
    assert float(counted["real"].rstrip("%")) > 90
