"""How parameters and batches lie on the mesh; the one place that decides it.

In: parameter shapes, a mesh and a layout (`planner` chooses it). Out: partition specs, and the `gather` that a
forward calls. The batch is sharded over both axes, so every device computes other rows whatever the head count, no
reduction crosses devices, and a row's arithmetic depends neither on the mesh nor on the layout. Matrices are stored
whole, or cut on their output axis and gathered when their layer runs; vectors are replicated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_extract.devices.mesh import BATCH_AXES, DATA, MODEL
from models.ports import Gather

STACKED = "blocks"  # parameters below this name have a leading layer axis

BATCH_SPEC = P(BATCH_AXES)
CAPTURE_SPEC = P(None, BATCH_AXES)  # [slots, batch, rows, width]


class Layout(Enum):
    """Over which mesh axes a matrix is cut for storage; every layout gives the same rows."""

    REPLICATED = "replicated"
    GATHERED = "gathered"  # over `model`
    GATHERED_BOTH = "gathered_both"  # over `data` and `model`

    @property
    def axes(self) -> tuple[str, ...]:
        return {Layout.REPLICATED: (), Layout.GATHERED: (MODEL,), Layout.GATHERED_BOTH: (DATA, MODEL)}[self]


def parameter_specs(structure: dict[str, Any], mesh: Mesh, layout: Layout = Layout.GATHERED) -> dict[str, Any]:
    """The specs of a nested dictionary of shaped values, nested alike."""

    def spec(path: tuple[Any, ...], value: Any) -> P:
        output_axis = 1 if dotted(path).startswith(STACKED + ".") else 0
        is_matrix = len(value.shape) == output_axis + 2
        axes = list(cut_over(value.shape[output_axis], layout, mesh.shape)) if is_matrix else []
        return P(*(None,) * output_axis, tuple(axes) if len(axes) > 1 else axes[0]) if axes else P()

    return jax.tree_util.tree_map_with_path(spec, structure)


def cut_over(outputs: int, layout: Layout, places: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes over which a matrix with so many outputs is cut, of axes with so many places; none: it stays whole.

    A matrix that the layout's axes together do not divide is cut over `model` alone, and one that neither divides
    is whole.
    """
    for axes in (layout.axes, layout.axes[-1:]):
        pieces = math.prod(places[axis] for axis in axes)
        if pieces > 1 and outputs % pieces == 0:
            return axes
    return ()


def named(mesh: Mesh, spec: P) -> NamedSharding:
    return NamedSharding(mesh, spec)


def dotted(path: tuple[Any, ...]) -> str:
    """A JAX key path as `blocks.qkv`."""
    return ".".join(str(key.key) for key in path)


def make_gather(specs: dict[str, Any]) -> Gather:
    """(path, local shards) -> whole arrays, inside `shard_map`; a layer of `blocks` has lost its layer axis."""
    flat = {dotted(path): spec for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=_is_spec)}

    def gather(prefix: str, shards: Any) -> Any:
        def whole(path: tuple[Any, ...], shard: jax.Array) -> jax.Array:
            spec = flat[".".join(filter(None, (prefix, dotted(path))))]
            for axis, mesh_axes in enumerate(spec):
                if mesh_axes is not None:
                    return jax.lax.all_gather(shard, mesh_axes, axis=axis - (prefix == STACKED), tiled=True)
            return shard

        return jax.tree_util.tree_map_with_path(whole, shards)

    return gather


def _is_spec(value: Any) -> bool:
    return isinstance(value, P)
