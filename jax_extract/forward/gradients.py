"""Gradients of a metric with respect to activations, text by text.

In: samples, hook points with layers, a metric, edits. Out: the metric of each sample, and the gradient at every site
and token. Blocks below the lowest site run without a way back, and of those above the stream alone is remembered;
batches are so small that what comes back stays below a bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jax_extract.devices.platform import PlatformDefaults
from jax_extract.forward.batches import power_below, rounded
from jax_extract.forward.edits import Edits
from jax_extract.forward.many_edits import EditedRow, interventions_of
from jax_extract.forward.suffix import Suffix
from jax_extract.forward.sweeps import Measured, groups_of, padded_texts, rows_of
from jax_extract.inputs.token_table import TokenizedSample
from models.capture_plan import CapturePlan
from models.hooks import HOOK_POINTS, depth
from models.ports import ModelConfig, hook_width

_VALUES_AT_ONCE = 1 << 27  # of gradients, on a device; half a gigabyte


class SampleGradient(NamedTuple):
    """Attributes:
    sample: its number.
    value: of the metric.
    rows: hook point -> float32 [layers, tokens, width], of the tokens before an answer.
    """

    sample: int
    value: Any
    rows: dict[str, np.ndarray]


def gradients(
    program: Suffix,
    config: ModelConfig,
    samples: Sequence[TokenizedSample],
    plan: CapturePlan,
    edits: Edits,
    measured: Measured,
    devices: int,
    defaults: PlatformDefaults,
) -> Iterator[SampleGradient]:
    """Of every site of the plan, whose positions are not looked at; in any order of the samples."""
    layers = {hook: np.array(layers or (0,), np.int32) for hook, layers in plan.layers}
    sites = tuple((hook, len(each)) for hook, each in layers.items())
    values = sum(count * hook_width(config, hook) for hook, count in sites)
    most = min(defaults.slab_tokens, max(1, _VALUES_AT_ONCE // values))
    lowest = min(_block_of(hook, layer, config) for hook, layer in plan.sites())
    if edits.lowest is not None:
        lowest = min(lowest, max(0, edits.lowest[0]))
    for columns, numbers in groups_of(samples, defaults, defaults.slab_tokens):
        group = [samples[i] for i in numbers]
        tokens, lengths = padded_texts(group, columns, devices)
        stream = program.advance(program.enter(tokens, lengths), lengths, 0, lowest)
        each = devices * min(power_below(max(1, most // columns)), rounded(-(-len(group) // devices)))
        for start in range(0, len(group), each):
            whose = list(range(start, min(start + each, len(group))))
            padded = whose + [0] * (each - len(whose))
            edited = [EditedRow(group[i], edits) for i in padded]
            given = rows_of(padded, group, numbers, measured)
            value, gradient = program.differentiate(
                measured.kind, sites, layers, stream, lowest, given, interventions_of(edited, columns, in_place=True)
            )
            for row, i in enumerate(whose):
                rows = {hook: array[:, row, : group[i].prompt_length] for hook, array in gradient.items()}
                yield SampleGradient(numbers[i], value[row], rows)


def _block_of(hook: str, layer: int | None, config: ModelConfig) -> int:
    """The first block that must be on the way back."""
    if HOOK_POINTS[hook].per_layer:
        return depth(hook, layer)[0]
    return 0 if hook == "embeddings" else config.num_hidden_layers
