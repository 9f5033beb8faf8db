"""The JAX backend: a mesh of devices, and how products are computed on them.

In: `--mesh_shape` and `--dtype`. Out: a `JaxBackend`, which makes the compiled program of a job.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import jax
import numpy as np
from jax.sharding import Mesh

from jax_extract.devices.chips import CHIPS
from jax_extract.devices.exhaustion import refusing_exhaustion
from jax_extract.devices.memory import require_parameters
from jax_extract.devices.mesh import BATCH_AXES, make_mesh, parse_mesh_shape, platform_of
from jax_extract.devices.planner import Decision, ModelCounts, Request, choose_layout
from jax_extract.devices.platform import PlatformDefaults, device_kind, platform_defaults
from jax_extract.devices.sharding import Layout
from jax_extract.errors import UserError
from jax_extract.extraction.backend import Say, holds_several_a_row, silent
from jax_extract.extraction.cost import pair_work
from jax_extract.extraction.program import CaptureProgram, captured_bytes, rows_travel
from jax_extract.forward.edits import Edits
from jax_extract.inputs.planning.slabs import PlanSettings, SlabShape
from jax_extract.progress import COMPILING
from jax_extract.weights.load import Weights
from jax_extract.weights.open_model import OpenModel
from models.accelerated_attention import LARGEST_BLOCK, attention_backend, attention_block
from models.capture_plan import CapturePlan
from models.config_fields import TORCH_MEND
from models.errors import NotComputedHere
from models.layers import LONGEST_SUM, Numerics
from models.ports import ModelConfig

_SHARE_OF_MEMORY = 0.5  # of a device, that whole parameters may take


def open_mesh(mesh_shape: str | None) -> Mesh:
    return make_mesh(parse_mesh_shape(mesh_shape) if mesh_shape else None)


def compute_numerics(dtype: str | None) -> Numerics:
    return Numerics("bfloat16" if (dtype or platform_defaults().dtype) == "bfloat16" else "float32")


def with_attention(numerics: Numerics, mesh: Mesh, config: ModelConfig, samples_a_row: int = 1) -> Numerics:
    """The same, with what computes attention best on these devices, where so many samples may lie in a row."""
    backend = attention_backend(
        platform_of(mesh),
        numerics,
        head_width=config.head_dim,
        soft_cap=config.attention.soft_cap,
        samples_a_row=samples_a_row,
    )
    return replace(numerics, attention=backend.name)


def numerics_fingerprint(numerics: Numerics) -> dict[str, str]:
    """What decides the bits of a row, besides the plan's slab shapes: equal here means equal bytes."""
    return {
        "dtype": numerics.dtype,
        "accumulation": "float32" + (f", {numerics.longest_sum} terms at most" if numerics.longest_sum else ""),
        "attention": numerics.attention,
        "parameters": "whole when their layer runs, no reduction across devices",
        "device_kind": device_kind(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "numpy": np.__version__,
    }


@dataclass(frozen=True)
class JaxBackend:
    """See `Backend`."""

    mesh: Mesh
    numerics: Numerics

    @classmethod
    def open(cls, mesh_shape: str | None, dtype: str | None) -> JaxBackend:
        """UserError where the mesh is not one of these devices."""
        return cls(open_mesh(mesh_shape), compute_numerics(dtype))

    @property
    def name(self) -> str:
        return "jax"

    @property
    def packages(self) -> tuple[str, ...]:
        return ()

    @property
    def dtype(self) -> str:
        return self.numerics.dtype

    @property
    def defaults(self) -> PlatformDefaults:
        return platform_defaults()

    @property
    def devices(self) -> int:
        return self.mesh.size

    @property
    def devices_of_host(self) -> int:
        return sum(device.process_index == jax.process_index() for device in self.mesh.devices.flat)

    @property
    def device_kind(self) -> str:
        return self.mesh.devices.flat[0].device_kind

    @property
    def mesh_shape(self) -> Mapping[str, int]:
        return dict(self.mesh.shape)

    def under(self, model: OpenModel, settings: PlanSettings | None) -> Self:
        several = self.defaults.samples_a_row != 1 if settings is None else holds_several_a_row(settings)
        numerics = with_attention(self.numerics, self.mesh, model.config, 1 + several)
        older = settings is not None and settings.version == 1  # goes on with the sums that it was begun with
        return replace(self, numerics=replace(numerics, longest_sum=None if older else self.longest_sum))

    @property
    def longest_sum(self) -> int | None:
        """Processors have one accumulator a sum, matrix units have others; docs/decisions/long-sums.md."""
        return LONGEST_SUM if platform_of(self.mesh) == "cpu" and self.numerics.dtype == "float32" else None

    def fingerprint(self) -> dict[str, str]:
        return numerics_fingerprint(self.numerics)

    def pair_cost(self, model: OpenModel, plan: CapturePlan) -> float:
        return pair_work(model, plan) if self.numerics.attention == "splash" else 0.0

    @property
    def attention_block(self) -> int:
        return LARGEST_BLOCK if self.numerics.attention == "splash" else 1

    def captured_bytes(self, plan: CapturePlan, model: OpenModel, shape: SlabShape) -> int:
        return captured_bytes(plan, model.config, shape, platform_of(self.mesh))

    def rows_travel(self, plan: CapturePlan, model: OpenModel, shapes: Iterable[SlabShape]) -> bool:
        most = max((self.captured_bytes(plan, model, shape) for shape in shapes), default=0)
        return self.devices > self.devices_of_host and rows_travel(plan.positions, self.devices * most)

    def weights(self, model: OpenModel, plan: CapturePlan) -> Weights:
        blocks = plan.blocks_needed(model.config.num_hidden_layers)
        try:
            return Weights(model.checkpoint, model.port, model.config, blocks)
        except NotComputedHere as refusal:
            raise UserError(f"{refusal}; {TORCH_MEND}") from None

    def layout(
        self,
        model: OpenModel,
        plan: CapturePlan,
        weights: Weights,
        shapes: Iterable[SlabShape],
        rows_travel: bool = False,
    ) -> Decision | None:
        """How parameters should lie for slabs of these shapes; None where nothing is known of the device."""
        if (chip := CHIPS.get(device_kind())) is None:
            return None
        shape = max(shapes, key=lambda shape: shape.tokens)  # which takes the most memory
        data, model_axis = (self.mesh.shape[axis] for axis in BATCH_AXES)
        captures = self.captured_bytes(plan, model, shape) * (self.devices if rows_travel else 1)
        counts = self.counts(model, weights)
        block = attention_block(shape.length) if self.numerics.attention == "splash" else 1
        return choose_layout(Request(counts, chip, data, model_axis, shape.rows, shape.length, captures, block))

    @property
    def uncounted_layout(self) -> Layout:
        """On devices of which no figures are kept; the CPU devices of a process share one copy of what is whole."""
        return Layout.REPLICATED if platform_of(self.mesh) == "cpu" else Layout.GATHERED

    def numerics_of_answers(self, model: OpenModel) -> Numerics:
        """With sums undivided: a step of a token or two reads the weights, and would copy their parts."""
        return with_attention(replace(self.numerics, longest_sum=None), self.mesh, model.config)

    def layout_of_whole(self, weights: Weights) -> Layout:
        """Of models that are asked again and again: whole parameters where they fit.

        A step of few tokens reads them all, and gathering them takes longer than that.
        """
        if (chip := CHIPS.get(device_kind())) is None:
            return self.uncounted_layout
        stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights.structure(self.dtype)))
        fits = stored <= _SHARE_OF_MEMORY * chip.memory_bytes
        return Layout.REPLICATED if fits else Layout.GATHERED_BOTH

    def counts(self, model: OpenModel, weights: Weights) -> ModelCounts:
        """What the planner knows of the model."""
        return ModelCounts.of(weights.structure(self.dtype), model.config, weights.num_blocks)

    @refusing_exhaustion()
    def program(
        self,
        model: OpenModel,
        plan: CapturePlan,
        weights: Weights,
        shapes: Iterable[SlabShape],
        needed: Sequence[SlabShape],
        rows_travel: bool = False,
        edits: Edits | None = None,
        say: Say = silent,
    ) -> CaptureProgram:
        """Parameters lie as suits the largest shape."""
        decision = self.layout(model, plan, weights, shapes, rows_travel)
        layout = decision.layout if decision else self.uncounted_layout
        params = weights.shapes(self.mesh, self.dtype, layout)
        if platform_of(self.mesh) == "cpu":
            require_parameters(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)))
        program = CaptureProgram(model.port, model.config, params, plan, self.mesh, self.numerics, rows_travel, edits)
        with program.compiling(needed):
            program.use(weights.load(self.mesh, self.dtype, layout))
            say(COMPILING)
        return program
