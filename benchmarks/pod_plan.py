#!/usr/bin/env python3
"""How well a plan uses a TPU pod, other devices, or one host: counted, without a device.

    python benchmarks/pod_plan.py                          all tables; about half a minute
    python benchmarks/pod_plan.py --lengths FILE           with token lengths of your own, a JSON list, in their place
    python benchmarks/pod_plan.py --only goals             the table that docs/decisions/whole-mesh-plan.md promises

Lengths are drawn with replacement, and cut at 8,192 tokens. The built-in distributions are log-normal, with the
quantiles of real inputs under Qwen2.5's tokenizer: `arc-like` of the 400 + 400 tasks of ARC-AGI-1 as prompts of digits
and newlines (median 906, mean 1,355), `gsm8k-like` of the 8,792 questions of GSM8K (median 56, mean 60); `web` has a
heavy tail (median 493, one in sixty is cut).

Plans and schedules are those of a run: windows, batches, parts, and steps that give every device one slab of one shape.
A plan is the same whatever the mesh, so the tables of one input show one plan on several. `real` is the share of
computed tokens that are tokens of samples; `padding` and `idle` are what else is computed, in slabs and on devices that
have none. `unseen` is the share of the work (products and attention) that goes into pairs of a query and a key it does
not see, most of them of two samples in a row; `useful` is what tokens of samples and the keys that they see need of it.
The model is Qwen2.5-0.5B, layers 10 to 23 kept in float32, with attention in blocks of 512 on TPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jax_extract.devices.platform import CPU, GPU, TPU, PlatformDefaults
from jax_extract.extraction.accounting import StepCounts
from jax_extract.extraction.program import rows_travel
from jax_extract.extraction.schedule import steps
from jax_extract.inputs.planning.slabs import PlanSettings
from jax_extract.inputs.planning.windows import WINDOW_SAMPLES, plan_tables, shapes_of
from jax_extract.inputs.token_table import TokenTable, windows_of
from models.positions import Positions

MAX_LENGTH = 8_192
# FLOPs of a layer of Qwen2.5-0.5B: products for a token, and attention for a query and a key.
D_MODEL, KEYS_AND_VALUES, D_FF = 896, 256, 4_864
LAYERS = 14  # that are kept
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
class Mesh:
    """Devices, and on how many hosts they are."""

    devices: int
    hosts: int

    @classmethod
    def of_tpus(cls, chips: int) -> Mesh:
        return cls(chips, max(1, chips // 4))


def settings_of(defaults: PlatformDefaults, mesh: Mesh, positions: str = "last") -> PlanSettings:
    """Those of a run with batches of 8 a device, begun on this mesh."""
    of_rows = defaults is TPU  # whose attention computes whole rows
    return PlanSettings(
        samples_per_batch=8 * mesh.devices,
        rows=8,
        slab_tokens=defaults.slab_tokens,
        length_multiple=defaults.length_multiple,
        max_length=MAX_LENGTH,
        positions=Positions.parse(positions),
        bytes_per_row=D_MODEL * 4,
        compile_tokens=defaults.compile_tokens,
        hosts=mesh.hosts,
        packed=defaults.packed,
        version=2,
        devices_of_host=mesh.devices // mesh.hosts,
        samples_a_row=defaults.samples_a_row,
        pair_cost=PAIR_COST if of_rows else 0.0,
        attention_block=512 if of_rows else 1,
        rows_stay=mesh.hosts > 1 and positions == "all",
    )


def table_of(lengths: np.ndarray) -> TokenTable:
    """Samples of these lengths (int64 [samples]) whose tokens and names say nothing."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    nothing = [""] * len(lengths)
    return TokenTable(np.zeros(offsets[-1], np.int32), offsets, np.arange(len(lengths)), lengths, nothing, nothing)


def row_of(lengths: np.ndarray, settings: PlanSettings, mesh: Mesh) -> list[str]:
    """What the devices of a mesh compute of samples of these lengths."""
    started = time.process_time()
    windows = list(plan_tables(windows_of([table_of(lengths)], WINDOW_SAMPLES), settings))
    seconds = time.process_time() - started
    parts = [part for window in windows for part in window.parts]
    captured = max(shape.rows * settings.positions.slots(shape.length, shape.samples) for shape in shapes_of(parts))
    travel = rows_travel(settings.positions, mesh.devices * captured * LAYERS * settings.bytes_per_row)
    taken = steps(parts, mesh.hosts, mesh.devices // mesh.hosts, travel)
    counts = StepCounts.of(taken, mesh.devices, settings.pair_cost)
    number = counts.steps.total()
    shares = (*counts.shares, counts.unseen_share, counts.useful_share)
    return [
        f"{len(parts):,}",
        str(len(counts.steps)),
        f"{number:,}",
        f"{counts.slabs / number:.1f}",
        *(f"{share:.1%}" for share in shares),
        f"{seconds:.2f}",
    ]


COUNTED = ["parts", "shapes", "steps", "slabs a step", "real", "padding", "idle", "unseen", "useful", "plan, s"]


def goals(draws: dict[str, Draw], seed: int) -> Iterator[list[str]]:
    name, draw = next(iter(draws.items()))
    yield ["lengths", "samples", "positions", "devices", *COUNTED]
    pod = Mesh.of_tpus(64)
    for samples, positions in itertools.product((50_000, 5_000, 800), ("last", "all")):
        lengths = draw(np.random.default_rng(seed), samples)
        said = [name, f"{samples:,}", positions, "v5e-64"]
        yield [*said, *row_of(lengths, settings_of(TPU, pod, positions), pod)]
    host = Mesh(8, 1)
    lengths = draw(np.random.default_rng(seed), 600)
    yield [name, "600", "last", "8 CPU devices", *row_of(lengths, settings_of(CPU, host), host)]


def _on(
    defaults: PlatformDefaults, draws: dict[str, Draw], seed: int, samples: Sequence[int], meshes: Sequence[Mesh]
) -> Iterator[list[str]]:
    yield ["lengths", "samples", "devices", *COUNTED]
    for (name, draw), number, mesh in itertools.product(draws.items(), samples, meshes):
        lengths = draw(np.random.default_rng(seed), number)
        yield [name, f"{number:,}", str(mesh.devices), *row_of(lengths, settings_of(defaults, mesh), mesh)]


def meshes(draws: dict[str, Draw], seed: int) -> Iterator[list[str]]:
    chips = [Mesh.of_tpus(chips) for chips in (1, 4, 8, 64, 256)]
    return _on(TPU, draws, seed, (50_000, 5_000, 800), chips)


def one_sample_a_row(draws: dict[str, Draw], seed: int) -> Iterator[list[str]]:
    return _on(GPU, draws, seed, (50_000, 5_000), (Mesh(1, 1), Mesh(8, 1)))


def hosts(draws: dict[str, Draw], seed: int) -> Iterator[list[str]]:
    return _on(CPU, draws, seed, (5_000, 600), (Mesh(1, 1), Mesh(8, 1), Mesh(64, 1)))


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
