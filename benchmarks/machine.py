"""The machine that a benchmark runs on: what it is, what others take of it, and what it can do at most.

In: the machine. Out: its description, the share of its processors that other programs had (`Watch`), the peaks of its
matrix products under XLA and under torch, and the raw bandwidth of a disk. Whatever is not in the standard library is
imported where a peak is asked for, so that a side of any environment can use this file. Linux only.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PEAK_TOKENS = 2048  # rows of the products whose peak is measured: a slab's worth
PEAK_TRIES = 5
PIECE = 8 << 20  # bytes of one raw reading or writing

Product = tuple[int, int]  # (inputs, outputs) of a matrix product


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def describe() -> dict[str, Any]:
    """What a result says of its machine; plain JSON."""
    return {
        "architecture": platform.machine(),
        "processor": cpu_name(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.system(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def title(machine: dict[str, Any]) -> str:
    """`x86_64, AMD EPYC, 2 cores, 25 GB`."""
    memory = f", {machine['memory_bytes'] / 1e9:.0f} GB" if machine.get("memory_bytes") else ""
    return f"{machine['architecture']}, {machine['processor']}, {machine['cores']} cores{memory}"


# -------------------------------------------------------------------------------------------- others


class Watch:
    """From now on: how much of the machine's processors goes to other programs than this one."""

    def __init__(self) -> None:
        self._start = self._now()

    def read(self) -> tuple[float, float, float]:
        """Seconds since then, processor seconds of this process, and how many processors others had."""
        elapsed, everyone, own = (after - before for before, after in zip(self._start, self._now(), strict=True))
        return elapsed, own, max(0.0, everyone - own) / elapsed

    def share_of_others(self) -> float:
        """Of all processors together, from 0 to 1."""
        # The system counts in hundredths of a second: of a shorter time it may say more than there was.
        return min(1.0, self.read()[2] / (os.cpu_count() or 1))

    def _now(self) -> tuple[float, float, float]:
        return time.perf_counter(), busy_seconds(), time.process_time()


def busy_seconds() -> float:
    """Of all processors since the machine started: everything but idling and waiting for disks.

    What a virtual machine's host gave to others meanwhile (`steal`) counts as busy.
    """
    fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _wait, interrupt, soft, steal = map(int, fields)
    return (user + nice + system + interrupt + soft + steal) / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------------------ matrix products


def xla_peak(products: Sequence[Product], dtype: str, tokens: int = PEAK_TOKENS) -> float:
    """FLOP/s of XLA over these products, each as often as the others: [tokens, inputs] x [outputs, inputs].

    float32 in the highest precision; bfloat16 operands with a float32 result.
    """
    import jax
    import jax.numpy as jnp

    @jax.jit
    def product(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.einsum("td,fd->tf", x, weight, precision="highest", preferred_element_type=jnp.float32)

    def prepare(inputs: int, outputs: int) -> Callable[[], object]:
        x = jax.random.normal(jax.random.key(0), (tokens, inputs), dtype)
        weight = jax.random.normal(jax.random.key(1), (outputs, inputs), dtype)
        return lambda: product(x, weight).block_until_ready()

    return _peak(products, tokens, prepare)


def torch_peak(products: Sequence[Product], dtype: str, tokens: int = PEAK_TOKENS) -> float:
    """FLOP/s of torch over these products; results in the operands' dtype, as torch's models have them."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def prepare(inputs: int, outputs: int) -> Callable[[], object]:
        kind = getattr(torch, dtype)
        x = torch.randn(tokens, inputs, device=device).to(kind)
        weight = torch.randn(outputs, inputs, device=device).to(kind)

        def product() -> None:
            torch.nn.functional.linear(x, weight)
            if device == "cuda":
                torch.cuda.synchronize()

        return product

    with torch.inference_mode():
        return _peak(products, tokens, prepare)


def _peak(products: Sequence[Product], tokens: int, prepare: Callable[[int, int], Callable[[], object]]) -> float:
    """All FLOPs over all seconds, so that a product weighs what it weighs in the model; the best of some tries."""
    seconds = 0.0
    for inputs, outputs in products:
        product = prepare(inputs, outputs)
        product()  # compiles, or wakes the threads
        tries = []
        for _ in range(PEAK_TRIES):
            started = time.perf_counter()
            product()
            tries.append(time.perf_counter() - started)
        seconds += min(tries)
    return 2 * tokens * sum(inputs * outputs for inputs, outputs in products) / seconds


# ---------------------------------------------------------------------------------------------- disk


def disk_bandwidth(folder: Path, total: int = 1 << 30) -> float:
    """Bytes a second of plain sequential writing into a new file, fsync included: the best of three ways."""
    ways: list[Callable[[Path, int], int]] = [raw_direct, raw_direct_huge, raw_buffered]
    found = []
    for write in ways:
        started = time.perf_counter()
        with contextlib.suppress(OSError):  # not every file system can go past the page cache
            found.append(write(folder, total) / (time.perf_counter() - started))
        (folder / "raw").unlink(missing_ok=True)
    return max(found)


def raw_direct(folder: Path, total: int, piece: int = PIECE, huge: bool = False) -> int:
    """Past the page cache, in aligned pieces; how many bytes were written."""
    with mmap.mmap(-1, piece, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as buffer:
        if huge:
            buffer.madvise(mmap.MADV_HUGEPAGE)
        buffer.write(os.urandom(1 << 20) * (piece >> 20))
        fd = os.open(folder / "raw", os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o644)
        return _write_all(fd, memoryview(buffer), total)


def raw_direct_huge(folder: Path, total: int) -> int:
    return raw_direct(folder, total, huge=True)


def raw_buffered(folder: Path, total: int, piece: int = PIECE) -> int:
    """Through the page cache, as any program writes."""
    fd = os.open(folder / "raw", os.O_CREAT | os.O_WRONLY, 0o644)
    return _write_all(fd, memoryview(os.urandom(1 << 20) * (piece >> 20)), total)


def _write_all(fd: int, buffer: memoryview, total: int) -> int:
    written = 0
    try:
        with buffer:
            while written < total:
                written += os.write(fd, buffer)
            os.fsync(fd)
    finally:
        os.close(fd)
    return written
