"""Rows that wait on the devices: a buffer of slots on each, filled from captures and drawn from in any order.

In: captures as the forward leaves them, which of their rows are real, slots. Out: batches [b, layers, width] of any
rows of any device, shared out over all of them. Which row is where, and when it comes, the host decides (`stream`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_extract.devices.mesh import BATCH_AXES
from jax_extract.devices.sharding import BATCH_SPEC, CAPTURE_SPEC, named
from jax_extract.store.parts import Site
from models.capture_plan import CapturePlan


class Ring:
    """Attributes:
    slots: of each device.
    """

    def __init__(self, plan: CapturePlan, sites: Sequence[Site], mesh: Mesh, slots: int) -> None:
        self.mesh, self.slots = mesh, slots
        self._sites = tuple(sites)
        self._places = tuple((site.hook, plan.slot(*site.key)) for site in sites)
        self._sharded = named(mesh, BATCH_SPEC)
        shape = (mesh.size * slots, len(sites), sites[0].width)
        self._rows = jax.jit(partial(jnp.zeros, shape, jnp.float32), out_shardings=self._sharded)()
        self._put = jax.jit(
            self._on_mesh(self._put_on_device, (BATCH_SPEC, CAPTURE_SPEC, BATCH_SPEC, BATCH_SPEC), BATCH_SPEC, 2),
            donate_argnums=0,
        )
        self._draw = jax.jit(self._on_mesh(self._draw_on_device, (BATCH_SPEC, P(), P()), BATCH_SPEC, 1))

    def put(self, captured: Mapping[str, Array], rows: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Takes rows of captures; returns their squared norms, float32 [devices, n, layers], and waits for that.

        Args:
          captured: hook point -> [slots, devices * rows, positions, width].
          rows: int32 [devices, n], which of the rows * positions of its device each one is.
          slots: int32 [devices, n], where it goes; what has a slot beyond the last goes nowhere.
        """
        given = tuple(captured[hook] for hook in dict.fromkeys(hook for hook, _ in self._places))
        where, to = (jax.device_put(each.reshape(-1), self._sharded) for each in (rows, slots))
        self._rows, squares = self._put(self._rows, given, where, to)
        return np.asarray(squares).reshape(*rows.shape, len(self._sites))

    def draw(self, devices: np.ndarray, slots: np.ndarray) -> Array:
        """float32 [b, layers, width], shared out over all devices, of rows in slots int32 [b] of devices int32 [b]."""
        return self._draw(self._rows, devices, slots)

    def _on_mesh(self, body: Any, given: Any, gives: Any, results: int) -> Any:
        out = (gives,) * results if results > 1 else gives
        return jax.shard_map(body, mesh=self.mesh, in_specs=given, out_specs=out, check_vma=False)

    def _put_on_device(self, ring: Array, captured: tuple[Array, ...], where: Array, to: Array) -> tuple[Array, Array]:
        hooks = list(dict.fromkeys(hook for hook, _ in self._places))
        layers = []
        for hook, slot in self._places:
            rows = captured[hooks.index(hook)][slot]
            layers.append(jnp.take(rows.reshape(-1, rows.shape[-1]), where, axis=0).astype(jnp.float32))
        found = jnp.stack(layers, axis=1)
        return ring.at[to].set(found, mode="drop"), jnp.sum(jnp.square(found), axis=2)

    def _draw_on_device(self, ring: Array, devices: Array, slots: Array) -> Array:
        mine = devices == jax.lax.axis_index(BATCH_AXES)
        found = jnp.where(mine[:, None, None], jnp.take(ring, jnp.where(mine, slots, 0), axis=0), 0)
        # Of each row all devices but one have zeros, so that sums are the row, to the last bit.
        return jax.lax.psum_scatter(found, BATCH_AXES, scatter_dimension=0, tiled=True)
