"""A row does not depend on what it was computed with: batch, slab, padding, left-over samples, mesh.

Guarded: row error at most 1e-5 against one sample at a time on one device, at every hook point of every
layer; and, of the program on 8 and 64 devices, that captures and matrices are sharded, that the work is
not inflated (the model's 7 heads divide no axis), and that nothing but parameters crosses devices.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mesh_worker import POSITIONS
from tiny_models import Rows, random_ids, row_errors, run_rows, text_of, tiny_folder

from jax_extract import extract
from jax_extract.config import ExtractConfig
from jax_extract.extraction.command import extract_to_directory
from jax_extract.store.reader import open_activations
from jax_extract.terminal import Terminal
from models.hooks import GATED

FAMILY = "qwen2"  # hidden 56, 7 heads, 1 key/value head, 100 gate_up rows: not all of it shards on 8
LAYERS = range(4)
ON_DEVICES = 2  # sequences a device
LENGTHS = (1, 40, 7, 1, 23, 61, 2, 33, 16, 1, 90, 48, 17)  # 13: no batch size below divides them
TEXTS = {f"s{i}": text_of(ids) for i, ids in enumerate(random_ids(LENGTHS))}

SHARDED_ON_8 = {"embedding", "blocks/qkv", "blocks/attention_output", "blocks/down"}
MATRICES = SHARDED_ON_8 | {"blocks/gate_up"}


def rows_of(run: Any) -> dict[str, Rows]:
    assert run.sample_ids == list(TEXTS)
    return {name: run_rows(run, name) for name in TEXTS}


def extracted(**options: Any) -> dict[str, Rows]:
    options = {"hook_points": ("*",), "positions": "all", **options}
    return rows_of(extract(str(tiny_folder(FAMILY)), TEXTS, layers=LAYERS, **options))


@pytest.fixture(scope="module")
def alone() -> dict[str, Rows]:
    """One sample at a time on one device."""
    return extracted(batch_size=1)


def assert_same(got: Mapping[str, Rows], alone: Mapping[str, Rows]) -> None:
    assert set(got) == set(alone)
    for name, truth in alone.items():
        assert set(got[name]) == set(truth)
        for site, rows in truth.items():
            assert row_errors(got[name][site], rows).max() <= 1e-5, (name, site)


@pytest.mark.parametrize("batch_size", [2, 4, 8, 13, 32])
def test_rows_do_not_depend_on_the_batch_size_or_on_left_over_samples(batch_size: int, alone: dict[str, Rows]) -> None:
    assert_same(extracted(batch_size=batch_size), alone)


def test_rows_do_not_depend_on_the_explicit_mesh_of_one_device(alone: dict[str, Rows]) -> None:
    assert_same(extracted(batch_size=4, mesh_shape="1,1"), alone)


@pytest.mark.parametrize(("batch_size", "slab_tokens"), [(8, 96), (8, 200), (4, 100_000), (4, 1)])
def test_rows_do_not_depend_on_the_slab_size(
    batch_size: int, slab_tokens: int, alone: dict[str, Rows], tmp_path: Path
) -> None:
    lines = "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in TEXTS.items())
    (tmp_path / "texts.jsonl").write_text(lines)
    config = ExtractConfig(
        model_path=str(tiny_folder(FAMILY)),
        tasks_file=str(tmp_path / "texts.jsonl"),
        layers_to_extract=tuple(LAYERS),
        hook_points=("*",),
        positions="all",
        shard_format="safetensors",
        activations_dir=str(tmp_path / "run"),
        batch_size=batch_size,
        slab_tokens=slab_tokens,
    )
    extract_to_directory(config, Terminal(silent=True))
    assert_same(rows_of(open_activations(tmp_path / "run")), alone)


@pytest.fixture(scope="module", params=[(8, ("8,1", "1,8", "2,4")), (64, ("8,8",))], ids=["8", "64"])
def on_devices(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What a process with so many devices wrote: its folder, and mesh -> facts."""
    devices, meshes = request.param
    out = tmp_path_factory.mktemp(f"devices_{devices}")
    (out / "texts.json").write_text(json.dumps(TEXTS))
    worker = Path(__file__).with_name("mesh_worker.py")
    command = [str(worker), str(tiny_folder(FAMILY)), str(out / "texts.json"), str(out), str(ON_DEVICES), *meshes]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", *command]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4_000:]
    facts = json.loads((out / "facts.json").read_text())
    assert facts.pop("devices") == devices
    assert tuple(facts) == meshes
    return out, facts


def test_rows_are_byte_for_byte_those_of_one_device_on_every_mesh(
    on_devices: tuple[Path, dict[str, Any]], alone: dict[str, Rows]
) -> None:
    out, facts = on_devices
    for positions, hook_points in POSITIONS.items():
        on_one = extracted(batch_size=ON_DEVICES, positions=positions, hook_points=hook_points)
        if positions == "all":
            assert_same(on_one, alone)
        for mesh in facts:
            with np.load(out / f"rows_{mesh.replace(',', 'x')}.npz") as got:
                for name, sites in on_one.items():
                    for (hook, layer), rows in sites.items():
                        key = f"{positions}|{name}|{hook}|{layer}"
                        assert rows.tobytes() == got[key].tobytes(), (mesh, key)


def test_no_two_devices_hold_the_same_captured_rows(on_devices: tuple[Path, dict[str, Any]]) -> None:
    for mesh, facts in on_devices[1].items():
        devices = int(np.prod([int(n) for n in mesh.split(",")]))
        assert set(facts["captures"]) == set(GATED) - {"attention_pattern"}
        for hook, capture in facts["captures"].items():
            assert capture["shards"] == capture["distinct"] == devices, (mesh, hook)
            slots, rows, *rest = capture["whole"]
            assert capture["shapes"] == [[slots, rows // devices, *rest]], (mesh, hook)


def test_matrices_are_stored_sharded_over_the_model_axis_where_it_divides_them(
    on_devices: tuple[Path, dict[str, Any]],
) -> None:
    for mesh, facts in on_devices[1].items():
        size = int(mesh.split(",")[1])
        sharded = {1: set(), 4: MATRICES, 8: SHARDED_ON_8}[size]
        for name, parameter in facts["parameters"].items():
            shrunk = int(np.prod(parameter["whole"])) // int(np.prod(parameter["shard"]))
            assert shrunk == (size if name in sharded else 1), (mesh, name)
        assert set(facts["parameters"]) > MATRICES


def test_devices_together_do_no_more_work_than_one_device_alone(on_devices: tuple[Path, dict[str, Any]]) -> None:
    for mesh, facts in on_devices[1].items():
        assert 0 < facts["flops"] <= 1.05 * facts["flops_of_one_device"], mesh
        assert facts["flops"] >= 0.95 * facts["flops_of_one_device"], f"{mesh}: the figures do not compare"


def test_nothing_but_gathered_parameters_crosses_devices(on_devices: tuple[Path, dict[str, Any]]) -> None:
    for mesh, facts in on_devices[1].items():
        assert facts["collectives"] == ([] if mesh.endswith(",1") else ["all-gather"]), mesh
