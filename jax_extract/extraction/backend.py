"""What computes a job: a backend, and the program that it makes of a model and a capture plan.

In: nothing. Out: `Program`, which the loop runs, and `Backend`, which a job has. JAX is one, on a mesh of devices
(`jax_backend`); PyTorch is another, on one (`jax_extract.pytorch`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np

from jax_extract.devices.platform import PlatformDefaults
from jax_extract.forward.edits import Edits, Placed
from jax_extract.inputs.planning.slabs import PlanSettings, SlabShape
from jax_extract.store.writer import Blocks
from jax_extract.weights.open_model import OpenModel
from models.capture_plan import CapturePlan

Say = Callable[[str], object]  # is told what is done from now on, in a word


def silent(_: str) -> None:
    """Where nobody looks."""


class Program(Protocol):
    """Runs slabs.

    Attributes:
      plan: what is captured.
      hosts, host: how many processes compute together, and which of them this one is.
      devices_of_host: devices of this process; each computes a slab in every step.
      rows_travel: whether every host gets the captures of all devices, and not of its own alone.
      edits: that it makes; None where it makes none.
    """

    plan: CapturePlan
    edits: Edits | None
    hosts: int
    host: int
    devices_of_host: int
    rows_travel: bool

    def compiled(self, shape: SlabShape) -> object:
        """Makes ready for slabs of this shape, where that takes time."""
        ...

    def bytes_on_host(self, shape: SlabShape) -> int:
        """What the captures of one step take in this host's memory."""
        ...

    def run(self, tokens: np.ndarray, lengths: np.ndarray, placed: Iterable[Placed] = ()) -> Any:
        """Starts a step and the way of its captures to the host; may return before either is done.

        Args:
          tokens: int32 [devices_of_host * rows, length]; the i-th device gets the i-th block of rows.
          lengths: int32 [devices_of_host * rows, samples], real tokens of the samples that lie in each row, one
            behind the other; 0 where there is none.
          placed: where samples lie, for the edits.
        """
        ...

    def on_host(self, captured: Any) -> list[Blocks]:
        """Waits for what `run` gave: of each device, site -> [rows, positions, width].

        The devices are those of this host; where rows travel, those of the first host, then of the second, and so on.
        """
        ...

    def close(self) -> None:
        """Gives up what is being made ready and was not needed."""
        ...


class Loadable(Protocol):
    """The weights of a job, not read yet."""

    @property
    def notes(self) -> tuple[str, ...]:
        """To the user, about files and tensors that are not read."""
        ...

    def provenance(self) -> str:
        """Says which weights these are: equal where the content is."""
        ...


class Backend(Protocol):
    """What a job computes with.

    Attributes:
      name: as `--backend` has it.
      dtype: of matrix products.
      defaults: of the plan.
    """

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def defaults(self) -> PlatformDefaults: ...

    @property
    def packages(self) -> tuple[str, ...]:
        """Whose versions are worth keeping, besides those that every run has."""
        ...

    @property
    def devices(self) -> int:
        """Of all hosts."""
        ...

    @property
    def devices_of_host(self) -> int: ...

    @property
    def device_kind(self) -> str:
        """Such as `cpu` or `TPU v5 lite`."""
        ...

    @property
    def mesh_shape(self) -> Mapping[str, int]:
        """Places of the devices by axis: `data` and `model`."""
        ...

    def under(self, model: OpenModel, settings: PlanSettings | None) -> Self:
        """The same, as it computes slabs of a plan with these settings (None: its own defaults)."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """What decides the bits of a row, besides the plan's slab shapes: equal here means equal bytes."""
        ...

    def pair_cost(self, model: OpenModel, plan: CapturePlan) -> float:
        """Products of attention for one query and one key, over those of a token in the matrices of a block.

        0 where attention computes no pair of two samples, so that it costs the same wherever they lie.
        """
        ...

    @property
    def attention_block(self) -> int:
        """Attention computes pairs in squares of so many queries and keys, in rows that this divides."""
        ...

    def captured_bytes(self, plan: CapturePlan, model: OpenModel, shape: SlabShape) -> int:
        """Bytes of the captures of one slab of one device, as they reach the host."""
        ...

    def rows_travel(self, plan: CapturePlan, model: OpenModel, shapes: Iterable[SlabShape]) -> bool:
        """Whether captures of slabs of these shapes are small enough to bring them to every host; see `Program`."""
        ...

    def weights(self, model: OpenModel, plan: CapturePlan) -> Loadable:
        """The tensors that will be loaded, checked by name and shape."""
        ...

    def program(
        self,
        model: OpenModel,
        plan: CapturePlan,
        weights: Any,
        shapes: Iterable[SlabShape],
        needed: Sequence[SlabShape],
        rows_travel: bool = False,
        edits: Edits | None = None,
        say: Say = silent,
    ) -> Program:
        """Loads the weights and meanwhile makes ready for what is needed; this is where the real work begins.

        Args:
          weights: as `weights` gave them.
          shapes: that a slab may have.
          needed: those that are computed, the largest first.
          rows_travel, edits: see `Program`.
          say: is told when the weights are there and programs are still compiled.
        """
        ...


def holds_several_a_row(settings: PlanSettings) -> bool:
    """Whether rows of a plan with these settings may hold more than one sample."""
    if settings.version == 1:
        return settings.packed and settings.rows > 1
    return settings.samples_a_row != 1
