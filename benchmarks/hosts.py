#!/usr/bin/env python3
"""Whether the processes of one program wait for each other, and whether they write the bytes that one process writes.

    python benchmarks/hosts.py                      2,000 short samples on 8 CPU devices of 1, 2 and 4 processes
    python benchmarks/hosts.py --positions all      with parts that their own hosts compute

The processes are real, and speak through Gloo. A process is idle in a step in which none of its devices has a slab.
What is counted is in the sessions that a run keeps (docs/format.md). Seconds are not told: all share one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from restart import make_model, make_prompts

DEVICES = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2_000)
    parser.add_argument("--tokens", type=int, default=40, help="of a sample, within a third; default: 40")
    parser.add_argument("--positions", default="last")
    args = parser.parse_args()
    print("| processes | devices of each | steps | idle steps, each process | real | idle devices | rows |")
    print("|---|---|---|---|---|---|---|")
    rows = set()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder / "model")
        prompts = make_prompts(folder / "prompts.jsonl", args.samples, args.tokens)
        for processes in (1, 2, 4):
            run = folder / f"run{processes}"
            extract(folder / "model", prompts, run, args.positions, processes)
            told = digest(run)
            rows.add(told)
            print(row(processes, sessions(run), told), flush=True)
    if len(rows) > 1:
        print("error: the processes of one program wrote other rows than one process", file=sys.stderr)
    return int(len(rows) > 1)


def extract(model: Path, prompts: Path, run: Path, positions: str, processes: int) -> None:
    """One program over so many processes, each with its share of the devices."""
    options = {"model_path": model, "tasks_file": prompts, "activations_dir": run, "positions": positions}
    words = [sys.executable, "-m", "jax_extract.cli", "extract", "--layers_to_extract", "0", "--batch_size", "8"]
    words += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = ["--coordinator_address", f"127.0.0.1:{port}", "--num_processes", str(processes)]
    devices = str(DEVICES // processes)
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": devices, "PYTHONPATH": path}
    running = [
        subprocess.Popen(
            [*words, *([*group, "--process_id", str(index)] if processes > 1 else [])],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    for process in running:
        said = process.communicate()[1]
        if process.returncode:
            raise SystemExit(said)


def sessions(run: Path) -> list[Mapping[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((run / "_run/sessions").iterdir())]


def digest(run: Path) -> str:
    """sha256 over the rows of all samples, by their ids: the same where every row is, whatever files they are in."""
    from jax_extract import open_activations

    rows = {sample.sample_id: sample.get(0).tobytes() for sample in open_activations(run).samples()}
    return hashlib.sha256(b"".join(name.encode() + rows[name] for name in sorted(rows))).hexdigest()[:12]


def row(processes: int, of: Sequence[Mapping[str, Any]], told: str) -> str:
    computed = sum(session["slab_tokens"] for session in of)
    idle = ", ".join(f"{session['idle_steps'] / session['steps']:.1%}" for session in of)
    cells = [
        processes,
        DEVICES // processes,
        of[0]["steps"],
        idle,
        f"{sum(session['tokens'] for session in of) / computed:.1%}",
        f"{sum(session['idle_tokens'] for session in of) / computed:.1%}",
        told,
    ]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    sys.exit(main())
