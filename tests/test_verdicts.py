"""What `verify` says of rows with infinite or undefined values: how many, where, and not vouched for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from small_run import make_model, random_weights, whole_lines, write_weights

from jax_extract.config import ExtractConfig
from jax_extract.extraction.command import extract_to_directory
from jax_extract.store.finite import NotFiniteRows
from jax_extract.store.metadata import VERIFICATION_FILE
from jax_extract.store.parts import Site
from jax_extract.terminal import Terminal
from jax_extract.verification import reference
from jax_extract.verification.command import verify
from jax_extract.verification.reference import SiteErrors

LOUD = "Z"  # a letter whose embedding is beyond float16
TEXTS = {"quiet": "one two three", "loud": f"a{LOUD}b{LOUD}c", "loud too": f"four {LOUD}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and texts of which some have letters that overflow float16."""
    folder = tmp_path_factory.mktemp("verdicts")
    make_model(folder / "model", layers=2)
    weights = random_weights(2)
    letter = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()).index(LOUD)
    weights["model.embed_tokens.weight"][letter, :3] = (70_000, -80_000, 65_520)
    write_weights(folder / "model", weights)
    lines = (json.dumps({"id": key, "text": text}) for key, text in TEXTS.items())
    (folder / "in.jsonl").write_text("\n".join(lines))
    return folder


def run(folder: Path, directory: Path, capture_dtype: Any, positions: str = "all") -> dict[str, Any]:
    config = ExtractConfig(
        model_path=str(folder / "model"),
        tasks_file=str(folder / "in.jsonl"),
        activations_dir=str(directory),
        hook_points=("embeddings", "residual_before"),  # no block need be compiled for these
        layers_to_extract=(0,),
        positions=positions,
        capture_dtype=capture_dtype,
    )
    return extract_to_directory(config)


@pytest.fixture
def own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "torch_is_installed", lambda: False)


@pytest.mark.usefixtures("own_forward")
def test_rows_that_overflowed_are_counted_named_and_not_vouched_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, tmp_path / "a", "float16")["not_finite_rows"] == 6
    warning = next(line for line in whole_lines(capsys.readouterr().out).splitlines() if line.startswith("warning"))
    assert "6 rows hold infinite" in warning and "--capture_dtype bfloat16" in warning
    verdict = verify(str(tmp_path / "a"), samples=3)
    out = capsys.readouterr().out
    assert (verdict.verdict, verdict.exit_status, verdict.damaged) == ("not finite", 1, [])
    assert all(site.ok for site in verdict.sites), "an infinity that the dtype makes of the truth is no error"
    assert [(found.hook, found.layer) for found in verdict.not_finite] == [("embeddings", None), ("residual_before", 0)]
    for found in verdict.not_finite:
        assert (found.rows, found.infinite, found.undefined, found.samples) == (3, 9, 0, 2)
        assert sorted(found.first_samples) == ["loud", "loud too"]
    whole = whole_lines(out)
    assert "residual_before of layer 0: 3 rows with 9 infinite values, of " in whole and "'loud too'" in whole
    assert "--capture_dtype bfloat16 or float32" in whole
    table = [line for line in out.splitlines() if line.strip().startswith(("embeddings  ", "residual_before  "))]
    assert [line.partition("ok")[2] for line in table] == [", but 3 rows NOT FINITE"] * 2
    assert whole.splitlines()[-1].startswith("verdict  not finite: 6 rows with infinite or undefined values")
    said = json.loads((tmp_path / "a" / VERIFICATION_FILE).read_text())
    assert said["not_finite"][0]["rows"] == 3 and said["verdict"] == "not finite"


@pytest.mark.usefixtures("own_forward")
def test_the_dtype_that_the_mend_names_holds_the_same_rows(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "a", "bfloat16")["not_finite_rows"] == 0
    verdict = verify(str(tmp_path / "a"), samples=3, terminal=Terminal(silent=True))
    assert (verdict.verdict, verdict.exit_status, list(verdict.not_finite)) == ("verified", 0, [])


@pytest.mark.usefixtures("own_forward")
def test_samples_that_are_not_computed_again_are_looked_at_too(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "a", "float16", "last")
    verdict = verify(str(tmp_path / "a"), samples=2, terminal=Terminal(silent=True))
    assert {sample["sample_id"] for sample in verdict.samples} == {"quiet", "loud"}
    assert verdict.not_finite[0].first_samples == ["loud too"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_rows_are_found_however_their_bytes_arrive(dtype: Any) -> None:
    random = np.random.default_rng(0)
    width = 7
    rows = random.normal(size=(60, width)).astype(dtype)
    bad = {3: np.inf, 4: np.nan, 20: -np.inf, 59: np.nan}
    for row, value in bad.items():
        rows[row, row % width] = value
    rows[4, :2] = np.inf
    data = memoryview(rows.tobytes())
    for _ in range(20):
        watch, at = NotFiniteRows(width, np.dtype(dtype)), 0
        while at < len(data):
            size = int(random.integers(0, 90))
            watch.add(data[at : at + size])
            at += size
        assert watch.rows.tolist() == sorted(bad)
        assert (watch.infinite, watch.undefined) == (4, 2)


def test_a_peer_that_overflows_does_not_let_everything_pass() -> None:
    truth = np.array([[100.0, 1.0], [1.0, 1.0]])
    wrong = np.array([[1.0, 100.0], [1.0, 1.0]], np.float16)
    overflowed = np.array([[1e6, 1.0], [1.0, 1.0]])
    errors = SiteErrors()
    errors.add(wrong, truth, overflowed)
    verdict = errors.verdict(Site("after_block", 0, 2), "bfloat16")
    assert verdict.bound == 1e-5 and verdict.median_bound == 1e-5 and verdict.ok is False


def test_an_infinity_or_nothing_where_the_truth_is_a_number_is_out_of_bounds() -> None:
    truth = np.array([[60_000.0, 1.0], [60_000.0, 1.0], [60_000.0, 1.0]])
    for value in (np.inf, -np.inf, np.nan):
        errors = SiteErrors()
        errors.add(np.array([[60_000, 1], [value, 1], [60_000, 1]], np.float16), truth, None)
        assert errors.verdict(Site("after_block", 0, 2), "float32").ok is False
