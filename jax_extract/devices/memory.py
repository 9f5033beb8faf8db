"""Whether a step fits the memory that there is, asked before the first one starts.

In: what the compiler says of a program, and the devices of this process. Out: nothing, or a `UserError` with the mend.
CPU devices take this machine's memory, all of them at once; another device has its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jax_extract.devices.planner import STEPS_HELD
from jax_extract.errors import UserError
from jax_extract.terminal import bytes_text, plural

_FEWEST_TOKENS = 128  # of a slab that is proposed; others are multiples of it


def require_parameters(nbytes: int) -> None:
    """Raises UserError where parameters that CPU devices share do not fit this machine's memory."""
    if (free := free_bytes()) is not None and nbytes > free:
        raise UserError(
            f"the parameters take {bytes_text(nbytes)} and {bytes_text(free)} of this machine's memory are free; give "
            "--dtype bfloat16, or layers that are not so deep"
        )


def require_room(compiled: jax.stages.Compiled, tokens: int, devices: Sequence[Any]) -> None:
    """Raises UserError where a step has too little memory.

    Args:
      compiled: the program; parameters lie on the devices already.
      tokens: of the slab that each device computes.
      devices: of this process.
    """
    if (memory := compiled.memory_analysis()) is None:
        return
    step = memory.temp_size_in_bytes + STEPS_HELD * memory.output_size_in_bytes
    if devices[0].platform == "cpu":
        if (free := free_bytes()) is not None:
            require_machine(len(devices) * step, free, tokens, len(devices))
    else:
        limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
        if known := [limit for limit in limits if limit]:
            require_device(memory.argument_size_in_bytes, step, min(known), tokens, devices[0].device_kind)


def require_machine(needed: int, free: int, tokens: int, devices: int) -> None:
    """Raises UserError where the CPU devices of this process need more than is free, besides the parameters."""
    if needed <= free:
        return
    fewer = devices * free // needed
    mends = [f"fewer devices (JAX_NUM_CPU_DEVICES={fewer})"] if 0 < fewer < devices else []
    raise UserError(
        f"a step of {tokens:,} tokens on {'each of ' * (devices > 1)}{plural(devices, 'device')} needs "
        f"{bytes_text(needed)} besides the parameters, and {bytes_text(free)} of this machine's memory are free; "
        + _mend(mends, tokens, free / needed)
    )


def require_device(parameters: int, step: int, limit: int, tokens: int, kind: str) -> None:
    """Raises UserError where a device with memory of its own, `limit` bytes, has too little."""
    if parameters + step <= limit:
        return
    raise UserError(
        f"a step of {tokens:,} tokens needs {bytes_text(parameters + step)} of a device's memory, "
        f"{bytes_text(parameters)} of it for parameters, and a {kind} has {bytes_text(limit)}; "
        + _mend(["a --mesh_shape with a longer model axis", "fewer layers"], tokens, (limit - parameters) / step)
    )


def _mend(others: Sequence[str], tokens: int, share: float) -> str:
    """What to do, a smaller slab among it: memory grows with its tokens."""
    fewer = int(tokens * share) // _FEWEST_TOKENS * _FEWEST_TOKENS
    such = f" such as {fewer}" if fewer > 0 else ""
    slab = f"begin a run with a smaller --slab_tokens{such} and samples that are no longer (--max_seq_length)"
    return f"give {' or '.join(others)}, or {slab}" if others else slab


def free_bytes(root: Path = Path("/")) -> int | None:
    """Memory that this process may still take: of the machine, or of a container where that is less.

    None where the system does not tell as Linux does.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
    return min([free, *_free_of_groups(root)])


def _free_of_groups(root: Path) -> Iterator[int]:
    """What the control groups of this process leave it, where they have a limit; file pages are given back."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = (
                root / "sys/fs/cgroup/memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (free := _free_of(folder, *names)) is not None:
                yield free


def _free_of(group: Path, limit: str, used: str, reclaimable: str) -> int | None:
    """None without a limit, or where the group's folder is not to be seen from a container."""
    try:
        most, taken = (int((group / name).read_text()) for name in (limit, used))
        statistics = (group / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # "max" is no number
        return None
    pages = sum(int(line.split()[1]) for line in statistics if line.split()[:1] == [reclaimable])
    return max(0, most - taken + pages)
