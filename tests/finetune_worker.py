"""Fine-tuning commands in processes of their own, forked from one that has imported torch already.

In: words of a command, and changes of the environment. Out: its exit code and what it said. Importing torch and
transformers takes seconds; a test that kills its command needs a process each time.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parent
_SLOWEST = 120  # seconds
_PRELOADED = [
    "jax_extract.pytorch.finetuning.training",
    "jax_extract.pytorch.finetuning.scoring",
    "peft",
    "scipy.stats",
]


@dataclass(frozen=True)
class Ended:
    code: int | None
    out: str
    err: str


def start(words: Sequence[object], folder: Path, env: Mapping[str, str] | None = None, name: str = "said") -> Any:
    """Starts `jax-extract finetune` in a folder; `end` waits for it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    said = folder / f".{name}"
    process = context.Process(target=_command, args=(list(map(str, words)), folder, dict(env or {}), said), daemon=True)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_TESTS.parent), str(_TESTS), *([before] if before else [])])
    try:
        process.start()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return process, said


def end(started: Any) -> Ended:
    process, said = started
    process.join(_SLOWEST)
    assert process.exitcode is not None, "it did not end"
    return Ended(process.exitcode, Path(f"{said}.out").read_text(), Path(f"{said}.err").read_text())


def finetune(words: Sequence[object], folder: Path, env: Mapping[str, str] | None = None) -> Ended:
    return end(start(words, folder, env))


def _command(words: list[str], folder: Path, env: dict[str, str], said: Path) -> None:
    for stream, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", encoding="utf-8", closefd=False) for stream in (1, 2))
    os.chdir(folder)
    os.environ.update(env)
    import torch
    import tqdm

    from jax_extract import cli

    torch.set_num_threads(1)
    tqdm.tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed process leaves there
    sys.exit(cli.main(["finetune", *words]))
