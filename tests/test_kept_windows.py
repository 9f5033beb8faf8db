"""Windows that a run keeps for the next session, and the fingerprint that says whether they are its input's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import snapshot, write_arc, write_jsonl

from jax_extract import UserError
from jax_extract.config import ExtractConfig
from jax_extract.extraction.kept_windows import KeptWindow, Planned, keep, kept_windows
from jax_extract.extraction.named_source import source_named
from jax_extract.inputs.contexts import ContextCounts, ContextForm, KnownContexts, join
from jax_extract.inputs.fingerprint import fingerprint
from jax_extract.inputs.planning.slabs import PlanSettings
from jax_extract.inputs.planning.windows import WindowPlanner
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.sources import open_source
from jax_extract.inputs.token_table import TokenizedSample, TokenTable
from jax_extract.inputs.tokenize import InputCounts, tokenized_tables
from jax_extract.inputs.wrapping import Wrapping
from jax_extract.store import token_files
from jax_extract.store.ledger import Ledger
from jax_extract.store.storage.local import Directory
from models.positions import Positions

SETTINGS = PlanSettings(4, 2, 128, 16, 64, Positions.parse("last"), 128, version=2)


# ------------------------------------------------------------------------------------------- files of windows


def samples(count: int, first: int = 0) -> list[TokenizedSample]:
    draw = np.random.default_rng(first)
    return [
        TokenizedSample(
            first + i, f"s{first + i} \ud800é", draw.integers(0, 99, 5 + 7 * i % 50, dtype=np.int32), 70, {"line": i}
        )
        for i in range(count)
    ]


def described(sample: TokenizedSample) -> tuple[Any, ...]:
    return sample.sample_index, sample.sample_id, sample.token_ids.tolist(), sample.full_length, sample.meta


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.start(Directory(tmp_path), {"identity": {}, "numerics": {}, "description": {}})


@pytest.fixture
def planned(ledger: Ledger) -> list[Planned]:
    """Two windows, which are kept."""
    planner = WindowPlanner(SETTINGS)
    tables = [TokenTable.of(samples(9)), TokenTable.of(samples(7, 9))]
    counts = InputCounts(samples=16, first_empty_samples=["x"], chained=False)
    windows = [Planned.now(planner.window(table, number == 1), counts) for number, table in enumerate(tables)]
    for window in windows:
        keep(ledger, window, "0a")
    return windows


def test_a_window_that_is_kept_is_the_same_and_its_tokens_wait(
    ledger: Ledger, planned: list[Planned], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    array = token_files.TokenFile.array
    monkeypatch.setattr(token_files.TokenFile, "array", lambda self, name: read.append(name) or array(self, name))
    found, *wrong = kept_windows(ledger, ())
    assert (len(found), wrong) == (2, ["", ""])
    planner = WindowPlanner(SETTINGS)
    for kept, (window, counts) in zip(found, planned, strict=True):
        there = kept.planned(planner, InputCounts())
        assert there
        assert there.counts == counts
        assert there.window.digest == window.digest
        assert [part.digest for part in there.window.parts] == [part.digest for part in window.parts]
        assert "token_ids" not in read
        table, before = there.window.arrangement.table, window.arrangement.table
        assert list(map(described, table)) == list(map(described, before))
        assert np.array_equal(table.token_ids, before.token_ids)
        assert table.token_ids.base is not None, "mapped, not read"
        read.clear()
    passing = WindowPlanner(SETTINGS)
    assert found[0].planned(passing, InputCounts())
    found[1].pass_over(passing)
    more = TokenTable.of(samples(5, 16))
    assert passing.window(more, True).digest == planner.window(more, True).digest
    other = WindowPlanner(replace(SETTINGS, rows=1))
    assert found[0].planned(other, InputCounts()) is None, "laid out otherwise"


def test_files_of_others_and_damaged_ones_are_no_windows(ledger: Ledger, planned: list[Planned]) -> None:
    path = Path(ledger.storage.where(token_files.file_name(0)))
    whole = path.read_bytes()
    assert token_files.TokenFile.open(ledger, 2) is None
    assert token_files.TokenFile.open(Ledger(ledger.storage, {**ledger.run, "run_id": "0" * 32}), 0) is None
    header = 8 + int.from_bytes(whole[:8], "little")
    assert header % 8 == 0
    for wrong in (b"", b"\xff" * 20, whole[: header - 9], whole[:-1]):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match=r"000000\.safetensors is damaged .* give the same command again"):
            KeptWindow.open(ledger, 0, is_done=False)
    for place in range(header, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(UserError, match="damaged"):
            kept = KeptWindow.open(ledger, 0, is_done=False)
            assert kept
            _ = kept.table.token_ids
    path.write_bytes(whole)
    assert kept_windows(ledger, ())[1:] == ("", "")
    path.write_bytes(whole[:100])
    found, name, damaged = kept_windows(ledger, ())
    assert (found, name) == ([], token_files.file_name(0))
    assert "000000.safetensors is damaged" in damaged


def test_a_window_is_kept_once(ledger: Ledger, planned: list[Planned]) -> None:
    before = snapshot(Path(str(ledger.storage)))
    token_files.write(ledger, 0, {"offsets": np.zeros(1, np.int64)}, {}, "0b")
    assert snapshot(Path(str(ledger.storage))) == before


@pytest.mark.parametrize("known", [1, 2, 3, 5, 8])
def test_contexts_go_on_where_others_end(known: int) -> None:
    form = ContextForm(8, start=7, separator=8)
    lengths = [3, 7, 1, 1, 30, 2, 0, 5, 8]  # contexts end within documents, at their ends, and with a separator
    given = [Sample(f"d{i}", "x", token_ids=tuple(range(20, 20 + n))) for i, n in enumerate(lengths)]

    def made(known: KnownContexts | None) -> tuple[list[Any], Any]:
        counts, read = ContextCounts(chained=False), InputCounts(chained=False)
        tables = tokenized_tables(given, None, 99, Wrapping(), read, known=known and known.documents)
        return [s for table in join(tables, form, counts, read, known) for s in map(described, table)], counts

    whole, counts = made(None)
    tokens = (np.array(sample[2], np.int32) for sample in whole)
    table = TokenTable.of(TokenizedSample(s[0], s[1], ids, s[3], s[4]) for s, ids in zip(whole, tokens, strict=True))
    there = KnownContexts([table.between(0, known - 1), table.between(known - 1, known)][known == 1 :])
    assert made(there) == (whole[known:], counts)


# ------------------------------------------------------------------------------------------- fingerprints


def test_a_fingerprint_is_of_bytes_names_and_options(tmp_path: Path) -> None:
    path, folder = write_jsonl(tmp_path / "a.jsonl", [3, 4]), tmp_path / "arc"
    (folder / "sub").mkdir(parents=True)

    def of(tasks_file: Path, **changes: Any) -> str | None:
        options: dict[str, Any] = dict.fromkeys(
            ["n_tasks", "n_samples", "split", "dataset_config", "text_column", "id_column"]
        )
        source = open_source(str(tasks_file), None, **{**options, "encoder": "digits", "seed": 0, **changes})
        return source.fingerprint()

    first = of(path)
    assert first == of(path)
    assert str(first).startswith("sha256:")
    assert len({first, of(path, n_samples=1), of(path, text_column="text"), of(path, id_column="id")}) == 4
    config = ExtractConfig(tasks_file=str(path))
    assert source_named(config).fingerprint() == first
    assert source_named(replace(config, max_new_tokens=9)).fingerprint() not in (None, first), "prompts are shorter"
    path.write_text(path.read_text() + "\n")
    assert of(path) != first
    task = folder / "sub" / "x.json"
    task.write_text(json.dumps(json.loads(write_arc(tmp_path / "arc.json", 1).read_text())["task000"]))
    said = {of(folder), of(folder, seed=1), of(folder, n_samples=2), of(folder, encoder="spaced")}
    assert len(said) == 4
    task.rename(folder / "sub" / "y.json")
    assert of(folder) not in said, "the id of a task is the name of its file"


def test_a_fingerprint_is_not_made_of_what_may_change(tmp_path: Path) -> None:
    commit = "hf://datasets/owner/name@" + "0" * 40 + "/data/x.parquet"
    assert fingerprint({}, [commit]) != fingerprint({}, [commit.replace("x", "y")])
    assert fingerprint({}, [commit.replace("@" + "0" * 40, "@main")]) is None
    assert fingerprint({}, None) is fingerprint({}, [tmp_path / "gone"]) is None
    path = write_jsonl(tmp_path / "a.jsonl", [30])
    assert fingerprint({}, [path], most=10) is None
    assert fingerprint({}, [path], most=1_000) == fingerprint({}, [path])


def test_what_was_counted_counts_when_the_input_ends(ledger: Ledger) -> None:
    plan = {"window": 0, "last": False, "digest": "a", "parts": [], "input": {"samples": 8}}
    last = {"window": 1, "last": True, "digest": "b", "parts": [], "input": {"samples": 9}}
    ledger.keep_plan(0, plan)
    ledger.keep_plan(1, last)
    ledger.keep_plan(0, {**plan, "input": {"samples": 6}})  # read less far ahead
    assert ledger.holds_plan(0, "a", {"samples": 6})
    assert ledger.holds_plan(1, "b", {"samples": 9})
    assert not ledger.holds_plan(1, "b", {"samples": 6})
    for changed in ({**last, "input": {"samples": 6}}, {**plan, "digest": "c", "input": {"samples": 6}}):
        with pytest.raises(UserError, match="other inputs"):
            ledger.keep_plan(changed["window"], changed)
