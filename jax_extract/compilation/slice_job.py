"""The job of an extraction on a slice: what the run would know there before its first weight is read.

In: `CompileConfig`, a model's configuration, the slice's devices as a mesh. Out: a `Job` that plans and counts steps;
it has no weights, and makes no program.
"""

from __future__ import annotations

from dataclasses import dataclass

from jax.sharding import Mesh

from jax_extract.compilation.config import CompileConfig
from jax_extract.devices import platform
from jax_extract.devices.platform import PlatformDefaults
from jax_extract.extraction.capture import sites_of
from jax_extract.extraction.jax_backend import JaxBackend, compute_numerics
from jax_extract.extraction.prepare import Job
from jax_extract.weights.open_model import OpenModel
from models.capture_plan import CapturePlan


@dataclass(frozen=True)
class SliceBackend(JaxBackend):
    """JAX on the devices of a slice, which are not this machine's."""

    @property
    def defaults(self) -> PlatformDefaults:
        return platform.TPU


def slice_job(config: CompileConfig, model: OpenModel, plan: CapturePlan, mesh: Mesh, max_length: int) -> Job:
    return Job(
        model=model,
        plan=plan,
        sites=tuple(sites_of(plan, model.config)),
        backend=SliceBackend(mesh, compute_numerics(config.dtype)),
        max_length=max_length,
        prompt_length=max_length,
    ).under(None)
