"""The torch backend: SAELens' own trainer, fed with the same rows, for GPUs and to compare with.

In: jobs, a schedule, scales. Out: `SaeLensSweep`, which takes steps as `SweepProgram` does. Everything around a step is
the
same: the reader, the first weights, checkpoints (Adam's moments and thresholds lie in the same files), metrics,
folders.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_extract.errors import UserError
from jax_extract.sae.architecture import WITH_K, WITH_L1, Architecture
from jax_extract.sae.jobs import Job
from jax_extract.sae.rows import Scales
from jax_extract.sae.step import Schedule, State
from jax_extract.sae.training import first_state

if TYPE_CHECKING:
    import torch

_MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names


def require_saelens(jobs: Sequence[Job]) -> None:
    """UserError where it is not installed, or has no trainer for what is asked."""
    if importlib.util.find_spec("sae_lens") is None:
        raise UserError(
            "--backend torch needs sae-lens, which is not installed: pip install 'jax_extract[sae]'; or leave it out"
        )
    for job in jobs:
        if not job.architecture.centred:
            raise UserError("SAELens trains no transcoders and no crosscoders; leave --backend torch out")


class SaeLensSweep:
    """One of SAELens' trainers for each job; see `SweepProgram`."""

    def __init__(
        self,
        groups: dict[Architecture, list[Job]],
        schedule: Schedule,
        scales: Scales,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.groups, self.schedule = groups, schedule
        self._scales, self._batch_size, self._device = scales, batch_size, device

    def start(self) -> list[list[Any]]:
        """A trainer for each job of each group."""
        return self.resume(tuple(first_state(jobs, self._scales) for jobs in self.groups.values()))

    def resume(self, states: tuple[State, ...]) -> list[list[Any]]:
        """Trainers that go on from there."""
        return [
            [
                self._trainer(job, jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), state))
                for i, job in enumerate(jobs)
            ]
            for jobs, state in zip(self.groups.values(), states, strict=True)
        ]

    def states(self, states: list[list[Any]]) -> tuple[State, ...]:
        """As `SweepProgram` has them, on the host."""
        each = [[_state_of(trainer) for trainer in of_group] for of_group in states]
        return tuple(jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_group) for of_group in each)

    def step(self, states: list[list[Any]], rows: np.ndarray) -> tuple[list[list[Any]], np.ndarray]:
        """A step of every SAE on rows [b, layers, width]; and float32 [jobs, 5], as `SweepProgram.step` tells them."""
        import torch

        factor = self._scales.factor.astype(np.float32)[:, None]
        given = torch.from_numpy(rows.astype(np.float32) * factor).to(self._device)
        pairs = zip(self.groups.values(), states, strict=True)
        told = []
        for jobs, each in pairs:
            for job, trainer in zip(jobs, each, strict=True):
                told.append(_step(trainer, job, given[:, job.sources[0]]))
        return states, np.array(told, np.float32)

    def _trainer(self, job: Job, state: State) -> Any:
        import torch

        schedule, done = self.schedule, int(state.step)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the other library, about what it will change
            from sae_lens.config import LoggingConfig, SAETrainerConfig
            from sae_lens.registry import get_sae_training_class
            from sae_lens.training.sae_trainer import SAETrainer

            kind, config = get_sae_training_class(job.architecture.name)
            sae = kind(config(d_in=job.architecture.d_in, d_sae=job.architecture.d_sae, **_options(job, schedule)))
            with torch.no_grad():
                for name, value in sae.named_parameters():
                    value.copy_(torch.from_numpy(np.array(state.params[name])))
            sae.W_dec.requires_grad_(job.baseline != "frozen_decoder")
            trainer = SAETrainer(
                cfg=SAETrainerConfig(
                    n_checkpoints=0,
                    checkpoint_path=None,
                    save_final_checkpoint=False,
                    total_training_samples=schedule.steps * self._batch_size,
                    device=str(self._device),
                    autocast=False,
                    lr=job.learning_rate,
                    lr_end=job.learning_rate,
                    lr_scheduler_name="constant",
                    lr_warm_up_steps=schedule.warm_up,
                    adam_beta1=0.9,
                    adam_beta2=0.999,
                    lr_decay_steps=schedule.decay,
                    n_restart_cycles=1,
                    train_batch_size_samples=self._batch_size,
                    dead_feature_window=schedule.dead_after,
                    feature_sampling_window=schedule.steps + 1,
                    logger=LoggingConfig(log_to_wandb=False),
                    n_batches_for_norm_estimate=1,
                ),
                sae=sae.to(self._device),
                data_provider=iter([]),
            )
            for _ in range(done):
                trainer.lr_scheduler.step()
                for scheduler in trainer.coefficient_schedulers.values():
                    scheduler.step()
        _restore(trainer, state, done)
        return trainer


