"""The device mesh (`data`, `model`).

In: `--mesh_shape` as written and the devices that JAX sees. Out: a `jax.sharding.Mesh`, or one
sentence before any device work. The batch is sharded over both axes; `model` also shards the
storage of parameters, which are gathered layer by layer (see `sharding`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jax_extract.errors import UserError

DATA, MODEL = "data", "model"
BATCH_AXES = (DATA, MODEL)


def parse_mesh_shape(text: str) -> tuple[int, int]:
    """`"8,8"` -> (8, 8); `"4"` -> (4, 1); UserError on anything else."""
    if not (match := re.fullmatch(r"\s*(\d{1,9})\s*(?:[,x]\s*(\d{1,9})\s*)?", text)) or "0" in match.groups():
        raise UserError(f"mesh shape {text!r} is not two positive numbers; write --mesh_shape DATA,MODEL such as 8,8")
    return int(match[1]), int(match[2] or 1)


def platform_of(mesh: Mesh) -> str:
    """Of its devices: `cpu`, `tpu`, `gpu`, or `rocm` for AMD's, which JAX calls `gpu` too."""
    device = mesh.devices.flat[0]
    if device.platform == "gpu" and "rocm" in device.client.platform_version.lower():
        return "rocm"
    return device.platform


def make_mesh(shape: tuple[int, int] | None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices; shape None puts them all on `data`.

    Raises:
      UserError: the shape does not have exactly as many places as there are devices.
    """
    devices = jax.devices() if devices is None else devices
    data, model = shape or (len(devices), 1)
    if data * model != len(devices):
        kind = devices[0].platform
        mend = f"use --mesh_shape {len(devices)},1"
        if kind == "cpu":
            mend += f", or set JAX_NUM_CPU_DEVICES={data * model} to try this mesh on CPU"
        raise UserError(
            f"mesh shape {data},{model} has {data * model} places but there "
            f"{'is' if len(devices) == 1 else 'are'} {len(devices)} {kind} device{'s' * (len(devices) != 1)}; {mend}"
        )
    # Auto axes, said explicitly: jax.make_mesh would default to Explicit ones.
    return Mesh(np.array(devices).reshape(data, model), BATCH_AXES, axis_types=(AxisType.Auto, AxisType.Auto))
