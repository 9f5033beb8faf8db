"""Commands in processes of their own, forked from one that has imported everything and has no thread and no device.

In: jobs, a message each, with the streams that the process is to have. Out: its process id and how it ended, into a
pipe of the job's own. An interpreter that starts takes seconds of a core for its imports; what is forked is as real a
process, which can be killed, and takes a tenth. `Forked` is how a test speaks to it; it is used as a `Popen` is.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LARGEST_JOB = 1 << 18  # bytes


class Forked:
    """A process that the server has forked: `code`, a script, or `jax-extract` where neither is given."""

    _server: tuple[socket.socket, subprocess.Popen[bytes]] | None = None
    _lock = threading.Lock()

    def __init__(
        self,
        words: list[str],
        *,
        code: str | None = None,
        script: Path | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str],
        largest_file: int | None = None,
    ) -> None:
        job = {"words": words, "code": code, "script": script and str(script), "cwd": str(cwd or Path.cwd())}
        job |= {"env": dict(env), "largest_file": largest_file}
        pipes = [os.pipe() for _ in range(3)]
        socket.send_fds(self._started(), [json.dumps(job).encode()], [write for _, write in pipes])
        for _, write in pipes:
            os.close(write)
        self.stdout, self.stderr, self._ended = (
            os.fdopen(read, encoding="utf-8", errors="replace") for read, _ in pipes
        )
        self.returncode: int | None = None
        self.pid = int(self._ended.readline())

    @classmethod
    def _started(cls) -> socket.socket:
        with cls._lock:
            if cls._server is None:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                paths = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
                process = subprocess.Popen(
                    [sys.executable, __file__, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                )
                theirs.close()
                cls._server = ours, process
                atexit.register(cls._end)
        return cls._server[0]

    @classmethod
    def _end(cls) -> None:
        if cls._server is not None:
            cls._server[0].close()
            cls._server[1].wait()

    def poll(self) -> int | None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._ended, selectors.EVENT_READ)
            return self.wait() if self.returncode is None and selector.select(0) else self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal; TimeoutExpired."""
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._ended, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired("a forked command", timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(int(self._ended.readline()))
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has said since, when it has ended."""
        said = ["", ""]

        def read(i: int) -> None:
            with contextlib.suppress(ValueError):  # a test has closed the stream
                said[i] = (self.stdout, self.stderr)[i].read()

        readers = [threading.Thread(target=read, args=(i,), daemon=True) for i in range(2)]
        until = time.monotonic() + (timeout or 1e9)
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(min(max(0.0, until - time.monotonic()), threading.TIMEOUT_MAX))
            if reader.is_alive():
                raise subprocess.TimeoutExpired("a forked command", timeout or 0)
        self.wait(max(0.0, until - time.monotonic()) if timeout else None)
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        for stream in (self.stdout, self.stderr, self._ended):
            stream.close()

    def __del__(self) -> None:
        for stream in (self.stdout, self.stderr, self._ended):
            stream.close()


# ----------------------------------------------------------------------------------------------- the server


def _import_everything() -> None:
    from jax_extract import cli, startup

    cli._quiet_libraries()
    startup.leave_torch_out()
    import tempfile

    import small_run
    import tqdm
    from transformers import AutoTokenizer

    import jax_extract.estimation.command
    import jax_extract.extraction.command
    import jax_extract.generation.command
    import jax_extract.store.storage.gcs
    import jax_extract.walks.command  # noqa: F401 (forks have them then)

    with tempfile.TemporaryDirectory() as folder:
        small_run.make_model(Path(folder), layers=1)
        AutoTokenizer.from_pretrained(folder, local_files_only=True)
    del sys.modules["torch"]
    tqdm.tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed process leaves there
    gc.collect()
    gc.freeze()


def _next_job(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """In a new process, its job and streams; None in the server, when nobody speaks to it any more."""
    heard, tell = os.pipe()
    for end in (heard, tell):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is pytest's
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    running: dict[int, int] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        selector.register(heard, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in selector.select()}
            if heard in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(heard, 4_096)
                _tell_ends(running)
            if connection.fileno() not in ready:
                continue
            message, streams, *_ = socket.recv_fds(connection, _LARGEST_JOB, 3)
            if not message:
                return None
            if (pid := os.fork()) == 0:
                signal.set_wakeup_fd(-1)
                for end in (heard, tell, *running.values()):
                    os.close(end)
                connection.close()
                return json.loads(message), streams
            for stream in streams[:2]:
                os.close(stream)
            os.write(streams[2], f"{pid}\n".encode())
            running[pid] = streams[2]


def _tell_ends(running: dict[int, int]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        pipe = running.pop(pid)
        with contextlib.suppress(BrokenPipeError):  # the test has gone
            os.write(pipe, f"{status}\n".encode())
        os.close(pipe)


def _become(job: dict[str, Any], streams: list[int]) -> None:
    """What an interpreter would have done by now."""
    for number in (signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, place in zip(streams, (1, 2), strict=False):
        os.dup2(stream, place)
    for stream in streams:
        os.close(stream)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    given = dict(os.environ)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    if job["largest_file"] is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
    import jax

    for variable, value in job["env"].items():  # JAX has read them already
        if variable.lower() in jax.config.values and given.get(variable) != value:
            kind = type(getattr(jax.config, variable.lower()))
            jax.config.update(variable.lower(), kind(value) if kind in (int, float) else value)


def _run(job: dict[str, Any]) -> Any:
    sys.argv = [job["script"] or "-c", *job["words"]]
    if job["code"] is not None:
        exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
        return None
    if job["script"]:
        sys.path[0] = str(Path(job["script"]).parent)
        runpy.run_path(job["script"], run_name="__main__")
        return None
    from jax_extract import cli

    return cli.main()


def _main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(connection.fileno(), False)
    _import_everything()
    if (found := _next_job(connection)) is None:
        return
    _become(*found)
    try:
        sys.exit(_run(found[0]))
    except Exception:  # noqa: BLE001 (what an interpreter says of it)
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    _main()
