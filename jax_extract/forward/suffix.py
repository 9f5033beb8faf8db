"""Many edits of one text, and gradients: the blocks below the lowest one that matters run once, those above again.

In: a `ForwardProgram`'s decoder and parameters, texts with a row each, interventions. Out: the metric of each row; the
gradient of its sum. What enters a block is kept on the devices, each of which has the streams of all texts; rows of a
batch, which may be edits of any of them, are shared out. Where to begin is traced: one program serves every layer.
Dimension letters: m texts, b rows, t tokens, d width, k layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

from jax_extract.devices.mesh import BATCH_AXES
from jax_extract.devices.sharding import BATCH_SPEC, CAPTURE_SPEC
from jax_extract.forward.metrics import Function, MetricInputs, measured, require_one_number
from jax_extract.forward.program import ForwardProgram, specs_of
from models.capture_plan import CapturePlan
from models.causal_rows import CausalRows
from models.interventions import Intervention
from models.packing import Packing
from models.ports import Parameters, hook_width
from models.positions import Positions
from models.self_attention import WithinRows

_NOTHING = CapturePlan((), Positions("all"))
Interventions = tuple[Intervention, ...]


class Rows(NamedTuple):
    """Attributes:
    text: int32 [b], whose stream each row begins with.
    lengths: int32 [b], its tokens.
    metric: what its logits are judged by.
    """

    text: Any
    lengths: Any
    metric: MetricInputs


_ROWS_SPEC = Rows(BATCH_SPEC, BATCH_SPEC, MetricInputs(BATCH_SPEC, BATCH_SPEC, BATCH_SPEC))


class Suffix(Protocol):
    """What computes them; see `SuffixProgram`. A stream is whatever it likes to be given again."""

    def enter(self, tokens: np.ndarray, lengths: np.ndarray) -> Any: ...
    def advance(self, stream: Any, lengths: np.ndarray, first: int, last: int) -> Any: ...
    def measure(
        self, kind: str | Function, stream: Any, first: int, rows: Rows, interventions: Interventions
    ) -> Any: ...
    def differentiate(
        self,
        kind: str | Function,
        sites: tuple[tuple[str, int], ...],
        layers: Mapping[str, np.ndarray],
        stream: Any,
        first: int,
        rows: Rows,
        interventions: Interventions,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]: ...


class SuffixProgram:
    """The compiled ones."""

    def __init__(self, whole: ForwardProgram) -> None:
        self._whole = whole
        self._enter = jax.jit(self._enter_on_mesh)
        self._advance = jax.jit(self._advance_on_mesh)
        self._measure = jax.jit(self._measure_on_mesh, static_argnums=0)
        self._differentiate = jax.jit(self._differentiate_on_mesh, static_argnums=(0, 1))

    def enter(self, tokens: np.ndarray, lengths: np.ndarray) -> Array:
        """The stream that enters block 0, float32 [m, t, d] on every device, of texts int32 [m, t], of lengths [m]."""
        return self._enter(self._whole.params, tokens, lengths)

    def advance(self, stream: Array, lengths: np.ndarray, first: int, last: int) -> Array:
        """The stream that enters block `last`, of that which enters block `first`."""
        if first == last:
            return stream
        return self._advance(self._whole.params, stream, lengths, np.int32(first), np.int32(last))

    def measure(
        self, kind: str | Function, stream: Array, first: int, rows: Rows, interventions: Interventions
    ) -> np.ndarray:
        """The metric of each row [b] under its interventions; `stream` is what enters block `first`."""
        return jax.tree.map(
            np.asarray, self._measure(kind, self._whole.params, stream, np.int32(first), rows, interventions)
        )

    def differentiate(
        self,
        kind: str | Function,
        sites: tuple[tuple[str, int], ...],
        layers: Mapping[str, np.ndarray],
        stream: Array,
        first: int,
        rows: Rows,
        interventions: Interventions,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The metric of each row, and its gradient.

        Args:
          sites: hook point and how many of its layers.
          layers: hook point -> int32 [k], which.

        Returns:
          float32 [b]; hook point -> float32 [k, b, t, width].
        """
        params = self._whole.params
        given = self._differentiate(kind, sites, params, dict(layers), stream, np.int32(first), rows, interventions)
        return jax.tree.map(np.asarray, given)

    # -------------------------------------------------------------------------------------- on the mesh

    def _on_mesh(self, body: Any, given: Any, gives: Any) -> Any:
        specs = (self._whole.specs, *given)
        return jax.shard_map(body, mesh=self._whole.mesh, in_specs=specs, out_specs=gives, check_vma=False)

    def _enter_on_mesh(self, params: Parameters, tokens: Array, lengths: Array) -> Array:
        def body(params: Parameters, tokens: Array, lengths: Array) -> Array:
            decoder, packing = self._whole.decoder, Packing(lengths[:, None], tokens.shape[1])
            places = WithinRows(packing.positions)
            x, _ = decoder.embed(params, tokens, decoder.taps(_NOTHING, packing), places)
            return _everywhere(x)

        return self._on_mesh(body, (BATCH_SPEC, BATCH_SPEC), P())(params, tokens, lengths)

    def _advance_on_mesh(self, params: Parameters, stream: Array, lengths: Array, first: Array, last: Array) -> Array:
        def body(params: Parameters, x: Array, lengths: Array, first: Array, last: Array) -> Array:
            decoder, packing = self._whole.decoder, Packing(lengths[:, None], x.shape[1])
            taps = decoder.taps(_NOTHING, packing, num_blocks=decoder.config.num_hidden_layers)
            x, _, _ = decoder.blocks(params, x, taps, WithinRows(packing.positions), first, last)
            return _everywhere(x)

        return self._on_mesh(body, (BATCH_SPEC, BATCH_SPEC, P(), P()), P())(params, stream, lengths, first, last)

    def _measure_on_mesh(
        self,
        kind: str | Function,
        params: Parameters,
        stream: Array,
        first: Array,
        rows: Rows,
        interventions: Interventions,
    ) -> Any:
        def body(params: Parameters, stream: Array, first: Array, rows: Rows, interventions: Interventions) -> Any:
            decoder, packing = self._whole.decoder, Packing(rows.lengths[:, None], stream.shape[1])
            taps = decoder.taps(_NOTHING, packing, interventions, decoder.config.num_hidden_layers)
            x = taps.change("embeddings", None, jnp.take(stream, rows.text, axis=0))
            x, taps, _ = decoder.blocks(params, x, taps, WithinRows(packing.positions), first)
            x, _ = decoder.final_norm(params, x, taps)
            return measured(kind, decoder, params, x, rows.metric)

        given = (P(), P(), _ROWS_SPEC, tuple(map(specs_of, interventions)))
        return self._on_mesh(body, given, BATCH_SPEC)(params, stream, first, rows, interventions)

    def _differentiate_on_mesh(
        self,
        kind: str | Function,
        sites: tuple[tuple[str, int], ...],
        params: Parameters,
        layers: dict[str, Array],
        stream: Array,
        first: Array,
        rows: Rows,
        interventions: Interventions,
    ) -> Any:
        decoder = self._whole.decoder

        def body(
            params: Parameters,
            layers: dict[str, Array],
            stream: Array,
            first: Array,
            rows: Rows,
            interventions: Interventions,
        ) -> Any:
            packing = Packing(rows.lengths[:, None], stream.shape[1])
            taps = decoder.taps(_NOTHING, packing, interventions, decoder.config.num_hidden_layers)
            entering = jnp.take(stream, rows.text, axis=0)
            b, t, _ = entering.shape

            def sum_of(zeros: dict[str, Array]) -> tuple[Array, Array]:
                probes = {hook: (layers[hook], zeros[hook]) for hook in zeros}
                outside = dataclasses.replace(taps, probes=probes)
                x = outside.change("embeddings", None, entering)
                attention = CausalRows(packing.positions)
                x, _, _ = decoder.blocks(params, x, taps, attention, first, probes=probes)
                x, _ = decoder.final_norm(params, x, outside)
                values = measured(kind, decoder, params, x, rows.metric)
                require_one_number(kind, values, b)
                return jnp.sum(values), values

            zeros = {hook: jnp.zeros((k, b, t, hook_width(decoder.config, hook)), jnp.float32) for hook, k in sites}
            gradient, values = jax.grad(sum_of, has_aux=True)(zeros)
            return values, gradient

        given = (P(), P(), P(), _ROWS_SPEC, tuple(map(specs_of, interventions)))
        gives = (BATCH_SPEC, {hook: CAPTURE_SPEC for hook, _ in sites})
        return self._on_mesh(body, given, gives)(params, layers, stream, first, rows, interventions)


def _everywhere(x: Array) -> Array:
    """Rows of all devices on each of them."""
    return jax.lax.all_gather(x, BATCH_AXES, axis=0, tiled=True)
