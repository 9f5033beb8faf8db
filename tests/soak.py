"""Kills the real command at random moments, hundreds of times, and compares what is there in the end.

In: a number of kills and a seed. Out: a line a run, a summary, and exit code 0 where no run lost or doubled
anything. Not part of the test suite: it takes its time. docs/never_lost.md has the result of one.

    .venv/bin/python tests/soak.py --kills 200 --seed 1

A run is one command on a tiny model and some hundred parts, killed and given again until it ends by itself:
by one process, by a program of two, or by two or three independent workers, of one, two or four devices
each, which change from session to session. A session is killed at a moment that is drawn evenly from the
time that it would take to end, so also while it starts and when it has nothing left to do.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import platform
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from small_run import command, environment, make_model, texts, write_jsonl

from jax_extract import open_activations
from jax_extract.cli import main as jax_extract
from jax_extract.store.ledger import RUN_FILE, Ledger
from jax_extract.store.storage.opening import open_storage
from jax_extract.store.survey import survey

LAYERS = (3, 11)
FORMATS = ("pickle", "npz", "safetensors")
ENDS = 240  # seconds after which a process hangs
AT_ONCE = 0.5  # a whole program is taken within so many seconds
KILLED, KILLED_AT_THE_END = 0.9, 0.5  # share of sessions; when nothing is left to do; the others may end

Rows = dict[tuple[str, int], bytes]  # (sample, layer) -> its rows


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody killed.

    Attributes:
      seconds: until it had ended.
      start: until the first part was committed.
      rows, parts: what it wrote; (batch, part) -> samples.
    """

    seconds: float
    start: float
    rows: Rows
    parts: dict[tuple[int, int], int]


