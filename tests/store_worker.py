"""Runs of the store alone, with made-up rows, in processes that are to be killed; for tests.

In: jobs, one a line of JSON on standard input. Out: how the process of each ended, one line each. Every
job is a fork of one process that has imported everything and has no thread and no device, so that hundreds
of them take seconds. `StoreWorker` is how a test speaks to it.
"""

from __future__ import annotations

import gc
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_extract.config import ExtractConfig
from jax_extract.devices.processes import Processes
from jax_extract.extraction.loop import part_content
from jax_extract.extraction.pending import parse_committed, pending_parts, plan_json, read_committed
from jax_extract.extraction.place import Place, keep_config
from jax_extract.inputs.planning.windows import PlanSettings, Window, plan_windows
from jax_extract.inputs.token_table import TokenizedSample
from jax_extract.store.ledger import Ledger
from jax_extract.store.metadata import write_metadata
from jax_extract.store.parts import Site
from jax_extract.store.storage import gcs
from jax_extract.store.storage.failpoints import VARIABLE
from jax_extract.store.storage.gcs_requests import Patience
from jax_extract.store.storage.opening import open_storage
from jax_extract.store.sweep import erase
from jax_extract.store.upload import Uploader
from jax_extract.store.writer import PartWriter, RowPiece
from jax_extract.upkeep import status, uploading
from models.positions import Positions

ALL = Positions.parse("all")
ENDS = 60.0  # seconds after which a job hangs
_PATIENT = Patience(deadline=30, at_start=30, first_wait=0.01, longest_wait=0.05)
_ROWS = 2  # of a slab
_ROWS_OF_A_PART = 30
_PADDING = np.float32(777)


@dataclass(frozen=True)
class Case:
    """A run: samples of so many tokens, five in a batch; by default two batches, the first of them in two parts.

    Attributes:
      lengths: tokens of each sample, all of which are kept.
      widths: of its sites, layers 0, 1, …
      unnamed: whether files are written without a name, as most file systems allow.
      flushed: whether fsync goes to the disk. A kill leaves the page cache alone, so it makes no difference here.
    """

    shard_format: str = "pickle"
    lengths: tuple[int, ...] = (6, 12, 9, 7, 11, 5, 8, 10)
    widths: tuple[int, ...] = (16, 24)
    unnamed: bool = True
    flushed: bool = False

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site("after_block", layer, width) for layer, width in enumerate(self.widths))

    def windows(self) -> list[Window]:
        samples = [
            TokenizedSample(i, f"s{i}", np.arange(n, dtype=np.int32) + i, n, {"line": i})
            for i, n in enumerate(self.lengths)
        ]
        row = max(self.widths) * 4
        settings = PlanSettings(5, _ROWS, 64, 4, 64, ALL, row, max_shard_bytes=row * _ROWS_OF_A_PART)
        return list(plan_windows(samples, settings))

    def run(self) -> dict[str, Any]:
        """What run.json says of it."""
        sites = [asdict(site) for site in self.sites]
        return {
            "identity": {"sites": sites, "shard_format": self.shard_format, "capture_dtype": "float32"},
            "numerics": {},
            "description": {"model_name": "none", "hidden_dim": max(self.widths)},
        }

    def rows(self, sample: TokenizedSample, site: Site) -> np.ndarray:
        """float32 [length, width]"""
        assert site.layer is not None
        random = np.random.default_rng([sample.sample_index, site.layer])
        return random.random((sample.length, site.width), np.float32)


# ------------------------------------------------------------------------------ what jobs do


def extract(place: str, case: Case, spool: str | None = None, delete_local: bool = False) -> None:
    """Writes or resumes the run, in the steps in which `extraction.py` and `session.py` do it."""
    config = ExtractConfig(activations_dir=place)
    if spool is not None:
        config = ExtractConfig(activations_dir=spool, gcs_bucket=place, upload_to_cloud=True, delete_local=delete_local)
    somewhere, windows, attempt = Place.of(config), case.windows(), uuid.uuid4().hex[:12]
    if found := somewhere.find(Processes()):
        found.require_same(case.run()["identity"], {}, False)
    somewhere.bring_over()
    ledger = somewhere.find(Processes()) or _start(somewhere, config, case)
    local = somewhere.open_spool(ledger, config)
    ledgers = [ledger] if local is None else [ledger, local]

    def keep_plan(window: Window) -> None:
        for each in ledgers:
            each.keep_plan(window.number, plan_json(window, {}))

    refused = True
    while refused:
        uploader = None if local is None else Uploader(local, ledger, attempt, delete_local)
        writer = PartWriter(
            local or ledger,
            case.sites,
            case.shard_format,
            "float32",
            attempt,
            on_commit=uploader.submit if uploader else lambda _: None,
        )
        for part in pending_parts(windows, parse_committed(read_committed(ledger)), keep_plan):
            opened = writer.begin(part_content(part, ALL))
            for slab in part.slabs:
                samples = list(part.table)[slab.first : slab.first + slab.count]
                blocks = {site.key: _block(case, samples, slab.shape.length, site) for site in case.sites}
                opened.append(blocks, [RowPiece(i, 0, s.length) for i, s in enumerate(samples)], lambda: None)
            opened.commit()
        writer.close()
        if uploader is not None:
            uploader.close()
        refused = writer.refused > 0
    for each in ledgers:
        each.end_session(attempt, {"tokens": 0, "slab_tokens": 0, "seconds": 0.0})
        write_metadata(each)


