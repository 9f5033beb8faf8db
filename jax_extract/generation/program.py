"""The compiled steps of answering: prompts at once, then some tokens of every answer.

In: a port, parameters with a head on a mesh, rows of one prompt each. Out: tokens. The bodies are written per device
(`shard_map`): each device answers its own prompts, and only parameters and the answers themselves cross devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_extract.devices.mesh import BATCH_AXES, platform_of
from jax_extract.devices.sharding import BATCH_SPEC, CAPTURE_SPEC, STACKED, make_gather, named
from jax_extract.generation.sampling import Sampling
from models.hooks import CapturePlan, Taps
from models.kv_cache import Decoding, KeyValueCache, Prefill, apart
from models.layers import Numerics
from models.packing import Packing
from models.ports import Gather, ModelConfig, Parameters, Port
from models.positions import Positions

NO_TOKEN = -1  # behind the end of an answer
STEPS = 16  # tokens of every answer between two looks at whether all are finished

_LAST_ROW = CapturePlan((("final_norm", ()),), Positions("last"))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Answering:
    """Answers under way.

    Attributes:
      cache: keys and values of prompts and answers.
      token: int32 [b], the next token of each answer.
      finished: bool [b], whether the answer has ended.
      samples: int32 [b], places in the input.
      step: int32 scalar, tokens of each answer that are out already.
    """

    cache: KeyValueCache
    token: Array
    finished: Array
    samples: Array
    step: Array


class AnswerProgram:
    """Answers batches of prompts. Compiles once a number of rows and columns."""

    def __init__(
        self,
        port: Port,
        config: ModelConfig,
        params: Parameters,
        mesh: Mesh,
        numerics: Numerics,
        sampling: Sampling,
        stops: Sequence[int],
    ) -> None:
        """`stops` are the tokens that end an answer."""
        self.mesh = mesh
        specs = jax.tree.map(lambda parameter: parameter.sharding.spec, params)
        self._model = _Model(port, config, numerics, sampling, tuple(stops), make_gather(specs))
        # A step of one token reads every parameter and computes little: on a CPU, a copy out of a stack would take
        # most of its time. Accelerators read slices where they lie.
        apart = platform_of(mesh) == "cpu"
        self._params = params
        self._step_params = layers_apart(params, specs, mesh) if apart else params
        self._specs, self._apart = specs, apart
        layers = config.num_hidden_layers if apart else None
        step_specs = {**specs, STACKED: [jax.tree.map(_of_a_layer, specs[STACKED])] * layers} if layers else specs
        self._state_specs = _state_specs(layers)
        self._answer = jax.jit(
            self._on_mesh(self._model.answer, (step_specs, self._state_specs), (self._state_specs, P(), P())),
            donate_argnums=1,
        )
        self._read: dict[int, Any] = {}

    def prompts(self, tokens: np.ndarray, lengths: np.ndarray, samples: np.ndarray, columns: int) -> Answering:
        """Reads prompts and chooses the first token of each answer; returns at once.

        Args:
          tokens: int32 [devices * rows, prompt columns], padded on the right; the same on every host. The i-th device
            of the mesh gets the i-th block of rows.
          lengths: int32 [devices * rows], real tokens; 0 where a row is a dummy.
          samples: int32 [devices * rows], places in the input.
          columns: room for a prompt and its answer.
        """
        if columns not in self._read:
            read = self._on_mesh(
                partial(self._model.read, columns=columns, apart_=self._apart),
                (self._specs, BATCH_SPEC, BATCH_SPEC, BATCH_SPEC),
                self._state_specs,
            )
            self._read[columns] = jax.jit(read)
        return self._read[columns](self._params, *map(self._put, (tokens, lengths, samples)))

    def answer(self, state: Answering) -> tuple[Answering, Array, Array]:
        """`STEPS` more tokens of every answer; returns at once.

        Returns:
          What goes on from here, in the place of `state`, which is used up; the tokens of all rows on every host,
          int32 [devices * rows, STEPS], NO_TOKEN behind an answer's end; and how many answers are unfinished.
        """
        return self._answer(self._step_params, state)

    def _on_mesh(self, body: Any, given: Any, gives: Any) -> Any:
        # Gathered parameters are equal on all devices, which the check of varying values cannot see.
        return jax.shard_map(body, mesh=self.mesh, in_specs=given, out_specs=gives, check_vma=False)

    def _put(self, rows: np.ndarray) -> Array:
        """Rows of all devices, of which this host's devices get theirs."""
        return jax.make_array_from_callback(rows.shape, named(self.mesh, BATCH_SPEC), lambda index: rows[index])


