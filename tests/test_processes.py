"""Several processes on one run: one program over hosts, and independent workers; each may die."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_run import make_model, run_cli, run_here, started, texts, write_jsonl

from jax_extract import UserError, open_activations
from jax_extract.cli import main
from jax_extract.devices.processes import Processes
from jax_extract.extraction.kept_windows import Planned
from jax_extract.extraction.loop import LoopStatistics
from jax_extract.extraction.session import Session
from jax_extract.inputs.planning.slabs import PlanSettings
from jax_extract.inputs.planning.windows import plan_windows
from jax_extract.inputs.token_table import TokenizedSample
from jax_extract.inputs.tokenize import InputCounts
from jax_extract.store.ledger import Ledger
from jax_extract.store.storage.failpoints import VARIABLE
from jax_extract.store.storage.local import Directory
from jax_extract.terminal import Terminal
from models.positions import Positions

LENGTHS = [int(n) for n in np.random.default_rng(0).integers(20, 121, 150)]
ENDS = 90  # seconds in which processes that lost one of theirs are given up


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("input") / "in.jsonl", LENGTHS)


def _words(model: Path, tasks: Path, directory: Path, *more: object) -> list[str]:
    words = ["--model_path", model, "--tasks_file", tasks, "--activations_dir", directory, "--batch_size", 1]
    return [str(w) for w in (*words, "--layers_to_extract", 3, 11, "--positions", "all", *more)]


def program(words: Sequence[str], processes: int, devices: int, killed_at: str | None = None) -> list[int]:
    """One program over `processes`; process 0 dies at a failpoint, then so do the others. Returns exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for index in range(processes):
        group = ["--coordinator_address", f"127.0.0.1:{port}", "--num_processes", processes, "--process_id", index]
        env = {"JAX_NUM_CPU_DEVICES": str(devices)}
        if killed_at and index == 0:
            env[VARIABLE] = killed_at
        running.append(started(*words, *(group if processes > 1 else ()), env=env))
    said = []
    for process in running:
        said.append(process.communicate(timeout=ENDS))
        if killed_at:
            for other in running:
                other.kill()
    codes = [process.returncode for process in running]
    assert killed_at or codes == [0] * processes, said
    return codes


def _rows(directory: Path) -> dict[tuple[str, int], bytes]:
    run = open_activations(directory)
    return {(sample.sample_id, layer): sample.get(layer).tobytes() for sample in run.samples() for layer in (3, 11)}


def test_a_program_of_4_2_1_processes_and_8_4_2_devices_killed_twice_gives_every_row_once_and_the_same_bytes(
    model: Path, tasks: Path, tmp_path: Path
) -> None:
    program(_words(model, tasks, tmp_path / "whole"), 4, 2)
    words = _words(model, tasks, tmp_path / "killed")
    assert program(words, 4, 2, killed_at="part.record:after:1")[0] == -9
    first = len(list((tmp_path / "killed/_run/commits").iterdir()))
    assert program(words, 2, 2, killed_at="part.record:before:2")[0] == -9
    second = len(list((tmp_path / "killed/_run/commits").iterdir()))
    program(words, 1, 2)
    records = sorted((tmp_path / "killed/_run/commits").iterdir())
    assert 1 <= first < second < len(records) == len(list((tmp_path / "whole/_run/commits").iterdir()))
    assert open_activations(tmp_path / "killed").sample_ids == list(texts(LENGTHS))
    assert _rows(tmp_path / "killed") == _rows(tmp_path / "whole")
    assert len({json.loads(path.read_text())["attempt"] for path in records}) > 2  # hosts wrote parts of their own


def _refused(words_of: Callable[[int], list[str]], folders: Sequence[Path]) -> list[str]:
    """One program of a process in each folder, all of which must end with exit code 2; what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = ["--coordinator_address", f"127.0.0.1:{port}", "--num_processes", len(folders)]
    running = [started(*words_of(i), *group, "--process_id", i, cwd=folder) for i, folder in enumerate(folders)]
    said = [process.communicate(timeout=ENDS)[1] for process in running]
    assert [process.returncode for process in running] == [2] * len(folders), said
    return said


@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_dies_ends_the_other_soon_with_one_sentence_that_names_it(
    model: Path, tasks: Path, tmp_path: Path, dies: int
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = _words(model, tasks, tmp_path / "a", "--coordinator_address", f"127.0.0.1:{port}", "--num_processes", 2)
    running = [
        started(*words, "--process_id", index, env={VARIABLE: "part.record:after:1"} if index == dies else {})
        for index in range(2)
    ]
    running[dies].communicate(timeout=ENDS)
    begun = time.monotonic()
    out, err = running[1 - dies].communicate(timeout=ENDS)
    assert time.monotonic() - begun < 25  # not the heartbeat's 30
    assert running[1 - dies].returncode == 1  # 2 would end the launch scripts' tries
    said = [line for line in err.splitlines() if not re.match("computing: |E[0-9]+ ", line)]
    assert said == [
        f"error: process {dies} of 2 is gone; what is committed is safe: start the same command again on all hosts"
    ]
    assert "Gloo" not in out


ALONE = """
import sys
from jax_extract.devices import processes
from jax_extract.errors import UserError

