"""A change of what flows through one hook point, as a compiled forward makes it.

In: rows of a batch at a hook point. Out: the same with some of them changed. What decides the program is static: the
hook point and the kind of change. Layers, tokens and operands are traced, so that one program serves all of them.
Dimension letters: b rows of the batch, t tokens, d width, n rows that are put or added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from models.errors import UserError

UNCHANGED = -1

# A pure function of rows float32 [1, d], a token at a time, and an operand of any kind -> rows alike.
Function = Callable[[Array, Any], Array]
Kind = Literal["zero", "add", "replace"] | Function


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Intervention:
    """Arrays are of NumPy on the host.

    Attributes:
      hook: hook point (static).
      kind: what is done (static).
      shared: for each leaf of a function's operand, whether all rows of the batch have the same (static).
      by_device: the operand has n rows for each device, and `rows` are numbers of those of its own (static).
      layers: bool [1 or b, blocks + 1], at which layers, the same for all rows of the batch or for each; the entry
        behind the last block is the stream that leaves it.
      rows: int32 [b, t]: which row of the operand each token gets; UNCHANGED leaves it. A function gets the whole
        operand, and any other number means that its result is taken.
      operand: float32 [n, d] of what is put or added; None where there is none; of a function, any pytree, whose leaves
        have a leading axis b where they are not shared.
    """

    hook: str = dataclasses.field(metadata={"static": True})
    kind: Kind = dataclasses.field(metadata={"static": True})
    layers: Any
    rows: Any
    operand: Any = None
    shared: tuple[bool, ...] = dataclasses.field(default=(), metadata={"static": True})
    by_device: bool = dataclasses.field(default=False, metadata={"static": True})

    def apply(self, x: Array, layer: Array | None) -> Array:
        """x float32 [b, t, d] with the change made; `layer` is None at hook points that have none."""
        if layer is None:
            return self._changed(x, self.rows)
        at = jnp.take(self.layers, layer, axis=1)
        rows = jnp.where(at[:, None], self.rows, jnp.int32(UNCHANGED))
        # A branch, so that what is meant for one layer costs nothing at the others.
        return jax.lax.cond(jnp.any(at), self._changed, lambda x, _: x, x, rows)

    def _changed(self, x: Array, rows: Array) -> Array:
        here = (rows != UNCHANGED)[:, :, None]
        if self.kind == "zero":
            return jnp.where(here, jnp.float32(0), x)
        if callable(self.kind):
            return jnp.where(here, self.result(x), x)
        given = self.operand[0][None, None] if len(self.operand) == 1 else jnp.take(self.operand, rows, 0, mode="clip")
        return jnp.where(here, x + given if self.kind == "add" else given, x)

    def of_rows(self, rows: Any) -> Intervention:
        """Of these rows of the batch alone; a slice or numbers."""
        if not callable(self.kind):
            return dataclasses.replace(self, rows=self.rows[rows])
        leaves, structure = jax.tree.flatten(self.operand)
        shared = self.shared or (True,) * len(leaves)
        some = [leaf if alike else leaf[rows] for leaf, alike in zip(leaves, shared, strict=True)]
        return dataclasses.replace(self, rows=self.rows[rows], operand=jax.tree.unflatten(structure, some))

    def result(self, x: Array) -> Array:
        """What its function makes of x float32 [b, t, d], of all tokens."""
        function = self.kind
        assert callable(function), "others are no functions"
        leaves, structure = jax.tree.flatten(self.operand)
        shared = self.shared or (True,) * len(leaves)
        axes = jax.tree.unflatten(structure, [None if alike else 0 for alike in shared])

        def of_token(row: Array, operand: Any) -> Array:
            """A token by itself: nothing that a function does may depend on what else lies in the batch."""
            result = function(row[None], operand)
            is_array = isinstance(result, jax.Array | np.ndarray)
            if not is_array or result.shape != (1, *row.shape) or jnp.iscomplexobj(result):
                name = getattr(function, "__name__", "change")
                given = f"{result.dtype} {list(result.shape)}" if is_array else type(result).__name__
                raise UserError(
                    f"the function {name!r} at {self.hook!r} is given float32 [1, {len(row)}] and returns {given}; "
                    "return rows alike"
                )
            return result[0]

        of_row = jax.vmap(of_token, in_axes=(0, None))
        # A caller's function is written for JAX's own rules of promotion. An operand without leaves has no axes.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            result = jax.vmap(of_row, in_axes=(0, axes if leaves else None))(x, self.operand)
        return result.astype(jnp.float32)
