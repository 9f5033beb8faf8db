"""What a step needs is compared with the memory that there is before the first one starts.

Guarded: the machine's free memory, and a container's where that is less; one sentence with both figures and what to
give instead, on CPU devices, which share the machine, and on devices with memory of their own; and a pod tried on
64 CPU devices, whose slabs shrink so that all of them fit 16 GB at once.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_run import run_here, write_jsonl

from jax_extract import UserError
from jax_extract.devices import memory
from jax_extract.extraction.program import CaptureProgram

GIB = 1 << 30


def _system(root: Path, groups: str, **files: object) -> Path:
    for name, content in {"proc/meminfo": f"MemTotal: 9\nMemAvailable:  {8 * GIB // 1024} kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(content))
    (root / "proc/self").mkdir()
    (root / "proc/self/cgroup").write_text(groups)
    return root


def test_free_memory_is_the_machines_or_what_a_container_leaves_of_it(tmp_path: Path) -> None:
    assert memory.free_bytes(tmp_path / "elsewhere") is None
    assert memory.free_bytes(_system(tmp_path / "alone", "0::/\n")) == 8 * GIB

    two = "sys/fs/cgroup/a"
    files = {f"{two}/memory.current": 3 * GIB, f"{two}/memory.stat": f"anon 5\ninactive_file {GIB}\n"}
    inner = {f"{two}/b/memory.max": "max", f"{two}/b/memory.current": GIB, f"{two}/b/memory.stat": ""}
    found = _system(tmp_path / "second", "0::/a/b\n", **{f"{two}/memory.max": 4 * GIB, **files, **inner})
    assert memory.free_bytes(found) == 2 * GIB, "of the group above, whose file pages are given back"

    one = "sys/fs/cgroup/memory"
    files = {f"{one}/memory.limit_in_bytes": 2 * GIB, f"{one}/memory.usage_in_bytes": 3 * GIB}
    found = _system(
        tmp_path / "first",
        "3:cpu:/x\n4:memory:/x\n0::/\n",
        **files,
        **{f"{one}/memory.stat": "total_inactive_file 0\n"},
    )
    assert memory.free_bytes(found) == 0, "a container does not see its own group by the host's name"


def test_devices_that_share_a_machine_are_told_how_many_fit_and_which_slab_does() -> None:
    memory.require_machine(15 * GIB, 15 * GIB, 4_096, 64)
    with pytest.raises(UserError) as refused:
        memory.require_machine(30 * GIB, 14 * GIB, 4_096, 64)
    said = str(refused.value)
    assert "each of 64 devices" in said and "32.2 GB" in said and "15 GB" in said
    assert "JAX_NUM_CPU_DEVICES=29" in said and "--slab_tokens such as 1792" in said
    with pytest.raises(UserError) as refused:
        memory.require_machine(30 * GIB, GIB // 2, 4_096, 1)
    assert "on 1 device" in str(refused.value) and "JAX_NUM" not in str(refused.value)
    assert "begin a run with a smaller --slab_tokens and" in str(refused.value), "no slab is small enough to name"


def test_a_device_with_memory_of_its_own_is_compared_with_that() -> None:
    def compiled(temporary: int) -> Any:
        sizes = SimpleNamespace(argument_size_in_bytes=4 * GIB, temp_size_in_bytes=temporary, output_size_in_bytes=GIB)
        return SimpleNamespace(memory_analysis=lambda: sizes)

    def device(**stats: int) -> Any:
        return SimpleNamespace(platform="tpu", device_kind="TPU v9", memory_stats=lambda: stats or None)

    devices = [device(bytes_limit=16 * GIB), device()]
    memory.require_room(compiled(10 * GIB), 16_384, devices)
    with pytest.raises(UserError, match=r"needs 18.3 GB .* 4.29 GB of it for parameters, and a TPU v9 has 17.2 GB"):
        memory.require_room(compiled(11 * GIB), 16_384, devices)
    memory.require_room(compiled(99 * GIB), 16_384, devices[1:])  # which does not say what it has


def test_a_run_that_does_not_fit_ends_before_its_first_step(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = write_jsonl(tmp_path / "in.jsonl", [30, 40])
    monkeypatch.setattr(CaptureProgram, "run", lambda *_: pytest.fail("a step began"))
    for free, words in ((10_000, "the parameters take"), (400_000, "besides the parameters")):
        monkeypatch.setattr(memory, "free_bytes", lambda free=free: free)
        with pytest.raises(UserError, match=words):
            run_here(model, tasks, tmp_path / "out", layers_to_extract=(3,))
    assert not list((tmp_path / "out").glob("*.pkl"))
