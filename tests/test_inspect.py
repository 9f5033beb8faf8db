"""`jax-extract inspect` says of the rows what NumPy says of them, in lines that a terminal holds.

Guarded: mean, median, p1 and p99 of the norms, the root mean square, the first tokens' share, where a run holds first
tokens and nowhere else; rows that are not finite; quantiles of more rows than are kept; 80 and 100 columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import make_model, run_here, write_jsonl

from jax_extract.cli import main
from jax_extract.store.reader import open_activations
from jax_extract.upkeep import quantiles
from jax_extract.upkeep.inspect import SiteStatistics, statistics
from jax_extract.upkeep.quantiles import Quantiles

LENGTHS = [33, 60, 2, 21, 35, 50, 1]
HOOKS = ("embeddings", "ffn_gate", "after_attention", "after_block")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), layers=4)


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tasks = write_jsonl(folder / "texts.jsonl", LENGTHS)
    options: dict[str, Any] = {"positions": "all", "hook_points": HOOKS, "batch_size": 4, "layers_to_extract": (1, 3)}
    run_here(model, tasks, folder / "a", **options)
    return folder / "a"


def table(out: str) -> dict[tuple[str, int | None], list[str]]:
    """(hook point, layer) -> the cells behind them, bars left out."""
    found: dict[tuple[str, int | None], list[str]] = {}
    for line in out.partition("hook point")[2].splitlines()[1:]:
        hook, *cells = line.rstrip(" ▏▎▍▌▋▊▉█").split()
        found[hook, None if hook == "embeddings" else int(cells.pop(0))] = cells
    return found


def test_every_number_is_what_numpy_says_of_the_rows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run)]) == 0
    told = table(capsys.readouterr().out)
    opened = open_activations(run)
    assert set(told) == {site.key for site in opened.sites} and len(told) == 7
    for site in opened.sites:
        samples = [sample.get(site.layer, site.hook).astype(np.float64) for sample in opened.samples()]
        rows = np.concatenate(samples)
        norms, first = np.linalg.norm(rows, axis=1), np.array([sample[0] for sample in samples])
        expected = [norms.mean(), *np.quantile(norms, [0.5, 0.01, 0.99]), np.sqrt(np.square(rows).mean())]
        width, *numbers, share = told[site.key]
        assert int(width) == site.width
        np.testing.assert_allclose([float(n.replace(",", "")) for n in numbers], expected, rtol=6e-4)
        assert share == f"{np.square(first).sum() / np.square(rows).sum():.1%}"


@pytest.mark.parametrize(
    ("positions", "share"),
    [("all", True), ("at:0,5", True), ("from:1", False), ("last", False)],
)
def test_the_first_tokens_share_is_told_of_runs_that_hold_first_tokens_alone(
    positions: str, share: bool, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = write_jsonl(tmp_path / "texts.jsonl", LENGTHS)
    run_here(model, tasks, tmp_path / "a", positions=positions, layers_to_extract=(1,))
    assert main(["inspect", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert ("token\n" in out, len(table(out)["after_block", 1])) == (share, 7 if share else 6)


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_no_line_is_wider_than_the_terminal_or_100_columns(
    columns: int, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(run.parent)
    assert main(["inspect", "a"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= min(columns, 100)
    assert any("█" in line for line in lines) == (columns > 80)
    heading = next(line for line in lines if "median" in line)
    of_sites = [
        line.rstrip(" ▏▎▍▌▋▊▉█") for line in lines if line.split()[:1] and line.split()[0] in HOOKS and "%" in line
    ]
    assert {len(line) for line in of_sites} == {len(heading)}, "columns are aligned"


def test_rows_that_are_not_finite_are_told_and_left_out() -> None:
    rows = np.ones((5, 4), np.float32)
    rows[1, 2], rows[3, 0] = np.inf, np.nan
    found = statistics([(rows[:2], np.array([0, 1])), (rows[2:], np.array([0, 1, 2]))])
    assert (found.rows, found.not_finite, found.mean_norm, found.rms) == (5, 2, 2.0, 1.0)
    assert found.norms.at([0.01, 0.99]) == [2.0, 2.0]
    assert found.first_share == pytest.approx(2 / 3)


def test_nothing_is_told_of_no_rows() -> None:
    found = SiteStatistics()
    assert (found.mean_norm, found.rms, found.first_share, found.norms.at([0.5, 0.99])) == (0, 0, 0, [0, 0])


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_quantiles_of_more_than_is_kept_are_near_and_take_bounded_memory(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantiles, "EXACT", 1_000)
    random = np.random.default_rng(0)
    numbers = np.concatenate([random.lognormal(5, 0.3, 99_000), random.lognormal(10, 0.1, 1_000)]) * scale
    random.shuffle(numbers)
    found = Quantiles()
    for some in np.array_split(numbers, 300):
        found.add(some)
        assert sum(map(len, found._kept)) <= 1_000
    shares = [0.0, 0.01, 0.5, 0.985, 0.995, 1.0]
    np.testing.assert_allclose(found.at(shares), np.quantile(numbers, shares), rtol=1e-3)
    found.add(np.zeros(len(numbers)))
    assert found.at([0.25]) == [0.0]
