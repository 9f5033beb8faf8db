"""SIGTERM, the notice before a machine is taken away: what is complete is committed, and the process ends in time."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest
from command_server import Forked
from gcs_server import RunningServer
from small_run import started, write_jsonl

from jax_extract import open_activations
from jax_extract.cli import main
from jax_extract.store.ledger import Ledger
from jax_extract.store.storage.opening import open_storage
from jax_extract.store.survey import survey

SAMPLES = 160
PARTS = SAMPLES // 4
SLABS = 4  # of a part
NOTICED = "told "  # begins the line in which the process says that the test's moment has come

# The command, with one function replaced. SIGTERM can come when a line that begins with `told` was printed.
SCRIPT = f"""
import ctypes, sys, threading, time
from jax_extract import interruption
from jax_extract import preemption
from jax_extract.cli import main
from jax_extract.extraction.program import CaptureProgram
from jax_extract.store import writer

run, finish, calls = CaptureProgram.run, writer._Shard.finish, []

def tell(what):
    print("{NOTICED}" + what, flush=True)

def slow_program(*words):
    calls.append(None)
    time.sleep(0.02)
    return run(*words)

def slow_writer(shard):
    time.sleep(0.3)
    finish(shard)

def program_stuck_in_c(*words):
    calls.append(None)
    if len(calls) == {5 * SLABS + 2}:
        mutex = ctypes.create_string_buffer(64)
        libc = ctypes.CDLL(None)
        libc.pthread_mutex_lock(mutex)
        tell("stuck")
        libc.pthread_mutex_lock(mutex)  # no signal ends this wait, and no Python code runs in this thread
    return run(*words)

def stuck_writer(shard):
    if shard._content.batch == 7:
        tell("stuck")
        threading.Event().wait()
    finish(shard)

kind, grace = sys.argv[1], float(sys.argv[2])
preemption.GRACE_SECONDS = interruption._UNWIND_SECONDS = grace
if kind == "slow":
    CaptureProgram.run, writer._Shard.finish = slow_program, slow_writer
if kind == "stuck in C":
    CaptureProgram.run, writer._Shard.finish = program_stuck_in_c, slow_writer
if kind == "stuck writer":
    writer._Shard.finish = stuck_writer
sys.argv[1:] = ["extract", *sys.argv[3:]]
sys.exit(main())
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("input") / "in.jsonl", [60] * SAMPLES)


