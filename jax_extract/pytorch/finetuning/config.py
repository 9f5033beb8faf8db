"""The configuration of a fine-tuning, which is also its command line.

In: flags. Out: `FinetuneConfig`, checked as far as it can be without files and devices. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from jax_extract.errors import UserError
from jax_extract.inputs.benchmarks import MAX_LENGTH, VALIDATION_SAMPLES, Benchmark, benchmark_named
from jax_extract.inputs.benchmarks_prompts import ANSWER_TOKENS

Method = Literal["full_finetune", "lora"]

LARGEST_SEED = 2**32 - 1  # that NumPy takes

_LARGEST = 2**31 - 1
_LEARNING_RATES = {"full_finetune": 2e-5, "lora": 2e-4}
# What may differ between a command and the one that goes on with its work: where things are, and what is kept.
_PLACES = frozenset("model_path revision output_dir train_file validation_file save_steps keep_checkpoints".split())


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tune a decoder on MRPC, SST-2, RTE or SQuAD v2, into OUTPUT_DIR/METHOD_TIME/final_model.

    The same command again goes on where it was stopped.

    Several GPUs: accelerate launch -m jax_extract.cli finetune …

    Attributes:
      model_path: Hugging Face folder or hub id.
      task: mrpc, sst2, rte or squad_v2.
      method: all weights (full_finetune) or a LoRA adapter.
      seed: of the order of examples, of dropout and of the adapter's start.
      output_dir: where METHOD_TIME is made.
      train_file: local .jsonl or .csv with the task's columns, instead of the hub's; with validation_file.
      validation_file: the same for validation.
      revision: branch, tag or commit of a hub model.
      dataset_revision: the same of the hub's dataset.
      train_samples: only so many training examples, from the first.
      validation_samples: so many validation examples, from the first; all where there are fewer.
      max_length: of prompt and answer, in tokens; longer texts are shortened.
      batch_size: examples a device computes at once.
      gradient_accumulation_steps: batches of every device that make one step.
      epochs: how often all training examples are seen.
      max_steps: so many steps instead.
      learning_rate: at its highest; by default 2e-5 for full_finetune and 2e-4 for lora.
      warmup_ratio: share of the steps in which the learning rate rises; then it falls to 0 in a straight line.
      weight_decay: of AdamW.
      lora_rank: of the adapter's matrices.
      lora_alpha: the adapter is scaled by lora_alpha / lora_rank.
      lora_dropout: of what enters the adapter.
      lora_target_modules: names of adapted modules; by default all linear layers but the head.
      dtype: of matrix products; by default bfloat16 on GPUs that have it, else float32. Weights are float32.
      device: cpu or cuda; by default cuda where there is one.
      save_steps: steps from one checkpoint to the next.
      keep_checkpoints: keep all checkpoints, also when training is done.
    """

    model_path: str = ""
    task: str = ""
    method: Method = "full_finetune"
    seed: int = 42
    output_dir: str = "results"
    train_file: str | None = None
    validation_file: str | None = None
    revision: str | None = None
    dataset_revision: str | None = None
    train_samples: int | None = None
    validation_samples: int = VALIDATION_SAMPLES
    max_length: int = MAX_LENGTH
    batch_size: int = 4
    gradient_accumulation_steps: int = 4
    epochs: float = 3.0
    max_steps: int | None = None
    learning_rate: float | None = None
    warmup_ratio: float = 0.06
    weight_decay: float = 0.0
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    lora_target_modules: tuple[str, ...] | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    device: Literal["cpu", "cuda"] | None = None
    save_steps: int = 500
    keep_checkpoints: bool = False

    @property
    def benchmark(self) -> Benchmark:
        return benchmark_named(self.task)

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate if self.learning_rate is not None else _LEARNING_RATES[self.method]

    def check(self) -> None:
        """UserError for what no training can be done with."""
        names = "mrpc, sst2, rte or squad_v2"
        for name, what in (("model_path", "a Hugging Face folder or a hub id"), ("task", names)):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing; give {what}")
        benchmark = self.benchmark
        if (self.train_file is None) != (self.validation_file is None):
            raise UserError("--train_file and --validation_file belong together; give both, or neither for the hub's")
        if self.train_file is not None and self.dataset_revision is not None:
            raise UserError(
                f"--dataset_revision {self.dataset_revision!r} is of the hub's {benchmark.dataset}, and "
                "--train_file is a local file; leave one of them out"
            )
        self._check_numbers()
        self._check_lora()

    def _check_numbers(self) -> None:
        counts = (
            "batch_size gradient_accumulation_steps validation_samples train_samples max_steps lora_rank save_steps"
        )
        for name in counts.split():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _LARGEST:
                raise UserError(f"--{name} {value} must be from 1 to {_LARGEST}")
        if not 2 * ANSWER_TOKENS <= self.max_length <= _LARGEST:
            raise UserError(
                f"--max_length {self.max_length} must be at least {2 * ANSWER_TOKENS}: {ANSWER_TOKENS} tokens are "
                "kept for the answer"
            )
        if not 0 <= self.seed <= LARGEST_SEED:
            raise UserError(f"--seed {self.seed} must be from 0 to {LARGEST_SEED}")
        for name in ("epochs", "learning_rate", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"--{name} {value} must be a number above 0")
        for name in ("warmup_ratio", "weight_decay", "lora_dropout"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise UserError(f"--{name} {value} must be at least 0 and below 1")

    def _check_lora(self) -> None:
        if self.lora_target_modules is not None and not self.lora_target_modules:
            raise UserError("--lora_target_modules is empty; name at least one module, or leave the flag out")
        if self.method == "lora":
            return
        for field in dataclasses.fields(self):
            if field.name.startswith("lora_") and getattr(self, field.name) != field.default:
                raise UserError(f"--{field.name} is of LoRA adapters, and --method is {self.method}; leave one out")

    def options(self) -> dict[str, Any]:
        """All options as plain values, the task by its own name."""
        values = {**dataclasses.asdict(self), "task": self.benchmark.name}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def deciding(self) -> dict[str, Any]:
        """Those options that decide what comes out, beside the files' contents."""
        decisive = {name: value for name, value in self.options().items() if name not in _PLACES}
        decisive["learning_rate"] = self.peak_learning_rate
        if self.max_steps is not None:
            del decisive["epochs"]
        return decisive