def _start(place: Place, config: ExtractConfig, case: Case) -> Ledger:
    keep_config(place.storage, config)
    return Ledger.start(place.storage, case.run())


def _block(case: Case, samples: tuple[TokenizedSample, ...], length: int, site: Site) -> np.ndarray:
    """float32 [rows, length, width], as a device gives it: padded on the right, dummy rows at the end."""
    block = np.full((_ROWS, length, site.width), _PADDING)
    for row, sample in zip(block, samples, strict=False):
        row[: sample.length] = case.rows(sample, site)
    return block


def sweep(place: str, torn: bool = True) -> None:
    assert status.sweep_command(status.SweepConfig(place, torn=torn)) == 0


def erase_run(place: str) -> None:
    erase(open_storage(place))


def upload(place: str, bucket: str, delete_local: bool = False) -> None:
    assert uploading.upload(uploading.UploadConfig(place, bucket, delete_local)) == 0


_JOBS: dict[str, Callable[..., None]] = {
    "extract": lambda place, case, **more: extract(place, Case(**case), **more),
    "sweep": sweep,
    "erase": erase_run,
    "upload": upload,
}


# ------------------------------------------------------------------------------ the process


def serve() -> None:
    parse = gcs.Bucket.parse
    gcs.Bucket.parse = staticmethod(lambda url: parse(url, _PATIENT, gcs.GRAIN))  # type: ignore[assignment, method-assign]
    gc.freeze()  # else the first collection of each child copies everything that was imported
    for line in sys.stdin:
        with tempfile.TemporaryFile() as said:
            code = _status_of(json.loads(line), said.fileno())
            said.seek(0)
            answer = {"code": code, "said": said.read().decode(errors="replace")}
        print(json.dumps(answer), flush=True)


def _status_of(job: Mapping[str, Any], output: int) -> int:
    """The exit status of a process that does a job; -N where signal N ended it."""
    if child := os.fork():
        return _wait(child)
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        _do(**job)
        code = 0
    except BaseException:  # noqa: BLE001 (the process ends here)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _wait(child: int) -> int:
    """The exit status of a child, which is ended when it hangs."""
    ends = os.pidfd_open(child)
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(ends, selectors.EVENT_READ)
            if not selector.select(ENDS):
                os.kill(child, signal.SIGABRT)
    finally:
        os.close(ends)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _do(do: str, failpoint: str | None, case: Mapping[str, Any] | None = None, **words: Any) -> None:
    if failpoint:
        os.environ[VARIABLE] = failpoint
    else:
        os.environ.pop(VARIABLE, None)
    made = Case() if case is None else Case(**case)
    if not made.flushed:
        os.fsync = lambda _: None
    if not made.unnamed:
        del os.O_TMPFILE
    _JOBS[do](**words, **({} if case is None else {"case": case}))


class StoreWorker:
    """Does jobs one at a time, each in a process of its own."""

    def __init__(self, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # One thread, so that it may fork.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1", **environment},
            text=True,
        )

    def run(self, do: str, place: object, failpoint: str | None = None, case: Case | None = None, **more: Any) -> int:
        """The exit status of a job; AssertionError, with all that it said, unless it is 0 or SIGKILL."""
        job = {"do": do, "place": str(place), "failpoint": failpoint, **more}
        if case is not None:
            job["case"] = asdict(case)
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert answer["code"] in (0, -signal.SIGKILL), f"{job}: ended with {answer['code']}\n{answer['said']}"
        return answer["code"]

    def steps(self, do: str, place: object, log: Path, **more: Any) -> list[str]:
        """Does a job and returns every step that it took, as `NAME:NUMBER`."""
        assert self.run(do, place, f"list:{log}", **more) == 0
        return log.read_text().split()

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()


if __name__ == "__main__":
    serve()
