"""A sweep of SAEs on the disk: checkpoint-STEP/ with all of them, and at the end a folder of each beside the summary.

In: SAEs as they are trained, what they were trained on. Out: folders that SAELens loads, whichever step they are of,
with sae_training_summary.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jax_extract.sae.folder import CONFIG_FILE, WEIGHTS_FILE, config_of, folded, write
from jax_extract.sae.jobs import Job
from jax_extract.sae.metrics import Metrics
from jax_extract.training.checkpoints import HERE, Kind, TrainerState, save, save_here
from jax_extract.training.place import first_other

SUMMARY_FILE = "sae_training_summary.json"
COMMAND = "jax-extract sae train"

Stored = tuple[Job, Metrics, Mapping[str, Any]]  # as `SaeTraining.stored` gives it


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


class SavedSweep:
    """What is said of every SAE of a sweep.

    Attributes:
      about: of all: the run, filters, schedule, in JSON.
    """

    def __init__(self, about: Mapping[str, Any]) -> None:
        self.about = dict(about)

    def fills(self, stored: Iterable[Stored], scales: Mapping[int, float], step: int) -> dict[str, Any]:
        """What writes each SAE's folder, by its name, and what the summary says of it."""
        found: dict[str, Any] = {}
        for job, metrics, trained in stored:
            scale = scales[job.place]
            tensors = folded(job.architecture, trained["params"], trained["threshold"], scale, scale)
            said = self._metadata(job, metrics, trained, scale, step)
            config = config_of(job.architecture, said)

            def fill(folder: Path, config: Any = config, tensors: Any = tensors) -> None:
                folder.mkdir(exist_ok=True)
                write(folder, config, tensors)

            found[job.name] = fill, {**said["jax_extract"], "metrics": metrics.to_json()}
        return found

    def _metadata(
        self, job: Job, metrics: Metrics, trained: Mapping[str, Any], scale: float, step: int
    ) -> dict[str, Any]:
        about = self.about
        own: dict[str, Any] = {
            "name": job.name,
            "architecture": job.architecture.name,
            "layer": job.site.layer,
            "hook_point": job.site.hook,
            "d_in": job.architecture.d_in,
            "d_sae": job.architecture.d_sae,
            "sparsity": job.sparsity,
            "learning_rate": job.learning_rate,
            "seed": job.seed,
            "baseline": job.baseline,
            "input_scale": scale,
            "step": step,
            "trained_on": about,
        }
        if job.architecture.widths:
            own["matryoshka_widths"] = list(job.architecture.widths)
        if trained["threshold"] and "batchtopk" in job.architecture.name:
            own["threshold"] = {
                "stored": "calibrated on rows of the training, to the mean L0 that was asked for",
                "calibrated": trained["threshold"] / scale,
                "moving_average": trained["averaged_threshold"] / scale,
            }
        return {
            "model_name": about.get("model_name"),
            "hook_name": about["hook_names"].get(str(job.site.layer)),
            "l0": metrics.l0,
            "jax_extract": own,
        }


def save_checkpoint(
    target: Path, state: TrainerState, fills: Mapping[str, Any], save_optimizer: Callable[[Path], None]
) -> None:
    """All SAEs of a step in one folder, with what resuming needs."""

    def fill(folder: Path) -> None:
        for name, (fill_one, _) in fills.items():
            fill_one(folder / name)
        _write_summary(folder / SUMMARY_FILE, state, fills)

    save(target, state, fill, save_optimizer)


def save_end(output: Path, state: TrainerState, fills: Mapping[str, Any]) -> dict[str, Any]:
    """A folder of each SAE, and the summary; which is returned."""
    from jax_extract.store.folders import write_file

    write_file(output / SUMMARY_FILE, lambda path: _write_summary(path, state, fills))
    save_here(output, state, {name: fill for name, (fill, _) in fills.items()})
    return summary_of(state, fills)


def summary_of(state: TrainerState, fills: Mapping[str, Any]) -> dict[str, Any]:
    """What sae_training_summary.json says."""
    return {
        "step": state.global_step,
        "steps": state.max_steps,
        "epoch": state.epoch,
        "loss": {
            "reconstruction": "mean over rows of the summed squared error, rows scaled by input_scale",
            "sparsity": "mean over rows of the sum over latents, weighted by decoder norms (L1 and tanh L0)",
            "decoder": "norms are free; BatchTopK and TopK choose by activation times norm",
            "input_scale": "square root of the width by the mean norm of the rows that are trained on",
        },
        "saes": [said for _, said in fills.values()],
    }


def _write_summary(path: Path, state: TrainerState, fills: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(summary_of(state, fills), indent=1, allow_nan=False) + "\n", encoding="utf-8")
