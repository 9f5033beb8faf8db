"""Taps: what travels through the blocks of a forward to keep and change activations at its hook points.

In: a `CapturePlan`, interventions, where samples lie. Out: `Taps`, the pytree that a port's block passes through its
hook points. Capture and intervention are one mechanism: `Taps.visit` first applies the interventions and then stores
what is wanted, so what is stored is what flows on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from models.capture_plan import CapturePlan
from models.interventions import Intervention
from models.packing import Packing

Probes = Mapping[str, tuple[Array, Array]]
"""Hook point -> layers int32 [k] and zeros [k, b, t, width]; of hook points without a layer k is 1, and layers are not
looked at. The gradient of a result with respect to the zeros is that with respect to what flows there."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Taps:
    """Capture buffers and interventions.

    A hook point's buffer is [slots, b, rows, width] in the plan's dtype, a slot per wanted layer. A layer that
    is not wanted writes where the next wanted one will overwrite it; where there is no next, a spare slot at
    the end absorbs it. A buffer that is carried takes less temporary memory than stacking every layer and
    slicing, and far less than an unrolled stack.

    Attributes:
      probes: added behind everything else.
    """

    plan: CapturePlan = dataclasses.field(metadata={"static": True})
    num_blocks: int = dataclasses.field(metadata={"static": True})
    packing: Packing
    columns: Array | None  # int32 [b, rows], which tokens are kept; None where it takes no gather
    buffers: dict[str, Array]
    interventions: tuple[Intervention, ...] = ()
    probes: Probes = dataclasses.field(default_factory=dict)

    @classmethod
    def start(
        cls,
        plan: CapturePlan,
        num_blocks: int,
        packing: Packing,
        widths: Mapping[str, int],
        interventions: Sequence[Intervention] = (),
    ) -> Taps:
        """Empty buffers for samples that lie so in their rows; `widths` by hook point."""
        batch, rows = packing.lengths.shape[0], plan.positions.slots(packing.tokens, packing.samples)
        buffers = {
            hook: jnp.zeros((slots(layers, num_blocks), batch, rows, widths[hook]), plan.dtype)
            for hook, layers in plan.layers
        }
        return cls(plan, num_blocks, packing, plan.positions.columns(packing), buffers, tuple(interventions))

    def keeps_or_changes(self, hook: str) -> bool:
        return hook in self.buffers or hook in self.probes or any(each.hook == hook for each in self.interventions)

    def visit(self, hook: str, layer: Array | None, x: Array) -> tuple[Array, Taps]:
        """Passes x [batch, tokens, width] through a hook point: changes it, then keeps it."""
        x = self.change(hook, layer, x)
        return x, self.keep(hook, layer, x)

    def visit_heads(self, layer: Array, **heads: Array) -> tuple[list[Array], Taps]:
        """Passes x [batch, tokens, heads, head width] of each of these hook points through it, in their order.

        Rows are made only of what is kept or changed: a program that asks for none of them is the same without them.
        """
        taps, passed = self, []
        for hook, x in heads.items():
            if self.keeps_or_changes(hook):
                rows, taps = taps.visit(hook, layer, x.reshape(*x.shape[:2], -1))
                x = rows.reshape(x.shape)  # noqa: PLW2901
            passed.append(x)
        return passed, taps

    def keep(self, hook: str, layer: Array | None, x: Array) -> Taps:
        """With what flows on from a hook point, x [batch, tokens, width], where it is wanted."""
        if hook not in self.buffers:
            return self
        buffer = self.buffers[hook]
        kept = self.plan.positions.select(x, self.packing, self.columns).astype(buffer.dtype)
        slot = jnp.int32(0) if layer is None else self._slot_table(hook)[layer]
        buffer = jax.lax.dynamic_update_index_in_dim(buffer, kept, slot, axis=0)
        return dataclasses.replace(self, buffers={**self.buffers, hook: buffer})

    def change(self, hook: str, layer: Array | None, x: Array) -> Array:
        """x as interventions and probes leave it."""
        for intervention in self.interventions:
            if intervention.hook == hook:
                x = intervention.apply(x, layer)
        if hook not in self.probes:
            return x
        layers, zeros = self.probes[hook]
        if layer is None:
            return x + zeros[0]
        here = layers == layer
        mine = jax.lax.dynamic_index_in_dim(zeros, jnp.argmax(here), 0, keepdims=False)
        return x + jnp.where(jnp.any(here), mine, jnp.float32(0))

    def _slot_table(self, hook: str) -> Array:
        wanted = dict(self.plan.layers)[hook]
        # One entry past the last block: `residual_before` of the block after it is its output.
        return jnp.asarray(np.searchsorted(wanted, np.arange(self.num_blocks + 1)), jnp.int32)


def slots(layers: tuple[int, ...], num_blocks: int) -> int:
    """How many slots the buffer of these layers (ascending) has when so many blocks run; see `Taps`."""
    if not layers:
        return 1
    return len(layers) + (layers[-1] < num_blocks - 1)
