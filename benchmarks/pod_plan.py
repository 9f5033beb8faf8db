#!/usr/bin/env python3
"""How well a plan uses a TPU pod, other devices, or one host: counted, without a device.

    python benchmarks/pod_plan.py                          all tables; about half a minute
    python benchmarks/pod_plan.py --lengths FILE           with token lengths of your own, a JSON list, in their place
    python benchmarks/pod_plan.py --only goals             the tables that docs/decisions/whole-mesh-plan.md promises

Lengths are drawn with replacement, and cut at 8,192 tokens. The built-in distributions are log-normal, with the
quantiles of real inputs under Qwen2.5's tokenizer: `arc-like` of the 400 + 400 tasks of ARC-AGI-1 as prompts of digits
and newlines (median 906, mean 1,355), `gsm8k-like` of the 8,792 questions of GSM8K (median 56, mean 60); `web` has a
heavy tail (median 493, one in sixty is cut).

Every step gives every device one slab of one shape, so that a device sits out where slabs of a shape are no multiple of
the devices. `real` is the share of computed tokens that are tokens of samples; `padding` and `idle` are what else is
computed, in slabs and on devices that have none. `useful` is the same share of floating-point operations, of attention
only the pairs of one sample. They are those of a layer of Qwen2.5-0.5B, with attention in blocks of 512 on TPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jax_extract.inputs.planning.rows import pack
from jax_extract.inputs.planning.slabs import PlanSettings, Shapes, Slab, SlabShape
from jax_extract.inputs.planning.stages import attention_pairs
from models.positions import Positions

MAX_LENGTH = 8_192
# FLOPs of a layer of Qwen2.5-0.5B: products for a token, and attention for a query and a key.
D_MODEL, KEYS_AND_VALUES, D_FF = 896, 256, 4_864
PRODUCTS = 2 * (D_MODEL * (D_MODEL + KEYS_AND_VALUES) + D_MODEL * D_MODEL + 3 * D_MODEL * D_FF)
PAIR = 4 * D_MODEL
PAIR_COST = PAIR / PRODUCTS

Draw = Callable[[np.random.Generator, int], np.ndarray]


def log_normal(mean: float, deviation: float, shortest: int, longest: int) -> Draw:
    def draw(random: np.random.Generator, samples: int) -> np.ndarray:
        return np.exp(random.normal(mean, deviation, samples)).astype(np.int64).clip(shortest, longest)

    return draw


DISTRIBUTIONS: dict[str, Draw] = {
    "arc-like": log_normal(6.816, 0.9155, 72, MAX_LENGTH),
    "gsm8k-like": log_normal(4.032, 0.3455, 12, 212),
    "web": log_normal(6.2, 1.3, 8, MAX_LENGTH),
}


@dataclass(frozen=True)
class Count:
    """Of a plan: tokens of samples; tokens computed, of which on devices without a slab; and the shares of FLOPs."""

    shapes: int
    slabs: int
    steps: int
    real: int
    computed: int
    idle: int
    useful: float
    seconds: float

    @property
    def cells(self) -> list[str]:
        padding = self.computed - self.real - self.idle
        shares = (self.real, padding, self.idle)
        return [
            str(self.shapes),
            f"{self.steps:,}",
            f"{self.slabs / self.steps:.1f}",
            *(f"{share / self.computed:.1%}" for share in shares),
            f"{self.useful:.1%}",
            f"{self.seconds:.2f}",
        ]


COUNTED = ["shapes", "steps", "slabs a step", "real", "padding", "idle", "useful", "plan, s"]


def steps_of(slabs: Sequence[Slab], devices: int) -> Iterator[tuple[SlabShape, int]]:
    """The shape of each step, and how many devices have a slab."""
    for shape, run in itertools.groupby(slabs, key=lambda slab: slab.shape):
        left = sum(1 for _ in run)
        while left > 0:
            yield shape, min(left, devices)
            left -= devices


def count(lengths: np.ndarray, settings: PlanSettings, shapes: Shapes = ()) -> Count:
    """Plans samples of these lengths (int64 [samples], tokens), and counts."""
    started = time.process_time()
    packed = pack(lengths, settings, shapes)
    seconds = time.process_time() - started
    steps = list(steps_of(packed.slabs, settings.devices))
    rows: dict[int, int] = {}  # computed, by their length
    for shape, _ in steps:
        rows[shape.length] = rows.get(shape.length, 0) + settings.devices * shape.rows
    real, computed = int(lengths.sum()), sum(length * number for length, number in rows.items())
    # Blockwise attention (0: it computes no pair of two samples) costs the same however samples lie.
    own = int((lengths * (lengths + 1)).sum()) // 2
    if settings.pair_cost:
        pairs = sum(number * attention_pairs(length, settings.attention_block) for length, number in rows.items())
    else:
        pairs = own
    return Count(
        shapes=len({shape for shape, _ in steps}),
        slabs=len(packed.slabs),
        steps=len(steps),
        real=real,
        computed=computed,
        idle=sum((settings.devices - slabs) * shape.tokens for shape, slabs in steps),
        useful=(real * PRODUCTS + own * PAIR) / (computed * PRODUCTS + pairs * PAIR),
        seconds=seconds,
    )


def accelerators(devices: int, positions: str = "last") -> PlanSettings:
    """A run on TPUs with the defaults: 4 chips a host, batches of 8."""
    hosts = max(1, devices // 4)
    return PlanSettings(
        samples_per_batch=8 * devices,
        rows=8,
        slab_tokens=16_384,
        length_multiple=128,
        max_length=MAX_LENGTH,
        positions=Positions.parse(positions),
        bytes_per_row=D_MODEL * 4,
        compile_tokens=500_000,
        hosts=hosts,
        version=2,
        devices=devices,
        devices_of_host=devices // hosts,
        pair_cost=PAIR_COST,
        attention_block=512,
    )


def gpus(devices: int) -> PlanSettings:
    """A run on GPUs: attention takes rows of one sample."""
    return replace(accelerators(devices), hosts=1, devices_of_host=devices, samples_a_row=1)


def processors(devices: int) -> PlanSettings:
    """A run on CPU devices of one host: slabs are one row, and attention computes no pair of two samples."""
    return PlanSettings(
        samples_per_batch=8 * devices,
        rows=8,
        slab_tokens=4_096,
        length_multiple=16,
        max_length=MAX_LENGTH,
        positions=Positions.parse("last"),
        bytes_per_row=D_MODEL * 4,
        compile_tokens=1_000,
        packed=True,
        version=2,
        devices=devices,
        devices_of_host=devices,
    )


def goals(draws: dict[str, Draw], seed: int) -> Iterator[list[str]]:
    name, draw = next(iter(draws.items()))
    cases = [
        (50_000, accelerators(64), "v5e-64"),
        (5_000, accelerators(64), "v5e-64"),
        (800, accelerators(64), "v5e-64"),
        (600, processors(8), "8 CPU devices"),
    ]
    yield ["lengths", "samples", "devices", *COUNTED]
    for samples, settings, devices in cases:
        lengths = draw(np.random.default_rng(seed), samples)
        yield [name, f"{samples:,}", devices, *count(lengths, settings).cells]


def meshes(draws: dict[str, Draw], seed: int) -> Iterator[list[str]]:
    yield ["lengths", "samples", "TPUs", *COUNTED]
    for (name, draw), samples, devices in itertools.product(draws.items(), (50_000, 5_000, 800), (1, 4, 8, 64, 256)):
        lengths = draw(np.random.default_rng(seed), samples)
        yield [name, f"{samples:,}", str(devices), *count(lengths, accelerators(devices)).cells]


def one_sample_a_row(draws: dict[str, Draw], seed: int) -> Iterator[list[str]]:
    yield ["lengths", "samples", "GPUs", *COUNTED]
    for (name, draw), samples, devices in itertools.product(draws.items(), (50_000, 5_000), (1, 8)):
        lengths = draw(np.random.default_rng(seed), samples)
        yield [name, f"{samples:,}", str(devices), *count(lengths, gpus(devices)).cells]


def hosts(draws: dict[str, Draw], seed: int) -> Iterator[list[str]]:
    yield ["lengths", "samples", "CPU devices", *COUNTED]
    for (name, draw), samples, devices in itertools.product(draws.items(), (5_000, 600), (1, 8, 64)):
        lengths = draw(np.random.default_rng(seed), samples)
        yield [name, f"{samples:,}", str(devices), *count(lengths, processors(devices)).cells]


TABLES = {"goals": goals, "meshes": meshes, "one_sample_a_row": one_sample_a_row, "hosts": hosts}


def markdown(rows: Iterator[list[str]]) -> Iterator[str]:
    for number, row in enumerate(rows):
        yield f"| {' | '.join(row)} |"
        if number == 0:
            yield f"|{'---|' * len(row)}"


def main(argv: Sequence[str] | None = None) -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--lengths", type=Path, help="token lengths to draw from, a JSON list")
    words.add_argument("--only", nargs="+", default=list(TABLES), choices=TABLES)
    words.add_argument("--seed", type=int, default=0, help="of the draws; default: 0")
    args = words.parse_args(argv)
    draws = DISTRIBUTIONS
    if args.lengths:
        known = np.array(json.loads(args.lengths.read_text(encoding="utf-8")), np.int64).clip(1, MAX_LENGTH)
        draws = {args.lengths.stem: lambda random, samples: random.choice(known, samples)}
    for name in args.only:
        print(f"\n{name}\n")
        for line in markdown(TABLES[name](draws, args.seed)):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
