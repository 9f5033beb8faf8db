"""The configuration of `jax-extract compile`, which is also its command line.

In: flags. Out: `CompileConfig`, validated as far as it can be without a model or a compiler. Options that an extraction
has too are spelled as there.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from jax_extract.config import ExtractConfig, check_captures
from jax_extract.errors import UserError
from jax_extract.layer_words import OPTION, LayerWord, layer_words
from models.capture_plan import PATTERN_TOKENS
from models.hooks import DEFAULT_HOOK_POINT

_MOST_SAMPLES = 2**31 - 1


@dataclass(frozen=True)
class CompileConfig:
    """Compile an extraction for a TPU slice that you do not have, and say what it needs there.

    Attributes:
      model_path: folder with config.json, .gguf file, hub id, or a known model such as qwen2.5-7b; no weights needed.
      topology: chip and slice, such as v5e:8x8.
      tasks_file: inputs of the run, as an extraction takes them, which are tokenised: then the run's own steps are
        planned and counted. Needs the model's tokenizer.
      text_column: the column or JSON field that holds the text.
      n_samples: how many samples; more than there are makes augmented ARC samples, or repeats lengths in turn.
      grid_encoder: how ARC grids become text: digits, spaced, json or letters.
      chat_template: put each text through the tokenizer's chat template as a user's turn.
      lengths: instead of tasks_file a file of how many tokens each sample has, one a line or a JSON list.
      revision: branch, tag or commit of a hub model.
      layers_to_extract: layers (--layers and --layer mean the same), counted from 0, or from the end: 12, -1 (the
        last), 10-23 (both among them), all, or several of these; by default 10-23, or what the model has of them.
      hook_points: where in the block, by name, TransformerLens name or glob.
      attention_pattern_tokens: of attention_pattern: weights that a row has for each head, and the most tokens of a
        sample.
      positions: which tokens: all, from:k, last, mean, mean_from:k, first:n, every:k, at:i,j,…
      dtype: of the computation.
      capture_dtype: of the stored values.
      batch_size: sequences per chip.
      mesh_shape: DATA,MODEL over all chips; by default all on DATA.
      max_seq_length: longest sample in tokens; by default the smaller of 8192 and what the model allows.
      slab_tokens: most tokens one chip computes at once.
      layout: how parameters lie: auto as an extraction chooses; others are for comparison.
      search: look for the largest batch that fits, by compiling a few more programs; with inputs, compile every slab
        shape of the plan, not only the one that carries most tokens.
      tokens: of the whole run where no inputs are given, for its hours and cost.
      price_per_chip_hour: in any currency.
      share_of_peak: what products reach of the chip's published peak; an assumption, not a measurement.
      host_gb_per_second: what one host brings to disk or bucket; an assumption, which jax-extract estimate can measure.
      host_tokens_per_second: what one host reads and tokenises; an assumption, which jax-extract estimate can measure:
        the default is what two cores do.
      explain: show what was counted for every layout.
    """

    model_path: str = ""
    topology: str = "v5e:8x8"
    tasks_file: str | None = None
    text_column: str | None = None
    n_samples: int | None = None
    grid_encoder: str = "digits"
    chat_template: bool = False
    lengths: str | None = None
    revision: str | None = None
    layers_to_extract: tuple[LayerWord, ...] | None = None
    hook_points: tuple[str, ...] = (DEFAULT_HOOK_POINT,)
    attention_pattern_tokens: int = PATTERN_TOKENS
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
    host_tokens_per_second: float = 1_500_000
    explain: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, OPTION, layer_words(self.layers_to_extract))

    def check(self) -> None:
        if not self.model_path:
            raise UserError("no model was given; pass --model_path, such as qwen2.5-7b or a folder with config.json")
        check_captures(self)
        self._check_input()
        for name in ("tokens", "price_per_chip_hour", "host_gb_per_second", "host_tokens_per_second"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"--{name} {value} must be a positive number")
        if not 0 < self.share_of_peak <= 1:
            raise UserError(f"--share_of_peak {self.share_of_peak} must be above 0 and at most 1; 0.5 is half the peak")

    def _check_input(self) -> None:
        if self.tasks_file is not None and self.lengths is not None:
            raise UserError("--tasks_file and --lengths both say what the samples are; leave one of the two out")
        given = self.tasks_file or self.lengths
        if given and self.tokens is not None:
            raise UserError(f"--tokens {self.tokens} is for runs without inputs, and {given} says how many there are")
        if self.n_samples is not None and not given:
            raise UserError("--n_samples needs samples; give --tasks_file FILE, or --lengths FILE with token counts")
        if self.n_samples is not None and not 1 <= self.n_samples <= _MOST_SAMPLES:
            raise UserError(f"--n_samples {self.n_samples} must be from 1 to {_MOST_SAMPLES:,}")
        for name in ("text_column", "chat_template", "grid_encoder"):
            if getattr(self, name) != getattr(CompileConfig, name) and self.tasks_file is None:
                raise UserError(f"--{name} is about texts, and none are given; add --tasks_file FILE")

    def as_extraction(self) -> ExtractConfig:
        """The extraction that is asked about."""
        known = {field.name for field in dataclasses.fields(ExtractConfig)}
        return ExtractConfig(**{name: value for name, value in vars(self).items() if name in known})
