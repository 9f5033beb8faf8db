#!/usr/bin/env python3
"""The writer alone, fed by a producer that costs nothing: against the raw disk, into nothing, and into a bucket.

    python benchmarks/writer.py                     all three; needs 8 GB of free disk, and writes some 100 GB in all
    python benchmarks/writer.py --only disk         the share of the raw disk's bandwidth
    python benchmarks/writer.py --only null         what the writer could take at most, per format
    python benchmarks/writer.py --only uploads      one upload against several at once
    python benchmarks/writer.py --without_sums      what sums over rows cost: the same without them

The producer hands over what the extraction loop would: blocks [8, 512, 896] of 14 layers, samples a little
shorter than the block, within the loop's bound on host memory. Everything a run does to a part is timed:
sums over rows, format, checksums, fsync, names, sidecar, commit record.

Raw disk: as many bytes written sequentially with plain system calls in pieces of 8 MiB, fsync included: past the page
cache (O_DIRECT, aligned), the same from huge pages, and through the page cache. Raw and ours run in turn, so that
the machine's drift meets both; what counts is the share of the best raw writing of the same round. Files go between,
and the disk settles. Null sinks take the place of files: one only counts bytes, the other also makes the checksum
that a bucket wants. Uploads go to a small server on this machine that waits before it answers a chunk, as a network
does. `others` is the share of the machine's processors that other programs had meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from machine import Watch, describe, raw_buffered, raw_direct, raw_direct_huge, title

from jax_extract.extraction.loop import STEPS_IN_MEMORY
from jax_extract.store import writer as writer_module
from jax_extract.store.budget import ByteBudget
from jax_extract.store.ledger import Ledger
from jax_extract.store.parts import PartContent, Site
from jax_extract.store.row_sums import SummedRows
from jax_extract.store.storage.local import Directory
from jax_extract.store.storage.verbs import Chunk, Published, Storage, crc32c
from jax_extract.store.writer import PartWriter, RowPiece

WIDTH, ROWS, POSITIONS = 896, 8, 512
SITES = [Site("after_block", layer, WIDTH) for layer in range(10, 24)]
FORMATS = ("pickle", "npz", "safetensors")
LARGE, SLAB, SMALL = 256_000_000, 14_000_000, 28_672  # bytes of one shard: of a part, of one slab, of 8 last positions
TOTAL = LARGE * len(SITES)
SMALL_PARTS = 50
DELAY = 0.5  # seconds before the server answers a chunk: a connection of some 17 MB/s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["disk", "null", "uploads"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", help="on the disk to be measured; by default the system's temporary directory")
    parser.add_argument("--without_sums", action="store_true", help="no sums over rows, which every run makes")
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    figures: dict[str, Any] = {"machine": describe()}
    print(f"{title(figures['machine'])}; load of the machine before: {figures['machine']['load_before']:.1f}\n")
    sums = mock.patch.object(SummedRows, "add", lambda *_: None) if args.without_sums else contextlib.nullcontext()
    with sums, tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        for name, benchmark in {"disk": disk, "null": null, "uploads": uploads}.items():
            if args.only in (None, name):
                figures[name] = benchmark(Path(scratch), args.rounds)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


# -------------------------------------------------------------------------------------- the producer


@dataclass(frozen=True)
class Load:
    """What is written: parts of shards of about `shard_bytes`, about `total` bytes of them."""

    dtype: str
    shard_bytes: int
    total: int = TOTAL


class Producer:
    """Hands parts to a writer as the loop does, from a few steps' worth of blocks made beforehand."""

    def __init__(self, load: Load) -> None:
        self.load = load
        kind = np.dtype(ml_dtypes.bfloat16 if load.dtype == "bfloat16" else load.dtype)
        positions = 1 if load.shard_bytes == SMALL else POSITIONS
        random = np.random.default_rng(0)
        step = random.standard_normal((len(SITES) + 1, ROWS, positions, WIDTH), np.float32).astype(kind)
        self._steps = [step, *(step.copy() for _ in range(STEPS_IN_MEMORY - 1))]
        # Samples are a little shorter than their slab, as in a plan with 5 % of padding.
        self._kept = [max(1, positions - 6 * i) for i in range(ROWS)]
        rows_bytes = sum(self._kept) * WIDTH * kind.itemsize
        self._slabs = max(1, round(load.shard_bytes / rows_bytes))
        part_bytes = self._slabs * rows_bytes * len(SITES)
        self._parts = max(1, round(load.total / part_bytes))
        self.bytes = self._parts * part_bytes

    def feed(self, writer: PartWriter) -> None:
        """All parts, durable when this returns."""
        budget = ByteBudget(STEPS_IN_MEMORY * self._steps[0].nbytes)
        for number in range(1, self._parts + 1):
            part = writer.begin(self._content(number))
            for slab in range(self._slabs):
                step = self._steps[slab % len(self._steps)]
                budget.acquire(step.nbytes)
                blocks = {site.key: step[i] for i, site in enumerate(SITES)}
                pieces = [RowPiece(row, 0, count) for row, count in enumerate(self._kept)]
                part.append(blocks, pieces, partial(budget.release, step.nbytes))
            part.commit()
        writer.close()

    def _content(self, batch: int) -> PartContent:
        lengths = self._kept * self._slabs
        ids = [f"{batch:06d}_{i}" for i in range(len(lengths))]
        return PartContent(
            batch=batch,
            part=1,
            parts_in_batch=1,
            sample_indices=np.arange(len(ids)),
            sample_ids=tuple(ids),
            token_ids=tuple(np.zeros(n, np.int32) for n in lengths),
            positions=tuple(np.arange(n, dtype=np.int32) for n in lengths),
            full_lengths=np.array(lengths, np.int64),
            meta=tuple({} for _ in ids),
            plan="",
        )


