"""Means and scales of a site: right, the same to the last bit however rows came and whoever wrote them.

Sums that were stored with parts, and sums made anew by reading rows, are the same numbers; runs of the version before
keep none and give them all the same; rows that are not finite are counted apart.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from small_run import run_cli, run_here, snapshot, write_jsonl
from test_shuffled import _fill

from jax_extract import Run, UserError, open_activations
from jax_extract.store import row_sums
from jax_extract.store.file_part import FilePart
from jax_extract.store.ledger import RUN_FILE, Ledger
from jax_extract.store.parts import Site
from jax_extract.store.row_sums import RowStatistics, RowSums, SummedRows
from jax_extract.store.storage.local import Directory
from jax_extract.store.writer import PartWriter

WIDTH = 4_096  # blocks of 32 rows


def rows_of(count: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    """Rows as a residual stream has them: some dimensions far from zero, the first row a hundred times the others."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((count, WIDTH)) + np.where(np.arange(WIDTH) % 50 == 0, 300.0, 0.0)
    rows[0] *= 100
    return rows.astype(dtype)


def summed(rows: np.ndarray, pieces: Sequence[int] = ()) -> RowSums:
    sums = SummedRows(rows.shape[1], rows.itemsize)
    for piece in np.split(rows, pieces):
        sums.add(piece)
    return sums.sums()


def same(one: RowSums | RowStatistics, other: RowSums | RowStatistics) -> bool:
    pairs = zip(dataclasses.astuple(one), dataclasses.astuple(other), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 1e-12), (np.float16, 1e-6), (ml_dtypes.bfloat16, 1e-6)])
