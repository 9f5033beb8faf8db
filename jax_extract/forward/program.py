"""The compiled forward of the door: activations that are kept, logits at chosen tokens, log-probabilities of answers.

In: a decoder with a head, parameters on a mesh, a batch, interventions. Out: arrays on the host. The body is written
per device (`shard_map`): each computes its own rows, and only parameters cross devices. One program serves every
layer, token and operand of an intervention; what is compiled for is in `Wanted`, in the shapes, and in the kinds of
interventions. Dimension letters: b rows, t tokens, n samples of a row, d width, v vocabulary, k rows of logits, a
tokens of answers.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_extract.devices.sharding import BATCH_SPEC, CAPTURE_SPEC, make_gather
from jax_extract.forward.batches import rounded
from models.capture_plan import CapturePlan
from models.decoder import Decoder
from models.interventions import Intervention
from models.layers import Numerics
from models.packing import Packing
from models.ports import ModelConfig, Parameters, Port
from models.self_attention import WithinRows

_LOGITS_AT_ONCE = 1 << 24  # values, where nobody wants to have them


class Wanted(NamedTuple):
    """What a program gives: static."""

    plan: CapturePlan
    logits: bool = False
    answers: bool = False

    @property
    def has_head(self) -> bool:
        return self.logits or self.answers


class Inputs(NamedTuple):
    """Attributes:
    tokens: int32 [b, t].
    lengths: int32 [b, n], real tokens of the samples that lie in each row, one behind the other.
    logits_at: int32 [b, k], columns whose logits are given.
    answers_at: int32 [b, a], columns before each token of an answer.
    answers: int32 [b, a], these tokens.
    """

    tokens: Any
    lengths: Any
    logits_at: Any
    answers_at: Any
    answers: Any


class Outputs(NamedTuple):
    """Attributes:
    kept: hook point -> [slots, b, rows, d].
    logits: float32 [b, k, v].
    answers: float32 [b, a], the log-probability of each token of an answer, in nats.
    """

    kept: Any
    logits: Any
    answers: Any


class ForwardProgram:
    def __init__(self, port: Port, config: ModelConfig, params: Parameters, mesh: Mesh, numerics: Numerics) -> None:
        """`params` are those of all blocks, and of the head."""
        self.mesh = mesh
        self.params = params
        self.specs = jax.tree.map(lambda parameter: parameter.sharding.spec, params)
        self.decoder = Decoder(port, config, numerics, make_gather(self.specs))
        self._run = jax.jit(self._on_mesh, static_argnums=0)
        self._lens = jax.jit(self._lens_on_mesh)
        self._losses = jax.jit(self._losses_on_mesh)

    def run(self, wanted: Wanted, inputs: Inputs, interventions: tuple[Intervention, ...] = ()) -> Outputs:
        """On the host; waits for it."""
        return jax.tree.map(np.asarray, self._run(wanted, self.params, inputs, interventions))

    def logits_of(self, rows: np.ndarray) -> np.ndarray:
        """Rows float32 [n, d] of the residual stream behind final norm and head -> [n, v]."""
        return np.asarray(self._lens(self.params, self._for_devices(rows)[:, None]))[: len(rows), 0]

    def next_token_losses(self, rows: np.ndarray, reference: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """float32 [n, 2], in nats: how unlikely the tokens int32 [n] are behind rows float32 [n, d] of the residual
        stream, and the KL divergence of that prediction from the one behind the rows of `reference`.
        """
        given = [self._for_devices(each)[:, None] for each in (rows, reference)]
        return np.asarray(self._losses(self.params, *given, self._for_devices(tokens)))[: len(rows)]

    def _for_devices(self, rows: np.ndarray) -> np.ndarray:
        """Padded with zeros to as many as devices can share, of which there are few lengths."""
        size = self.mesh.size * rounded(-(-len(rows) // self.mesh.size))
        return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])

    def _losses_on_mesh(self, params: Parameters, rows: Array, reference: Array, tokens: Array) -> Array:
        def on_device(params: Parameters, rows: Array, reference: Array, tokens: Array) -> Array:
            decoder = self.decoder

            def log_probabilities(rows: Array) -> Array:
                x = decoder.port.final_norm(decoder.config, params, rows, decoder.gather)
                return jax.nn.log_softmax(decoder.logits(params, x)[:, 0].astype(jnp.float32))

            found, expected = log_probabilities(rows), log_probabilities(reference)
            missed = -jnp.take_along_axis(found, tokens[:, None], axis=1)[:, 0]
            return jnp.stack([missed, jnp.sum(jnp.exp(expected) * (expected - found), axis=1)], axis=1)

        given = (self.specs, BATCH_SPEC, BATCH_SPEC, BATCH_SPEC)
        return jax.shard_map(on_device, mesh=self.mesh, in_specs=given, out_specs=BATCH_SPEC, check_vma=False)(
            params, rows, reference, tokens
        )

    def _lens_on_mesh(self, params: Parameters, rows: Array) -> Array:
        def on_device(params: Parameters, rows: Array) -> Array:
            x = self.decoder.port.final_norm(self.decoder.config, params, rows, self.decoder.gather)
            return self.decoder.logits(params, x)

        given = (self.specs, BATCH_SPEC)
        return jax.shard_map(on_device, mesh=self.mesh, in_specs=given, out_specs=BATCH_SPEC, check_vma=False)(
            params, rows
        )

    def _on_mesh(
        self, wanted: Wanted, params: Parameters, inputs: Inputs, interventions: tuple[Intervention, ...]
    ) -> Outputs:
        given = Inputs(*[BATCH_SPEC] * len(inputs))
        return jax.shard_map(
            partial(self._on_device, wanted),
            mesh=self.mesh,
            in_specs=(self.specs, given, tuple(map(specs_of, interventions))),
            out_specs=Outputs(CAPTURE_SPEC, BATCH_SPEC, BATCH_SPEC),
            check_vma=False,  # what was gathered is equal on all devices, which it cannot see
        )(params, inputs, interventions)

    def _on_device(
        self, wanted: Wanted, params: Parameters, inputs: Inputs, interventions: tuple[Intervention, ...]
    ) -> Outputs:
        decoder, tokens = self.decoder, jnp.asarray(inputs.tokens)
        packing = Packing(inputs.lengths, tokens.shape[1])
        attention = WithinRows(packing.positions)
        blocks = decoder.config.num_hidden_layers if wanted.has_head else None
        taps = decoder.taps(wanted.plan, packing, interventions, blocks)
        x, taps = decoder.embed(params, tokens, taps, attention)
        x, taps, _ = decoder.blocks(params, x, taps, attention)
        if wanted.has_head or wanted.plan.needs_final_norm:
            x, taps = decoder.final_norm(params, x, taps)
        kept = {hook: taps.buffers[hook][: max(1, len(layers))] for hook, layers in wanted.plan.layers}
        nothing = jnp.zeros((tokens.shape[0], 0), jnp.float32)
        logits = decoder.logits(params, taken(x, inputs.logits_at)) if wanted.logits else nothing
        answers = nothing
        if wanted.answers:
            answers = answer_log_probabilities(decoder, params, x, inputs.answers_at, inputs.answers)
        return Outputs(kept, logits, answers)


def specs_of(intervention: Intervention) -> Intervention:
    """How an intervention lies on the mesh: what is of the rows of the batch with them, the rest on all devices."""
    per_row = intervention.layers.shape[0] > 1
    shared = intervention.shared or (True,) * len(jax.tree.leaves(intervention.operand))
    if intervention.by_device:
        shared = (False,)
    structure = jax.tree.structure(intervention.operand)
    operand = jax.tree.unflatten(structure, [P() if alike else BATCH_SPEC for alike in shared])
    layers: Any = BATCH_SPEC if per_row else P()
    rows: Any = BATCH_SPEC
    return dataclasses.replace(intervention, layers=layers, rows=rows, operand=operand)


def taken(x: Array, columns: Array) -> Array:
    """x [b, t, d], columns int32 [b, k] -> [b, k, d]."""
    return jnp.take_along_axis(x, columns[:, :, None], axis=1)


def answer_log_probabilities(decoder: Decoder, params: Parameters, x: Array, columns: Array, answers: Array) -> Array:
    """The log-probability of given tokens, float32 [b, a]; logits exist for some columns at a time.

    Args:
      x: float32 [b, t, d], behind the final norm.
      columns: int32 [b, a], each before the token.
      answers: int32 [b, a], the tokens.
    """
    b, a = columns.shape
    most = max(1, _LOGITS_AT_ONCE // (b * decoder.config.vocab_size))
    pieces = 1
    while a > pieces * most and pieces < a:  # both are powers of two
        pieces *= 2

    def some(given: tuple[Array, Array]) -> Array:
        logits = decoder.logits(params, taken(x, given[0]))
        chosen = jnp.take_along_axis(logits, given[1][:, :, None], axis=2)[:, :, 0]
        return chosen - jax.nn.logsumexp(logits, axis=2)

    def cut(values: Array) -> Array:
        return values.reshape(b, pieces, a // pieces).transpose(1, 0, 2)

    return jax.lax.map(some, (cut(columns), cut(answers))).transpose(1, 0, 2).reshape(b, a)