@pytest.fixture(scope="module")
def expected(model: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("whole")
    assert main(["extract", *_words(model, tasks, directory)]) == 0
    rows = _rows(directory)
    assert len(rows) == SAMPLES
    return rows


def _words(model: Path, tasks: Path, directory: Path, *more: object) -> list[str]:
    words = ["--model_path", model, "--tasks_file", tasks, "--activations_dir", directory, "--batch_size", 4]
    words += ["--layers_to_extract", 3, 11, "--positions", "all", "--slab_tokens", 64]  # a sample a slab
    return [str(word) for word in (*words, *more)]


def _rows(place: Path | str) -> dict[str, bytes]:
    return {sample.sample_id: sample.get(3).tobytes() + sample.get(11).tobytes() for sample in _run(place)}


def _run(place: Path | str) -> list:
    return list(open_activations(place).samples())


class Preempted:
    """The command, sent SIGTERM (or another signal) in the middle.

    Attributes:
      before, after: parts committed when the signal was sent, and when the process had ended.
      seconds: from the one to the other.
    """

    def __init__(
        self,
        kind: str,
        words: list[str],
        directory: Path,
        grace: float = 25,
        enough: int = 0,
        sent: signal.Signals = signal.SIGTERM,
    ) -> None:
        commits = directory / "_run/commits"
        with started(kind, grace, *words, code=SCRIPT) as process:
            try:
                self._wait(process, commits, enough)
                self.before, sent_at = len(list(commits.iterdir())), time.monotonic()
                process.send_signal(sent)
                self.stdout, self.stderr = process.communicate(timeout=60)
            finally:
                process.kill()
        self.seconds = time.monotonic() - sent_at
        self.code = process.returncode
        self.after = len(list(commits.iterdir()))

    @staticmethod
    def _wait(process: Forked, commits: Path, enough: int) -> None:
        """Until so many parts are committed, or, with 0, until the process tells."""
        until = time.monotonic() + 60
        if enough:
            while not (commits.is_dir() and len(list(commits.iterdir())) >= enough):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < until
                time.sleep(0.005)
            return
        for line in process.stdout:
            if line.startswith(NOTICED):
                return
        raise AssertionError(process.communicate())

    def require_one_sentence(self, pattern: str) -> None:
        """The bar of progress apart, one sentence, which ends with what to do, and no traceback."""
        (said,) = re.findall(r"^stopped by SIGTERM: .*$", self.stderr, re.MULTILINE)
        assert re.fullmatch(f"stopped by SIGTERM: {pattern}; run the same command again to go on", said)
        rest = self.stderr.replace(said, "").strip()
        assert not rest or re.fullmatch(r"(\s*computing: [^\n]*)*", rest), self.stderr


def _require_resumed(words: list[str], directory: Path, expected: dict[str, bytes], place: str | None = None) -> None:
    assert main(["extract", *words]) == 0
    assert _rows(place or directory) == expected
    found = survey(Ledger.open(open_storage(place or directory)))
    assert found.complete
    assert not found.orphans


def test_sigterm_commits_the_parts_that_are_complete_and_abandons_the_others(
    model: Path, tasks: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    directory = tmp_path / "a"
    words = _words(model, tasks, directory)
    stopped = Preempted("slow", words, directory, enough=3)
    assert stopped.code == 143
    assert stopped.seconds < 25
    assert stopped.before < stopped.after < PARTS
    stopped.require_one_sentence(f"{stopped.after} parts of this session are committed")
    found = survey(Ledger.open(open_storage(directory)))
    assert not found.torn
    assert not found.orphans  # nothing of a part that lacks rows
    assert not list(directory.glob(".*"))
    _require_resumed(words, directory, expected)
    assert len(json.loads((directory / "metadata.json").read_text())["sessions"]) == 1  # the first came to no end


def test_ctrl_c_while_shards_are_written_takes_away_what_is_half_written_and_ends_with_one_sentence(
    model: Path, tasks: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    directory = tmp_path / "a"
    words = _words(model, tasks, directory)
    stopped = Preempted("slow", words, directory, enough=3, sent=signal.SIGINT)
    assert stopped.code == 130
    assert stopped.seconds < 15
    assert stopped.after < PARTS
    lines = [
        line for line in re.split(r"[\r\n]+", stopped.stderr) if line.strip() and not line.startswith("computing:")
    ]
    assert lines == ["interrupted; what is committed is safe: run the same command again to go on"]
    assert not survey(Ledger.open(open_storage(directory))).orphans
    assert not list(directory.glob(".*"))
    _require_resumed(words, directory, expected)


def test_ctrl_c_is_heard_while_the_main_thread_is_stuck_in_c(model: Path, tasks: Path, tmp_path: Path) -> None:
    directory = tmp_path / "a"
    stopped = Preempted("stuck in C", _words(model, tasks, directory), directory, grace=1, sent=signal.SIGINT)
    assert stopped.code == 130
    assert stopped.seconds < 5
    assert "interrupted; what is committed is safe" in stopped.stderr


def test_sigterm_is_heard_while_the_main_thread_is_stuck_in_c(
    model: Path, tasks: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    directory = tmp_path / "a"
    words = _words(model, tasks, directory)
    stopped = Preempted("stuck in C", words, directory)
    assert stopped.code == 143
    assert stopped.seconds < 25
    assert stopped.after == 5  # all of which the rows had been on the host
    stopped.require_one_sentence("5 parts of this session are committed")
    _require_resumed(words, directory, expected)


def test_a_writer_that_hangs_does_not_keep_the_process_beyond_the_grace(
    model: Path, tasks: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    directory = tmp_path / "a"
    words = _words(model, tasks, directory)
    stopped = Preempted("stuck writer", words, directory, grace=2)
    assert stopped.code == 143
    assert 0.5 < stopped.seconds < 2 + 3
    assert stopped.before <= stopped.after == 6
    stopped.require_one_sentence("6 parts of this session are committed; the 1 s did not suffice for the others")
    _require_resumed(words, directory, expected)


def test_a_bucket_that_hangs_does_not_keep_the_process_beyond_the_grace(
    model: Path,
    tasks: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    bucket_server: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket_server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    bucket_server.make_bucket("preempted")
    bucket_server.fault("stall", name="runs/one/_run/commits/000004", times=1_000, seconds=60)
    directory = tmp_path / "spool"
    words = _words(model, tasks, directory, "--gcs_bucket", "gs://preempted/runs/one", "--upload_to_cloud", "True")
    stopped = Preempted("", words, directory, grace=2, enough=PARTS)
    bucket_server.forget_faults()
    assert stopped.code == 143
    assert stopped.seconds < 2 + 3
    assert stopped.after == PARTS  # on the disk; not all of them in the bucket
    stopped.require_one_sentence("(40 parts .* the 1 s did not suffice.*|the 2 s that were left did not suffice .*)")
    assert len(Ledger.open(open_storage("gs://preempted/runs/one")).committed()) < PARTS
    _require_resumed(words, directory, expected, "gs://preempted/runs/one")
