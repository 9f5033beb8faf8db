"""What a forward pass keeps.

In: hook points with their layers, positions, a dtype. Out: `CapturePlan`, static and hashable, so that a program is
compiled for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.positions import Positions

PATTERN_TOKENS = 512  # as many as contexts for such studies have; a row of 16 heads is 32 kB


@dataclass(frozen=True)
class CapturePlan:
    """What a forward pass keeps: static, hashable, known when the program is compiled.

    Attributes:
      layers: (hook point, ascending layers) pairs; the layers are empty where the point has none.
      positions: which token positions of each sample are kept.
      dtype: the dtype of the kept values, cast on the device after everything else.
      pattern_tokens: weights that a row of `attention_pattern` has for each head, on the first tokens of a sample.
    """

    layers: tuple[tuple[str, tuple[int, ...]], ...]
    positions: Positions
    dtype: str = "float32"
    pattern_tokens: int = PATTERN_TOKENS

    def blocks_needed(self, num_layers: int) -> int:
        """How many blocks must run: none above the deepest one asked for.

        The input of block i is the output of block i - 1, so `residual_before` needs one block less.
        """
        needed = 0
        for hook, layers in self.layers:
            if hook == "final_norm":
                return num_layers
            if layers:
                needed = max(needed, max(layers) + (hook != "residual_before"))
        return needed

    def sites(self) -> list[tuple[str, int | None]]:
        """Every (hook point, layer) that is kept, layer None where the point has none."""
        return [(hook, layer) for hook, layers in self.layers for layer in (layers or (None,))]

    def slot(self, hook: str, layer: int | None) -> int:
        """Index of a layer in the hook point's buffer."""
        return 0 if layer is None else dict(self.layers)[hook].index(layer)

    @property
    def needs_final_norm(self) -> bool:
        return any(hook == "final_norm" for hook, _ in self.layers)