def write_through(storage: Storage, producer: Producer, shard_format: str) -> int:
    """Makes everything durable in an empty place; returns the bytes of the rows."""
    identity = {"sites": [{"hook": s.hook, "layer": s.layer, "width": WIDTH} for s in SITES]}
    ledger = Ledger.start(
        storage, {"identity": identity, "numerics": {}, "description": {writer_module.KEEPS_SUMS: True}}
    )
    producer.feed(PartWriter(ledger, SITES, shard_format, producer.load.dtype, "benchmark"))
    return producer.bytes


@dataclass(frozen=True)
class Rate:
    """Attributes:
    bytes_per_second: as a clock on the wall sees it.
    processor: seconds of all processors a gigabyte, the kernel's among them; hardly disturbed by other programs.
    others: share of the machine's processors that other programs had.
    """

    bytes_per_second: float
    processor: float
    others: float

    @classmethod
    def of(cls, write: Callable[[], int]) -> Rate:
        """`write` returns how many bytes it wrote."""
        watch = Watch()
        written = write()
        seconds, own, others = watch.read()
        return cls(written / seconds, own / written * 1e9, others / (os.cpu_count() or 1))


def median(rates: list[Rate]) -> Rate:
    return Rate(*(statistics.median(getattr(r, field.name) for r in rates) for field in dataclasses.fields(Rate)))


# ---------------------------------------------------------------------------------------------- disk


def disk(scratch: Path, rounds: int) -> dict[str, Any]:
    """Ours and raw, in turn; each load's share of the best raw writing of its round."""

    def ours(dtype: str, shard_bytes: int, shard_format: str = "safetensors", total: int = TOTAL) -> Any:
        producer = Producer(Load(dtype, shard_bytes, total))
        return lambda root: write_through(Directory(root), producer, shard_format)

    writings: dict[str, Callable[[Path], int]] = {
        "raw, direct": partial(raw_direct, total=TOTAL),
        "float32, 256 MB shards": ours("float32", LARGE, total=2 * TOTAL),
        "raw, direct, huge pages": partial(raw_direct_huge, total=TOTAL),
        "bfloat16, 256 MB shards": ours("bfloat16", LARGE),
        "float32, 256 MB, pickle": ours("float32", LARGE, "pickle"),
        "raw, page cache": partial(raw_buffered, total=TOTAL),
        "float32, 256 MB, npz": ours("float32", LARGE, "npz"),
        "float32, 14 MB shards": ours("float32", SLAB),
        "float32, 29 kB shards": ours("float32", SMALL, total=SMALL_PARTS * SMALL * len(SITES)),
    }
    rates: dict[str, list[Rate]] = {name: [] for name in writings}
    for _ in range(rounds):
        for name, write in writings.items():
            rates[name].append(measured(scratch, write))
    raw = [found for name, found in rates.items() if name.startswith("raw")]
    best = [max(found[i].bytes_per_second for found in raw) for i in range(rounds)]
    print(f"{'disk':<28}{'GB/s':>8}{'CPU s/GB':>10}{'others':>8}{'of best raw':>13}   by round")
    shares: dict[str, float] = {}
    for name, found in rates.items():
        of_best = [rate.bytes_per_second / top for rate, top in zip(found, best, strict=True)]
        shares[name] = statistics.median(of_best)
        middle = median(found)
        print(
            f"{name:<28}{middle.bytes_per_second / 1e9:>8.2f}{middle.processor:>10.2f}{middle.others:>8.0%}"
            f"{shares[name]:>13.0%}   " + ", ".join(f"{share:.0%}" for share in of_best)
        )
    files = median(rates["float32, 29 kB shards"]).bytes_per_second / SMALL
    print(f"shards of 29 kB: {files:,.0f} files a second, each with its fsync\n")
    told = {name: [dataclasses.asdict(rate) for rate in found] for name, found in rates.items()}
    return {"rates": told, "share_of_best_raw": shares, "small_files_per_second": files}


