"""The optimizer's state in a checkpoint, by Orbax.

In: the state on the mesh, and a folder. Out: the same state again, in the sharding that is wanted.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jax_extract.errors import UserError


def save_optimizer(folder: Path, state: Any) -> None:
    """Every leaf of the state, durable when it returns; OSError where it cannot be written."""
    try:
        with _silent_orbax() as ocp:
            ocp.save(str(folder.absolute()), jax.tree.leaves(state))
    except Exception as error:  # noqa: BLE001 (orbax raises kinds of several libraries)
        raise OSError(errno.EIO, _first_line(error), str(folder)) from None


def load_optimizer(folder: Path, like: Any, mend: str) -> Any:
    """A state with the structure, shapes and shardings of `like`; UserError that ends in `mend` where it is no such."""

    def wanted(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    leaves, structure = jax.tree.flatten(like)
    try:
        with _silent_orbax() as ocp:
            found = ocp.load(str(folder.absolute()), [wanted(leaf) for leaf in leaves])
    except Exception as error:  # noqa: BLE001 (Orbax and TensorStore fail in their own ways)
        raise UserError(f"the optimizer's state in {folder} cannot be read ({_first_line(error)}); {mend}") from None
    return jax.tree.unflatten(structure, found)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:160] or type(error).__name__


@contextlib.contextmanager
def _silent_orbax() -> Iterator[Any]:
    """Orbax tells every stage on the root logger; our own lines are the interface."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from orbax.checkpoint import v1 as ocp

        yield ocp
    finally:
        logger.setLevel(before)
