"""The compiled steps of answering: prompts in slabs, then some tokens of every answer.

In: a port, parameters with a head on a mesh, slabs of prompts. Out: tokens. The bodies are written per device
(`shard_map`): each device answers its own prompts, and only parameters and the answers themselves cross devices.
"""

from __future__ import annotations

import dataclasses
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
from jax_extract.forward.program import specs_of
from jax_extract.generation.sampling import Sampling
from models.capture_plan import CapturePlan
from models.decoder import Decoder
from models.interventions import Intervention
from models.kv_cache import Decoding, KeyValueCache, Prefill, apart
from models.layers import Numerics
from models.packing import Packing
from models.ports import ModelConfig, Parameters, Port
from models.positions import Positions

NO_TOKEN = -1  # behind the end of an answer
Interventions = tuple[Intervention, ...]
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
      seed: uint32 scalar, of everything drawn.
    """

    cache: KeyValueCache
    token: Array
    finished: Array
    samples: Array
    step: Array
    seed: Array


class AnswerProgram:
    """Answers batches of prompts. Compiles once a number of rows and columns, and once a shape of slabs."""

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
        self._seed = np.uint32(sampling.seed)
        unseeded = dataclasses.replace(sampling, seed=0)
        self._model = _Model(Decoder(port, config, numerics, make_gather(specs)), unseeded, tuple(stops))
        # A step of one token reads every parameter and computes little: on a CPU, a copy out of a stack would take
        # most of its time. Accelerators read slices where they lie.
        has_layers_apart = platform_of(mesh) == "cpu"
        self._params = params
        self._step_params = layers_apart(params, specs, mesh) if has_layers_apart else params
        layers = config.num_hidden_layers if has_layers_apart else None
        step_specs = {**specs, STACKED: [jax.tree.map(_of_a_layer, specs[STACKED])] * layers} if layers else specs
        stacked, stepped = _state_specs(None), _state_specs(layers)
        self._start = jax.jit(
            lambda columns, *given: self._on_mesh(
                partial(self._model.start, columns), (BATCH_SPEC, BATCH_SPEC, P(), P()), stacked
            )(*given),
            static_argnums=0,
        )
        self._read = jax.jit(
            lambda *given: self._on_mesh(
                self._model.read,
                (specs, stacked, BATCH_SPEC, BATCH_SPEC, BATCH_SPEC, tuple(map(specs_of, given[-1]))),
                stacked,
            )(*given),
            donate_argnums=1,
        )
        self._ready = jax.jit(self._on_mesh(_ready, (stacked,), stepped)) if has_layers_apart else lambda state: state
        self._answer = jax.jit(
            lambda *given: self._on_mesh(
                self._model.answer, (step_specs, stepped, tuple(map(specs_of, given[-1]))), (stepped, P(), P())
            )(*given),
            donate_argnums=1,
        )

    def start(self, lengths: np.ndarray, samples: np.ndarray, prompt_columns: int, columns: int) -> Answering:
        """Answers none of whose prompts is read yet.

        Args:
          lengths: int32 [devices * rows], real tokens of each prompt, the same on every host; 0 where a row is a dummy.
            The i-th device of the mesh gets the i-th block of rows.
          samples: int32 [devices * rows], places in the input.
          prompt_columns: room for a prompt.
          columns: room for a prompt and its answer.
        """
        return self._start(columns, self._put(lengths), self._put(samples), np.int32(prompt_columns), self._seed)

    def read(
        self,
        state: Answering,
        tokens: np.ndarray,
        lengths: np.ndarray,
        rows: np.ndarray,
        made: Interventions = (),
    ) -> Answering:
        """Reads some of the prompts and chooses the first token of each answer; returns at once, `state` is used up.

        Args:
          tokens: int32 [devices * b, t], a slab of each device.
          lengths: int32 [devices * b, n], real tokens of the prompts that lie in each row, one behind the other.
          rows: int32 [devices * b, n], of the device's answers, whose prompts these are; one beyond where none is.
          made: what is changed of the prompts.
        """
        return self._read(self._params, state, *map(self._put, (tokens, lengths, rows)), self._put_changes(made))

    def ready(self, state: Answering) -> Answering:
        """All prompts are read."""
        return self._ready(state)

    def answer(self, state: Answering, following: Interventions = ()) -> tuple[Answering, Array, Array]:
        """`STEPS` more tokens of every answer; returns at once. `following` is what is changed of answers' tokens.

        Returns:
          What goes on from here, in the place of `state`, which is used up; the tokens of all rows on every host,
          int32 [devices * rows, STEPS], NO_TOKEN behind an answer's end; and how many answers are unfinished.
        """
        return self._answer(self._step_params, state, self._put_changes(following))

    def _put_changes(self, made: Interventions) -> Interventions:
        def put(leaf: Any, spec: P) -> Array:
            leaf = np.asarray(leaf)
            return jax.make_array_from_callback(leaf.shape, named(self.mesh, spec), lambda index: leaf[index or ()])

        return jax.tree.map(put, made, tuple(map(specs_of, made)))

    def _on_mesh(self, body: Any, given: Any, gives: Any) -> Any:
        # Gathered parameters are equal on all devices, which the check of varying values cannot see.
        return jax.shard_map(body, mesh=self.mesh, in_specs=given, out_specs=gives, check_vma=False)

    def _put(self, rows: np.ndarray) -> Array:
        """Rows of all devices, of which this host's devices get theirs."""
        return jax.make_array_from_callback(rows.shape, named(self.mesh, BATCH_SPEC), lambda index: rows[index])


