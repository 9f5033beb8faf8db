"""A forward through a decoder: the one place where a port, attention and taps come together.

In: a port with its configuration, how products are computed, parameters, tokens and where they lie, what is kept and
changed. Out: taps filled, attention with what it remembers, logits. Blocks are scanned, a layer's parameters whole only
while it runs. Dimension letters: b rows of the batch, t tokens, d width of the stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from models.capture_plan import CapturePlan
from models.interventions import Intervention
from models.layers import Numerics
from models.packing import Packing
from models.ports import Carry, Gather, ModelConfig, Parameters, Port, hook_width
from models.self_attention import Attention, SelfAttention, WithinRows
from models.taps import Probes, Taps


def already_whole(_: str, parameters: Any) -> Any:
    """The `gather` of parameters that no device shares with another."""
    return parameters


@dataclass(frozen=True)
class Decoder:
    """A model that is computed here.

    Attributes:
      gather: makes parameters whole of this device's shards, at the moment they are needed.
    """

    port: Port
    config: ModelConfig
    numerics: Numerics
    gather: Gather = already_whole

    def capture(
        self,
        params: Parameters,
        tokens: Array,
        packing: Packing,
        plan: CapturePlan,
        interventions: Sequence[Intervention] = (),
    ) -> dict[str, Array]:
        """Hook point -> what is kept of it, [slots, b, rows, width]; no block above the deepest one that is kept runs.

        Args:
          tokens: int32 [b, t].
          packing: whose they are.
        """
        taps = self.taps(plan, packing, interventions)
        return self.run(params, tokens, taps, WithinRows(packing.positions))[0].buffers

    def taps(
        self,
        plan: CapturePlan,
        packing: Packing,
        interventions: Sequence[Intervention] = (),
        num_blocks: int | None = None,
    ) -> Taps:
        """Empty ones, for so many blocks; as many as the plan needs for None."""
        widths = {hook: hook_width(self.config, hook, plan.pattern_tokens) for hook, _ in plan.layers}
        blocks = plan.blocks_needed(self.config.num_hidden_layers) if num_blocks is None else num_blocks
        return Taps.start(plan, blocks, packing, widths, interventions)

    def run(self, params: Parameters, tokens: Array, taps: Taps, attention: Attention) -> tuple[Taps, Attention]:
        """Runs `taps.num_blocks` blocks over tokens int32 [b, t], and the final norm where it is kept."""
        x, taps = self.embed(params, tokens, taps, attention)
        x, taps, attention = self.blocks(params, x, taps, attention)
        if taps.plan.needs_final_norm:
            _, taps = self.final_norm(params, x, taps)
        return taps, attention

    def embed(self, params: Parameters, tokens: Array, taps: Taps, attention: SelfAttention) -> tuple[Array, Taps]:
        """tokens int32 [b, t] -> the stream that enters the first block, float32 [b, t, d]."""
        with jax.named_scope("embeddings"):
            x = self.port.embed(self.config, params, tokens, attention, self.gather)
        return taps.visit("embeddings", None, x)

    def blocks(
        self,
        params: Parameters,
        x: Array,
        taps: Taps,
        attention: Attention,
        first: Array | None = None,
        last: Array | None = None,
        probes: Probes | None = None,
    ) -> tuple[Array, Taps, Attention]:
        """Runs `taps.num_blocks` blocks on the stream x, float32 [b, t, d].

        Args:
          params: the blocks' lie stacked on a leading layer axis, or as a list with those of each. A list is compiled
            layer by layer, and nothing is copied out of a stack: for steps so short that reading parameters is all
            they do, and for gradients with respect to parameters.
          first, last: int32 scalars: only the blocks from `first` on and before `last` run, so that one program serves
            them all. Without probes there is no gradient then.
          probes: what gradients are taken with respect to. What a block computes is computed again on the way back, so
            that of each layer the stream alone is remembered.
        """
        port, config, n = self.port, self.config, taps.num_blocks
        stack, shared = params["blocks"], port.shared(config, attention)

        def block(carry: Carry, shards: Parameters, layer: Array) -> Carry:
            return port.block(config, self.gather("blocks", shards), *carry, layer, shared, self.numerics)

        def of_layer(layer: Array) -> Parameters:
            return jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, layer, 0, keepdims=False), stack)

        carry: Carry = (x, taps, attention)
        if isinstance(stack, list):
            for layer, shards in enumerate(stack[:n]):
                # Known while compiling, so that a cache of lists can be indexed with it.
                carry = block(carry, shards, cast(Array, np.int32(layer)))
        elif probes:

            def step(carry: tuple[Array, Attention], layer: Array) -> tuple[tuple[Array, Attention], None]:
                probed = dataclasses.replace(taps, probes=probes)
                x, _, attention = block((carry[0], probed, carry[1]), of_layer(layer), layer)
                return (x, cast(Attention, attention)), None

            def step_if_meant(carry: tuple[Array, Attention], layer: Array) -> tuple[tuple[Array, Attention], None]:
                runs = jnp.bool_(True) if first is None else layer >= first
                return jax.lax.cond(runs, step, lambda carry, _: (carry, None), carry, layer)

            layers = jnp.arange(n, dtype=jnp.int32)
            (x, attention), _ = jax.lax.scan(jax.checkpoint(step_if_meant), (x, attention), layers)
            carry = (x, taps, attention)
        elif first is not None or last is not None:
            begin, end = (jnp.int32(0) if first is None else first), (jnp.int32(n) if last is None else last)
            carry = jax.lax.fori_loop(begin, end, lambda layer, carry: block(carry, of_layer(layer), layer), carry)
        elif n == _layers(stack):
            if n:
                layers = jnp.arange(n, dtype=jnp.int32)
                carry, _ = jax.lax.scan(lambda carry, xs: (block(carry, *xs), None), carry, (stack, layers))
        elif n:  # of a stack that has more; slicing it would copy what runs
            layers = jnp.arange(n, dtype=jnp.int32)
            carry, _ = jax.lax.scan(lambda carry, layer: (block(carry, of_layer(layer), layer), None), carry, layers)
        x, taps, attention = cast(tuple[Array, Taps, Attention], carry)
        # The input of the block after the last one that runs is the output of that one.
        if n in dict(taps.plan.layers).get("residual_before", ()):
            x, taps = taps.visit("residual_before", jnp.int32(n), x)
        else:
            x = taps.change("residual_before", jnp.int32(n), x)
        return x, taps, attention

    def final_norm(self, params: Parameters, x: Array, taps: Taps) -> tuple[Array, Taps]:
        """The stream behind the last block -> the same behind the final norm."""
        return taps.visit("final_norm", None, self.port.final_norm(self.config, params, x, self.gather))

    def logits(self, params: Parameters, rows: Array) -> Array:
        """Rows of `final_norm`, float32 [b, t, d] -> float32 [b, t, vocab]."""
        return self.port.logits(self.config, params, rows, self.numerics, self.gather)


def _layers(stack: Parameters) -> int:
    return jax.tree.leaves(stack)[0].shape[0]
