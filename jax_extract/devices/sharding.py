"""How parameters and batches lie on the mesh; the one place that decides it.

In: parameter shapes and a mesh. Out: partition specs, and the `gather` that a forward calls.
The batch is sharded over both axes, so every device computes other rows whatever the head count, no
reduction crosses devices, and a row's arithmetic does not depend on the mesh. Matrices are stored
sharded over `model` on their output axis and gathered when their layer runs; vectors are replicated.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_extract.devices.mesh import BATCH_AXES, MODEL
from models.ports import Gather

STACKED = "blocks"  # parameters below this name have a leading layer axis

BATCH_SPEC = P(BATCH_AXES)
CAPTURE_SPEC = P(None, BATCH_AXES)  # [slots, batch, rows, width]


def parameter_spec(path: str, shape: tuple[int, ...], model_size: int) -> P:
    """Storage of one parameter, by its dotted path and whole shape."""
    output_axis = 1 if path.startswith(STACKED + ".") else 0
    is_matrix = len(shape) == output_axis + 2
    if model_size == 1 or not is_matrix or shape[output_axis] % model_size:
        return P()
    return P(*(None,) * output_axis, MODEL)


def parameter_specs(structure: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The specs of a nested dictionary of shaped values, nested alike."""
    size = mesh.shape[MODEL]
    return jax.tree_util.tree_map_with_path(lambda path, p: parameter_spec(dotted(path), p.shape, size), structure)


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
            if MODEL not in spec:
                return shard
            axis = tuple(spec).index(MODEL) - (prefix == STACKED)
            return jax.lax.all_gather(shard, MODEL, axis=axis, tiled=True)

        return jax.tree_util.tree_map_with_path(whole, shards)

    return gather


def _is_spec(value: Any) -> bool:
    return isinstance(value, P)
