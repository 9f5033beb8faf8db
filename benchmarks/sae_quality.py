#!/usr/bin/env python3
"""How well SAEs find features that are known: ours and SAELens' trainer on the same rows of SAELens' synthetic model.

    python benchmarks/sae_quality.py                       three seeds of BatchTopK, Matryoshka and L1
    python benchmarks/sae_quality.py --rows 200000 --seeds 0 --architectures batchtopk

Both are given the same rows in the same order, the same first weights and the same hyper-parameters, by `train_saes`
with `backend` jax and torch. SAELens' own evaluation measures what either has stored: the mean correlation of decoder
directions with the features (each with one, MCC), F1 of latents as detectors, explained variance, L0. A model of 512
features in 256 dimensions that fire as Zipf's law has it. Printed are means over seeds, and twice the standard error of
the difference.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from machine import describe, title

BACKENDS = {"jax": "ours", "torch": "SAELens"}
ARCHITECTURES = {
    "batchtopk": {"k": 9.0},
    "matryoshka_batchtopk": {"k": 9.0},
    "standard": {"l1_coefficient": 2.0},
}
FEATURES, WIDTH, LATENTS, BATCH = 512, 256, 512, 1_024
EVALUATED = 50_000


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    words.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    words.add_argument("--rows", type=int, default=300_000, help="default: 300,000")
    args = words.parse_args()
    warnings.simplefilter("ignore")  # of the other library
    print(title(describe()), flush=True)
    for architecture in args.architectures:
        print(f"\n{architecture}, {args.rows:,} rows, seeds {' '.join(map(str, args.seeds))}", flush=True)
        found = {
            backend: [trained(architecture, backend, seed, args.rows) for seed in args.seeds] for backend in BACKENDS
        }
        for name in next(iter(found.values()))[0]:
            ours, theirs = (np.array([each[name] for each in found[backend]]) for backend in BACKENDS)
            spread = 2 * np.std(ours - theirs, ddof=1) / np.sqrt(len(ours)) if len(ours) > 1 else float("nan")
            print(
                f"  {name:<20}ours {ours.mean():8.4f}   SAELens {theirs.mean():8.4f}   difference "
                f"{(ours - theirs).mean():+.4f} ± {spread:.4f}",
                flush=True,
            )
    return 0


def trained(architecture: str, backend: str, seed: int, rows: int) -> dict[str, float]:
    """What SAELens' evaluation says of one SAE."""
    from sae_lens import SAE
    from sae_lens.synthetic import eval_sae_on_synthetic_data

    from jax_extract import train_saes

    model = synthetic_model(seed)
    options: dict[str, Any] = {**ARCHITECTURES[architecture], "architecture": architecture, "d_sae": LATENTS}
    options |= {"batch_size": BATCH, "training_rows": rows, "seed": seed, "learning_rate": 3e-3, "baselines": "none"}
    options |= {"dead_after_rows": 100_000, "largest_norm": 0.0, "eval_steps": 10**6, "save_steps": 10**6}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        [name] = train_saes(batches(model, seed), folder, backend=backend, silent=True, **options)
        seconds = time.perf_counter() - started
        sae = SAE.load_from_disk(str(Path(folder) / name))
    seeded(10_000 + seed)
    said = eval_sae_on_synthetic_data(sae, model.feature_dict, model.activation_generator, EVALUATED, batch_size=5_000)
    return {
        "MCC": float(said.mcc),
        "F1": float(said.classification.f1_score),
        "mean max cosine": planted(sae, model),
        "explained variance": float(said.explained_variance),
        "L0": float(said.sae_l0),
        "seconds": seconds,
    }


def planted(sae: Any, model: Any) -> float:
    """Over the half of the features that fire most often, the cosine with the nearest latent's direction."""
    import torch

    features = torch.nn.functional.normalize(model.feature_dict.feature_vectors, dim=1)[: FEATURES // 2]
    latents = torch.nn.functional.normalize(sae.W_dec, dim=1)
    return float((features @ latents.T).max(dim=1).values.mean())


def synthetic_model(seed: int) -> Any:
    from sae_lens.synthetic import (
        OrthogonalizationConfig,
        SyntheticModel,
        SyntheticModelConfig,
        ZipfianFiringProbabilityConfig,
    )

    seeded(seed)
    config = SyntheticModelConfig(
        num_features=FEATURES,
        hidden_dim=WIDTH,
        firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.2, min_prob=0.005),
        orthogonalization=OrthogonalizationConfig(),
        std_firing_magnitudes=0.3,
        seed=seed,
    )
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        return SyntheticModel(config, device="cpu")


def batches(model: Any, seed: int) -> Iterator[Any]:
    """The same rows for the same seed, whatever else draws random numbers meanwhile."""
    import torch

    for number in itertools.count():
        with torch.random.fork_rng(devices=[]):
            seeded(1_000_000 * (seed + 1) + number)
            rows = model.sample(4 * BATCH)
        yield rows


def seeded(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


if __name__ == "__main__":
    sys.exit(main())
