"""What a step costs beside another, before anything was timed: what a line of progress foretells its end with.

In: a model, a capture plan, slab shapes. Out: costs in products of one token with the matrices of all blocks that run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jax_extract.devices.planner import ModelCounts
from jax_extract.inputs.planning.slabs import SlabShape
from jax_extract.weights.load import parameter_shapes
from jax_extract.weights.open_model import OpenModel
from models.accelerated_attention import computed_pairs
from models.capture_plan import CapturePlan
from models.ports import Port


@dataclass(frozen=True)
class StepCost:
    """Attributes:
    pair: products of attention for one query and one key, over those of a token with the matrices.
    """

    pair: float

    @classmethod
    def of(cls, model: OpenModel, plan: CapturePlan) -> StepCost:
        return cls(pair_work(model, plan))

    def __call__(self, shape: SlabShape) -> float:
        """Of a step whose slabs have this shape: devices compute theirs at the same time."""
        return shape.rows * (shape.length + self.pair * computed_pairs(shape.length, 1))

    def of_all(self, steps: Mapping[SlabShape, int]) -> float:
        """Of so many steps of each shape."""
        return sum(count * self(shape) for shape, count in steps.items())


def pair_work(model: OpenModel, plan: CapturePlan) -> float:
    """See `StepCost.pair`; 0 where no block runs, or nothing is known of their sizes."""
    blocks = plan.blocks_needed(model.config.num_hidden_layers)
    if not blocks or not isinstance(model.family, Port):
        return 0.0
    counts = ModelCounts.of(parameter_shapes(model.port, model.config, blocks, "float32"), model.config, blocks)
    return counts.attention_flops(rows=1, length=1) / counts.product_flops(tokens=1)