def _options(job: Job, schedule: Schedule) -> dict[str, Any]:
    """Of SAELens' configuration."""
    a = job.architecture
    if a.name in WITH_K:
        k = a.k if a.name == "topk" else job.sparsity
        return {
            "k": k,
            **({"matryoshka_widths": list(a.widths)} if a.widths else {}),
            "aux_loss_coefficient": a.aux_coefficient,
        }
    warm_up = schedule.sparsity_warm_up
    if a.name in WITH_L1:
        return {"l1_coefficient": job.sparsity, "l1_warm_up_steps": warm_up}
    return {
        "l0_coefficient": job.sparsity,
        "l0_warm_up_steps": warm_up,
        "jumprelu_bandwidth": a.bandwidth,
        "jumprelu_sparsity_loss_mode": a.sparsity_loss,
        "jumprelu_tanh_scale": a.tanh_scale,
        "jumprelu_ste_to_input": a.ste_to_input,
        "pre_act_loss_coefficient": a.pre_act_coefficient or None,
    }


def _step(trainer: Any, job: Job, x: Any) -> list[float]:
    """The loss, its error, L0, the variance of the rows, dead latents."""
    import torch

    sae = trainer.sae
    before = {name: getattr(sae, name).detach().clone() for name in ("W_enc", "W_dec")} if _keeps_lengths(job) else {}
    dead = int(trainer.dead_neurons.sum())
    out = trainer.step(x)
    trainer.n_training_steps += 1
    with torch.no_grad():
        for name, was in before.items():
            axis = 0 if name == "W_enc" else 1
            now = getattr(sae, name)
            share = ((now - was) * was).sum(axis, keepdim=True) / (was**2).sum(axis, keepdim=True)
            now.copy_(was * (1 + share))
        error = (out.sae_out - x).pow(2).sum(1).mean()
        active = out.feature_acts.to_dense() if out.feature_acts.is_sparse else out.feature_acts
        l0 = (active > 0).float().sum(1).mean()
        variance = (x - x.mean(0)).pow(2).sum(1).mean()
    return [float(each) for each in (out.loss.detach(), error, l0, variance, dead)]


def _keeps_lengths(job: Job) -> bool:
    return job.baseline == "frozen_random"


def _state_of(trainer: Any) -> State:
    sae, moments = trainer.sae, trainer.optimizer.state
    params = {name: _array(value) for name, value in sae.named_parameters()}
    first, second = (
        {
            name: _array(moments[value][kind]) if kind in moments.get(value, {}) else np.zeros_like(params[name])
            for name, value in sae.named_parameters()
        }
        for kind in _MOMENTS
    )
    averaged = np.float64(sae.topk_threshold.item()) if hasattr(sae, "topk_threshold") else np.float64(0)
    threshold: Any = np.float32(averaged)
    done: Any = np.int32(trainer.n_training_steps)
    rest: Any = np.float32(averaged - threshold)
    silent = _array(trainer.n_forward_passes_since_fired).astype(np.int32)
    return State(params, first, second, done, silent, threshold, rest, threshold)


def _restore(trainer: Any, state: State, done: int) -> None:
    import torch

    sae = trainer.sae
    trainer.n_training_steps = done
    trainer.n_training_samples = done * trainer.cfg.train_batch_size_samples
    silent = torch.from_numpy(np.array(state.silent, np.float32))
    trainer.n_forward_passes_since_fired.copy_(silent)
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(float(state.threshold) + float(state.rest))
    if not done:
        return
    for name, value in sae.named_parameters():
        if value.requires_grad:
            first, second = (torch.from_numpy(np.array(each[name])).to(value) for each in (state.first, state.second))
            trainer.optimizer.state[value] = {
                "step": torch.tensor(float(done)),
                **dict(zip(_MOMENTS, (first, second), strict=True)),
            }


def _array(value: Any) -> Any:
    return value.detach().cpu().numpy().copy()


def torch_device(choice: str) -> torch.device:
    """UserError where a GPU is asked for and there is none."""
    import torch

    if choice == "tpu":
        raise UserError("--backend torch has no TPU; give --device cpu or gpu, or leave --backend torch out")
    if choice == "gpu" and not torch.cuda.is_available():
        raise UserError("--device gpu: torch sees no GPU here; give --device cpu")
    return torch.device("cuda" if choice != "cpu" and torch.cuda.is_available() else "cpu")
