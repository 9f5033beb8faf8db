"""The configuration of `jax-extract compile`, which is also its command line.

In: flags. Out: `CompileConfig`, validated as far as it can be without a model or a compiler. Options that an extraction
has too are spelled as there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jax_extract.config import check_captures
from jax_extract.errors import UserError
from models.hooks import DEFAULT_HOOK_POINT


@dataclass(frozen=True)
class CompileConfig:
    """Compile an extraction for a TPU slice that you do not have, and say what it needs there.

    Attributes:
      model_path: folder with config.json, .gguf file, hub id, or a known model such as qwen2.5-7b; no weights needed.
      topology: chip and slice, such as v5e:8x8.
      revision: branch, tag or commit of a hub model.
      layers_to_extract: layers, counted from 0; by default 10 to 23, or what the model has of them.
      hook_points: where in the block, by name, TransformerLens name or glob.
      positions: which tokens: all, last, mean, first:n, every:k, at:i,j,…
      dtype: of the computation.
      capture_dtype: of the stored values.
      batch_size: sequences per chip.
      mesh_shape: DATA,MODEL over all chips; by default all on DATA.
      max_seq_length: longest sample in tokens; by default the smaller of 8192 and what the model allows.
      slab_tokens: most tokens one chip computes at once.
      layout: how parameters lie: auto as an extraction chooses; others are for comparison.
      search: look for the largest batch that fits, by compiling a few more programs.
      tokens: of the whole run, for its hours and cost.
      price_per_chip_hour: in any currency.
      share_of_peak: what products reach of the chip's published peak; an assumption, not a measurement.
      host_gb_per_second: what one host brings to disk or bucket; an assumption, which jax-extract estimate can measure.
      explain: show what was counted for every layout.
    """

    model_path: str = ""
    topology: str = "v5e:8x8"
    revision: str | None = None
    layers_to_extract: tuple[int, ...] | None = None
    hook_points: tuple[str, ...] = (DEFAULT_HOOK_POINT,)
    positions: str = "last"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    capture_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int = 8
    mesh_shape: str | None = None
    max_seq_length: int | None = None
    slab_tokens: int | None = None
    layout: Literal["auto", "replicated", "gathered", "gathered_both"] = "auto"
    search: bool = True
    tokens: int | None = None
    price_per_chip_hour: float | None = None
    share_of_peak: float = 0.5
    host_gb_per_second: float = 1.0
    explain: bool = False

    def check(self) -> None:
        if not self.model_path:
            raise UserError("no model was given; pass --model_path, such as qwen2.5-7b or a folder with config.json")
        check_captures(self)
        for name in ("tokens", "price_per_chip_hour"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"--{name} {value} must be a positive number")
        if not 0 < self.share_of_peak <= 1:
            raise UserError(f"--share_of_peak {self.share_of_peak} must be above 0 and at most 1; 0.5 is half the peak")
        if not 0 < self.host_gb_per_second < math.inf:
            raise UserError(f"--host_gb_per_second {self.host_gb_per_second} must be a positive number of gigabytes")
