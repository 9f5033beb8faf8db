"""A sweep of SAEs, as the rhythm of a training sees it.

In: jobs grouped by what is compiled, rows, scales. Out: steps of all SAEs on each batch, lines and metrics, checkpoints
of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_extract.devices.mesh import BATCH_AXES
from jax_extract.devices.sharding import named
from jax_extract.sae.architecture import OVER_BATCH, Architecture
from jax_extract.sae.autoencoder import Form, SparseAutoencoder
from jax_extract.sae.folder import config_of, folded, with_threshold
from jax_extract.sae.jobs import Job, choices_of
from jax_extract.sae.metrics import calibrated, sums_of
from jax_extract.sae.parameters import first_parameters
from jax_extract.sae.rows import RowsOfTraining, Scales
from jax_extract.sae.saved import StoredSae
from jax_extract.sae.step import Schedule, State, train_steps
from jax_extract.terminal import Terminal
from jax_extract.training.rhythm import Log, Measured, diverged

States = tuple[State, ...]  # of each group, stacked over its jobs
_TOLD = ("loss", "mse", "l0", "variance", "dead")  # of a job and step


class SweepProgram:
    """Steps of all groups; compiles each once."""

    def __init__(self, groups: dict[Architecture, list[Job]], schedule: Schedule, scales: Scales, mesh: Mesh) -> None:
        self.groups, self.schedule, self.mesh = groups, schedule, mesh
        self._scales = scales
        whole, batch = named(mesh, P()), named(mesh, P(BATCH_AXES))
        self._batch = batch
        factors = scales.factor.tolist()
        self._choices = [jax.device_put(choices_of(jobs, factors), whole) for jobs in groups.values()]
        self._steps = [step_program(architecture, schedule, mesh) for architecture in groups]

    def start(self) -> States:
        """Before the first step."""
        return self.resume(tuple(first_state(jobs, self._scales) for jobs in self.groups.values()))

    def resume(self, states: States) -> States:
        """The same on the devices."""
        return jax.device_put(states, named(self.mesh, P()))

    def states(self, states: States) -> States:
        """What is saved, of each group."""
        return states

    def step(self, states: States, rows: np.ndarray) -> tuple[States, Array]:
        """A step of every SAE on rows [b, layers, width]; and float32 [jobs, 5], `_TOLD` of each."""
        placed = jax.device_put(rows, self._batch)
        done = [step(*given, placed) for step, *given in zip(self._steps, states, self._choices, strict=True)]
        told = [found for _, found in done]
        return tuple(state for state, _ in done), told[0] if len(told) == 1 else jnp.concatenate(told)


def step_program(architecture: Architecture, schedule: Schedule, mesh: Mesh) -> Any:
    """The jitted (states, choices, rows) -> states, measured; rows are shared out over the devices, SAEs are on
    each."""
    whole, batch = named(mesh, P()), named(mesh, P(BATCH_AXES))
    return jax.jit(
        partial(_steps_of, architecture, schedule),
        donate_argnums=0,
        in_shardings=(whole, whole, batch),
        out_shardings=(whole, whole),
    )


def first_state(jobs: Sequence[Job], scales: Scales) -> State:
    """Before the first step, stacked over jobs of one shape."""
    drawn = []
    for job in jobs:
        goals = list(job.goals)
        mean = (scales.mean[goals] * scales.factor[goals][:, None]).reshape(-1)
        drawn.append(State.start(first_parameters(job.architecture, job.seed, mean)))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *drawn)


def _steps_of(
    architecture: Architecture, schedule: Schedule, states: State, choices: Any, rows: Array
) -> tuple[State, Array]:
    states, found = train_steps(architecture, schedule, states, choices, rows)
    return states, jnp.stack([getattr(found, name).astype(jnp.float32) for name in _TOLD], axis=1)


class Sweep(Protocol):
    """What takes steps; its states are whatever it likes to be given again."""

    groups: dict[Architecture, list[Job]]
    schedule: Schedule

    def start(self) -> Any: ...
    def resume(self, states: States) -> Any: ...
    def states(self, states: Any) -> States: ...
    def step(self, states: Any, rows: np.ndarray) -> tuple[Any, Any]: ...


@dataclass
class SaeTraining:
    """Attributes:
    checkpoint: writes one of this training, a step and its states, and what no line has told yet.
    held_out: [n, layers, width] rows that are not trained on.
    calibration: [n, layers, width] rows that are, for thresholds.
    """

    program: Sweep
    rows: RowsOfTraining
    scales: Scales
    held_out: np.ndarray
    calibration: np.ndarray
    batch_size: int
    checkpoint: Callable[[SaeTraining, int, Any, list[Any]], None]
    terminal: Terminal
    log: Log = field(default_factory=list)

    @property
    def jobs(self) -> list[Job]:
        return [job for jobs in self.program.groups.values() for job in jobs]

    @property
    def steps(self) -> int:
        return self.program.schedule.steps

    @property
    def units(self) -> int:
        return self.steps * self.batch_size

    @property
    def unit(self) -> str:
        return " rows"

    def batches(self, done: int) -> Iterator[np.ndarray]:
        for _, rows in zip(range(self.steps - done), self.rows.batches(self.scales), strict=False):
            yield rows

    def units_of(self, batch: np.ndarray) -> int:
        return len(batch)

    def step(self, state: Any, batch: np.ndarray) -> tuple[Any, Any]:
        return self.program.step(state, batch)

    def tell(self, step: int, measured: Measured) -> None:
        means: dict[str, np.ndarray] = dict(zip(_TOLD, np.mean(_finite(measured, step), axis=0).T, strict=True))
        means["explained_variance"] = 1 - means["mse"] / means["variance"]
        self._say("train", step, means)

    def evaluate(self, step: int, state: Any) -> None:
        found = [sae.metrics for sae in self.stored(state)]
        names = ("explained_variance", "l0", "dead")
        self._say("evaluate", step, {name: np.array([getattr(each, name) for each in found]) for name in names})

    def save(self, step: int, state: Any, measured: Measured) -> None:
        self.checkpoint(self, step, state, _finite(measured, step).tolist())

    def stored(self, states: Any) -> list[StoredSae]:
        """Each SAE as it would be stored now."""
        pairs = zip(self.program.states(states), self.program.groups.values(), strict=True)
        return [self._stored(state, i, job) for state, jobs in pairs for i, job in enumerate(jobs)]

    def _stored(self, state: State, i: int, job: Job) -> StoredSae:
        params = {name: np.asarray(value[i]) for name, value in state.params.items()}
        scale_in, scale_out = self.scales.factor[list(job.sources)], self.scales.factor[list(job.goals)]
        tensors, averaged = folded(job.architecture, params, scale_in, scale_out), None
        if job.architecture.name in OVER_BATCH:
            unit = float(scale_out.mean())  # of the stored activations
            form, guess = Form("relu", job.architecture.centred), float(state.guess[i]) / unit
            threshold = calibrated(form, tensors, job.encoded(self.calibration), job.sparsity, guess)
            tensors = with_threshold(tensors, threshold)
            averaged = (float(state.threshold[i]) + float(state.rest[i])) / unit
        sae = SparseAutoencoder(
            config_of(job.architecture, {}), {n: jnp.asarray(value) for n, value in tensors.items()}
        )
        rows, targets = job.encoded(self.held_out), job.reconstructed(self.held_out)
        metrics = sums_of(sae, rows, targets, layers=job.architecture.layers).metrics()
        return StoredSae(job, tensors, metrics, scale_in.tolist(), averaged)

    def _say(self, word: str, step: int, values: dict[str, np.ndarray]) -> None:
        jobs = self.jobs
        prefix = "" if word == "train" else "eval_"
        entry: dict[str, Any] = {"step": step}
        for i, job in enumerate(jobs):
            entry |= {f"{job.name}/{prefix}{name}": float(value[i]) for name, value in values.items()}
        self.log.append(entry)
        trained = np.array([job.baseline is None for job in jobs])
        dead = values["dead"] if word == "evaluate" else values["dead"] / [job.architecture.d_sae for job in jobs]
        texts = [
            f"explained variance {_spread(values['explained_variance'][trained], '.4f')}",
            f"L0 {_spread(values['l0'][trained], '.1f')}",
            f"dead {_spread(dead[trained], '.1%')}",
        ]
        self.terminal.line(word, f"step {step:,} of {self.steps:,}: {', '.join(texts)}")


def _spread(values: np.ndarray, form: str) -> str:
    """One value, or from the least to the largest."""
    least, largest = (format(value, form) for value in (values.min(), values.max()))
    return least if least == largest else f"{least} to {largest}"


def _finite(measured: Measured, last: int) -> np.ndarray:
    """[steps, jobs, 5] of the steps up to `last`; UserError where a loss is no number any more."""
    found = np.array([np.asarray(each) for each in measured], np.float64)
    for step, of_step in enumerate(found, last - len(found) + 1):
        if not np.isfinite(of_step[:, 0]).all():
            raise diverged(f"the loss is {of_step[:, 0][~np.isfinite(of_step[:, 0])][0]}", step)
    return found