@dataclass
class Soak:
    """Attributes:
    killed: when processes were killed -> how many.
    """

    root: Path
    chance: random.Random
    samples: int
    model: Path = field(init=False)
    tasks: Path = field(init=False)
    references: dict[tuple[int, int], Undisturbed] = field(default_factory=dict)
    killed: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    sessions: int = 0
    runs: int = 0
    parts: int = 0
    orphans: int = 0

    def __post_init__(self) -> None:
        self.model = make_model(self.root / "model")
        lengths = np.random.default_rng(0).integers(17, 33, self.samples)
        self.tasks = write_jsonl(self.root / "in.jsonl", [int(n) for n in lengths])

    # ------------------------------------------------------------------------- processes

    def start(self, directory: Path, shard_format: str, devices: int, *more: object) -> subprocess.Popen[str]:
        words = ["--model_path", self.model, "--tasks_file", self.tasks, "--activations_dir", directory]
        words += ["--layers_to_extract", *LAYERS, "--positions", "all", "--batch_size", 1]
        return subprocess.Popen(
            command(*words, "--shard_format", shard_format, *more),
            env=environment({"JAX_NUM_CPU_DEVICES": str(devices)}),
            stdout=subprocess.DEVNULL,
            stderr=(directory.parent / f"{directory.name}.stderr").open("a"),
            text=True,
        )

    def program(self, directory: Path, shard_format: str, hosts: int, devices: int) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = ["--coordinator_address", f"127.0.0.1:{port}", "--num_processes", hosts]
        if hosts == 1:
            return [self.start(directory, shard_format, devices)]
        return [self.start(directory, shard_format, devices, *group, "--process_id", i) for i in range(hosts)]

    def undisturbed(self, directory: Path) -> Undisturbed:
        """A run of the same plan, made when it is first needed."""
        settings = Ledger.open(open_storage(directory)).run["identity"]["plan_settings"]
        return self.reference(settings["samples_per_batch"], settings["hosts"])

    def reference(self, devices: int, hosts: int) -> Undisturbed:
        """A run that was started with so many devices, on so many hosts."""
        if (devices, hosts) not in self.references:
            place = self.root / f"undisturbed_{devices}_{hosts}"
            started, first = time.monotonic(), 0.0
            processes = self.program(place, FORMATS[0], hosts, devices // hosts)
            while any(process.poll() is None for process in processes):
                first = first or (committed(place) and time.monotonic() - started)
                time.sleep(0.02)
            seconds = time.monotonic() - started
            require(all(process.returncode == 0 for process in processes), place, "the undisturbed run failed")
            self.references[devices, hosts] = Undisturbed(seconds, first, rows_of(place), parts_of(place))
            shutil.rmtree(place)
        return self.references[devices, hosts]

    # ------------------------------------------------------------------------- a run

    def run(self, mode: str) -> str:
        """One run, from nothing until it ends by itself; a line about it."""
        directory = self.root / f"run_{self.runs:03d}"
        shard_format = FORMATS[self.runs % len(FORMATS)]
        session: Callable[[Path, str], bool] = {
            "one process": self.of_one_process,
            "a program": self.of_a_program,
            "workers": self.of_workers,
        }[mode]
        kills, started, sessions = self.killed.total(), time.monotonic(), 0
        done = False
        while not done:
            done = session(directory, shard_format)
            sessions += 1
        parts, orphans = self.check(directory)
        kills = self.killed.total() - kills
        self.runs += 1
        self.sessions += sessions
        self.parts += parts
        self.orphans += orphans
        self.modes[f"in runs by {mode}"] += kills
        shutil.rmtree(directory)
        return (
            f"run {self.runs:3}  {mode:<12} {shard_format:<12} {sessions:3} sessions  {kills:3} kills  {parts:4} parts "
            f"{orphans:4} orphans swept  {time.monotonic() - started:5.0f} s  (kills so far: {self.killed.total()})"
        )

    def of_one_process(self, directory: Path, shard_format: str) -> bool:
        devices = self.chance.choice((1, 2, 4))
        before, (moment,) = phase(directory), self.moments(directory, devices, 1)
        return not self.kill([self.start(directory, shard_format, devices)], moment, directory, before)

    def of_a_program(self, directory: Path, shard_format: str) -> bool:
        """All its processes go, within a moment; in the next session they may be fewer."""
        hosts, devices = self.chance.choice(((2, 1), (2, 2), (1, 2)))
        before, (moment,) = phase(directory), self.moments(directory, hosts * devices, hosts)
        return not self.kill(self.program(directory, shard_format, hosts, devices), moment, directory, before)

    def of_workers(self, directory: Path, shard_format: str) -> bool:
        """Each goes at its own moment, or not at all; one that ends by itself has seen to it that all is there."""
        count, devices = self.chance.choice((2, 3)), self.chance.choice((1, 2))
        before, moments = phase(directory), self.moments(directory, devices, 1, count)
        workers = [
            self.start(directory, shard_format, devices, "--worker_id", i, "--num_workers", count) for i in range(count)
        ]
        started = time.monotonic()
        for moment, worker in sorted(zip(moments, workers, strict=True), key=lambda pair: pair[0]):
            self.kill([worker], started + moment - time.monotonic(), directory, before)
        return any(worker.returncode == 0 for worker in workers)

    def moments(self, directory: Path, devices: int, hosts: int, count: int = 1) -> list[float]:
        """When `count` processes are to be killed, in seconds: evenly in their lives, or never.

        How long a session lives follows from how long an undisturbed run did.
        """
        known, left = self.reference(devices, hosts), 1.0
        if (directory / RUN_FILE).exists():
            left = 1 - committed(directory) / len(self.undisturbed(directory).parts)
        life = known.start + left * (known.seconds - known.start)
        share = KILLED if left else KILLED_AT_THE_END
        return [life * self.chance.random() if self.chance.random() < share else math.inf for _ in range(count)]

    def kill(
        self, processes: Sequence[subprocess.Popen[str]], moment: float, directory: Path, before: int | None
    ) -> int:
        """SIGKILL for all of them after a while; how many were hit. Those that had ended had ended well."""
        until = time.monotonic() + min(moment, ENDS)
        while time.monotonic() < until and any(process.poll() is None for process in processes):
            time.sleep(0.005)
        require(moment < ENDS or all(p.poll() is not None for p in processes), directory, "a process hangs")
        hit = 0
        for process in self.chance.sample(processes, len(processes)):
            if hit:
                time.sleep(AT_ONCE * self.chance.random())
            lived = process.poll() is None
            process.send_signal(signal.SIGKILL)  # nothing happens where it has ended
            code = process.wait(ENDS)
            if lived and code == -signal.SIGKILL:
                hit += 1
            elif not hit:  # else it ended for want of the one that was killed
                self.wait(process, directory, "a process that was not killed")
        self.killed[self.when(directory, before)] += hit
        return hit

    def when(self, directory: Path, before: int | None) -> str:
        now = phase(directory)
        if not (directory / "_run/plan/000000.json").exists():
            return "before the plan was kept"
        if now == len(self.undisturbed(directory).parts):
            return "after the last part"
        return "before the session's first part" if now == (before or 0) else "between a session's parts"

    def wait(self, process: subprocess.Popen[str], directory: Path, who: str) -> None:
        code = process.wait(ENDS)
        require(code == 0, directory, f"{who} ended with {code}")

    def check(self, directory: Path) -> tuple[int, int]:
        """Everything that was promised of a run; its parts, and the orphans that were swept."""
        expected = self.undisturbed(directory)
        require(quietly("status", directory) == 0, directory, "status is not 0")
        orphans = len(survey(Ledger.open(open_storage(directory))).orphans)
        require(quietly("sweep", directory) == 0, directory, "sweep is not 0")
        require(not survey(Ledger.open(open_storage(directory))).orphans, directory, "a sweep left orphans")
        require(parts_of(directory) == expected.parts, directory, "its parts are not those of the undisturbed run")
        require(rows_of(directory) == expected.rows, directory, "its rows are not those of the undisturbed run")
        run = open_activations(directory)
        require(run.sample_ids == list(texts([9] * self.samples)), directory, "a sample is not there once")
        total = json.loads((directory / "metadata.json").read_text())["total_samples"]
        require(total == self.samples, directory, f"metadata.json counts {total} samples")
        shards = {path.name for path in directory.iterdir() if "_batch_" in path.name}
        named = {name for batch in run.metadata["batches"] for name in batch["files"]}
        require(shards == named, directory, "there are shards that no record names")
        return len(expected.parts), orphans


def phase(directory: Path) -> int | None:
    """How many parts are committed; None where there is no run yet."""
    return committed(directory) if (directory / RUN_FILE).exists() else None


def committed(directory: Path) -> int:
    commits = directory / "_run/commits"
    return len(list(commits.iterdir())) if commits.is_dir() else 0


def rows_of(directory: Path) -> Rows:
    run = open_activations(directory)
    return {(sample.sample_id, layer): sample.get(layer).tobytes() for sample in run.samples() for layer in LAYERS}


def parts_of(directory: Path) -> dict[tuple[int, int], int]:
    records = Ledger.open(open_storage(directory)).committed()
    return {key: record["samples"] for key, record in records.items()}


def quietly(*words: object) -> int:
    with contextlib.redirect_stdout(io.StringIO()):
        return jax_extract([str(word) for word in words])


def require(held: bool, directory: Path, otherwise: str) -> None:
    if not held:
        errors = directory.parent / f"{directory.name}.stderr"
        said = errors.read_text()[-4_000:] if errors.exists() else ""
        raise SystemExit(f"FAILED: {otherwise}; {directory} is kept\n{said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many processes are to be killed while they live")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1_600, help="of each run; one a part and device")
    options = parser.parse_args()
    started = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(root, random.Random(options.seed), options.samples)
    while soak.killed.total() < options.kills:
        print(soak.run(("one process", "a program", "workers")[soak.runs % 3]), flush=True)
    shutil.rmtree(root)
    print(
        f"\n{soak.killed.total()} processes killed in {soak.sessions} sessions of {soak.runs} runs, "
        f"{soak.parts:,} parts, {time.monotonic() - started:.0f} s, seed {options.seed}, "
        f"Python {platform.python_version()}, jax {jax.__version__}"
    )
    for what, number in [*sorted(soak.modes.items()), *sorted(soak.killed.items())]:
        print(f"  {number:4} {what}")
    print(
        f"every row is byte for byte that of an undisturbed run; no sample is lost or there twice; "
        f"{soak.orphans} orphans swept, none left"
    )


if __name__ == "__main__":
    main()
