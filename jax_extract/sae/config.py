"""The configuration of `jax-extract sae train`: one frozen dataclass, which is also the command line.

In: flags. Out: `SaeTrainConfig`, checked as far as that goes without looking at files or devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jax_extract.devices.choice import DeviceChoice
from jax_extract.errors import UserError
from jax_extract.sae.architecture import NAMES, WITH_K, WITH_L1, SparsityLoss, canonical
from models.nearest import nearest

_MOST = 2**31 - 1
BASELINES = ("frozen_decoder", "frozen_random")
NONE = "none"


@dataclass(frozen=True)
class SaeTrainConfig:
    """Train sparse autoencoders on activations; several layers, widths, sparsities and seeds make a sweep.

    All of a sweep are trained in one pass over the rows. The same command again goes on from the last whole checkpoint.

    Attributes:
      activations: a run that jax-extract extract wrote, a directory or gs://bucket/prefix; or a file of rows.
      output_dir: where every SAE gets a folder that SAELens loads, beside checkpoint-STEP/ and
        sae_training_summary.json.
      online: train on activations of model_path while they are computed, and store none.
      model_path, adapter, revision, tasks_file, dataset, dataset_config, split, text_column, n_samples, chat_template,
        context_tokens, max_seq_length, dtype: with online, the model and its texts, as of extract.
      buffer_rows: with online, rows that wait on the devices, in which they are shuffled.
      layers: of the run, as 12, 10-12 or all; each gets SAEs of its own. All of the run by default.
      hook: hook point, by its name or TransformerLens' name.
      target_hook: hook point that is reconstructed from the rows of hook at the same layer, of the same width; makes
        transcoders.
      crosscoder: one SAE of all layers, which encodes and reconstructs them together, instead of one of each.
      architecture: batchtopk, topk, standard (ReLU with L1), jumprelu, gated or matryoshka_batchtopk.
      d_sae: latents; by default expansion_factor times the width of the rows.
      expansion_factor: latents for each dimension of the rows.
      k: of a row, latents that are active: of topk exactly, of batchtopk and matryoshka_batchtopk on average.
      l1_coefficient: factor of the L1 loss of standard and gated, on rows scaled to a mean norm of the square root of
        their width (docs/sae.md has the factors of other conventions).
      l0_coefficient: factor of the L0 loss of jumprelu.
      l0_loss: of jumprelu: step (DeepMind's), or tanh (Anthropic's, with their estimator and loss against dead
        latents).
      matryoshka_widths: of the nested dictionaries, without the last one, as shares of the latents.
      batch_size: rows of a step.
      training_rows: how many rows in all; by default each row once.
      learning_rate: of Adam, behind its warm-up.
      learning_rate_warm_up, learning_rate_decay: shares of the steps.
      sparsity_warm_up: share of the steps in which the sparsity loss rises.
      seed: of first weights and, the first one, of the order of the rows.
      baselines: SAEs that are trained beside each other one for comparison: frozen_decoder (the decoder stays random),
        frozen_random (all directions do, and lengths and biases are trained); none for neither.
      held_out: share of the samples that no row is trained on and every metric is of.
      positions: rows of which positions, as of extract; by default from:1, which leaves out first tokens, whose norms
        are many times larger, and all of a run of means.
      largest_norm: rows whose norm is more than so many times the median are left out; 0 keeps all.
      dead_after_rows: a latent that was not active for so many rows is dead.
      save_steps: a checkpoint every so many steps.
      eval_steps: metrics of the held-out rows every so many steps, and at the end.
      logging_steps: a line every so many steps.
      backend: jax, or torch for SAELens' own trainer on the same rows, which takes no --mesh_shape.
      device: auto, cpu, gpu or tpu.
      mesh_shape: DATA,MODEL over all devices; by default all on DATA.
      overwrite: remove what is in output_dir and start anew.
      allow_numeric_change: go on although devices or library versions changed, which changes the last bits.
    """

    activations: str = ""
    output_dir: str = "saes"
    online: bool = False
    model_path: str = ""
    adapter: str | None = None
    revision: str | None = None
    tasks_file: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    split: str | None = None
    text_column: str | None = None
    n_samples: int | None = None
    chat_template: bool = False
    context_tokens: int | None = None
    max_seq_length: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    buffer_rows: int = 131_072
    layers: str | None = None
    hook: str = "after_block"
    target_hook: str | None = None
    crosscoder: bool = False
    architecture: tuple[str, ...] = ("batchtopk",)
    d_sae: tuple[int, ...] | None = None
    expansion_factor: tuple[float, ...] = (8.0,)
    k: tuple[float, ...] = (32.0,)
    l1_coefficient: tuple[float, ...] = (5.0,)
    l0_coefficient: tuple[float, ...] = (1.0,)
    l0_loss: SparsityLoss = "step"
    matryoshka_widths: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.5)
    batch_size: int = 4096
    training_rows: int | None = None
    learning_rate: tuple[float, ...] = (1e-3,)
    learning_rate_warm_up: float = 0.0
    learning_rate_decay: float = 0.2
    sparsity_warm_up: float = 0.05
    seed: tuple[int, ...] = (0,)
    baselines: tuple[str, ...] = BASELINES
    held_out: float = 0.05
    positions: str | None = None
    largest_norm: float = 10.0
    dead_after_rows: int = 200_000
    save_steps: int = 1_000
    eval_steps: int = 500
    logging_steps: int = 50
    backend: Literal["jax", "torch"] = "jax"
    device: DeviceChoice = "auto"
    mesh_shape: str | None = None
    overwrite: bool = False
    allow_numeric_change: bool = False

    def check(self) -> None:
        if self.online == bool(self.activations):
            raise UserError(
                "give --activations, or --online True with --model_path and its texts"
                if not self.online
                else f"--activations {self.activations} and --online are both given; leave one out"
            )
        if self.online and self.backend == "torch":
            raise UserError("--online computes with JAX; leave --backend torch out")
        self._check_names()
        self._check_shares()
        for name in ("batch_size", "buffer_rows", "dead_after_rows", "save_steps", "eval_steps", "logging_steps"):
            if not 1 <= getattr(self, name) <= _MOST:
                raise UserError(f"--{name} {getattr(self, name)} must be from 1 to {_MOST}")
        if self.training_rows is not None and self.training_rows < self.batch_size:
            raise UserError(
                f"--training_rows {self.training_rows} makes no batch of --batch_size {self.batch_size}; give more "
                "rows, or smaller batches"
            )
        for name in ("d_sae", "expansion_factor", "k", "l1_coefficient", "l0_coefficient", "learning_rate"):
            for value in getattr(self, name) or ():
                if not (math.isfinite(value) and value > 0):
                    raise UserError(f"--{name} {value} must be a positive number")

    def _check_names(self) -> None:
        if self.backend == "torch" and self.mesh_shape is not None:
            raise UserError(f"--mesh_shape {self.mesh_shape} is of JAX; leave it out with --backend torch")
        if self.crosscoder and self.target_hook is not None:
            raise UserError(
                f"--crosscoder and --target_hook {self.target_hook} are both given; a crosscoder reconstructs what it "
                "encodes, so leave one out"
            )
        for name in self.architecture:
            if canonical(name) not in NAMES:
                near = nearest(name, list(NAMES))
                raise UserError(
                    f"--architecture {name!r} is none of {', '.join(NAMES)}"
                    + (f"; did you mean {near}?" if near else "")
                )
        for baseline in self.baselines:
            if baseline not in (*BASELINES, NONE):
                raise UserError(f"--baselines {baseline!r} is none of {', '.join((*BASELINES, NONE))}")

    def _check_shares(self) -> None:
        for name in ("learning_rate_warm_up", "learning_rate_decay", "sparsity_warm_up"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} {getattr(self, name)} must be a share of the steps, from 0 to 1")
        if not 0 < self.held_out < 1:
            raise UserError(f"--held_out {self.held_out} must be a share of the samples, above 0 and below 1")
        if not (math.isfinite(self.largest_norm) and self.largest_norm >= 0):
            raise UserError(f"--largest_norm {self.largest_norm} must be 0 or a positive number")
        for seed in self.seed:
            if not 0 <= seed <= _MOST:
                raise UserError(f"--seed {seed} must be from 0 to {_MOST}")
        for share in self.matryoshka_widths:
            if not 0 < share < 1:
                raise UserError(f"--matryoshka_widths {share} must be a share of the latents, above 0 and below 1")

    def sparsities(self, architecture: str) -> tuple[float, ...]:
        """What a sweep over sparsity goes through."""
        if architecture in WITH_K:
            return self.k
        return self.l1_coefficient if architecture in WITH_L1 else self.l0_coefficient