def test_mean_variance_and_norms_are_those_of_the_stored_rows(dtype: Any, bound: float) -> None:
    """Of float32 rows as float64 has them; of 16-bit rows a thousand times finer than their own rounding."""
    rows = rows_of(300, dtype)
    exact = rows.astype(np.longdouble)
    found = RowStatistics.of([summed(rows[:100]), summed(rows[100:])], 300, WIDTH)
    norms = np.sqrt((exact**2).sum(axis=1))
    rms = np.sqrt((exact**2).mean(axis=0))
    assert np.abs((found.mean - exact.mean(axis=0)) / rms).max() <= bound
    assert np.abs((found.variance - exact.var(axis=0)) / rms**2).max() <= bound
    assert np.abs((found.std**2 - found.variance) / rms**2).max() <= 1e-15
    for value, truth in (
        (found.total_variance, exact.var(axis=0).sum()),
        (found.mean_norm, norms.mean()),
        (found.mean_squared_norm, (norms**2).mean()),
        (found.least_norm, norms.min()),
        (found.largest_norm, norms.max()),
    ):
        assert abs(value / truth - 1) <= bound
    assert (found.rows, found.not_finite) == (300, 0)
    assert repr(found) == (
        f"RowStatistics(300 rows of 4096, mean norm {found.mean_norm:.4g}, from {found.least_norm:.4g} to "
        f"{found.largest_norm:.4g})"
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_sums_are_the_same_bits_however_the_rows_were_handed_over(dtype: Any) -> None:
    rows = rows_of(200, dtype)
    whole = summed(rows)
    for pieces in ([1], [31, 32, 33], [64, 64, 199], range(1, 200)):
        assert same(summed(rows, pieces), whole)


def test_rows_that_are_not_finite_are_left_out_and_counted(recwarn: pytest.WarningsRecorder) -> None:
    rows = rows_of(100)
    bad = rows.copy()
    bad[3, 5], bad[40, 0], bad[99] = np.inf, -np.inf, np.nan
    bad.view(np.uint32)[41, 7] = 0x7F800001  # a signalling NaN
    kept = np.delete(rows, [3, 40, 41, 99], axis=0)
    sums = SummedRows(WIDTH, 4)
    sums.add(bad)
    found = RowStatistics.of([sums.sums()], 100, WIDTH)
    assert (found.rows, found.not_finite, sums.not_finite) == (96, 4, 4)
    np.testing.assert_allclose(found.mean, kept.astype(np.float64).mean(axis=0), rtol=1e-12)
    assert found.largest_norm == RowStatistics.of([summed(rows)], 100, WIDTH).largest_norm
    assert "4 more not finite" in repr(found)
    for dtype in (np.float32, ml_dtypes.bfloat16):  # squares beyond float32 are of finite rows all the same
        largest = np.full((2, WIDTH), 1e30, dtype)
        found = RowStatistics.of([summed(largest)], 2, WIDTH)
        assert found.rows == 2
        np.testing.assert_allclose(found.largest_norm, 64 * largest[0, 0].astype(np.float64), rtol=1e-12)
    assert not recwarn


def test_of_no_row_that_is_finite_there_are_no_numbers(recwarn: pytest.WarningsRecorder) -> None:
    for sums, total in (([], 0), ([summed(np.full((3, WIDTH), np.nan, np.float32))], 3)):
        found = RowStatistics.of(sums, total, WIDTH)
        assert (found.rows, found.not_finite) == (0, total)
        assert np.isnan([found.mean_norm, found.least_norm, found.largest_norm, *found.mean, *found.variance]).all()
    assert not recwarn


# -------------------------------------------------------------------------------------------------- of a run

SITES = [Site("after_block", 3, 64), Site("after_block", 7, 64)]
PARTS = [[np.arange(150), np.arange(130)], [np.arange(40)], [np.arange(300)], [np.arange(99), np.arange(200)]]


def write(root: Path, dtype: str = "float32", shard_format: str = "safetensors", keeps_sums: bool = True) -> Path:
    directory = Directory(root)
    directory.make()
    identity = {"sites": [vars(site) for site in SITES], "capture_dtype": dtype}
    description = {"model_name": "m", "hidden_dim": 64, **({"row_sums": True} if keeps_sums else {})}
    ledger = Ledger.start(directory, {"identity": identity, "numerics": {}, "description": description})
    _fill(PartWriter(ledger, SITES, shard_format, dtype, "abc"), SITES, dtype, PARTS)
    return root


def forbidden(*_: Any) -> Any:
    raise AssertionError("rows were read")


@pytest.mark.parametrize(("dtype", "shard_format"), [("float32", "pickle"), ("bfloat16", "npz"), ("float16", "pt")])
def test_stored_sums_are_those_of_the_rows_and_no_row_is_read_for_them(
    tmp_path: Path, dtype: str, shard_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jax_extract.store.writer.FEWEST_ROWS", 1)
    kept = open_activations(write(tmp_path / "kept", dtype, shard_format))
    bare = open_activations(write(tmp_path / "bare", dtype, shard_format, keeps_sums=False))
    for layer in (3, 7):
        made = bare.statistics(layer)
        with monkeypatch.context() as patch:
            patch.setattr(FilePart, "rows", forbidden)
            found = kept.statistics("after_block", layer=layer)
        assert same(found, made)
        rows = kept.get(layer).astype(np.float64)
        np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-12 if dtype == "float32" else 1e-6)
        assert found.rows == sum(len(sample) for part in PARTS for sample in part)
    assert kept.statistics(3) is kept.statistics(layer=3)
    with pytest.raises(UserError, match="no layer 5"):
        kept.statistics(5)


def test_parts_of_few_rows_keep_no_sums_and_are_read(tmp_path: Path) -> None:
    kept, bare = open_activations(write(tmp_path / "a")), open_activations(write(tmp_path / "b", keeps_sums=False))
    assert [isinstance(part, FilePart) and part.sums(SITES[0]) is not None for part in kept.parts] == [
        True,
        False,
        True,
        True,
    ]
    assert same(kept.statistics(3), bare.statistics(3))
    sizes = [(tmp_path / name / "_run/parts/000002_001.safetensors").stat().st_size for name in ("a", "b")]
    assert sizes[0] == sizes[1]


def test_a_run_in_memory_and_a_run_that_is_read_in_pieces_have_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_activations(write(tmp_path / "a", keeps_sums=False))
    whole = run.statistics(3)
    monkeypatch.setattr("jax_extract.store.reader._READ_VALUES", 1_000)
    again = Run(run.metadata, run.sites, run.parts)
    assert same(again.statistics(3), whole)


def test_not_finite_rows_are_recorded_whether_a_run_keeps_sums_or_not(tmp_path: Path) -> None:
    for keeps_sums in (True, False):
        root = write(tmp_path / str(keeps_sums), "float16", keeps_sums=keeps_sums)
        assert sum(record["not_finite_rows"] for record in Ledger.open(Directory(root)).committed().values()) == 0
    assert row_sums.FEWEST_ROWS <= 300


LENGTHS = [300, 17, 290, 5, 260, 44, 31, 299]
OPTIONS: dict[str, Any] = {"layers_to_extract": (3,), "positions": "all", "batch_size": 1, "slab_tokens": 512}


def test_killed_and_resumed_a_run_has_the_numbers_of_an_undisturbed_one(model: Path, tmp_path: Path) -> None:
    tasks = write_jsonl(tmp_path / "t.jsonl", LENGTHS)
    run_here(model, tasks, tmp_path / "whole", **OPTIONS)
    words = ["--model_path", model, "--tasks_file", tasks, "--activations_dir", "run", "--layers_to_extract", 3]
    words += ["--positions", "all", "--batch_size", 1, "--slab_tokens", 512]
    for _ in range(2):
        done = run_cli(*words, cwd=tmp_path, env={"JAX_EXTRACT_FAILPOINT": "part.record:before:3"})
        assert done.returncode < 0
    assert run_cli(*words, cwd=tmp_path).returncode == 0
    whole, resumed = (open_activations(tmp_path / name) for name in ("whole", "run"))
    assert any(isinstance(part, FilePart) and part.sums(whole.sites[0]) is not None for part in whole.parts)
    assert same(whole.statistics(3), resumed.statistics(3))


def test_a_run_that_the_version_before_began_goes_on_without_sums_byte_for_byte(model: Path, tmp_path: Path) -> None:
    tasks = write_jsonl(tmp_path / "t.jsonl", LENGTHS)
    run_here(model, tasks, tmp_path / "run", **OPTIONS)
    new = open_activations(tmp_path / "run").statistics(3)
    path = tmp_path / "run" / RUN_FILE
    began = json.loads(path.read_text())
    del began["description"]["row_sums"]  # as that version wrote it
    path.write_text(json.dumps(began))
    for file in [*(tmp_path / "run").glob("_run/parts/*"), *(tmp_path / "run").glob("_run/commits/*")]:
        file.unlink()
    run_here(model, tasks, tmp_path / "run", **OPTIONS)
    sidecars = snapshot(tmp_path / "run/_run/parts")
    assert len(sidecars) == len(open_activations(tmp_path / "run").parts)
    assert not [name for name, data in sidecars.items() if b"sum_rows" in data]
    assert same(open_activations(tmp_path / "run").statistics(3), new)