processes.START_SECONDS, processes._TOLD_AFTER_SECONDS = 3, 1
try:
    processes.start_processes("on", sys.argv[1], 2, int(sys.argv[2]))
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_whose_others_do_not_come_says_that_it_waits_and_ends_with_one_sentence(
    tmp_path: Path, index: int
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (tmp_path / "alone.py").write_text(ALONE)
    ended = run_cli(
        address, index, cwd=tmp_path, script=tmp_path / "alone.py", env={"TF_CPP_MIN_LOG_LEVEL": "3"}, fresh=True
    )
    assert ended.returncode == 0
    assert f"not all of them came to {address} within 3 s" in ended.stdout
    waiting = ("1 of 2 processes", "process 0 and the others of the program")[index]
    assert ended.stderr == f"waiting for {waiting} at {address}\n"


def test_hosts_without_a_shared_directory_are_refused_with_one_sentence(
    model: Path, tasks: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / f"of_host_{i}" for i in range(2)]
    for folder in folders:
        folder.mkdir()
    said = _refused(lambda _: _words(model, tasks, Path("run")), folders)
    assert all("is not the same directory on every host; write to a bucket" in text for text in said)
    assert not any((folder / "run/_run/run.json").exists() for folder in folders)


def test_a_lost_worker_s_parts_are_stolen_and_nothing_is_there_twice(model: Path, tasks: Path, tmp_path: Path) -> None:
    whole = run_cli(*_words(model, tasks, tmp_path / "whole"), cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    workers = []
    for index in range(3):
        words = _words(model, tasks, tmp_path / "shared", "--worker_id", index, "--num_workers", 3)
        env = {VARIABLE: "part.record:before:2"} if index == 1 else {}
        workers.append(started(*words, env=env))
    said = [worker.communicate(timeout=ENDS) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, -9, 0], said
    records = [json.loads(path.read_text()) for path in (tmp_path / "shared/_run/commits").iterdir()]
    assert len(records) == len(LENGTHS)
    assert {(r["batch"], r["part"]) for r in records} == {(batch, 1) for batch in range(1, len(LENGTHS) + 1)}
    assert _rows(tmp_path / "shared") == _rows(tmp_path / "whole")
    assert main(["status", str(tmp_path / "shared")]) == 0
    metadata = json.loads((tmp_path / "shared/metadata.json").read_text())
    assert metadata["total_samples"] == len(LENGTHS)
    assert len(metadata["sessions"]) == 2


@pytest.mark.parametrize("index", [0, 1])
def test_a_worker_that_comes_back_alone_computes_the_stripes_of_those_that_do_not(
    model: Path, tasks: Path, tmp_path: Path, index: int
) -> None:
    options: dict[str, Any] = {"layers_to_extract": (3,), "batch_size": 50, "num_workers": 2}
    run_here(model, tasks, tmp_path / "a", worker_id=0, **options)
    for record in sorted((tmp_path / "a/_run/commits").iterdir())[1::2]:  # worker 1's stripe
        record.unlink()
    run_here(model, tasks, tmp_path / "a", worker_id=index, **options)
    assert main(["status", str(tmp_path / "a")]) == 0


def test_hosts_with_different_models_are_refused_although_their_tokens_are_the_same(
    model: Path, tasks: Path, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", seed=7)
    said = _refused(lambda i: _words((model, other)[i], tasks, tmp_path / "a"), [tmp_path, tmp_path])
    assert all("do not have the same model, options or library versions" in text for text in said)
    assert not (tmp_path / "a/_run/run.json").exists()


def test_hosts_whose_streams_diverge_are_refused_before_the_window_is_kept(tmp_path: Path) -> None:
    class Two(Processes):
        def _gather(self, text: str) -> list[str]:
            return [text, text.replace(theirs, "another") if text == theirs else text]

    sites = [{"hook": "after_block", "layer": 0, "width": 64}]
    identity = {"sites": sites, "shard_format": "npz", "capture_dtype": "float32"}
    ledger = Ledger.start(Directory(tmp_path), {"identity": identity, "numerics": {}, "description": {}})
    tokenized = [TokenizedSample(i, str(i), np.zeros(20, np.int32), 20, {}) for i in range(40)]
    settings = PlanSettings(4, 4, 4_096, 16, 512, Positions.parse("last"), 64, 200, hosts=2)
    windows = list(plan_windows(tokenized, settings, window_samples=20))
    theirs = windows[1].digest
    nothing: Any = SimpleNamespace(worker_id=None, num_workers=None)
    session = Session(nothing, Two(2), nothing, nothing, ledger, None, nothing)
    planned = [Planned(window, InputCounts()) for window in windows]
    pending = session._pending(planned, {}, steal=False, keeper=None)
    with pytest.raises(UserError, match="do not have the same plan of window 1; give every process the same inputs"):
        list(pending)
    assert [plan["digest"] for plan in ledger.plans()] == [windows[0].digest]


def test_a_thief_whose_loot_is_to_be_written_again_goes_on() -> None:
    rounds = [(1, False), (1, True), (1, False), (0, False)]  # parts done, and whether some are to be written again
    committed: Any = [{1: 0}, {1: 0, 2: 0}, {1: 0, 2: 0}, {1: 0, 2: 0, 3: 0}]
    asked = iter(rounds)

    class Rounds(Session):
        def _committed_now(self, known: Any) -> Any:
            return committed.pop(0)

        def _pending(self, *_: Any) -> Any:
            return []

        def _round(self, *_: Any) -> Any:
            parts, again = next(asked)
            return LoopStatistics(parts=parts), again

    config: Any = SimpleNamespace(worker_id=1, num_workers=2)
    nothing: Any = None
    job: Any = SimpleNamespace(step_cost=None)  # no step is computed
    session = Rounds(config, Processes(), job, Terminal(silent=True), nothing, None, nothing)
    closed: list[bool] = []
    program: Any = SimpleNamespace(close=lambda: closed.append(True))
    session.compute(list, {}, None, lambda _: program)
    assert next(asked, None) is None
    assert closed == [True], "once, after all rounds"
