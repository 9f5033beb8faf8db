"""A TPU slice without a TPU: the devices that its compiler compiles for.

In: a topology's name such as `v5e:8x8`. Out: a `Slice` of devices that can be put into a mesh and compiled for, but
not run on. The compiler is libtpu's, which comes with `jax[tpu]` and works on any Linux machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax_extract.devices import libtpu
from jax_extract.devices.chips import CHIPS, Chip
from jax_extract.errors import UserError


@dataclass(frozen=True)
class Slice:
    """Attributes:
    name: as asked for.
    shape: chips along each axis of the slice.
    hosts: machines that the chips are spread over.
    """

    name: str
    shape: tuple[int, ...]
    devices: Sequence[Any]
    chip: Chip

    @property
    def hosts(self) -> int:
        return len({device.process_index for device in self.devices})

    @property
    def axes(self) -> tuple[int, int]:
        """The slice's own two, as a mesh may have them; of three, the first two together."""
        return len(self.devices) // self.shape[-1], self.shape[-1]


def open_slice(name: str) -> Slice:
    """The devices of a topology; takes no device of this machine.

    Raises:
      UserError: there is no such topology, or no compiler for it here.
    """
    chips = {chip.name: chip for chip in CHIPS.values()}
    kind, _, axes = name.partition(":")
    if (chip := chips.get(kind)) is None:
        raise UserError(
            f"topology {name!r} is not known; write a chip ({', '.join(chips)}) and the slice's axes, such as v5e:8x8"
        )
    if axes not in chip.slices:
        raise UserError(f"topology {name!r} is no slice of {kind}; there are {', '.join(chip.slices)}")
    if not libtpu.is_installed():
        raise UserError(
            "the TPU compiler is not installed here; it comes with pip install -e '.[tpu]', which needs no TPU"
        )
    libtpu.silence()
    from jax.experimental import topologies

    alone = {"chips_per_host_bounds": (1, 1, 1)} if axes == "1x1" else {}
    try:
        devices = topologies.get_topology_desc(topology_name=name, platform="tpu", **alone).devices
    except Exception as error:  # noqa: BLE001 (libtpu raises its own kinds, and says everything in one line)
        said = str(error).partition("\n")[0].partition(": ")[2] or str(error)
        raise UserError(f"the TPU compiler does not open {name!r}: {said[:200]}") from None
    libtpu.release_signals()
    return Slice(name, tuple(map(int, axes.split("x"))), devices, chip)
