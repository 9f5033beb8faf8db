"""Host memory has a bound: ten times the samples do not take more of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from small_run import environment, make_model, run_here, write_jsonl

from jax_extract import UserError
from jax_extract.store.budget import ByteBudget

PROGRAM = """
import sys
from jax_extract.config import ExtractConfig
from jax_extract.extraction.command import extract_to_directory
from jax_extract.terminal import Terminal

model, tasks, directory = sys.argv[1:]
config = ExtractConfig(model_path=model, tasks_file=tasks, activations_dir=directory, positions="all",
                       layers_to_extract=tuple(range(12)), batch_size=8, host_memory_gb=0.1)
metadata = extract_to_directory(config, Terminal(silent=True))
with open("/proc/self/status") as status:  # ru_maxrss would be that of the process which started this one
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print(metadata["total_bytes"], peak)
"""


def _measure(model: Path, root: Path, samples: int) -> tuple[int, int]:
    """(bytes written, peak resident bytes) of a run in a process of its own."""
    lengths = [int(n) for n in np.random.default_rng(0).integers(90, 161, 100)] * (samples // 100)
    tasks = write_jsonl(root / f"{samples}.jsonl", lengths)
    words = [sys.executable, "-c", PROGRAM, model, tasks, root / str(samples)]
    done = subprocess.run(
        [str(w) for w in words], env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    shutil.rmtree(root / str(samples))
    written, peak = map(int, done.stdout.split())
    return written, peak


def test_peak_memory_with_all_positions_does_not_grow_with_the_number_of_samples(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", hidden=64)
    _, few = _measure(model, tmp_path, 100)
    written, many = _measure(model, tmp_path, 1_000)
    # The allowance: allocators keep pages, the larger input has its own tokens and file names, and which
    # of the writer and the computation is ahead differs from run to run. What was written is far more.
    allowance = few // 10 + 30_000_000
    assert written > 3 * allowance
    assert many <= few + allowance


def test_rows_wait_for_the_writer_only_up_to_the_budget() -> None:
    budget = ByteBudget(100)
    assert budget.acquire(80) < 1
    second = threading.Thread(target=budget.acquire, args=(30,))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    budget.release(80)
    second.join(10)
    assert not second.is_alive()
    assert budget.peak == 80


def test_a_failure_of_the_writer_ends_the_wait_for_room() -> None:
    budget = ByteBudget(100)
    budget.acquire(80)
    threading.Timer(0.1, budget.fail, [OSError("disk on fire")]).start()
    with pytest.raises(OSError, match="disk on fire"):
        budget.acquire(30)


def test_a_budget_that_not_even_one_step_fits_is_refused_with_the_mend_named(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", hidden=64)
    tasks = write_jsonl(tmp_path / "in.jsonl", [100])
    with pytest.raises(UserError, match=r"--host_memory_gb 0\.001 allows 1 MB; allow more.*--slab_tokens"):
        run_here(model, tasks, tmp_path / "a", positions="all", host_memory_gb=0.001)
    assert not (tmp_path / "a").exists()
