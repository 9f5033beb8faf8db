"""The compiled forward with taps: token ids in, captured activations out, one program a slab shape.

In: a port, its configuration and parameters on a mesh, a capture plan. Out: per hook point a global
array [slots, devices * rows, positions, width], sharded over all devices on its second axis. The body
is written per device (`shard_map`): each computes its own slab, and only parameters cross devices. On
several hosts each hands in the slabs of its own devices and reads their captures alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jax_extract.devices.mesh import platform_of
from jax_extract.devices.sharding import BATCH_SPEC, CAPTURE_SPEC, make_gather, named
from jax_extract.inputs.planning.slabs import SlabShape
from jax_extract.store.writer import Blocks
from models.hooks import HOOK_POINTS, CapturePlan, Taps, slots
from models.layers import Numerics
from models.packing import Packing
from models.ports import ModelConfig, Parameters, Port, hook_width
from models.self_attention import WithinRows


class CaptureProgram:
    """Runs slabs. Compiles once a slab shape; parameters are always arguments, never constants.

    Attributes:
      hosts, host: how many processes the mesh spans, and which of them this one is.
      devices_of_host: this process's devices in the mesh.
    """

    def __init__(
        self,
        port: Port,
        config: ModelConfig,
        params: Parameters,
        plan: CapturePlan,
        mesh: Mesh,
        numerics: Numerics,
    ) -> None:
        self.mesh = mesh
        self.plan = plan
        self._params = params
        owners = [device.process_index for device in mesh.devices.flat]
        self.hosts = len(set(owners))
        self.host = sorted(set(owners)).index(jax.process_index())
        # A block of rows of the batch belongs to a place in the mesh; ours are numbered in that order.
        self._places = {place: i for i, place in enumerate(i for i, p in enumerate(owners) if p == jax.process_index())}
        self.devices_of_host = len(self._places)
        self.rows_travel = False
        self._config = config
        self._batch_sharding = named(mesh, BATCH_SPEC)
        specs = jax.tree.map(lambda parameter: parameter.sharding.spec, params)
        self._jit = capture_function(port, config, plan, mesh, numerics, specs)
        self._compiled: dict[SlabShape, jax.stages.Compiled] = {}
        self._ahead: dict[SlabShape, Future[jax.stages.Compiled]] = {}

    @property
    def devices(self) -> int:
        return self.mesh.size

    def compiled(self, shape: SlabShape) -> jax.stages.Compiled:
        """The executable for slabs of this shape on every device."""
        if shape not in self._compiled:
            ahead = self._ahead.pop(shape, None)
            self._compiled[shape] = ahead.result() if ahead else self._compile(shape)
        return self._compiled[shape]

    @contextmanager
    def compiling(self, shape: SlabShape | None) -> Iterator[None]:
        """Inside, the executable for this shape is made beside what else is done, such as reading the parameters."""
        if shape is None:
            yield
            return
        with ThreadPoolExecutor(1) as beside:
            self._ahead[shape] = beside.submit(self._compile, shape)
            yield

    def use(self, params: Parameters) -> None:
        """Takes the parameters of a program that was made of their shapes alone."""
        self._params = params

    def _compile(self, shape: SlabShape) -> jax.stages.Compiled:
        return self._jit.lower(self._params, *slab_inputs(self.mesh, shape)).compile()

    def bytes_on_host(self, shape: SlabShape) -> int:
        """What the captures of one step take in this host's memory."""
        return self.devices_of_host * captured_bytes(self.plan, self._config, shape, platform_of(self.mesh))

    def run(self, tokens: np.ndarray, lengths: np.ndarray) -> dict[str, Array]:
        """Starts a step and the way of its captures to the host; returns at once.

        Args:
          tokens: int32 [devices_of_host * rows, length]; its i-th device gets the i-th block of rows.
          lengths: int32 [devices_of_host * rows, samples], real tokens of the samples that lie in each row, one
            behind the other; 0 where there is none.

        Returns:
          Hook point -> [slots, devices * rows, positions, width]; slots beyond the wanted layers are spare.
        """
        rows = tokens.shape[0] // self.devices_of_host
        execute = self.compiled(SlabShape(tokens.shape[1], rows, lengths.shape[1]))
        captured = execute(self._params, self._put(tokens, rows), self._put(lengths, rows))
        for array in captured.values():
            array.copy_to_host_async()
        return captured

    def on_host(self, captured: Mapping[str, Array]) -> list[list[Blocks]]:
        """The captures of this host's devices, in their order: site -> [rows, positions, width]."""
        blocks: list[dict[tuple[str, int | None], np.ndarray]] = [{} for _ in range(self.devices_of_host)]
        for hook, layers in self.plan.layers:
            shards = sorted(captured[hook].addressable_shards, key=lambda shard: shard.index[1].start or 0)
            for device, shard in enumerate(shards):
                data = np.asarray(shard.data)
                for slot, layer in enumerate(layers or (None,)):
                    blocks[device][hook, layer] = data[slot]
        return [list(blocks) if host == self.host else [] for host in range(self.hosts)]

    def _put(self, local: np.ndarray, rows: int) -> Array:
        """This host's blocks of rows as its share of the array on the whole mesh."""

        def block(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            place = self._places[(index[0].start or 0) // rows]
            return local[place * rows : (place + 1) * rows]

        return jax.make_array_from_callback((self.devices * rows, *local.shape[1:]), self._batch_sharding, block)


def slab_inputs(mesh: Mesh, shape: SlabShape) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Token ids and lengths of a slab of this shape on every device, without values."""
    rows, sharding = mesh.size * shape.rows, named(mesh, BATCH_SPEC)
    tokens = jax.ShapeDtypeStruct((rows, shape.length), np.int32, sharding=sharding)
    return tokens, jax.ShapeDtypeStruct((rows, shape.samples), np.int32, sharding=sharding)


def captured_bytes(plan: CapturePlan, config: ModelConfig, shape: SlabShape, platform: str) -> int:
    """Bytes of the captures of one slab of one device, as they reach the host."""
    itemsize = np.dtype(ml_dtypes.bfloat16 if plan.dtype == "bfloat16" else plan.dtype).itemsize
    num_blocks = plan.blocks_needed(config.num_hidden_layers)
    values = sum(
        (slots(layers, num_blocks) if _keeps_spare(platform) else max(1, len(layers)))
        * hook_width(config, HOOK_POINTS[hook].width)
        for hook, layers in plan.layers
    )
    return values * shape.rows * plan.positions.slots(shape.length, shape.samples) * itemsize


def _keeps_spare(platform: str) -> bool:
    """On CPU a slot that absorbs unwanted layers comes along: cutting it off would copy everything else."""
    return platform == "cpu"


def capture_function(
    port: Port,
    config: ModelConfig,
    plan: CapturePlan,
    mesh: Mesh,
    numerics: Numerics,
    specs: Mapping[str, Any],
) -> Any:
    """The jitted (params, tokens, lengths) -> captures, before compilation."""
    num_blocks = plan.blocks_needed(config.num_hidden_layers)
    widths = {hook: hook_width(config, HOOK_POINTS[hook].width) for hook, _ in plan.layers}
    gather = make_gather(dict(specs))
    keeps_spare = _keeps_spare(platform_of(mesh))

    def one_device(params: Parameters, tokens: Array, lengths: Array) -> dict[str, Array]:
        packing = Packing(lengths, tokens.shape[1])
        taps = Taps.start(plan, num_blocks, packing, widths)
        taps, _ = port.forward(config, params, tokens, taps, WithinRows(packing.positions), numerics, gather)
        buffers = taps.buffers
        if keeps_spare:
            return buffers
        return {hook: buffers[hook][: max(1, len(layers))] for hook, layers in plan.layers}

    return jax.jit(
        jax.shard_map(
            one_device,
            mesh=mesh,
            in_specs=(specs, BATCH_SPEC, BATCH_SPEC),
            out_specs=CAPTURE_SPEC,
            check_vma=False,  # the gathered parameters are equal on all devices, which it cannot see
        )
    )
