"""The configuration of phase 3, which is also its command line.

In: flags. Out: `PostTrainingConfig`, checked as far as it can be without files and devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jax_extract.errors import UserError, user_path
from jax_extract.inputs.benchmarks import benchmark_named
from jax_extract.inputs.benchmarks_prompts import ANSWER_TOKENS
from jax_extract.post_training.pooling import pooling_of
from jax_extract.pytorch.finetuning.folder import METHODS

_LARGEST = 2**31 - 1
_LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class PostTrainingConfig:
    """Representations of all models that were trained in a results folder, and of their base model.

    Each prompt of a task's validation samples gives one row a layer.

    The same command again goes on where it was.

    Attributes:
      results_dir: the folder with full_finetune_TIME/ and lora_TIME/ that jax-extract finetune has filled.
      tasks: only models of these tasks: mrpc, sst2, rte, squad_v2.
      methods: only models of these methods: full_finetune, lora.
      seeds: only models with these seeds.
      models: only these models, by name (lora_mrpc_seed42) or by their folder in results_dir (lora_20261121_230000).
      checkpoints: also the checkpoints of a training that were kept (--keep_checkpoints), as step_000500 and so on.
      skip_half_saved: pass over folders whose training is not done, instead of refusing them.
      model_path: one model that was trained elsewhere, by its folder (of an adapter too), instead of results_dir; with
        its task, method and seed.
      base: also the base model, on the tasks of the trained ones.
      base_model: where the base model is now; by default where it was when it was trained.
      output_dir: by default RESULTS_DIR/phase3_representations/representations.
      base_dir: for the base model; by default base_representations, beside RESULTS_DIR.
      data_dir: local validation data, TASK/validation.jsonl or .csv in it; by default what models were trained with.
      validation_samples: so many from the first, all where there are fewer; by default as the models were trained.
      max_length: of a prompt with its answer, in tokens; by default as the models were trained.
      pooling: what stands for a prompt: mean_from:k, the mean over its tokens from token k on, mean, over all of them,
        or last, its last token; by default mean_from:1, or as the folders that are there were begun.
      backend: torch, by forward hooks, or jax.
      device: of the torch backend: cpu, cuda or cuda:N; by default the first GPU, if there is one.
      dtype: of the computation; by default bfloat16 on TPU and GPU, float32 on CPU.
      capture_dtype: of the stored values.
      batch_size: sequences per device.
      overwrite: compute anew what is there already.
    """

    results_dir: str = "results"
    tasks: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    models: tuple[str, ...] | None = None
    checkpoints: bool = False
    skip_half_saved: bool = False
    model_path: str | None = None
    base: bool = True
    base_model: str | None = None
    output_dir: str | None = None
    base_dir: str | None = None
    data_dir: str | None = None
    validation_samples: int | None = None
    max_length: int | None = None
    pooling: str | None = None
    backend: Literal["torch", "jax"] = "torch"
    device: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    capture_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int = 8
    overwrite: bool = False

    @property
    def results(self) -> Path:
        return user_path(self.results_dir, "--results_dir")

    @property
    def output(self) -> Path:
        if self.output_dir is not None:
            return user_path(self.output_dir, "--output_dir")
        return self.results / "phase3_representations" / "representations"

    @property
    def base_output(self) -> Path:
        if self.base_dir is not None:
            return user_path(self.base_dir, "--base_dir")
        results = self.results if self.results.name not in ("", "..") else self.results.resolve()
        return results.parent / "base_representations"

    @property
    def wanted_tasks(self) -> tuple[str, ...] | None:
        """By their own names, however they were written."""
        return None if self.tasks is None else tuple(benchmark_named(task).name for task in self.tasks)

    def check(self) -> None:
        """UserError for what no extraction can be done with."""
        for name in ("tasks", "methods", "seeds", "models"):
            if getattr(self, name) == ():
                raise UserError(f"--{name} is empty; name at least one, or leave the flag out")
        _ = self.wanted_tasks
        if self.pooling is not None:
            pooling_of(self.pooling)
        for method in self.methods or ():
            if method not in METHODS:
                raise UserError(f"--methods {method!r} is none of {', '.join(METHODS)}")
        for seed in self.seeds or ():
            if not 0 <= seed <= _LARGEST_SEED:
                raise UserError(f"--seeds {seed} must be from 0 to {_LARGEST_SEED}")
        for name in ("validation_samples", "batch_size"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _LARGEST:
                raise UserError(f"--{name} {value} must be from 1 to {_LARGEST}")
        if self.max_length is not None and not 2 * ANSWER_TOKENS <= self.max_length <= _LARGEST:
            raise UserError(
                f"--max_length {self.max_length} must be at least {2 * ANSWER_TOKENS}: {ANSWER_TOKENS} tokens are "
                "kept for the answer"
            )
        if self.device is not None and self.backend != "torch":
            raise UserError(f"--device {self.device} is of --backend torch; leave it out")
        if self.base_model is not None and not self.base_model:
            raise UserError("--base_model is empty; give a Hugging Face folder or a hub id, or leave it out")
        self._check_single()

    def _check_single(self) -> None:
        if self.model_path is None:
            return
        for name in ("tasks", "methods", "seeds"):
            if len(getattr(self, name) or ()) != 1:
                raise UserError(f"--model_path names one model and not its {name}; give --{name} with just one")
        for name in ("models", "checkpoints", "skip_half_saved"):
            if getattr(self, name):
                raise UserError(f"--{name} chooses among the models of --results_dir; leave it or --model_path out")
