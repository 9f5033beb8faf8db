#!/usr/bin/env python3
"""Shuffled reading from a local disk: against the disk's raw sequential bandwidth, and how near it is to uniform.

    python benchmarks/shuffled_reading.py                          speed; 8 GB of free disk
    python benchmarks/shuffled_reading.py --only uniformity        pairs of one document in a batch, for some buffers
    python benchmarks/shuffled_reading.py --only grain             Grain on the same run (pip install grain first)

Runs are written through the package's own writer: documents of 256 to 768 tokens, shards of about 256 MB, width 896.
Raw: the same shards from the first byte to the last, one after the other, in pieces of 8 MiB: through the page
cache, as any program reads; and past it (O_DIRECT), by one reader and by four, each with shards of its own. Shuffled:
one epoch, every checksum block checked, until the last batch is there; nothing else is done with the batches. Before
each, the shards' pages are dropped from the page cache; they are on the disk, because the writer calls fsync.
All take turns, in another order every round, so that the machine's drift meets each; what counts is the ratio
within a round.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from machine import PIECE, Watch, describe, title

from jax_extract.store.ledger import Ledger
from jax_extract.store.parts import PartContent, Site
from jax_extract.store.reader import Run, open_activations
from jax_extract.store.shuffled.order import Layout, random_order
from jax_extract.store.shuffled.source import past_the_page_cache
from jax_extract.store.storage.direct import PAGE, page_memory
from jax_extract.store.storage.local import Directory
from jax_extract.store.writer import PartWriter

WIDTH = 896
SHARD_BYTES = 256_000_000
BATCH = 4096
SECONDS = 20.0  # for what would not come to its end in an hour


@dataclass(frozen=True)
class Case:
    dtype: str
    layers: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}, {len(self.layers)} layer{'s' if len(self.layers) > 1 else ''}"


CASES = (
    Case("float32", (12,)),
    Case("bfloat16", (12,)),
    Case("bfloat16", (10, 12, 14, 16)),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["speed", "uniformity", "grain"], default="speed")
    parser.add_argument("--gigabytes", type=float, default=7.0, help="of a run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="where the runs are written; by default the system's temporary one")
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    print(
        f"{title(describe())}, NumPy {np.__version__}; width {WIDTH}, batches of {BATCH} rows, buffer 1 GiB where "
        "nothing else is said"
    )
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        figures = {"speed": speed, "uniformity": uniformity, "grain": grain}[args.only](args, Path(scratch))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


# ------------------------------------------------------------------------------------------- speed


def speed(args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    figures = []
    for case in CASES:
        run = write_run(scratch, case, args.gigabytes)
        rounds = [one_round(scratch, run, case, seed) for seed in range(args.rounds)]
        print_run(case, run)
        print_rounds(["shuffled"], rounds)
        figures.append({"case": str(case), "rounds": rounds})
        erase(scratch)
    return figures


RAW = ("raw", "raw, direct", "raw, direct, 4")


def one_round(root: Path, run: Run, case: Case, number: int) -> dict[str, float]:
    """Bytes a second of each way to read; and how busy others kept the machine meanwhile."""
    layers = case.layers if len(case.layers) > 1 else case.layers[0]

    def shuffled() -> int:
        with run.shuffled(layers, rows=BATCH, seed=number, epochs=1, drop_remainder=False) as batches:
            return sum(batch.activations.nbytes for batch in batches)

    files = sorted(root.glob("*.safetensors"))
    ways = [
        partial(raw, files, 0, 1),
        partial(raw, files, os.O_DIRECT, 1),
        partial(raw, files, os.O_DIRECT, 4),
        shuffled,
    ]
    watch, figures = Watch(), {}
    for turn in range(len(ways)):
        at = (number + turn) % len(ways)
        figures[(*RAW, "shuffled")[at]] = cold(root, ways[at])
    return {**figures, "others": watch.read()[2]}


def print_run(case: Case, run: Run) -> None:
    size = run.metadata["total_bytes"]
    print(f"\n{case}: {run.metadata['total_rows']:,} rows, {size / 1e9:.2f} GB")


def raw(files: Sequence[Path], flags: int, readers: int) -> int:
    """Reads every file from begin to end; how many bytes they have."""

    def read(mine: Sequence[Path]) -> int:
        buffer, total = mmap.mmap(-1, PIECE), 0
        for path in mine:
            file, at = os.open(path, os.O_RDONLY | flags), 0
            while n := os.preadv(file, [buffer], at):
                at += n
                if n < PIECE:
                    break
            os.close(file)
            total += at
        return total

    with ThreadPoolExecutor(readers) as pool:
        return sum(pool.map(read, [files[i::readers] for i in range(readers)]))


def cold(root: Path, read: Callable[[], int]) -> float:
    """Bytes a second of a call that returns how many bytes it had, from a disk whose pages are not in memory."""
    for path in root.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    return read() / (time.perf_counter() - start)


def print_rounds(names: Sequence[str], rounds: Sequence[dict[str, float]]) -> None:
    """GB/s of every round, and of the other names their ratio to each raw one, by round; medians last."""
    lines = {name: [r[name] / 1e9 for r in rounds] for name in (*RAW, *names)}
    for name in names:
        lines |= {f"{name} / {other}": [r[name] / r[other] for r in rounds] for other in RAW}
    lines["cores in other use"] = [r["others"] for r in rounds]
    print(f"{'GB/s':<30}" + "".join(f"{i + 1:>8}" for i in range(len(rounds))) + f"{'median':>9}")
    for name, values in lines.items():
        print(f"{name:<30}" + "".join(f"{v:>8.2f}" for v in values) + f"{statistics.median(values):>9.2f}")


# -------------------------------------------------------------------------------------- uniformity


def uniformity(args: argparse.Namespace, scratch: Path) -> list[dict[str, float]]:
    """How often two rows of a batch are of one document, over how often they are in an order drawn uniformly."""
    run = write_run(scratch, Case("float32", (12,)), args.gigabytes)
    rows = run.metadata["total_rows"]
    print(f"\nfloat32, 1 layer: {rows:,} rows, {len(run):,} documents")
    print(f"{'':<24}{'pairs of one document':>23}{'documents':>12}")
    print(f"{'buffer':<12}{'of the run':>12}{'over uniform':>23}{'in a batch':>12}   filled and emptied instead")
    figures = []
    for mib in (64, 128, 256, 512, 1024, 2048):
        with run.shuffled(12, rows=BATCH, epochs=1, buffer_bytes=mib << 20) as batches:
            pairs, documents = neighbours([batch.sample_indices for batch in batches])
        plain = neighbours(list(filled_and_emptied(run, mib << 20)))
        share = (mib << 20) / run.metadata["total_bytes"]
        print(f"{mib:>6} MiB {share:>13.1%}{pairs:>23.2f}{documents:>12.0f}   {plain[0]:.2f}, {plain[1]:.0f}")
        figures.append({"buffer_mib": mib, "pairs": pairs, "documents": documents, "plain_pairs": plain[0]})
    samples = np.concatenate([np.full(len(s.positions), s.sample_index) for s in run.samples()])
    order = samples[np.random.default_rng(0).permutation(rows)]
    pairs, documents = neighbours([order[i : i + BATCH] for i in range(0, rows - BATCH, BATCH)])
    print(f"{'uniform':<24}{pairs:>23.2f}{documents:>12.0f}")
    return figures


def neighbours(batches: Sequence[np.ndarray]) -> tuple[float, float]:
    """Pairs of one document within a batch over the uniform expectation; and documents in a batch."""
    sizes = np.bincount(np.concatenate(batches))
    uniform = (sizes * (sizes - 1)).sum() / (sizes.sum() * (sizes.sum() - 1))
    pairs, documents = [], []
    for batch in batches:
        counts = np.bincount(batch)
        pairs.append((counts * (counts - 1)).sum() / (len(batch) * (len(batch) - 1)))
        documents.append((counts > 0).sum())
    return float(np.mean(pairs) / uniform), float(np.mean(documents))


def filled_and_emptied(run: Run, buffer_bytes: int) -> Iterator[np.ndarray]:
    """The simpler way: half of the buffer is shuffled and handed out while the other half is read. Documents alone."""
    rows = [part.content.rows for part in run.parts]
    layout = Layout.of(rows, 4 * WIDTH, 1, buffer_bytes, PIECE, 1)
    owners = [np.repeat(part.content.sample_indices, np.diff(part.content.row_offsets)) for part in run.parts]
    pieces = layout.pieces[random_order(len(layout.pieces), 0)].tolist()
    half = buffer_bytes // 2 // (4 * WIDTH + 12)
    stream = np.concatenate([owners[part][start:stop] for part, start, stop in pieces])
    for first in range(0, len(stream), half):
        window = stream[first : first + half]
        window = window[random_order(len(window), 1, first)]
        yield from (window[i : i + BATCH] for i in range(0, len(window) - BATCH + 1, BATCH))


# ------------------------------------------------------------------------------------------- Grain


def grain(args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Grain three ways on float32 rows: by rows, by blocks taken apart into rows, by blocks in groups."""
    case = CASES[0]
    run = write_run(scratch, case, args.gigabytes)
    ways = GrainWays(run)
    print_run(case, run)
    for name, make in (("rows", ways.rows), ("blocks taken apart into rows", ways.windows)):
        print(f"Grain by {name}: {cold(scratch, lambda make=make: handed_out(make())) / 1e9:.3f} GB/s")
    rounds, documents = [], []
    for seed in range(args.rounds):
        documents.clear()
        by_groups = cold(scratch, lambda seed=seed: handed_out(ways.groups(seed, documents), 1e9))
        rounds.append({**one_round(scratch, run, case, seed), "Grain by groups": by_groups})
    print_rounds(["shuffled", "Grain by groups"], rounds)
    print(f"pairs of one document over uniform, Grain by groups: {neighbours(documents)[0]:.2f}")
    return rounds