@dataclass(frozen=True)
class _Model:
    """What one device computes."""

    port: Port
    config: ModelConfig
    numerics: Numerics
    sampling: Sampling
    stops: tuple[int, ...]
    gather: Gather

    def read(
        self, params: Parameters, tokens: Array, lengths: Array, samples: Array, columns: int, apart_: bool
    ) -> Answering:
        """Prompts [b, t] into a cache of so many columns; a list of layers where they are to be apart."""
        config = self.config
        rows = Packing(lengths[:, None], tokens.shape[1])
        heads = (config.num_key_value_heads, config.head_dim)
        memory = Prefill.start(rows.positions, lengths, columns, config.num_hidden_layers, heads, self.numerics.dtype)
        logits, memory = self._logits(params, tokens, rows, memory)
        cache = apart(memory.cache) if apart_ else memory.cache
        step = jnp.int32(0)
        return Answering(cache, self.sampling.choose(logits, samples, step), lengths == 0, samples, step)

    def answer(self, params: Parameters, state: Answering) -> tuple[Answering, Array, Array]:
        """`STEPS` tokens; how many answers are unfinished is counted over all devices."""
        b = state.token.shape[0]
        one = Packing(jnp.ones((b, 1), jnp.int32), 1)

        def step(i: Array, carry: tuple[Answering, Array]) -> tuple[Answering, Array]:
            state, tokens = carry
            told = jnp.where(state.finished, jnp.int32(NO_TOKEN), state.token)
            tokens = jax.lax.dynamic_update_slice(tokens, told[:, None], (jnp.int32(0), i))
            finished = state.finished | jnp.isin(state.token, jnp.asarray(self.stops, jnp.int32))
            memory = Decoding(state.cache, state.step)
            logits, memory = self._logits(params, state.token[:, None], one, memory)
            chosen = self.sampling.choose(logits, state.samples, state.step + 1)
            return Answering(memory.cache, chosen, finished, state.samples, state.step + 1), tokens

        # All devices take as many steps, so that parameters can be gathered in each.
        tokens = jnp.full((b, STEPS), NO_TOKEN, jnp.int32)
        state, tokens = jax.lax.fori_loop(jnp.int32(0), jnp.int32(STEPS), step, (state, tokens))
        told = jax.lax.all_gather(tokens, BATCH_AXES, axis=0, tiled=True)
        return state, told, jax.lax.psum(jnp.sum(~state.finished, dtype=jnp.int32), BATCH_AXES)

    def _logits(self, params: Parameters, tokens: Array, rows: Packing, memory: Any) -> tuple[Array, Any]:
        """Of the last token of each row, float32 [b, vocab]."""
        config = self.config
        taps = Taps.start(_LAST_ROW, config.num_hidden_layers, rows, {"final_norm": config.hidden_size})
        taps, memory = self.port.forward(config, params, tokens, taps, memory, self.numerics, self.gather)
        normed = taps.buffers["final_norm"][0]
        return self.port.logits(config, params, normed, self.numerics, self.gather)[:, 0], memory


def layers_apart(params: Parameters, specs: Parameters, mesh: Mesh) -> Parameters:
    """The same parameters with a list of layers in the place of the stack; on CPU devices nothing is copied."""
    layers = next(iter(params[STACKED].values())).shape[0]

    def layer(name: str, i: int) -> Array:
        stack = params[STACKED][name]
        pieces = [jax.device_put(np.asarray(shard.data)[i], shard.device) for shard in stack.addressable_shards]
        sharding = named(mesh, _of_a_layer(specs[STACKED][name]))
        return jax.make_array_from_single_device_arrays(stack.shape[1:], sharding, pieces)

    return {**params, STACKED: [{name: layer(name, i) for name in params[STACKED]} for i in range(layers)]}


def _of_a_layer(spec: P) -> P:
    """Of a stack's spec, whose first axis is the layers'."""
    return P(*spec[1:])


def _state_specs(layers: int | None) -> Answering:
    """How `Answering` lies on the mesh; `layers` of a cache that is a list of them, None of a stacked one."""
    stored: Any = CAPTURE_SPEC if layers is None else [BATCH_SPEC] * layers
    rows: Any = BATCH_SPEC
    alike: Any = P()
    return Answering(KeyValueCache(stored, stored, rows, alike), rows, rows, rows, alike)
