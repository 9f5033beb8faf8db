#!/usr/bin/env python3
"""Steps of training a sparse autoencoder, side by side: ours, SAELens as it comes, SAELens at its best, in turn.

    python benchmarks/sae.py                                      rows of 576 values to 4,608 latents, 4,096 a step
    python benchmarks/sae.py --architectures batchtopk --rounds 5

Each side has a process of its own, the same rows, its own weights, and all cores. SAELens at its best has its memory in
huge pages (GLIBC_TUNABLES) and, for TopK, its option for sparse activations. Beside them the five products of matrices
that a step of an autoencoder needs, alone in one compiled program: no step can be faster. Not timed: imports,
compiling, a first step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from machine import describe, title
from protocol import Commands, Side, in_turn, serve

ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu", "gated", "matryoshka_batchtopk")
PRODUCTS, OURS, AS_IT_COMES, AT_ITS_BEST = "five products", "ours", "SAELens", "SAELens at its best"
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
POOL = 4  # batches, of which each step has the next
K, L1, L0 = 32, 5.0, 1.0


def main() -> int:
    if sys.argv[1:2] == ["serve"]:
        name, job = sys.argv[2], json.loads(Path(sys.argv[3]).read_text(encoding="utf-8"))
        sides = {PRODUCTS: products, OURS: ours, AS_IT_COMES: saelens, AT_ITS_BEST: saelens}
        return serve(lambda: sides[name](job))
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    words.add_argument("--width", type=int, default=576, help="default: 576")
    words.add_argument("--latents", type=int, default=4608, help="default: 4608")
    words.add_argument("--rows", type=int, default=4096, help="of a step; default: 4096")
    words.add_argument("--steps", type=int, default=8, help="timed together; default: 8")
    words.add_argument("--rounds", type=int, default=3, help="default: 3")
    words.add_argument("--no_peers", action="store_true", help="our own sides alone")
    words.add_argument("--peers_python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python")
    args = words.parse_args()
    print(title(describe()))
    for architecture in args.architectures:
        with tempfile.TemporaryDirectory() as folder:
            print(f"\n{architecture}: {compare(args, architecture, Path(folder))}", flush=True)
    return 0


def compare(args: argparse.Namespace, architecture: str, folder: Path) -> str:
    """Rounds in turn; a table."""
    from extraction import environment

    job = {name: getattr(args, name) for name in ("width", "latents", "rows", "steps")}
    env = environment(folder / "compiled")
    sides: dict[str, Side] = {}
    peers = [] if args.no_peers else [AS_IT_COMES, AT_ITS_BEST]
    for name in (PRODUCTS, OURS, *peers):
        path = folder / f"{name}.json"
        sparse = name == AT_ITS_BEST and architecture == "topk"
        path.write_text(json.dumps({**job, "architecture": architecture, "sparse": sparse}), encoding="utf-8")
        python = str(args.peers_python) if name in peers else sys.executable
        command = [python, str(HERE / "sae.py"), "serve", name, str(path)]
        sides[name] = Side(command, folder / "log", {**env, **(HUGE_PAGES if name == AT_ITS_BEST else {})})
    told = in_turn(sides, args.rounds)
    seconds = {name: [answer["seconds"] for answer in answers] for name, answers in told.items()}
    lines = [f"{args.rows:,} rows of {args.width} values to {args.latents:,} latents, {args.steps} steps a round"]
    for name, each in seconds.items():
        ratios = [theirs / ours for ours, theirs in zip(seconds[OURS], each, strict=True)]
        others = statistics.median(answer["others"] for answer in told[name])
        rounds = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        step = statistics.median(each)
        lines.append(
            f"  {name:<20}{args.rows / step:>10,.0f} rows/s   {step:.3f} s a step   "
            f"ours: {statistics.median(ratios):.2f} times as fast (by round: {rounds})   others {others:.0%}"
        )
    return "\n".join(lines)


def batches(job: dict[str, Any]) -> Any:
    """float32 [POOL, rows, width]: a few of many directions at once, as activations are; norms of about sqrt(width)."""
    import numpy as np

    random = np.random.default_rng(0)
    width, many = job["width"], 4 * job["width"]
    directions = random.standard_normal((many, width)).astype(np.float32)
    found = np.empty((POOL, job["rows"], width), np.float32)
    for batch in found:
        there = (random.random((job["rows"], many)) < 24 / many) * random.exponential(1.0, (job["rows"], many))
        batch[:] = there.astype(np.float32) @ directions
    return found * (np.sqrt(width) / np.linalg.norm(found, axis=-1).mean())


def timed(step: Any, steps: int) -> Commands:
    """`step(i)` makes one; the last one is waited for."""

    def run() -> dict[str, Any]:
        started = time.perf_counter()
        for i in range(steps):
            last = step(i)
        float(last)
        return {"seconds": (time.perf_counter() - started) / steps}

    run()
    return {"run": run}


# ------------------------------------------------------------------------------------------------ ours


def products(job: dict[str, Any]) -> Commands:
    import jax
    import jax.numpy as jnp

    rows = [jnp.asarray(batch) for batch in batches(job)]
    random = jax.random.key(0)
    encoder = jax.random.normal(random, (job["width"], job["latents"]), jnp.float32)
    decoder = encoder.T.copy()

    @jax.jit
    def five(x: Any, encoder: Any, decoder: Any) -> Any:
        f = jax.lax.optimization_barrier(x @ encoder)
        out = jax.lax.optimization_barrier(f @ decoder)
        df = jax.lax.optimization_barrier(out @ decoder.T)
        return out[0, 0] + (f.T @ out)[0, 0] + (x.T @ df)[0, 0], f.T @ out, x.T @ df

    return timed(lambda i: five(rows[i % POOL], encoder, decoder)[0], job["steps"])


def ours(job: dict[str, Any]) -> Commands:
    from functools import partial

    import jax
    import jax.numpy as jnp
    import numpy as np

    from jax_extract.sae.architecture import Architecture
    from jax_extract.sae.parameters import first_parameters
    from jax_extract.sae.step import FREE, Choice, Schedule, State, train_steps

    name, width, latents = job["architecture"], job["width"], job["latents"]
    nested = tuple(latents >> shift for shift in (4, 3, 2, 1, 0)) if name == "matryoshka_batchtopk" else ()
    architecture = Architecture(name, width, width, latents, k=K if name == "topk" else None, widths=nested)
    layer, free, unscaled = np.zeros(1, np.int32), np.full(1, FREE, np.int32), np.ones(1, np.float32)
    scales = np.ones((1, 1), np.float32)
    sparsity = unscaled * (L0 if name == "jumprelu" else L1)
    choice = Choice(layer, layer, scales, K * unscaled, sparsity, 1e-3 * unscaled, free, free)
    state = jax.tree.map(lambda leaf: leaf[None], State.start(first_parameters(architecture, 0)))
    step = jax.jit(partial(train_steps, architecture, Schedule(1_000)), donate_argnums=0)
    rows = [batch[:, None] for batch in batches(job)]
    kept = [state]

    def one_step(i: int) -> Any:
        kept[0], measured = step(kept[0], choice, jnp.asarray(rows[i % POOL]))
        return measured.loss[0]

    return timed(one_step, job["steps"])


# --------------------------------------------------------------------------------------------- SAELens


def saelens(job: dict[str, Any]) -> Commands:
    import torch
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    name, width, latents = job["architecture"], job["width"], job["latents"]
    options: dict[str, Any] = {
        "standard": {"l1_coefficient": L1},
        "gated": {"l1_coefficient": L1},
        "jumprelu": {"l0_coefficient": L0},
        "matryoshka_batchtopk": {"k": K, "matryoshka_widths": [latents >> shift for shift in (4, 3, 2, 1, 0)]},
    }.get(name, {"k": K})
    if job["sparse"]:
        options |= {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}  # with both it fails
    kind, config = get_sae_training_class(name)
    torch.manual_seed(0)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            total_training_samples=1_000 * job["rows"],
            device="cpu",
            autocast=False,
            lr=1e-3,
            lr_end=1e-3,
            lr_scheduler_name="constant",
            lr_warm_up_steps=0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            lr_decay_steps=0,
            n_restart_cycles=1,
            train_batch_size_samples=job["rows"],
            dead_feature_window=1_000,
            feature_sampling_window=2_000,
            logger=LoggingConfig(log_to_wandb=False),
            n_batches_for_norm_estimate=1,
        ),
        sae=kind(config(d_in=width, d_sae=latents, **options)),
        data_provider=iter([]),
    )
    rows = [torch.from_numpy(batch) for batch in batches(job)]

    def step(i: int) -> float:
        loss = trainer.step(rows[i % POOL]).loss
        trainer.n_training_steps += 1
        return float(loss.detach())

    return timed(step, job["steps"])


if __name__ == "__main__":
    sys.exit(main())
