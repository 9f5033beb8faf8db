"""The configuration of a training: one frozen dataclass, which is also the command line.

In: flags, named and set as the variables of launch/stage02/02a_model_training.sh. Out: `TrainConfig`, checked as far
as that goes without looking at files or devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jax_extract.devices.choice import DeviceChoice
from jax_extract.errors import UserError
from jax_extract.inputs.walk_dataset import TEXT_COLUMN

_MOST = 2**31 - 1
_LARGEST_RATE = 1e38  # of float32


@dataclass(frozen=True)
class TrainConfig:
    """Train a small language model on walks.

    The same command again goes on from the last whole checkpoint.

    Attributes:
      model_config: Hugging Face config.json of a Llama, Mistral, Qwen2 or Qwen3; the data decides its vocabulary.
      dataset_dir: folder with train.jsonl, validation.jsonl and vocab.json, as jax-extract walks makes it.
      output_dir: where checkpoint-STEP/ and final_model/ are written.
      epochs: how often every walk is seen.
      batch_size: walks of a batch, over all devices together.
      grad_accum: batches whose gradients make one step.
      learning_rate: of the first step; it falls linearly to 0.
      max_length: tokens of a walk; what is behind them is cut off.
      save_steps: a checkpoint every so many steps.
      eval_steps: the loss on validation.jsonl every so many steps, and at the end.
      logging_steps: a line every so many steps.
      seed: of the first weights and of the order of the walks.
      dtype: operands of matrix products; parameters, sums and the optimizer are float32.
      device: auto, cpu, gpu or tpu.
      mesh_shape: DATA,MODEL over all devices; by default all on DATA. The batch is shared between all of them.
      text_column: field of the .jsonl files that holds the walk, words between spaces.
      overwrite: remove the training in output_dir and start anew.
      allow_numeric_change: go on although devices or library versions changed, which changes the last bits.
      check_only: refuse what would be refused of these options, and train nothing; dataset_dir may still have to be
        made.
    """

    model_config: str
    dataset_dir: str
    output_dir: str
    epochs: int = 1
    batch_size: int = 50
    grad_accum: int = 1
    learning_rate: float = 5e-4
    max_length: int = 128
    save_steps: int = 200
    eval_steps: int = 200
    logging_steps: int = 10
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: DeviceChoice = "auto"
    mesh_shape: str | None = None
    text_column: str = TEXT_COLUMN
    overwrite: bool = False
    allow_numeric_change: bool = False
    check_only: bool = False

    def check(self) -> None:
        for name in "epochs batch_size grad_accum save_steps eval_steps logging_steps".split():
            if not 1 <= getattr(self, name) <= _MOST:
                raise UserError(f"--{name} {getattr(self, name)} must be from 1 to {_MOST}")
        if not 2 <= self.max_length <= _MOST:  # noqa: PLR2004 (one token predicts nothing)
            raise UserError(f"--max_length {self.max_length} must be from 2 to {_MOST}")
        if not 0 <= self.seed <= _MOST:
            raise UserError(f"--seed {self.seed} must be from 0 to {_MOST}")
        if not (0 < self.learning_rate < _LARGEST_RATE):
            raise UserError(f"--learning_rate {self.learning_rate} must be a positive number below {_LARGEST_RATE:g}")
