"""A sweep of SAEs on the disk: checkpoint-STEP/ with all of them, and at the end a folder of each beside the summary.

In: SAEs as they are trained, what they were trained on. Out: folders that SAELens loads, whichever step they are of,
with sae_training_summary.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jax_extract.errors import damage_is_told
from jax_extract.sae.folder import CONFIG_FILE, WEIGHTS_FILE, config_of, write
from jax_extract.sae.jobs import Job
from jax_extract.sae.metrics import Metrics
from jax_extract.sae.parameters import Parameters
from jax_extract.sae.sources import key_of
from jax_extract.store.folders import write_file
from jax_extract.training.checkpoints import HERE, Kind, TrainerState, save, save_here
from jax_extract.training.place import first_other

SUMMARY_FILE = "sae_training_summary.json"
COMMAND = "jax-extract sae train"


def _other(name: str, before: Any, asked: Any) -> str:
    if name == "saes" and isinstance(before, list) and isinstance(asked, list):
        gone = next((each for each in before if each not in asked), None)
        new = next((each for each in asked if each not in before), None)
        return f"a sweep {f'with {gone}' if gone else f'without {new}'}, and another one was asked for"
    if isinstance(before, dict) and isinstance(asked, dict):
        inner = first_other(before, asked) or ""
        return f"SAEs with {name} {inner} {before.get(inner)!r:.80}, and {asked.get(inner)!r:.80} was asked for"
    return f"SAEs with {name} {before!r:.80}, and {asked!r:.80} was asked for"


KIND = Kind(
    command=COMMAND,
    what="sweep",
    files=frozenset({CONFIG_FILE, WEIGHTS_FILE}),
    final=HERE,
    elsewhere="give another --output_dir",
    anew="or start anew with --overwrite True",
    nevertheless="go on with --allow_numeric_change True",
    mappings=frozenset({"data"}),
    other=_other,
)


@dataclass(frozen=True, eq=False)
class StoredSae:
    """One SAE for rows as they are, at some step.

    Attributes:
      tensors: by SAELens' names.
      metrics: of rows that are held out.
      scale: of its input, which is folded in; of a crosscoder one of each layer.
      averaged_threshold: of a BatchTopK SAE, the moving average of training, in units of the stored activations.
    """

    job: Job
    tensors: Parameters
    metrics: Metrics
    scale: list[float]
    averaged_threshold: float | None

    def described(self, about: Mapping[str, Any], step: int) -> dict[str, Any]:
        """What the summary and cfg.json say of it; `about` is said of all of a sweep."""
        job = self.job
        layers = [site.layer for site in job.sites]
        several = len(layers) > 1
        said: dict[str, Any] = {
            "name": job.name,
            "architecture": job.architecture.name,
            "layer": layers if several else layers[0],
            "hook_point": job.sites[0].hook,
            "d_in": job.architecture.d_in,
            "d_sae": job.architecture.d_sae,
            "sparsity": job.sparsity,
            "learning_rate": job.learning_rate,
            "seed": job.seed,
            "baseline": job.baseline,
            "input_scale": self.scale if several else self.scale[0],
            "step": step,
            "trained_on": dict(about),
            "metrics": self.metrics.to_json(),
        }
        if job.architecture.is_transcoder:
            said["target_hook_point"] = job.targets[0].hook
        if job.architecture.widths:
            said["matryoshka_widths"] = list(job.architecture.widths)
        if self.averaged_threshold is not None:
            said["threshold"] = {
                "stored": "calibrated on rows of the training, to the mean L0 that was asked for",
                "calibrated": float(self.tensors["threshold"][0]),
                "moving_average": self.averaged_threshold,
            }
        return said

    def write(self, folder: Path, about: Mapping[str, Any], step: int) -> None:
        """Makes the folder that SAELens loads."""
        names, architecture = about["hook_names"], self.job.architecture
        metadata = {
            "model_name": about.get("model_name"),
            "hook_name": None if architecture.layers > 1 else names.get(key_of(self.job.sites[0])),
            **({"hook_name_out": names.get(key_of(self.job.targets[0]))} if architecture.is_transcoder else {}),
            "l0": self.metrics.l0,
            "jax_extract": self.described(about, step),
        }
        folder.mkdir(exist_ok=True)
        write(folder, config_of(architecture, metadata), self.tensors)


@dataclass(frozen=True)
class SavedSweep:
    """All SAEs of a step, and what is said of all of them."""

    saes: Sequence[StoredSae]
    about: Mapping[str, Any]
    state: TrainerState

    @property
    def summary(self) -> dict[str, Any]:
        """What sae_training_summary.json says."""
        return {
            "step": self.state.global_step,
            "steps": self.state.max_steps,
            "epoch": self.state.epoch,
            "loss": {
                "reconstruction": "mean over rows of the summed squared error, rows multiplied by input_scale",
                "sparsity": "mean over rows of the sum over latents, weighted by decoder norms (L1 and tanh L0)",
                "decoder": "norms are free; BatchTopK and TopK choose by activation times norm",
                "input_scale": "square root of the width by the mean norm of the rows that are trained on",
            },
            "saes": [sae.described(self.about, self.state.global_step) for sae in self.saes],
        }

    def save_checkpoint(self, target: Path, save_optimizer: Callable[[Path], None]) -> None:
        """All SAEs in one folder, with what resuming needs."""

        def fill(folder: Path) -> None:
            for sae in self.saes:
                self._write(sae, folder / sae.job.name)
            self._write_summary(folder / SUMMARY_FILE)

        save(target, self.state, fill, save_optimizer)

    def save_end(self, output: Path) -> None:
        """A folder of each SAE beside the summary, and the state that says that all is there."""
        write_file(output / SUMMARY_FILE, self._write_summary)
        save_here(output, self.state, {sae.job.name: partial(self._write, sae) for sae in self.saes})

    def _write(self, sae: StoredSae, folder: Path) -> None:
        sae.write(folder, self.about, self.state.global_step)

    def _write_summary(self, path: Path) -> None:
        path.write_text(json.dumps(self.summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_summary(output: Path) -> dict[str, Any]:
    """UserError where it is damaged."""
    with damage_is_told(str(output / SUMMARY_FILE), f"remove {output} to train again"):
        return json.loads((output / SUMMARY_FILE).read_text(encoding="utf-8"))
