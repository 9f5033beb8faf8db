"""Rows that wait on the devices: a buffer of slots on each, filled from captures and drawn from in any order.

In: captures as the forward leaves them, which of their rows are real, slots. Out: batches [b, layers, width] of any
rows of any device, shared out over all of them. Which row is where, and when it comes, the host decides (`stream`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

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
        self.slots, self._layers = slots, len(sites)
        self._sharded = named(mesh, BATCH_SPEC)
        shape = (mesh.size * slots, len(sites), sites[0].width)
        self._rows = jax.jit(partial(jnp.zeros, shape, jnp.float32), out_shardings=self._sharded)()
        self._programs = RingPrograms(plan, sites, mesh)

    def put(self, captured: Mapping[str, Array], rows: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Takes rows of captures; returns their squared norms, float32 [devices, n, layers], and waits for that.

        Args:
          captured: hook point -> [slots, devices * rows, positions, width].
          rows: int32 [devices, n], which of the rows * positions of its device each one is.
          slots: int32 [devices, n], where it goes; what has a slot beyond the last goes nowhere.
        """
        where, to = (jax.device_put(each.reshape(-1), self._sharded) for each in (rows, slots))
        given = tuple(captured[hook] for hook in self._programs.hooks)
        self._rows, squares = self._programs.put(self._rows, given, where, to)
        return np.asarray(squares).reshape(*rows.shape, self._layers)

    def draw(self, devices: np.ndarray, slots: np.ndarray) -> Array:
        """float32 [b, layers, width], shared out over all devices, of rows in slots int32 [b] of devices int32 [b]."""
        return self._programs.draw(self._rows, devices, slots)


class RingPrograms:
    """The compiled ones.

    Attributes:
      hooks: whose captures `put` takes, in this order.
      put: (ring, captures, rows, slots) -> ring, squared norms; see `Ring.put`. No row crosses devices.
      draw: (ring, devices, slots) -> batch; see `Ring.draw`. The batch crosses them once.
    """

    def __init__(self, plan: CapturePlan, sites: Sequence[Site], mesh: Mesh) -> None:
        self._places = tuple((site.hook, plan.slot(*site.key)) for site in sites)
        self.hooks = tuple(dict.fromkeys(hook for hook, _ in self._places))
        of_captures = (BATCH_SPEC, CAPTURE_SPEC, BATCH_SPEC, BATCH_SPEC)
        self.put = jax.jit(
            jax.shard_map(self._put, mesh=mesh, in_specs=of_captures, out_specs=(BATCH_SPEC,) * 2, check_vma=False),
            donate_argnums=0,
        )
        self.draw = jax.jit(
            jax.shard_map(self._draw, mesh=mesh, in_specs=(BATCH_SPEC, P(), P()), out_specs=BATCH_SPEC, check_vma=False)
        )

    def _put(self, ring: Array, captured: tuple[Array, ...], where: Array, to: Array) -> tuple[Array, Array]:
        layers = []
        for hook, slot in self._places:
            rows = captured[self.hooks.index(hook)][slot]
            layers.append(jnp.take(rows.reshape(-1, rows.shape[-1]), where, axis=0).astype(jnp.float32))
        found = jnp.stack(layers, axis=1)
        return ring.at[to].set(found, mode="drop"), jnp.sum(jnp.square(found), axis=2)

    def _draw(self, ring: Array, devices: Array, slots: Array) -> Array:
        mine = devices == jax.lax.axis_index(BATCH_AXES)
        found = jnp.where(mine[:, None, None], jnp.take(ring, jnp.where(mine, slots, 0), axis=0), 0)
        # Of each row all devices but one have zeros, so that sums are the row, to the last bit.
        return jax.lax.psum_scatter(found, BATCH_AXES, scatter_dimension=0, tiled=True)