@dataclass(frozen=True)
class _Model:
    """What one device computes."""

    decoder: Decoder
    sampling: Sampling
    stops: tuple[int, ...]

    def start(self, columns: int, lengths: Array, samples: Array, prompt_columns: Array, seed: Array) -> Answering:
        config = self.decoder.config
        shape = (config.num_hidden_layers, config.num_key_value_heads, columns, config.head_dim)
        cache = KeyValueCache.empty(lengths, prompt_columns, shape, self.decoder.numerics.dtype)
        return Answering(cache, jnp.zeros_like(lengths), lengths == 0, samples, jnp.int32(0), seed)

    def read(
        self,
        params: Parameters,
        state: Answering,
        tokens: Array,
        lengths: Array,
        rows: Array,
        interventions: Interventions,
    ) -> Answering:
        """Prompts [b, t] into the cache, and the first token of their answers."""
        packing = Packing(lengths, tokens.shape[1])
        memory = Prefill.into(state.cache, packing, rows)
        logits, memory = self._logits(params, tokens, packing, memory, interventions)
        rows = rows.reshape(-1)
        whose = jnp.take(state.samples, rows, mode="clip")
        first = self.sampling.choose(logits.reshape(rows.size, -1), whose, state.step, state.seed)
        return dataclasses.replace(state, cache=memory.cache, token=state.token.at[rows].set(first, mode="drop"))

    def answer(self, params: Parameters, state: Answering, following: Interventions) -> tuple[Answering, Array, Array]:
        """`STEPS` tokens; how many answers are unfinished is counted over all devices."""
        b = state.token.shape[0]
        one = Packing(jnp.ones((b, 1), jnp.int32), 1)

        def step(i: Array, carry: tuple[Answering, Array]) -> tuple[Answering, Array]:
            state, tokens = carry
            told = jnp.where(state.finished, jnp.int32(NO_TOKEN), state.token)
            tokens = jax.lax.dynamic_update_slice(tokens, told[:, None], (jnp.int32(0), i))
            finished = state.finished | jnp.isin(state.token, jnp.asarray(self.stops, jnp.int32))
            memory = Decoding(state.cache, state.step)
            made = tuple(_of_token(each, state.step) for each in following)
            logits, memory = self._logits(params, state.token[:, None], one, memory, made)
            chosen = self.sampling.choose(logits[:, 0], state.samples, state.step + 1, state.seed)
            return Answering(memory.cache, chosen, finished, state.samples, state.step + 1, state.seed), tokens

        # All devices take as many steps, so that parameters can be gathered in each.
        tokens = jnp.full((b, STEPS), NO_TOKEN, jnp.int32)
        state, tokens = jax.lax.fori_loop(jnp.int32(0), jnp.int32(STEPS), step, (state, tokens))
        told = jax.lax.all_gather(tokens, BATCH_AXES, axis=0, tiled=True)
        return state, told, jax.lax.psum(jnp.sum(~state.finished, dtype=jnp.int32), BATCH_AXES)

    def _logits(
        self, params: Parameters, tokens: Array, rows: Packing, memory: Any, interventions: Interventions
    ) -> tuple[Array, Any]:
        """Of the last token of each sample, float32 [b, samples of a row, vocab]."""
        taps, memory = self.decoder.run(params, tokens, self.decoder.taps(_LAST_ROW, rows, interventions), memory)
        return self.decoder.logits(params, taps.buffers["final_norm"][0]), memory


def _of_token(following: Intervention, step: Array) -> Intervention:
    """What is changed of the token of a step of all answers."""
    return dataclasses.replace(following, rows=jax.lax.dynamic_slice_in_dim(following.rows, step, 1, axis=1))


def _ready(state: Answering) -> Answering:
    return dataclasses.replace(state, cache=apart(state.cache))


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
    return Answering(KeyValueCache(stored, stored, rows, alike), rows, rows, rows, alike, alike)
