"""`jax-extract train`: a model configuration and a dataset of walks in, checkpoints and a final model out.

In: `TrainConfig`. Out: checkpoint-STEP/ and final_model/, folders that transformers loads. Everything that can be
refused is refused before a device computes; what is saved is whole; the same command goes on from it.
"""

from __future__ import annotations

import importlib.metadata
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_extract.devices.choice import use_devices
from jax_extract.devices.mesh import make_mesh, parse_mesh_shape
from jax_extract.devices.platform import device_kind
from jax_extract.errors import user_path
from jax_extract.inputs.walk_dataset import WalkDataset
from jax_extract.store.folders import require_usable
from jax_extract.terminal import Terminal, duration_text, plural
from jax_extract.training.checkpoints import OPTIMIZER_FOLDER, TrainerState, checkpoint_folder
from jax_extract.training.optimizer_state import load_optimizer, save_optimizer
from jax_extract.training.place import Found, find, held
from jax_extract.training.rhythm import Every, Log, Rhythm, diverged
from jax_extract.walks.batches import Batches
from jax_extract.walks.config import TrainConfig
from jax_extract.walks.model import TrainedModel
from jax_extract.walks.saved import FINAL_MODEL, KIND, SavedModel
from jax_extract.walks.step import TrainProgram, TrainState, linear_decay_adamw
from jax_extract.walks.training import WalkTraining, above_text
from jax_extract.weights.folder import SafetensorsCheckpoint
from jax_extract.weights.load import Weights
from jax_extract.weights.save import hugging_face_tensors
from models.layers import Numerics

_PACKAGES = ("jax", "jaxlib", "optax", "numpy")


def train(config: TrainConfig, terminal: Terminal | None = None) -> dict[str, Any]:
    """Trains, or goes on; returns the step, the validation loss and the entropy that it is compared with.

    Raises:
      UserError: anything the user can mend; no checkpoint is lost.
    """
    config.check()
    output = user_path(config.output_dir, "--output_dir")
    if config.check_only:
        return _check(config, output)
    dataset = WalkDataset.open(user_path(config.dataset_dir, "--dataset_dir"), config.text_column)
    model = TrainedModel.open(config.model_config, len(dataset.vocabulary), config.max_length)
    require_usable(output, "--output_dir")
    use_devices(config.device)
    mesh = make_mesh(parse_mesh_shape(config.mesh_shape) if config.mesh_shape else None)
    training = _Training(config, output, dataset, model, mesh, terminal or Terminal())
    _ = dataset.train, dataset.validation  # read, and refused, before anything is written
    with held(KIND, output, config.overwrite):
        return training.run()


def _check(config: TrainConfig, output: Path) -> dict[str, Any]:
    """Refuses what can be refused before there are walks."""
    folder = user_path(config.dataset_dir, "--dataset_dir")
    words = len(WalkDataset.open(folder, config.text_column).vocabulary) if folder.is_dir() else None
    TrainedModel.open(config.model_config, words, config.max_length)
    require_usable(output, "--output_dir")
    use_devices(config.device)
    make_mesh(parse_mesh_shape(config.mesh_shape) if config.mesh_shape else None)
    return {}


