"""One training step on the mesh: token ids in, smaller loss out; and the loss of walks that are not trained on.

In: parameters, optimizer state, batches of token ids. Out: both a step further, and the sum of what the predictions
lost. The batch is shared between all devices, each of which holds all parameters; gradients are added up over the
devices and then over the batches of a step, and divided by the number of predictions in all of them, so that neither
padding nor the way of sharing weighs anything. Dimension letters: a batches of a step, b walks, t tokens, v vocabulary.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_extract.devices.mesh import BATCH_AXES
from jax_extract.devices.sharding import BATCH_SPEC, STACKED, named
from models.capture_plan import CapturePlan
from models.causal_rows import CausalRows
from models.decoder import Decoder
from models.layers import Numerics
from models.packing import Packing
from models.ports import ModelConfig, Parameters, Port
from models.positions import Positions

_STEP_SPEC = P(None, BATCH_AXES)  # [a, b, …]
_LAST_NORM = CapturePlan((("final_norm", ()),), Positions("all"))
_LARGEST_GRADIENT = 1.0  # norm, as transformers' Trainer clips it


def linear_decay_adamw(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW as transformers' Trainer has it by default: betas 0.9 and 0.999, no weight decay, gradients clipped."""
    schedule = optax.linear_schedule(learning_rate, 0.0, steps)
    return optax.chain(
        optax.clip_by_global_norm(_LARGEST_GRADIENT),
        optax.adamw(schedule, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, on all devices alike."""

    params: Parameters
    optimizer: Any


class TrainProgram:
    """Runs steps and evaluations; compiles each once for a shape of its batches."""

    def __init__(
        self, port: Port, config: ModelConfig, mesh: Mesh, numerics: Numerics, optimizer: optax.GradientTransformation
    ) -> None:
        self.mesh = mesh
        self._optimizer = optimizer
        lost = partial(_lost, port, config, numerics)
        on_mesh = partial(jax.shard_map, mesh=mesh, check_vma=False)
        self._gradient = on_mesh(partial(_summed_gradient, lost), in_specs=(P(), _STEP_SPEC, _STEP_SPEC), out_specs=P())
        self._step = jax.jit(self._whole_step, donate_argnums=0)
        self._evaluate = jax.jit(
            on_mesh(
                lambda params, tokens, lengths: jax.lax.psum(lost(params, tokens, lengths), BATCH_AXES),
                in_specs=(P(), BATCH_SPEC, BATCH_SPEC),
                out_specs=P(),
            )
        )

    def start(self, params: Parameters) -> TrainState:
        """The state before the first step, from parameters on the host."""
        placed = self.place(params)
        with _as_optax_computes():
            return TrainState(placed, self.place(self._optimizer.init(placed)))

    def place(self, tree: Any) -> Any:
        """Whole on every device."""
        return jax.device_put(tree, named(self.mesh, P()))

    def step(self, state: TrainState, tokens: np.ndarray, lengths: np.ndarray) -> tuple[TrainState, Array]:
        """Starts a step; returns at once. `state` is used up.

        Args:
          tokens: int32 [a, b, t]; b is a multiple of the devices.
          lengths: int32 [a, b], real tokens of each row; 0 where there is no walk.

        Returns:
          The state after it, and the mean loss in nats a prediction before it.
        """
        sharding = named(self.mesh, _STEP_SPEC)
        return self._step(state, jax.device_put(tokens, sharding), jax.device_put(lengths, sharding))

    def evaluate(self, params: Parameters, tokens: np.ndarray, lengths: np.ndarray) -> Array:
        """The sum of nats over all predictions of int32 [b, t] walks."""
        sharding = named(self.mesh, BATCH_SPEC)
        return self._evaluate(params, jax.device_put(tokens, sharding), jax.device_put(lengths, sharding))

    def _whole_step(self, state: TrainState, tokens: Array, lengths: Array) -> tuple[TrainState, Array]:
        total, gradient = self._gradient(state.params, tokens, lengths)
        count = jnp.sum(jnp.maximum(lengths - 1, 0)).astype(jnp.float32)
        gradient = jax.tree.map(lambda g: g / count, gradient)
        with _as_optax_computes():
            updates, optimizer = self._optimizer.update(gradient, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
        return TrainState(params, optimizer), total / count  # type: ignore[arg-type] (optax keeps its kind)


def _as_optax_computes() -> ExitStack:
    """optax mixes integers and floats, which our own code never does."""
    stack = ExitStack()
    stack.enter_context(jax.numpy_dtype_promotion("standard"))
    stack.enter_context(jax.numpy_rank_promotion("allow"))
    return stack


def _summed_gradient(lost: Any, params: Parameters, tokens: Array, lengths: Array) -> tuple[Array, Parameters]:
    """Sum of the losses and its gradient, over the batches one after the other and over all devices."""

    def add(so_far: Any, batch: tuple[Array, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, so_far, jax.value_and_grad(lost)(params, *batch)), None

    nothing = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    if tokens.shape[0] == 1:
        both = jax.value_and_grad(lost)(params, tokens[0], lengths[0])
    else:
        both, _ = jax.lax.scan(add, nothing, (tokens, lengths))
    return jax.lax.psum(both, BATCH_AXES)


def _lost(
    port: Port, config: ModelConfig, numerics: Numerics, params: Parameters, tokens: Array, lengths: Array
) -> Array:
    """Sum of the nats that the predictions of walks int32 [b, t] lose, each of the next token."""

    decoder = Decoder(port, config, numerics)
    rows = Packing(lengths[:, None], tokens.shape[1])
    n = config.num_hidden_layers
    # Layer by layer: the backward pass of a scan would stack what every layer keeps for it.
    apart = {**params, STACKED: [jax.tree.map(lambda p, i=i: p[i], params[STACKED]) for i in range(n)]}
    taps, _ = decoder.run(apart, tokens, decoder.taps(_LAST_NORM, rows), CausalRows(rows.positions))
    logits = decoder.logits(params, taps.buffers["final_norm"][0][:, :-1])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    predicted = jnp.arange(tokens.shape[1] - 1, dtype=jnp.int32)[None] < lengths[:, None] - 1
    return jnp.sum(jnp.where(predicted, nats, jnp.float32(0)))