def handed_out(batches: Iterator[np.ndarray], seconds: float = SECONDS) -> int:
    """Bytes until the end, or until the time is over."""
    total, end = 0, time.perf_counter() + seconds
    for batch in batches:
        total += batch.nbytes
        if time.perf_counter() > end:
            break
    return total


class GrainWays:
    """Pipelines of Grain's own parts over a run's rows at one site; blocks are our pieces, and read as ours are."""

    def __init__(self, run: Run) -> None:
        self.site = run.sites[0]
        self.parts = [past_the_page_cache(part) for part in run.parts]
        self.contents = [part.content for part in run.parts]
        self.layout = Layout.of([c.rows for c in self.contents], 4 * WIDTH, 1, 1 << 30, PIECE, 1)
        self.samples = [np.repeat(c.sample_indices, np.diff(c.row_offsets)) for c in self.contents]
        self.bounds = np.cumsum([0] + [c.rows for c in self.contents])

    def rows(self) -> Iterator[np.ndarray]:
        """The global shuffle: an index permutation over rows, each read by itself."""
        import grain

        ways = self

        class Rows:
            def __len__(self) -> int:
                return int(ways.bounds[-1])

            def __getitem__(self, index: int) -> np.ndarray:
                part = int(np.searchsorted(ways.bounds, index, side="right")) - 1
                start = int(index - ways.bounds[part])
                return ways.parts[part].rows(ways.site, start, start + 1)[0].copy()  # not the whole block it lies in

        options = grain.ReadOptions(num_threads=8, prefetch_buffer_size=16)
        return iter(grain.MapDataset.source(Rows()).shuffle(seed=1).batch(BATCH).to_iter_dataset(options))

    def windows(self) -> Iterator[np.ndarray]:
        """Shuffled blocks, taken apart into rows, which a window of a third of the buffer shuffles again."""
        from grain import experimental

        class Apart(experimental.FlatMapTransform):
            max_fan_out = 1 << 30

            def flat_map(self, element: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
                return list(element[0])

        rows = experimental.FlatMapIterDataset(self._blocks(1), Apart())
        window = (1 << 30) // 3 // (4 * WIDTH)
        return iter(experimental.WindowShuffleIterDataset(rows, window_size=window, seed=1).batch(BATCH))

    def groups(self, seed: int, documents: list[np.ndarray]) -> Iterator[np.ndarray]:
        """Shuffled blocks in groups of a third of the buffer: one is handed out, one waits, one is put together."""
        from grain import experimental

        group = (1 << 30) // 3 // self.layout.piece_bytes

        def together(blocks: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            samples = np.concatenate([samples for _, samples in blocks])
            order = random_order(len(samples), seed, int(samples[0]))
            return np.concatenate([rows for rows, _ in blocks]), samples, order

        class Batches:
            def __init__(self, element: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
                self.rows, self.samples, self.order = element

            def __len__(self) -> int:
                return len(self.order) // BATCH

            def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
                chosen = self.order[index * BATCH : (index + 1) * BATCH]
                return np.take(self.rows, chosen, axis=0), self.samples[chosen]

        class Apart(experimental.FlatMapTransform):
            max_fan_out = 1 << 30

            def flat_map(self, element: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Any:
                return Batches(element)

        ahead = experimental.ThreadPrefetchIterDataset(
            self._blocks(seed).batch(group, batch_fn=together), prefetch_buffer_size=1
        )
        for rows, samples in experimental.FlatMapIterDataset(ahead, Apart()):
            documents.append(samples)
            yield rows

    def _blocks(self, seed: int) -> Any:
        """Blocks in random order, read by threads: (rows, samples)."""
        import grain

        ways = self

        class Blocks:
            def __len__(self) -> int:
                return len(ways.layout.pieces)

            def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
                part, start, stop = ways.layout.pieces[index].tolist()
                memory = page_memory(ways.layout.piece_bytes + PAGE)
                rows = ways.parts[part].rows(ways.site, start, stop, memory)  # type: ignore[call-arg]  # a `FilePart`, as every part of a run on disk
                return rows, ways.samples[part][start:stop]

        options = grain.ReadOptions(num_threads=8, prefetch_buffer_size=16)
        return grain.MapDataset.source(Blocks()).shuffle(seed=seed).to_iter_dataset(options)


# ---------------------------------------------------------------------------------- the runs to read


def write_run(root: Path, case: Case, gigabytes: float) -> Run:
    """A run of random rows in documents of 256 to 768 tokens, through the package's own writer."""
    directory = Directory(root)
    directory.make()
    sites = [Site("after_block", layer, WIDTH) for layer in case.layers]
    identity = {
        "sites": [{"hook": s.hook, "layer": s.layer, "width": WIDTH} for s in sites],
        "capture_dtype": case.dtype,
    }
    description = {"model_name": "synthetic", "hidden_dim": WIDTH}
    ledger = Ledger.start(directory, {"identity": identity, "numerics": {}, "description": description})
    writer = PartWriter(ledger, sites, "safetensors", case.dtype, "benchmark")
    random = np.random.default_rng(0)
    dtype = np.dtype(ml_dtypes.bfloat16 if case.dtype == "bfloat16" else case.dtype)
    noise = random.normal(size=(5_000, WIDTH)).astype(np.float32).astype(dtype)
    row_bytes = WIDTH * dtype.itemsize
    left, number, sample = int(gigabytes * 1e9 / len(sites) / row_bytes), 0, 0
    while left:
        number += 1
        lengths: list[int] = []
        rows = min(left, SHARD_BYTES // row_bytes)
        while sum(lengths) < rows:
            lengths.append(min(int(random.integers(256, 769)), rows - sum(lengths)))
        part = writer.begin(content(number, sample, lengths))
        for length in lengths:
            first = int(random.integers(0, len(noise) - length))
            part.append({site.key: noise[None, first : first + length] for site in sites}, [length], lambda: None)
        part.commit()
        left, sample = left - rows, sample + len(lengths)
    writer.close()
    return open_activations(root)


def content(number: int, first: int, lengths: Sequence[int]) -> PartContent:
    positions = tuple(np.arange(n, dtype=np.int32) for n in lengths)
    samples = np.arange(first, first + len(lengths))
    return PartContent(
        batch=number,
        part=1,
        parts_in_batch=1,
        sample_indices=samples,
        sample_ids=tuple(map(str, samples)),
        token_ids=positions,
        positions=positions,
        full_lengths=np.array(lengths, np.int64),
        meta=tuple({} for _ in lengths),
        plan="benchmark",
    )


def erase(root: Path) -> None:
    for path in root.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    sys.exit(main())