@dataclass(frozen=True)
class _Training:
    config: TrainConfig
    output: Path
    dataset: WalkDataset
    model: TrainedModel
    mesh: Mesh
    terminal: Terminal

    def run(self) -> dict[str, Any]:
        numerics = None if self.config.allow_numeric_change else self._numerics()
        found = find(KIND, self.output, self._settings(), numerics)
        batches = self._batches()
        validation = self.dataset.validation.predicted().cut(self.config.max_length)
        entropy, of_what = self.dataset.entropy(validation)
        self._tell(batches, entropy, of_what)
        if found is not None and found.is_final:
            return self._conclude(batches.steps, found.state.log_history, entropy, None)
        optimizer = linear_decay_adamw(self.config.learning_rate, batches.steps)
        numerics_of_products = Numerics(self.config.dtype)
        program = TrainProgram(self.model.port, self.model.config, self.mesh, numerics_of_products, optimizer)
        before = found.state if found else None
        done, log, pending = (before.global_step, before.log_history, before.pending_losses) if before else (0, [], [])
        every = Every(self.config.logging_steps, self.config.eval_steps, self.config.save_steps)
        rate = self.config.learning_rate
        training = WalkTraining(program, batches, validation, entropy, rate, self._save, self.terminal, log)
        state = self._state(program, found)
        started = time.perf_counter()
        state = Rhythm(training, every, self.terminal, [*pending]).run(state, done)
        self._save(batches.steps, state, training.log, [], final=True)
        return self._conclude(batches.steps, training.log, entropy, time.perf_counter() - started)

    # --------------------------------------------------------------------------- what decides what

    def _settings(self) -> dict[str, Any]:
        """What decides the weights, in JSON."""
        of_command = "epochs batch_size grad_accum learning_rate max_length seed dtype text_column".split()
        return {
            "model_config": self.model.said,
            "dataset": self.dataset.digest,
            **{name: getattr(self.config, name) for name in of_command},
        }

    def _numerics(self) -> dict[str, Any]:
        """What decides their last bits."""
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        return {"device_kind": device_kind(), "devices": self.mesh.size, **versions}

    def _batches(self) -> Batches:
        config = self.config
        walks = self.dataset.train.predicted().cut(config.max_length)
        rows = min(config.batch_size, len(walks.tokens))
        batches = min(config.grad_accum, -(-len(walks.tokens) // rows))  # a step has no more than an epoch
        return Batches(walks, rows, batches, config.epochs, config.seed, self.mesh.size)

    # ------------------------------------------------------------------------------ state, and back

    def _state(self, program: TrainProgram, found: Found | None) -> TrainState:
        if found is None:
            return program.start(self.model.first_parameters(self.config.seed))
        mend = f"remove {found.folder} to go on from the checkpoint before it, {KIND.anew}"
        checkpoint = SafetensorsCheckpoint(found.folder, str(found.folder))
        layers = self.model.config.num_hidden_layers
        weights = Weights(checkpoint, self.model.port, self.model.config, layers, head=True)
        state = program.start(jax.tree.map(np.asarray, weights.load(self.mesh, "float32")))
        optimizer = load_optimizer(found.folder / OPTIMIZER_FOLDER, state.optimizer, mend)
        self.terminal.line("resume", f"goes on from step {found.state.global_step:,} of {found.folder}/")
        return TrainState(state.params, optimizer)

    def _save(self, step: int, state: TrainState, log: Log, pending: list[float], final: bool = False) -> None:
        batches = self._batches()
        epoch = step / batches.steps_an_epoch
        said = TrainerState(step, batches.steps, epoch, list(log), self._settings(), self._numerics(), pending)
        tensors = hugging_face_tensors(self.model.port, self.model.config, state.params)
        if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
            raise diverged("a parameter is no finite number", step)
        most = self.model.config.max_position_embeddings
        saved = SavedModel(self.model.said, self.dataset.vocabulary, most)
        if final:
            saved.save(self.output / FINAL_MODEL, tensors, said)
        else:
            folder = checkpoint_folder(self.output, step)
            saved.save(folder, tensors, said, lambda to: save_optimizer(to, state.optimizer))

    # ------------------------------------------------------------------------------- what is told

    def _tell(self, batches: Batches, entropy: float, of_what: str) -> None:
        model, mesh = self.model.config, self.mesh.shape
        walks, validation = batches.walks, self.dataset.validation.predicted()
        kind = self.mesh.devices.flat[0].device_kind
        self.terminal.line(
            "model",
            f"{model.model_type}, {model.num_hidden_layers} layers, d_model {model.hidden_size}, "
            f"{plural(self.model.parameters, 'parameter')} in {self.config.dtype} on "
            f"{plural(self.mesh.size, kind + ' device')}, mesh {mesh['data']},{mesh['model']}",
        )
        cut = int((self.dataset.train.lengths > self.config.max_length).sum())
        short = sum(int((of.lengths <= 1).sum()) for of in (self.dataset.train, self.dataset.validation))
        self.terminal.line(
            "input",
            f"{self.dataset.folder}: {plural(len(walks.tokens), 'walk')} to train on, {len(validation.tokens):,} to "
            f"evaluate on, {plural(len(self.dataset.vocabulary), 'word')}, longest {self.dataset.train.lengths.max():,}"
            + (f"; {plural(cut, 'walk')} cut to {self.config.max_length} words" if cut else "")
            + (f"; {plural(short, 'walk')} of fewer than 2 words left out" if short else ""),
        )
        self.terminal.line(
            "plan",
            f"{plural(batches.steps, 'step')} of {plural(batches.rows * batches.batches, 'walk')} in "
            f"{plural(batches.epochs, 'epoch')}; a checkpoint every {self.config.save_steps:,}",
        )
        self.terminal.line(
            "entropy",
            f"{entropy:.4f} nats a step {of_what}, which no model of such walks goes below; guessing has "
            f"{math.log(len(self.dataset.vocabulary)):.4f}",
        )

    def _conclude(self, steps: int, log: Log, entropy: float, seconds: float | None) -> dict[str, Any]:
        loss = next((entry["eval_loss"] for entry in reversed(log) if "eval_loss" in entry), math.nan)
        took = "it was there already" if seconds is None else f"this session took {duration_text(seconds)}"
        self.terminal.line(
            "done",
            f"{plural(steps, 'step')}; validation loss {loss:.4f}, walk entropy {entropy:.4f}, "
            f"{above_text(loss, entropy)}; {took}",
        )
        self.terminal.line("output", f"{self.output / FINAL_MODEL}/")
        return {"steps": steps, "loss": loss, "entropy": entropy, "folder": self.output / FINAL_MODEL}
