"""How much work an extraction is: the one place where FLOPs, products and padding are counted.

In: a model's config.json and lengths in tokens. Out: numbers. Counted are the matrix products and the causal attention
of the blocks that the deepest layer needs, of real tokens alone; not the embedding, norms, rotations, soft-max, and no
head. A product of [m, k] and [k, n] is 2 m k n FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The sizes that decide the work; `blocks` is how many of them must run."""

    hidden: int
    ffn: int
    query_rows: int
    key_rows: int
    blocks: int

    @classmethod
    def of(cls, config: Mapping[str, Any], layers: Iterable[int]) -> Shape:
        """Of a gated model's config.json, for the outputs of these layers."""
        heads = config["num_attention_heads"]
        width = config.get("head_dim") or config["hidden_size"] // heads
        return cls(
            hidden=config["hidden_size"],
            ffn=config["intermediate_size"],
            query_rows=heads * width,
            key_rows=config["num_key_value_heads"] * width,
            blocks=max(layers) + 1,
        )

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of a block's products: q, k, v in one; attention's output; gate and up in one; down."""
        return (
            (self.hidden, self.query_rows + 2 * self.key_rows),
            (self.query_rows, self.hidden),
            (self.hidden, 2 * self.ffn),
            (self.ffn, self.hidden),
        )

    def flops(self, tokens: int) -> int:
        """Of one sample: token t meets t + 1 keys, twice (logits, then the mix of values)."""
        products = 2 * tokens * sum(inputs * outputs for inputs, outputs in self.products)
        attention = 2 * 2 * self.query_rows * (tokens * (tokens + 1) // 2)
        return self.blocks * (products + attention)


def padding_waste(tokens: int, computed: int) -> float:
    """The share of computed tokens that are not real ones."""
    return 1 - tokens / computed
