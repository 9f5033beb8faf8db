#!/usr/bin/env python3
"""Where the start of an extraction goes: until its first batch is on its way, and stage by stage.

    python benchmarks/start.py                             SmolLM2-135M and ARC tasks, as `make demo` has them
    python benchmarks/start.py --rounds 6 --dtype bfloat16

Every figure is of a fresh process, with nothing compiled yet (cold) or with everything compiled (warm); in turns, so
that the machine's drift meets both. The first table is of the command itself, in which stages overlap; the second is
of the same work one stage after the other. Model and tasks are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from extraction import environment, flag
from machine import describe, title
from workloads import assets

CACHES = ("cold", "warm")
Seconds = Mapping[str, float]


def main() -> int:
    if sys.argv[1:2] == ["stages"]:
        print(json.dumps(stages(json.loads(sys.argv[2]))))
        return 0
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--rounds", type=int, default=5, help="default: 5")
    words.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    words.add_argument("--n_tasks", type=int, default=25, help="default: 25")
    args = words.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(args, Path(folder))
    print(f"{title(describe())}; {args.dtype}, {args.n_tasks} ARC tasks; seconds, median (fastest) of {args.rounds}\n")
    print(table("the command", [told["command"] for told in measured]))
    print()
    print(table("one stage after the other", [told["stages"] for told in measured]))
    return 0


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, dict[str, Seconds]]]:
    """A dictionary a round: of the command and of its stages, by cache."""
    options = {
        "model_path": str(assets() / "smollm2-135m-instruct.gguf"),
        "tasks_file": str(assets() / "arc-agi-1.json"),
        "n_tasks": args.n_tasks,
        "dtype": args.dtype,
        "activations_dir": str(folder / "run"),
        "overwrite": True,
    }
    rounds = []
    for number in range(args.rounds):
        of_command, of_stages = {}, {}
        for cache in CACHES:
            command = ["ours.py", "first_batch", str(time.monotonic())]
            command += [word for name, value in options.items() for word in flag(name, value)]
            of_command[cache] = fresh(command, folder / f"command{number}")
            of_stages[cache] = fresh(["start.py", "stages", json.dumps(options)], folder / f"stages{number}")
        names = {"on_its_way": "first batch on its way", "captured": "and captured", "processor": "processor time"}
        of_command = {cache: {names[k]: v for k, v in told.items()} for cache, told in of_command.items()}
        rounds.append({"command": of_command, "stages": of_stages})
    return rounds


def fresh(command: Sequence[str], compiled: Path) -> Seconds:
    """What a script of this folder prints last, in a process of its own."""
    env = {**os.environ, **environment(compiled)}
    script = [sys.executable, str(HERE / command[0]), *command[1:]]
    ended = subprocess.run(script, capture_output=True, text=True, check=False, env=env)
    if ended.returncode:
        raise SystemExit((ended.stderr.strip().splitlines() or [f"{command[0]} said nothing"])[-1])
    return json.loads(ended.stdout.strip().splitlines()[-1])


def stages(options: dict[str, Any]) -> dict[str, float]:
    """What the command does until its first step, one after the other, in this process; seconds."""
    from jax_extract.startup import seconds_since_start

    seconds: dict[str, float] = {}
    before = 0.0

    def done(stage: str) -> None:
        nonlocal before
        seconds[stage], before = (now := seconds_since_start()) - before, now

    import jax

    done("Python and jax")
    import jax_extract.extraction.command  # noqa: F401 (its imports are what is timed)
    from jax_extract.config import ExtractConfig
    from jax_extract.devices import compilation_cache
    from jax_extract.devices.sharding import Layout
    from jax_extract.extraction.prepare import Job
    from jax_extract.extraction.program import capture_function, slab_inputs

    compilation_cache.start()
    done("modules of an extraction")
    from ours import planned

    _, shapes = planned(config := ExtractConfig(**options))
    largest = max(shapes, key=lambda shape: shape.tokens)
    done("model's header, tokenizer, prompts, plan")
    job = Job.open(config)
    weights = job.weights()
    params = weights.load(job.backend.mesh, job.backend.dtype, Layout.GATHERED)
    jax.block_until_ready(params)
    done("weights")
    specs = jax.tree.map(lambda parameter: parameter.sharding.spec, params)
    jitted = capture_function(job.model.port, job.model.config, job.plan, job.backend.mesh, job.backend.numerics, specs)
    traced = jitted.trace(params, *slab_inputs(job.backend.mesh, largest), ())
    done("its largest program: tracing")
    lowered = traced.lower()
    done("its largest program: lowering")
    lowered.compile()
    done("its largest program: compiling or loading")
    return {**seconds, "all": before}


def table(heading: str, rounds: Sequence[Mapping[str, Seconds]]) -> str:
    lines = [f"{heading:<42}" + "".join(f"{cache:>16}" for cache in CACHES)]
    told = {cache: [one[cache] for one in rounds] for cache in CACHES}
    for name in told[CACHES[0]][0]:
        cells = [[one[name] for one in told[cache]] for cache in CACHES]
        lines.append(f"{name:<42}" + "".join(f"{statistics.median(c):>9.2f} ({min(c):.2f})" for c in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
