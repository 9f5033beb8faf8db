"""The compiled forward with taps: token ids in, captured activations out, one program a slab shape.

In: a port, its configuration and parameters on a mesh, a capture plan. Out: per hook point a global
array [slots, devices * rows, positions, width], sharded over all devices on its second axis. The body
is written per device (`shard_map`): each computes its own slab, and only parameters cross devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jax_extract.devices.sharding import BATCH_SPEC, CAPTURE_SPEC, make_gather, named, parameter_specs
from models.hooks import HOOK_POINTS, CapturePlan, Taps
from models.layers import Numerics
from models.ports import ModelConfig, Parameters, Port, hook_width


class CaptureProgram:
    """Runs slabs. Compiles once a slab shape; parameters are always arguments, never constants."""

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
        self._batch_sharding = named(mesh, BATCH_SPEC)
        self._jit = capture_function(port, config, plan, mesh, numerics, parameter_specs(params, mesh))
        self._compiled: dict[tuple[int, ...], Any] = {}

    @property
    def devices(self) -> int:
        return self.mesh.size

    def compiled(self, rows: int, length: int) -> jax.stages.Compiled:
        """The executable for slabs of `rows` x `length` tokens on every device."""
        shape = (self.devices * rows, length)
        if shape not in self._compiled:
            tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=self._batch_sharding)
            lengths = jax.ShapeDtypeStruct(shape[:1], np.int32, sharding=self._batch_sharding)
            self._compiled[shape] = self._jit.lower(self._params, tokens, lengths).compile()
        return self._compiled[shape]

    def run(self, tokens: np.ndarray, lengths: np.ndarray) -> dict[str, Array]:
        """Starts a step; returns at once.

        Args:
          tokens: int32 [devices * rows, length], right-padded; device i gets the i-th block of rows.
          lengths: int32 [devices * rows], real tokens of each row, at least 1 (dummy rows have 1).

        Returns:
          Hook point -> [slots, devices * rows, positions, width]; slots beyond the wanted layers are spare.
        """
        execute = self.compiled(tokens.shape[0] // self.devices, tokens.shape[1])
        put = partial(jax.device_put, device=self._batch_sharding)
        return execute(self._params, put(tokens), put(lengths))


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
    keeps_spare = jax.default_backend() == "cpu"

    def one_device(params: Parameters, tokens: Array, lengths: Array) -> dict[str, Array]:
        taps = Taps.start(plan, num_blocks, lengths, tokens.shape[1], widths)
        buffers = port.forward(config, params, tokens, taps, numerics, gather).buffers
        if keeps_spare:  # host memory is device memory: dropping the spare slot would copy everything else
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