def measured(scratch: Path, write: Callable[[Path], int]) -> Rate:
    """Of one writing into an empty folder that is gone afterwards."""
    folder = scratch / "measured"
    folder.mkdir()
    rate = Rate.of(lambda: write(folder))
    shutil.rmtree(folder)
    os.sync()  # the removal, too, is work for the disk; not for whoever comes next
    time.sleep(1)
    return rate


# ---------------------------------------------------------------------------------------- null sinks


class CountingFile:
    """A pending file that goes nowhere."""

    def __init__(self, name: str, checksums: bool) -> None:
        self.size = 0
        self.crc32c = 0
        self._name = name
        self._checksums = checksums

    def write(self, data: Chunk) -> int:
        self.size += len(data)
        if self._checksums:
            self.crc32c = crc32c(data, self.crc32c)
        return len(data)

    def publish(self) -> Published:
        return Published(self._name)

    def discard(self) -> None:
        pass


class NullStorage(Directory):
    """Keeps the small files of the ledger; shards and sidecars are counted."""

    def __init__(self, root: Path, checksums: bool) -> None:
        super().__init__(root)
        self._checksums = checksums

    def create(self, name: str, own: str) -> CountingFile:  # type: ignore[override] (no file of a directory)
        return CountingFile(name, self._checksums)


def null(scratch: Path, rounds: int) -> dict[str, Any]:
    memory = Path("/dev/shm")  # so that the records' own fsync costs nothing
    told: dict[str, Any] = {}
    print(f"{'into nothing':<28}{'counted':>26}{'and checksummed':>26}   median of {rounds}")
    print(f"{'':<28}" + f"{'GB/s':>8}{'CPU s/GB':>10}{'others':>8}" * 2)
    for dtype in ("float32", "bfloat16"):
        producer = Producer(Load(dtype, LARGE))
        for shard_format in FORMATS:
            found: dict[bool, list[Rate]] = {False: [], True: []}
            for _ in range(rounds):
                for checksums, rates in found.items():
                    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else scratch) as root:
                        sink = NullStorage(Path(root), checksums)
                        rates.append(Rate.of(partial(write_through, sink, producer, shard_format)))
            line = f"{f'{dtype}, {shard_format}':<28}"
            for checksums, rates in found.items():
                middle = median(rates)
                line += f"{middle.bytes_per_second / 1e9:>8.2f}{middle.processor:>10.2f}{middle.others:>8.0%}"
                name = f"{dtype} {shard_format}" + (" checksummed" if checksums else "")
                told[name] = [dataclasses.asdict(rate) for rate in rates]
            print(line)
    alone = statistics.median(checksum_alone() for _ in range(rounds))
    print(f"CRC32C alone: {alone / 1e9:.1f} GB/s by one thread; others wait meanwhile, so no process is faster\n")
    return {**told, "crc32c_bytes_per_second": alone}


def checksum_alone() -> float:
    block = memoryview(os.urandom(1 << 20))
    started = time.thread_time()
    for _ in range(1_000):
        crc32c(block)
    return 1_000 * len(block) / (time.thread_time() - started)


# ------------------------------------------------------------------------------------------- uploads


def uploads(scratch: Path, rounds: int) -> dict[str, Any]:
    """The same parts by one lane and by as many as a bucket gets, against a server that is slow to answer."""
    from jax_extract.store.storage.opening import open_storage

    server_module = _load(ROOT / "tests" / "gcs_server.py")
    producer = Producer(Load("float32", SLAB, SLAB * len(SITES)))
    many = writer_module.lanes_for("gs://", len(SITES))
    figures: dict[str, list[float]] = {"one lane": [], f"{many} lanes": []}
    for _ in range(rounds):
        for name, lanes in zip(figures, (1, many), strict=True):
            with server_module.running() as server, _emulator(server.url):
                server.make_bucket("benchmark")
                for kind in ("chunk", "finish"):
                    server.fault("stall", kind=kind, seconds=DELAY, times=1_000_000)
                with mock.patch.object(writer_module, "lanes_for", return_value=lanes):
                    place = open_storage("gs://benchmark/run")
                    rate = Rate.of(partial(write_through, place, producer, "safetensors"))
            figures[name].append(rate.bytes_per_second)
    print(f"{'uploads on this machine':<28}{'MB/s':>8}   answers after {DELAY} s, median of {rounds}")
    for name, rates in figures.items():
        print(f"{name:<28}{statistics.median(rates) / 1e6:>8.1f}")
    one, several = (statistics.median(rates) for rates in figures.values())
    print(f"{many} lanes / one lane: {several / one:.1f}\n")
    return {"bytes_per_second": figures, "ratio": several / one}


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _emulator(url: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, {"STORAGE_EMULATOR_HOST": url}):
        yield


if __name__ == "__main__":
    sys.exit(main())
