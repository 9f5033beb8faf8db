"""Checkpoint tensors to sharded parameters, straight onto their devices.

In: a `Checkpoint`, a port and its configuration, how many blocks run, a mesh, a dtype. Out: the
nested dictionary of arrays that the port's forward takes. Each device's shard is read from disk by
itself, so the host never holds more than one parameter beside what the devices hold, and nothing of
a block that will not run is read. Anything missing, misshapen or not understood is refused by name.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jax_extract.devices.sharding import Layout, dotted, named, parameter_specs
from jax_extract.errors import UserError
from jax_extract.weights.checkpoint import Checkpoint
from models.errors import NotComputedHere
from models.ports import Parameters, Port, TensorSource

_ALIGNMENT = 64
_MOST_READERS = 8  # each holds one layer of one parameter beside what the devices hold


class Weights:
    """The tensors of one checkpoint that a run needs, checked against the port before anything is read."""

    def __init__(self, checkpoint: Checkpoint, port: Port, config: Any, num_blocks: int, head: bool = False) -> None:
        """With `head`, those of the language-model head too."""
        self.checkpoint = checkpoint
        self.num_blocks = num_blocks
        self._port = port
        self._config = config
        self._head = head
        self._names = _stored_names(checkpoint, port, config, head)
        wanted = {dotted(path) for path, _ in jax.tree_util.tree_leaves_with_path(self.structure("float32"))}
        self._sources = {path: source for path, source in port.sources(config).items() if path in wanted}

    def tensor_names(self) -> list[str]:
        """Stored names of the tensors that will be loaded."""
        return [
            self._names[name.replace("{i}", str(layer))]
            for source in self._sources.values()
            for name in source.names
            for layer in (range(self.num_blocks) if source.per_layer else (0,))
        ]

    def provenance(self) -> str:
        """`hub:<commit>` where the hub vouches for the content, else a checksum of the tensors loaded."""
        if self.checkpoint.revision and not self.checkpoint.adapter:
            return f"hub:{self.checkpoint.revision}"
        return self.checkpoint.digest(self.tensor_names())

    def structure(self, dtype: str) -> Parameters:
        """The parameters as shapes."""
        return parameter_shapes(self._port, self._config, self.num_blocks, dtype, self._head)

    def shapes(self, mesh: Mesh, dtype: str, layout: Layout = Layout.GATHERED) -> Parameters:
        """What `load` gives, without values: enough to compile with while the values are read."""
        return laid_out(self.structure(dtype), mesh, layout)

    def load(self, mesh: Mesh, dtype: str, layout: Layout = Layout.GATHERED) -> Parameters:
        """Parameters on the mesh in `dtype`; see `devices.sharding` for how they lie there."""

        def place(path: tuple[Any, ...], value: jax.ShapeDtypeStruct) -> jax.Array:
            return jax.make_array_from_callback(
                value.shape, value.sharding, lambda index: self._read(dotted(path), value.shape, index or (), dtype)
            )

        return jax.tree_util.tree_map_with_path(place, self.shapes(mesh, dtype, layout))

    def _read(self, path: str, shape: tuple[int, ...], index: tuple[slice, ...], dtype: str) -> np.ndarray:
        """The part of a parameter that lies at `index`; only the output axis is ever cut."""
        source = self._sources[path]
        target = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
        axis = 1 if source.per_layer else 0
        start, stop, _ = index[axis].indices(shape[axis])
        piece = _aligned_empty((*shape[:axis], stop - start, *shape[axis + 1 :]), np.dtype(target))
        if not source.per_layer:
            self._fill(piece, source, 0, start, stop)
            return piece
        # Reading, dequantising and casting leave the interpreter to other threads.
        with ThreadPoolExecutor(min(_MOST_READERS, os.cpu_count() or 1)) as readers:
            for _ in readers.map(lambda i: self._fill(piece[i], source, i, start, stop), range(self.num_blocks)):
                pass
        return piece

    def _fill(self, out: np.ndarray, source: TensorSource, layer: int, start: int, stop: int) -> None:
        offset = 0
        for template, rows in zip(source.names, source.rows, strict=True):
            first, last = max(start, offset), min(stop, offset + rows)
            if first < last:
                stored = self._names[template.replace("{i}", str(layer))]
                wanted = slice(first - offset, last - offset)
                if source.transposed:
                    values = self.checkpoint.read(stored)[:, wanted].T
                else:
                    values = self.checkpoint.read(stored, wanted)
                out[first - start : last - start] = values
            offset += rows


def parameter_shapes(port: Port, config: Any, num_blocks: int, dtype: str, head: bool = False) -> Parameters:
    """The parameters of so many blocks, and of what is around them, as shapes; with `head`, those of the head too."""
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: port.structure(config, num_blocks, dtype, head))))


def laid_out(structure: Parameters, mesh: Mesh, layout: Layout) -> Parameters:
    """Shapes with the shardings of a layout."""
    return jax.tree.map(
        lambda value, spec: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=named(mesh, spec)),
        structure,
        parameter_specs(structure, mesh, layout),
    )


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory at a 64-byte boundary, which a CPU device adopts instead of copying it."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def _stored_names(checkpoint: Checkpoint, port: Port, config: Any, head: bool) -> dict[str, str]:
    """Canonical tensor name -> the name in this file; refuses missing, unknown and misshapen tensors."""
    stored = checkpoint.names()
    prefix = port.prefix if any(name.startswith(port.prefix) for name in stored) else ""
    structure = parameter_shapes(port, config, config.num_hidden_layers, "float32", head)
    shapes = {dotted(path): value.shape for path, value in jax.tree_util.tree_leaves_with_path(structure)}
    names: dict[str, str] = {}
    unused = set(port.unused_tensors(config))
    for path, source in port.sources(config).items():
        if path not in shapes:
            unused.update(source.names)
            continue
        for template, rows in zip(source.names, source.rows, strict=True):
            expected = (rows, *shapes[path][2 if source.per_layer else 1 :])
            expected = expected[::-1] if source.transposed else expected
            for layer in range(config.num_hidden_layers) if source.per_layer else (0,):
                name = template.replace("{i}", str(layer))
                names[name] = prefix + name.removeprefix(port.prefix) if name.startswith(port.prefix) else name
                if names[name] not in stored:
                    raise UserError(
                        f"the weights of {checkpoint.source} lack {names[name]!r}; the checkpoint is incomplete"
                    )
                if (shape := checkpoint.shape(names[name])) != expected:
                    raise UserError(
                        f"{names[name]!r} in {checkpoint.source} has shape {shape} where config.json means {expected}; "
                        "weights and configuration do not belong together"
                    )
    ignored = unused | {prefix + name.removeprefix(port.prefix) for name in unused}
    if unknown := sorted(stored - set(names.values()) - ignored):
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise NotComputedHere(
            f"the weights of {checkpoint.source} hold {unknown[0]!r}{more}, which the {config.model_type} port does "
            "not compute with; this is another architecture or a modified one"
        )
    return names
