#!/usr/bin/env python3
"""Extractions side by side: jax_extract and its peers on the same prompts, in one go, in turn.

    python benchmarks/extraction.py                                    ARC up to 1,024 tokens, the Qwen2.5-0.5B shape
    python benchmarks/extraction.py --models smollm2 --layers 10-23 12   SmolLM2-135M's real weights; both layer choices
    python benchmarks/extraction.py --models tiny --prompts 4 --rounds 1 does everything work? some minutes

A case is a workload, a model, a dtype, layers and positions; every combination of what is given is a case. All sides
get the same token ids and write the same rows as safetensors, in the dtype of the computation; after the first round
the rows of each peer are compared with ours. Each side has a process of its own; they take turns, in another order
every round, so that the machine's drift meets each, and what is compared are medians. Not timed: imports, loading,
tokenising, planning, compilation. After every round the peaks of XLA's and torch's matrix products are measured on the
model's own shapes. `bare_forward` is jax_extract without capturing, copying and writing; `others` is the share
of the machine's processors that other programs had meanwhile. Peers live in .venv-peers (`make .venv-peers/ready`). One
table a case is printed, and one JSON file written.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks"
sys.path.insert(0, str(ROOT))

from figures import BARE, OURS, PEERS, SIDES, figures_of
from machine import busy_seconds, describe, disk_bandwidth
from protocol import Side, SideFailed
from report import table
from rows import OtherRows, compare
from work import Shape
from workloads import (
    MODEL,
    MODELS,
    PROMPTS,
    TOKENS,
    WORKLOADS,
    Case,
    parse_layers,
    prepare_model,
    prepare_prompts,
)

from jax_extract.errors import UserError
from models.registry import port_for


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        cases = [
            Case(workload, model, dtype, parse_layers(layers), positions, args.prompts, args.writer == "files")
            for model, workload, dtype, layers, positions in itertools.product(
                args.models, args.workloads, args.dtypes, args.layers, args.positions
            )
        ]
        require_peers(args)
        print(f"{len(cases)} cases: {', '.join(case.name for case in cases)}", file=sys.stderr)
        args.results.mkdir(parents=True, exist_ok=True)
        for model, group in itertools.groupby(cases, key=lambda case: case.model):
            with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
                config = prepare_model(model, Path(scratch))
                for case in group:
                    result = Comparison(case, args, config, Path(scratch)).run()
                    path = args.results / f"{case.name}.json"
                    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                    print(f"\n{table(result)}\n\nwritten to {path}", flush=True)
    except (UserError, SideFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--workloads", nargs="+", default=["arc1024"], choices=list(WORKLOADS))
    words.add_argument("--models", nargs="+", default=["qwen2.5-0.5b"], choices=list(MODELS))
    words.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32", "bfloat16"],
        choices=["float32", "bfloat16"],
        help="default: both, a case each",
    )
    words.add_argument("--layers", nargs="+", default=["10-23"], metavar="LAYERS", help="such as 10-23 12: two choices")
    words.add_argument("--positions", nargs="+", default=["all"], choices=["all", "last"])
    words.add_argument("--prompts", type=int, default=64, help="default: 64")
    words.add_argument("--rounds", type=int, default=3, help="default: 3; one round says little")
    words.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES), help="default: all")
    words.add_argument("--writer", default="files", choices=["files", "none"], help="none: no side writes its rows")
    words.add_argument("--gsm8k", metavar="FILE_OR_URL", help="the questions of the workload gsm8k, as .jsonl")
    words.add_argument("--batch_size", type=int, default=8, help="of jax_extract, per device; peers have 8")
    words.add_argument("--results", type=Path, default=ROOT / "results" / "benchmarks", help="folder of the JSON files")
    words.add_argument("--directory", help="where everything is written meanwhile; by default the temporary one")
    words.add_argument("--peers_python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python")
    return words


def require_peers(args: argparse.Namespace) -> None:
    if set(args.sides) & set(PEERS) and not args.peers_python.exists():
        raise UserError(
            f"there is no {args.peers_python}, where the peers live; make it with make .venv-peers/ready, "
            f"or leave them out with --sides {OURS} {BARE}"
        )


@dataclass
class Comparison:
    """One case, from its prompts to its result.

    Attributes:
      config: the model's config.json.
      scratch: holds the model; what the case writes goes with it.
      cannot: side -> why it has no figures.
    """

    case: Case
    args: argparse.Namespace
    config: dict[str, Any]
    scratch: Path
    cannot: dict[str, str] = field(default_factory=dict)
    row_errors: dict[str, dict[str, float]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        case, machine = self.case, describe()
        port = port_for(self.config)
        config = port.config(self.config)
        if max(case.layers) >= (layers := config.num_hidden_layers):
            raise UserError(f"layer {max(case.layers)} does not exist; {case.model} has layers 0 to {layers - 1}")
        lengths = prepare_prompts(case, self.scratch, self.args.gsm8k)
        shape = Shape.of(self.config, case.layers)
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            here = Path(folder)
            self._write_jobs(here, shape, port.prefix + port.modules(config)["after_block"][0].removesuffix(".{i}"))
            disk = disk_bandwidth(here)
            first = self._first_batches(here)
            with self._sides(here) as sides:
                rounds = [self._round(number, sides, here) for number in range(self.args.rounds)]
                plan = sides[OURS].ask("plan")
        result = {
            "case": asdict(case),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "command": shlex.join(["benchmarks/extraction.py", *self._words()]),
            "machine": machine,
            "versions": {**plan["versions"], **self.versions},
            "tokens": sum(lengths),
            "longest": max(lengths),
            "flops": sum(shape.flops(length) for length in lengths),
            "shapes": plan["shapes"],
            "compile_seconds": plan["compile_seconds"],
            "disk_bytes_per_second": disk,
            "first_batch": first,
            "cannot": self.cannot,
            "row_errors": self.row_errors,
            "rounds": rounds,
        }
        return {**result, "figures": figures_of(result)}

    # ------------------------------------------------------------------------------------- the rounds

    def _round(self, number: int, sides: dict[str, Side], here: Path) -> dict[str, Any]:
        """Everyone once, in an order that begins with another side every time; then the peaks."""
        order = [side for side in SIDES if side in self.args.sides or side == OURS]
        order = order[number % len(order) :] + order[: number % len(order)]
        answers: dict[str, Any] = {}
        for name in order:
            if name in self.cannot:
                continue
            try:
                answers[name] = sides[OURS if name == BARE else name].ask("bare" if name == BARE else "run")
            except SideFailed as failure:
                if name not in PEERS:
                    raise
                self.cannot[name] = f"failed: {failure}"
                continue
            self.versions |= answers[name].pop("versions", {})
            speed = answers[name]["tokens"] / answers[name]["seconds"]
            print(f"{self.case.name}, round {number + 1}, {name}: {speed:.1f} tokens/s", file=sys.stderr)
        if number == 0:
            self._compare_rows(answers, here)
        names = {"xla": "xla_peak", "torch": "torch_peak"}
        peaks = {peak: sides[name].ask("peak")["flops_per_second"] for peak, name in names.items() if name in sides}
        return {"order": order, "sides": answers, "peaks": peaks}

    def _compare_rows(self, answers: dict[str, Any], here: Path) -> None:
        """Who did other work than we did has no figures."""
        prompts = json.loads((self.scratch / TOKENS).read_text(encoding="utf-8"))
        for name in set(answers) & set(PEERS):
            if not self.case.writes:
                continue
            try:
                errors = compare(here / OURS, here / name, prompts, self.case.layers, self.case.dtype)
                self.row_errors[name] = errors
            except OtherRows as error:
                self.cannot[name] = str(error)
                del answers[name]

    @contextlib.contextmanager
    def _sides(self, here: Path) -> Iterator[dict[str, Side]]:
        """Who takes part; each loads its model when it is asked first."""
        with contextlib.ExitStack() as stack:

            def start(name: str, *command: str | Path) -> Side:
                side = Side([str(word) for word in command], here / f"{name}.log", environment(here / "compiled"))
                stack.callback(side.close)
                return side

            job, peers = here / "job.json", self.args.peers_python
            sides = {
                OURS: start(OURS, sys.executable, HERE / "ours.py", "serve", job),
                "xla_peak": start("xla_peak", sys.executable, HERE / "ours.py", "peak", job),
            }
            if chosen := [peer for peer in PEERS if peer in self.args.sides]:
                sides["torch_peak"] = start("torch_peak", peers, HERE / "peers.py", "torch", job)
            for name in chosen:
                if reason := cannot(name, self.case):
                    self.cannot[name] = reason
                else:
                    sides[name] = start(name, peers, HERE / "peers.py", name, here / f"{name}.json")
            yield sides

    # --------------------------------------------------------------------------- what the sides are told

    def _write_jobs(self, here: Path, shape: Shape, blocks: str) -> None:
        """`blocks` is where a causal language model of transformers has its blocks."""
        case = self.case
        job = {
            "model": str(self.scratch / MODEL),
            "tokens": str(self.scratch / TOKENS),
            "dtype": case.dtype,
            "layers": case.layers,
            "positions": case.positions,
            "writes": case.writes,
            "products": shape.products,
            "blocks": blocks,
            "options": self._options(here / OURS),
        }
        (here / "job.json").write_text(json.dumps(job), encoding="utf-8")
        for name in PEERS:
            (here / f"{name}.json").write_text(json.dumps({**job, "out": str(here / name)}), encoding="utf-8")

    def _options(self, out: Path) -> dict[str, Any]:
        """Of `jax-extract extract`."""
        return {
            "model_path": str(self.scratch / MODEL),
            "tasks_file": str(self.scratch / PROMPTS),
            "layers_to_extract": self.case.layers,
            "positions": self.case.positions,
            "dtype": self.case.dtype,
            "capture_dtype": self.case.dtype,
            "shard_format": "safetensors",
            "max_seq_length": WORKLOADS[self.case.workload].most,
            "batch_size": self.args.batch_size,
            "activations_dir": str(out),
            "overwrite": True,
        }

    def _first_batches(self, here: Path) -> dict[str, dict[str, float]]:
        """Seconds from the start of a process: with nothing compiled yet, and again with everything compiled."""
        words = [word for name, value in self._options(here / "first").items() for word in flag(name, value)]
        found = {}
        for cache in ("cold", "warm"):
            command = [sys.executable, str(HERE / "ours.py"), "first_batch", str(time.monotonic()), *words]
            env = {**os.environ, **environment(here / "first_compiled")}
            before = busy_seconds()
            ended = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
            if ended.returncode:
                raise SideFailed((ended.stderr.strip().splitlines() or ["the first batch never came"])[-1])
            told = json.loads(ended.stdout.strip().splitlines()[-1])
            others = busy_seconds() - before - told["processor"]
            found[cache] = {**told, "others": max(0.0, others) / (told["captured"] * (os.cpu_count() or 1))}
        return found

    def _words(self) -> list[str]:
        """The command that repeats this case alone."""
        layers = self.case.name.partition("_layers")[2].partition("_")[0].replace("+", ",")
        words = ["--workloads", self.case.workload, "--models", self.case.model, "--dtypes", self.case.dtype]
        words += ["--layers", layers, "--positions", self.case.positions]
        words += ["--prompts", str(self.case.prompts), "--rounds", str(self.args.rounds)]
        if not self.case.writes:
            words += ["--writer", "none"]
        if self.args.batch_size != 8:
            words += ["--batch_size", str(self.args.batch_size)]
        if set(self.args.sides) != set(SIDES):
            words += ["--sides", *self.args.sides]
        if self.case.workload == "gsm8k":
            words += ["--gsm8k", "FILE_OR_URL"]
        return words


def cannot(peer: str, case: Case) -> str | None:
    """Why a peer has no way to do a case; None where it has."""
    if peer == "sae_lens" and len(case.layers) > 1:
        return f"caches one layer a run, and {len(case.layers)} are asked for"
    return None


def flag(name: str, value: Any) -> list[str]:
    return [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]


def environment(compiled: Path) -> dict[str, str]:
    """Of every side: where our commands keep compiled programs; and no hub is asked."""
    return {
        "JAX_EXTRACT_COMPILATION_CACHE": str(compiled),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


if __name__ == "__main__":
    sys.exit(main())
