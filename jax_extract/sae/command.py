"""`jax-extract sae train`: a run of activations in, sparse autoencoders out that SAELens loads.

In: `SaeTrainConfig`. Out: checkpoint-STEP/, a folder of each SAE, sae_training_summary.json. Everything that can be
refused is refused before a device computes; what is saved is whole; the same command goes on from it.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_extract.devices.choice import use_devices
from jax_extract.devices.mesh import make_mesh, parse_mesh_shape
from jax_extract.devices.platform import device_kind
from jax_extract.errors import UserError, user_path
from jax_extract.layer_words import layer_words, layers_of
from jax_extract.sae.config import SaeTrainConfig
from jax_extract.sae.jobs import Job, grouped, jobs_of
from jax_extract.sae.rows import Rows, RowsOfTraining, Scales
from jax_extract.sae.saved import KIND, SUMMARY_FILE, SavedSweep, StoredSae, read_summary
from jax_extract.sae.sources import HeldOut, Source
from jax_extract.sae.sources_array import ArraySource, is_array_file, read_array
from jax_extract.sae.sources_iterator import IteratorSource
from jax_extract.sae.sources_run import RunSource
from jax_extract.sae.step import Schedule
from jax_extract.sae.training import SaeTraining, Sweep, SweepProgram
from jax_extract.store.folders import require_usable
from jax_extract.store.parts import Site
from jax_extract.store.reader import Run, open_activations
from jax_extract.terminal import Terminal, duration_text, plural, ranges_text
from jax_extract.training.checkpoints import OPTIMIZER_FOLDER, TrainerState, checkpoint_folder
from jax_extract.training.optimizer_state import load_optimizer, save_optimizer
from jax_extract.training.place import Found, find, held
from jax_extract.training.rhythm import Every, Log, Rhythm

InMemory = Run | np.ndarray | Iterable[Any]
_PACKAGES = ("jax", "jaxlib", "numpy")


def sae_train(
    config: SaeTrainConfig, terminal: Terminal | None = None, held_in_memory: InMemory | None = None
) -> dict[str, Any]:
    """Trains, or goes on; returns what sae_training_summary.json says.

    Args:
      held_in_memory: what is trained on instead of what `config.activations` names.

    Raises:
      UserError: anything the user can mend; no checkpoint is lost.
    """
    config.check()
    output = user_path(config.output_dir, "--output_dir")
    terminal = terminal or Terminal()
    if config.online and config.backend == "jax":
        use_devices(config.device)
    rows = rows_of(config, terminal, held_in_memory)
    jobs = jobs_of(config, rows.source.sites)
    if config.backend == "torch":
        from jax_extract.sae.saelens import require_saelens, torch_device

        require_saelens(jobs)
        torch_device(config.device)
    require_usable(output, "--output_dir")
    use_devices(config.device if config.backend == "jax" else "cpu")
    mesh = make_mesh(parse_mesh_shape(config.mesh_shape) if config.mesh_shape else None)
    if config.batch_size % mesh.size:
        raise UserError(
            f"--batch_size {config.batch_size} cannot be shared between {mesh.size} devices; give a multiple of that"
        )
    training = _Sweep(config, output, jobs, rows, mesh, terminal)
    with held(KIND, output, config.overwrite):
        return training.run_all()


def rows_of(config: SaeTrainConfig, terminal: Terminal, held_in_memory: InMemory | None = None) -> RowsOfTraining:
    """What is trained on; UserError where there is nothing such."""
    if not config.online:
        return Rows(source_of(config, held_in_memory), config.batch_size)
    from jax_extract.sae.online.opening import open_online

    return open_online(config, lambda word: None)


def source_of(config: SaeTrainConfig, held_in_memory: InMemory | None = None) -> Source:
    """Where the rows come from; UserError where there are none such."""
    held_out, seed = HeldOut(config.held_out, config.seed[0]), config.seed[0]
    if isinstance(held_in_memory, Iterable) and not isinstance(held_in_memory, Run | np.ndarray):
        if config.training_rows is None:
            raise UserError(
                "training_rows is not given; how many rows an iterator has cannot be known, so say how many"
            )
        return IteratorSource(held_in_memory, config.batch_size, held_out, config.training_rows)
    if isinstance(held_in_memory, np.ndarray) or (held_in_memory is None and is_array_file(config.activations)):
        if config.layers is not None:
            raise UserError(
                f"--layers {config.layers} is about a run, and {config.activations} is a file; leave it out"
            )
        if config.target_hook is not None:
            raise UserError(
                f"--target_hook {config.target_hook} is about a run, and {config.activations} is a file; leave it out"
            )
        array = read_array(config.activations) if held_in_memory is None else held_in_memory
        return ArraySource(array, config.batch_size, seed, held_out, config.activations)
    run = open_activations(config.activations) if held_in_memory is None else held_in_memory
    positions = config.positions or ("all" if str(run.metadata.get("positions")).startswith("mean") else "from:1")
    return RunSource(run, _sites(run, config), config.batch_size, seed, positions, held_out)


def _sites(run: Run, config: SaeTrainConfig) -> list[Site]:
    """The layers of the run that are trained on; those of transcoders, and then what they reconstruct."""
    sites = _encoded(run, config)
    if config.target_hook is None:
        return sites
    return sites + [run.site(site.layer, config.target_hook) for site in sites]


def _encoded(run: Run, config: SaeTrainConfig) -> list[Site]:
    if config.layers is None:
        hook, named = run.hook_point(config.hook)
        if named is not None:
            return [run.site(layer, hook) for layer in sorted(named)]
        there = [site for site in run.sites if site.hook == hook]
        return there or [run.site(None, hook)]  # which refuses it by name
    blocks = run.metadata.get("num_hidden_layers") or max(run.layers, default=0) + 1
    layers = layers_of(layer_words(config.layers, "--layers") or (), blocks)
    return [run.site(layer, config.hook) for layer in layers]


@dataclass(frozen=True)
class _Sweep:
    config: SaeTrainConfig
    output: Path
    jobs: Sequence[Job]
    rows: RowsOfTraining
    mesh: Mesh
    terminal: Terminal

    def run_all(self) -> dict[str, Any]:
        config = self.config
        found = find(KIND, self.output, self._settings(), None if config.allow_numeric_change else self._numerics())
        if found is not None and found.is_final:
            self.terminal.line("done", f"it was there already: {self.output / SUMMARY_FILE}")
            return read_summary(self.output)
        if found is not None:
            mend = f"remove {found.folder} to go on from the checkpoint before it, {KIND.anew}"
            if found.state.data is None:
                raise UserError(f"{found.folder} does not say where in the rows it was; {mend}")
            self.rows.state = found.state.data
        with self.terminal.waiting("reading rows"):
            known = self.rows.measured()
            scales = Scales.of(known, config.largest_norm)
            aside, samples = self.rows.held_out()
            aside = aside[scales.keeps(aside)]
        if not len(aside):
            raise UserError(
                f"all rows that --held_out {config.held_out} holds out are left out by their norms; give a larger share"
            )
        schedule = self._schedule()
        self._tell(schedule, scales, len(aside), len(set(samples.tolist())))
        program = self._program(schedule, scales)
        before = found.state if found else None
        log, pending = (before.log_history, before.pending_losses) if before else ([], [])
        kept = known[scales.keeps(known)]
        training = SaeTraining(
            program, self.rows, scales, aside, kept, config.batch_size, self._save, self.terminal, log
        )
        states = self._states(program, found)
        every = Every(config.logging_steps, config.eval_steps, config.save_steps)
        started = time.perf_counter()
        states = Rhythm(training, every, self.terminal, [*pending]).run(states, before.global_step if before else 0)
        sweep = self._saved(training, schedule.steps, states, [])
        sweep.save_end(self.output)
        self._conclude(sweep.saes, time.perf_counter() - started)
        return sweep.summary

    def _program(self, schedule: Schedule, scales: Scales) -> Sweep:
        if self.config.backend == "jax":
            return SweepProgram(grouped(self.jobs), schedule, scales, self.mesh)
        from jax_extract.sae.saelens import SaeLensSweep, torch_device

        device = torch_device(self.config.device)
        return SaeLensSweep(grouped(self.jobs), schedule, scales, self.config.batch_size, device)

    # --------------------------------------------------------------------------- what decides what

    def _schedule(self) -> Schedule:
        config = self.config
        steps = (config.training_rows or self.rows.source.rows) // config.batch_size
        return Schedule(
            steps,
            warm_up=round(config.learning_rate_warm_up * steps),
            decay=round(config.learning_rate_decay * steps),
            sparsity_warm_up=round(config.sparsity_warm_up * steps),
            dead_after=max(1, config.dead_after_rows // config.batch_size),
        )

    def _settings(self) -> dict[str, Any]:
        """What decides the weights, in JSON."""
        source = self.rows.source
        names = "batch_size held_out positions largest_norm learning_rate_warm_up learning_rate_decay".split()
        names += "sparsity_warm_up dead_after_rows l0_loss".split()
        return {
            "data": {"digest": source.digest, "sites": [[site.hook, site.layer] for site in source.sites]},
            "saes": [job.name for job in self.jobs],
            "steps": self._schedule().steps,
            **{name: getattr(self.config, name) for name in names},
            "learning_rate": list(self.config.learning_rate),
            "seed": list(self.config.seed),
            "matryoshka_widths": list(self.config.matryoshka_widths),
        }

    def _numerics(self) -> dict[str, Any]:
        """What decides their last bits."""
        packages = _PACKAGES if self.config.backend == "jax" else (*_PACKAGES, "torch", "sae-lens")
        versions = {name: importlib.metadata.version(name) for name in packages}
        said = {"backend": self.config.backend, "device_kind": device_kind(), "devices": self.mesh.size, **versions}
        return {**said, "model_dtype": str(self.config.dtype)} if self.config.online else said

    def _about(self, scales: Scales) -> dict[str, Any]:
        """What is said in every SAE's metadata of what it was trained on."""
        config, source = self.config, self.rows.source
        return {
            **source.about,
            "activations": config.activations if not config.online else f"{config.model_path}, online",
            "digest": source.digest,
            "rows": self._schedule().steps * config.batch_size,
            "largest_norm": {"times_median": config.largest_norm, "norms": _finite(scales.largest.tolist())},
            "held_out": {"share": config.held_out, "seed": config.seed[0]},
        }

    # ------------------------------------------------------------------------------ state, and back

    def _states(self, program: Sweep, found: Found | None) -> Any:
        if found is None:
            return program.start()
        mend = f"remove {found.folder} to go on from the checkpoint before it, {KIND.anew}"
        like = program.states(program.start())
        states = program.resume(load_optimizer(found.folder / OPTIMIZER_FOLDER, like, mend))
        self.terminal.line("resume", f"goes on from step {found.state.global_step:,} of {found.folder}/")
        return states

    def _state(self, step: int, log: Log, pending: list[Any]) -> TrainerState:
        steps = self._schedule().steps
        epoch = step * self.config.batch_size / self.rows.source.rows
        return TrainerState(
            step, steps, epoch, list(log), self._settings(), self._numerics(), pending, dict(self.rows.state)
        )

    def _saved(self, training: SaeTraining, step: int, states: Any, pending: list[Any]) -> SavedSweep:
        state = self._state(step, training.log, pending)
        return SavedSweep(training.stored(states), self._about(training.scales), state)

    def _save(self, training: SaeTraining, step: int, states: Any, pending: list[Any]) -> None:
        folder = checkpoint_folder(self.output, step)
        self._saved(training, step, states, pending).save_checkpoint(
            folder, lambda to: save_optimizer(to, jax.tree.leaves(training.program.states(states)))
        )

    # ------------------------------------------------------------------------------- what is told

    def _tell(self, schedule: Schedule, scales: Scales, held_out: int, samples: int) -> None:
        sites = self.rows.source.sites
        layers = list(dict.fromkeys(site.layer for site in sites if site.layer is not None))
        where = " and ".join(dict.fromkeys(site.hook for site in sites)) + (
            f" at {'layer' if len(layers) == 1 else 'layers'} {ranges_text(layers)}" if layers else ""
        )
        self.terminal.line(
            "rows",
            f"{self._what()}: {self.rows.source.rows:,} rows of {where} to train on"
            + (f", positions {positions}" if (positions := self.rows.source.about["positions"]) else "")
            + f"; {held_out:,} of {plural(samples, 'other sample')} held out",
        )
        trained = sum(job.baseline is None for job in self.jobs)
        widths = ", ".join(dict.fromkeys(f"{job.architecture.d_in} to {job.architecture.d_sae}" for job in self.jobs))
        self.terminal.line(
            "saes",
            f"{plural(trained, self._noun())} ({widths}) and {plural(len(self.jobs) - trained, 'baseline')} in one "
            f"pass {self._where()}",
        )
        self.terminal.line(
            "plan",
            f"{plural(schedule.steps, 'step')} of {self.config.batch_size:,} rows"
            + ("" if self.config.online else f", {_epochs(self, schedule):.2g} epochs")
            + f"; a checkpoint every {self.config.save_steps:,}",
        )
        for note in self.rows.notes:
            self.terminal.line("note", note)

    def _what(self) -> str:
        config = self.config
        return f"{config.model_path} on {config.tasks_file or config.dataset}" if config.online else config.activations

    def _where(self) -> str:
        if self.config.backend == "torch":
            return "by SAELens' trainer"
        return f"on {plural(self.mesh.size, self.mesh.devices.flat[0].device_kind + ' device')}"

    def _noun(self) -> str:
        if self.config.crosscoder:
            return "crosscoder"
        return "SAE" if self.config.target_hook is None else "transcoder"

    def _conclude(self, saes: Sequence[StoredSae], seconds: float) -> None:
        count = self._schedule().steps * self.config.batch_size
        said = [f"{count:,} rows in {duration_text(seconds)}"]
        if self.rows.left_out:
            above = f"of a norm above {self.config.largest_norm:g} times the median"
            said.append(f"{plural(self.rows.left_out, 'row')} left out, {above}")
        if self.rows.not_finite:
            said.append(f"{plural(self.rows.not_finite, 'row')} left out, with a value that is no finite number")
        self.terminal.line("done", "; ".join(said))
        for sae in saes:
            if sae.job.baseline is None:
                self.terminal.line("sae", _told(sae, saes))
        self.terminal.line("output", f"{self.output}/")


def _told(sae: StoredSae, saes: Sequence[StoredSae]) -> str:
    """One SAE and the baselines beside it."""
    beside = [
        f"{other.job.baseline} {other.metrics.explained_variance:.4f}"
        for other in saes
        if other.job.baseline is not None and other.job.name == f"{sae.job.name}_{other.job.baseline}"
    ]
    metrics = sae.metrics
    return (
        f"{sae.job.name}: explained variance {metrics.explained_variance:.4f}"
        + (f" ({', '.join(beside)})" if beside else "")
        + f", L0 {metrics.l0:.1f}, dead {metrics.dead:.1%}"
    )


def _epochs(sweep: _Sweep, schedule: Schedule) -> float:
    return schedule.steps * sweep.config.batch_size / sweep.rows.source.rows


def _finite(values: list[float]) -> list[float | None]:
    """JSON has no infinity."""
    return [value if value < float("inf") else None for value in values]
