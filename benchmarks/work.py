"""How much work an extraction is: the one place where FLOPs, products and padding are counted.

In: a model's config.json and lengths in tokens. Out: numbers. Counted are the matrix products and the causal attention
of the blocks that the deepest layer needs, of real tokens alone; not the embedding, norms, rotations, soft-max, and no
head. A product of [m, k] and [k, n] is 2 m k n FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jax_extract.weights.load import parameter_shapes
from models.registry import port_for

_STACKED_MATRIX = 3  # axes: layer, outputs, inputs


@dataclass(frozen=True)
class Shape:
    """The sizes that decide the work.

    Attributes:
      products: (inputs, outputs) of a block's matrix products; queries, keys and values are one, gate and up another.
      query_rows: values that all query heads of a token have together.
      blocks: how many must run.
    """

    products: tuple[tuple[int, int], ...]
    query_rows: int
    blocks: int

    @classmethod
    def of(cls, config: Mapping[str, Any], layers: Iterable[int]) -> Shape:
        """Of a config.json, for the outputs of these layers."""
        port = port_for(config)
        read = port.config(config)
        stacked = parameter_shapes(port, read, 1, "float32")["blocks"].values()
        products = tuple((p.shape[2], p.shape[1]) for p in stacked if len(p.shape) == _STACKED_MATRIX)
        return cls(products, read.query_rows, max(layers) + 1)

    def flops(self, tokens: int) -> int:
        """Of one sample: token t meets t + 1 keys, twice (logits, then the mix of values)."""
        products = 2 * tokens * sum(inputs * outputs for inputs, outputs in self.products)
        attention = 2 * 2 * self.query_rows * (tokens * (tokens + 1) // 2)
        return self.blocks * (products + attention)


def padding_waste(tokens: int, computed: int) -> float:
    """The share of computed tokens that are not real ones; of one device, which is never idle, padding within rows."""
    return 1 - tokens / computed
