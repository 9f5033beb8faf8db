"""The compiled forward with taps: token ids in, captured activations out, one program a slab shape.

In: a port, its configuration and parameters on a mesh, a capture plan. Out: per hook point a global
array [slots, devices * rows, positions, width], sharded over all devices on its second axis. The body
is written per device (`shard_map`): each computes its own slab, and only parameters cross devices. On
several hosts each hands in the slabs of its own devices and reads their captures alone; where rows travel, every
device is given the captures of all of them, so that a host can store rows that another one computed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_extract.devices.memory import require_room
from jax_extract.devices.mesh import BATCH_AXES, platform_of
from jax_extract.devices.platform import platform_defaults
from jax_extract.devices.sharding import BATCH_SPEC, CAPTURE_SPEC, make_gather, named
from jax_extract.forward.edits import Edits, Placed
from jax_extract.forward.program import specs_of
from jax_extract.inputs.planning.slabs import SlabShape
from jax_extract.store.writer import Blocks
from models.capture_plan import CapturePlan
from models.decoder import Decoder
from models.interventions import Intervention
from models.layers import Numerics
from models.packing import Packing
from models.ports import ModelConfig, Parameters, Port, hook_width
from models.positions import Positions
from models.taps import slots

# A step: some hundredths of a second on the links of a pod, a tenth on the way into a host. Where rows stay, few parts
# leave most of many hosts idle, which costs more.
MOST_TRAVELLING_BYTES = 1_000_000_000


class CaptureProgram:
    """Runs slabs. Compiles once a slab shape; parameters are always arguments, never constants.

    Attributes:
      hosts, host: how many processes the mesh spans, and which of them this one is.
      devices_of_host: this process's devices in the mesh.
      rows_travel: whether every device is given the captures of all.
    """

    def __init__(
        self,
        port: Port,
        config: ModelConfig,
        params: Parameters,
        plan: CapturePlan,
        mesh: Mesh,
        numerics: Numerics,
        rows_travel: bool = False,
        edits: Edits | None = None,
    ) -> None:
        self.mesh = mesh
        self.plan = plan
        self.rows_travel = rows_travel
        self.edits = edits
        self._params = params
        owners = [device.process_index for device in mesh.devices.flat]
        self.hosts = len(set(owners))
        self.host = sorted(set(owners)).index(jax.process_index())
        # A block of rows of the batch belongs to a place in the mesh; ours are numbered in that order.
        self._places = {place: i for i, place in enumerate(i for i, p in enumerate(owners) if p == jax.process_index())}
        self.devices_of_host = len(self._places)
        self._by_host = np.argsort(owners, kind="stable")
        self._config = config
        self._batch_sharding = named(mesh, BATCH_SPEC)
        specs = jax.tree.map(lambda parameter: parameter.sharding.spec, params)
        changes = edits.interventions((), (self.devices, 1), self.devices) if edits else ()
        self._jit = capture_function(port, config, plan, mesh, numerics, specs, rows_travel, changes)
        self._compiled: dict[SlabShape, jax.stages.Compiled] = {}
        self._ahead: dict[SlabShape, Future[jax.stages.Compiled]] = {}
        self._beside: ThreadPoolExecutor | None = None

    @property
    def devices(self) -> int:
        return self.mesh.size

    def compiled(self, shape: SlabShape) -> jax.stages.Compiled:
        """The executable for slabs of this shape on every device; UserError where a step has too little memory."""
        if shape not in self._compiled:
            ahead = self._ahead.pop(shape, None)
            compiled = ahead.result() if ahead else self._compile(shape)
            require_room(
                compiled, shape.tokens, [d for d in self.mesh.devices.flat if d.process_index == jax.process_index()]
            )
            self._compiled[shape] = compiled
        return self._compiled[shape]

    @contextmanager
    def compiling(self, shapes: Sequence[SlabShape]) -> Iterator[None]:
        """Inside, executables are made beside what else is done, as reading parameters; at its end the first is there.

        The others come at the same time, or when they are needed: `PlatformDefaults.compiles_at_once`.
        """
        if not platform_defaults().compiles_at_once:
            shapes = shapes[:1]
        if not shapes:
            yield
            return
        self._beside = ThreadPoolExecutor(min(len(shapes), os.cpu_count() or 1), "jax_extract-compile")
        try:
            self._ahead |= {shape: self._beside.submit(self._compile, shape) for shape in shapes}
            yield
            wait([self._ahead[shapes[0]]])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """What is not being compiled yet never is: this process need not wait for it when it ends."""
        if self._beside is not None:
            self._beside.shutdown(wait=False, cancel_futures=True)

    def use(self, params: Parameters) -> None:
        """Takes the parameters of a program that was made of their shapes alone."""
        self._params = params

    def _compile(self, shape: SlabShape) -> jax.stages.Compiled:
        return self._jit.lower(self._params, *slab_inputs(self.mesh, shape), self._changes(shape)).compile()

    def _changes(self, shape: SlabShape) -> tuple[Intervention, ...]:
        """Interventions of a step, without values."""
        if not self.edits:
            return ()
        rows = self.devices * shape.rows
        found = self.edits.interventions((), (rows, shape.length), self.devices, shape.samples)

        def without_values(leaf: Any, spec: P) -> jax.ShapeDtypeStruct:
            leaf = np.asarray(leaf)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named(self.mesh, spec))

        return jax.tree.map(without_values, found, tuple(map(specs_of, found)))

    def bytes_on_host(self, shape: SlabShape) -> int:
        """What the captures of one step take in this host's memory."""
        devices = self.devices if self.rows_travel else self.devices_of_host
        return devices * captured_bytes(self.plan, self._config, shape, platform_of(self.mesh), self.rows_travel)

    def run(self, tokens: np.ndarray, lengths: np.ndarray, placed: Iterable[Placed] = ()) -> dict[str, Array]:
        """Starts a step and the way of its captures to the host, and returns at once; see `start`."""
        captured = self.start(tokens, lengths, placed)
        for array in captured.values():
            for shard in self._wanted(array):
                shard.copy_to_host_async()
        return captured

    def start(self, tokens: np.ndarray, lengths: np.ndarray, placed: Iterable[Placed] = ()) -> dict[str, Array]:
        """Starts a step whose captures stay on the devices; returns at once.

        Args:
          tokens: int32 [devices_of_host * rows, length]; its i-th device gets the i-th block of rows.
          lengths: int32 [devices_of_host * rows, samples], real tokens of the samples that lie in each row, one
            behind the other; 0 where there is none.
          placed: where samples lie, for the edits.

        Returns:
          Hook point -> [slots, devices * rows, positions, width]; slots beyond the wanted layers are spare.
          Where rows travel, every device has the whole of it.
        """
        rows = tokens.shape[0] // self.devices_of_host
        execute = self.compiled(SlabShape(tokens.shape[1], rows, lengths.shape[1]))
        changes = self._put_changes(placed, tokens.shape, lengths.shape[1])
        return execute(self._params, self._put(tokens, rows), self._put(lengths, rows), changes)

    def on_host(self, captured: Mapping[str, Array]) -> list[Blocks]:
        """Of each device of this host, in their order, site -> [rows, positions, width].

        Where rows travel, of all devices: those of the first host, then those of the second, and so on.
        """
        devices = self.devices if self.rows_travel else self.devices_of_host
        blocks: list[dict[tuple[str, int | None], np.ndarray]] = [{} for _ in range(devices)]
        for hook, layers in self.plan.layers:
            data = [np.asarray(shard) for shard in self._wanted(captured[hook])]
            if self.rows_travel:
                of_devices = np.split(data[0], devices, axis=1)
                data = [of_devices[place] for place in self._by_host]
            for block, of_device in zip(blocks, data, strict=True):
                for slot, layer in enumerate(layers or (None,)):
                    block[hook, layer] = of_device[slot]
        return list(blocks)

    def _wanted(self, array: Array) -> list[Array]:
        """What of captures is brought to the host: a part of each of its devices, or all, which each of them has."""
        if self.rows_travel:
            return [array.addressable_shards[0].data]
        shards = sorted(array.addressable_shards, key=lambda shard: shard.index[1].start or 0)
        return [shard.data for shard in shards]

    def _put_changes(self, placed: Iterable[Placed], shape: tuple[int, int], samples: int) -> tuple[Intervention, ...]:
        """This host's interventions as its share of those on the whole mesh."""
        if not self.edits:
            return ()
        found = self.edits.interventions(placed, shape, self.devices_of_host, samples)

        def put(leaf: Any, spec: P) -> Array:
            leaf = np.asarray(leaf)
            if spec == BATCH_SPEC:
                return self._put(leaf, len(leaf) // self.devices_of_host)
            return jax.make_array_from_callback(leaf.shape, named(self.mesh, spec), lambda index: leaf[index or ()])

        return jax.tree.map(put, found, tuple(map(specs_of, found)))

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


def captured_bytes(
    plan: CapturePlan, config: ModelConfig, shape: SlabShape, platform: str, rows_travel: bool = False
) -> int:
    """Bytes of the captures of one slab of one device, as they reach a host."""
    itemsize = np.dtype(ml_dtypes.bfloat16 if plan.dtype == "bfloat16" else plan.dtype).itemsize
    num_blocks = plan.blocks_needed(config.num_hidden_layers)
    keeps_spare = _keeps_spare(platform, rows_travel)
    values = sum(
        (slots(layers, num_blocks) if keeps_spare else max(1, len(layers)))
        * hook_width(config, hook, plan.pattern_tokens)
        for hook, layers in plan.layers
    )
    return values * shape.rows * plan.positions.slots(shape.length, shape.samples) * itemsize


def rows_travel(positions: Positions, step_bytes: int) -> bool:
    """Whether rows of these positions are few enough to bring those of every device to every host.

    Args:
      step_bytes: of all captures of one step of all devices, at most.
    """
    return positions.kind in ("last", "mean", "first", "at") and step_bytes <= MOST_TRAVELLING_BYTES


def _keeps_spare(platform: str, rows_travel: bool) -> bool:
    """On CPU a slot that absorbs unwanted layers comes along: cutting it off would copy everything else."""
    return platform == "cpu" and not rows_travel


def capture_function(
    port: Port,
    config: ModelConfig,
    plan: CapturePlan,
    mesh: Mesh,
    numerics: Numerics,
    specs: Mapping[str, Any],
    rows_travel: bool = False,
    changes: tuple[Intervention, ...] = (),
) -> Any:
    """The jitted (params, tokens, lengths, interventions) -> captures, before compilation.

    Where rows travel, captures are whole on each device. `changes` are interventions of the kinds that it will get.
    """
    decoder = Decoder(port, config, numerics, make_gather(dict(specs)))
    keeps_spare = _keeps_spare(platform_of(mesh), rows_travel)

    def one_device(
        params: Parameters, tokens: Array, lengths: Array, interventions: tuple[Intervention, ...]
    ) -> dict[str, Array]:
        buffers = decoder.capture(params, tokens, Packing(lengths, tokens.shape[1]), plan, interventions)
        if keeps_spare:
            return buffers
        buffers = {hook: buffers[hook][: max(1, len(layers))] for hook, layers in plan.layers}
        if rows_travel:
            buffers = {
                hook: jax.lax.all_gather(buffer, BATCH_AXES, axis=1, tiled=True) for hook, buffer in buffers.items()
            }
        return buffers

    return jax.jit(
        jax.shard_map(
            one_device,
            mesh=mesh,
            in_specs=(specs, BATCH_SPEC, BATCH_SPEC, tuple(map(specs_of, changes))),
            out_specs=P() if rows_travel else CAPTURE_SPEC,
            check_vma=False,  # what was gathered is equal on all devices, which it cannot see
        )
    )
