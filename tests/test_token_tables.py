"""Tables of tokens hold no object a sample, and give back what they were made of.

Guarded: the hash of what was given; ids that repeat; columns; windows and contexts cut from tables; the bytes that a
sample takes.
"""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_extract.errors import UserError
from jax_extract.inputs import text
from jax_extract.inputs.columns import Chained, Records, Texts, joined, json_column
from jax_extract.inputs.contexts import ContextCounts, ContextForm, join
from jax_extract.inputs.fields import Fields
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.token_table import TokenizedSample, TokenTable, windows_of
from jax_extract.inputs.tokenize import tokenized_tables
from jax_extract.inputs.tokenizing.counts import InputCounts
from jax_extract.inputs.tokenizing.names import Names
from jax_extract.inputs.wrapping import Wrapping


def test_the_hash_of_a_dataset_is_of_its_samples_and_not_of_chunks() -> None:
    def hashed(samples: Sequence[tuple[str, str]], cut: int) -> str:
        counts = InputCounts(chained=False)
        for at in range(0, len(samples), cut):
            names, texts = zip(*samples[at : at + cut], strict=True)
            ones = np.ones(len(names), np.int64)
            counts.add_samples(ones, ones, names, texts)
        return counts.dataset_hash

    samples = [("a", "xé"), ("b", ""), ("c", "\ud800")]
    assert hashed(samples, 1) == hashed(samples, 2) == hashed(samples, 3)
    others = [samples[:2], samples[::-1], [("ax", "é"), *samples[1:]], [("a", "x"), ("éb", ""), samples[2]]]
    assert len({hashed(other, 3) for other in [samples, *others]}) == 5
    assert "chained" not in InputCounts(chained=False).as_json()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.text(st.sampled_from("aé\ud800🙂"), max_size=2), max_size=6), max_size=6))
def test_an_id_that_was_there_is_found(chunks: list[list[str]]) -> None:
    names, seen = Names(), set()
    for chunk in chunks:
        repeated = next((i for i, name in enumerate(chunk) if name in seen or name in chunk[:i]), None)
        assert names.first_repeated(chunk) == repeated
        seen |= set(chunk)


@pytest.mark.parametrize(("again", "said"), [(5, "line 6, repeats"), (9, "in.jsonl repeats"), (12, "in.jsonl repeats")])
def test_a_row_that_repeats_an_id_is_found_however_long_ago_that_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: int, said: str
) -> None:
    monkeypatch.setattr(text, "_RECENT", 4)
    ids = [f"row-{i}" for i in range(13)]
    ids[again] = ids[again - 1] if again == 5 else "row-1"
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"id": name, "text": "a"}) + "\n" for name in ids))
    with pytest.raises(UserError, match=said):
        list(text.row_samples(tmp_path / "in.jsonl", Fields()))


rows = st.one_of(
    st.builds(lambda line: {"line": line}, st.integers(-5, 5)),
    st.builds(lambda row: {"dataset": "é", "row": row}, st.integers(0, 5)),
    st.sampled_from(
        [{}, {"line": True}, {"line": "1"}, {"line": 1 << 70}, {"a": [1, None]}, {"row": 1, "dataset": "é"}]
    ),
)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(rows, max_size=4), max_size=4), st.data())
def test_columns_give_back_what_they_were_made_of(parts: list[list[dict[str, Any]]], data: st.DataObject) -> None:
    whole = [row for part in parts for row in part]
    said = [json.dumps(row) if row else "" for row in whole]
    columns = [json_column(part) for part in parts]
    for column in (joined(columns), Chained(columns), Texts.of(said), json_column(whole)):
        assert list(column) == said and len(column) == len(said)
        first = data.draw(st.integers(0, len(said)))
        last = data.draw(st.integers(first, len(said)))
        assert list(column[first:last]) == said[first:last]
        assert list(joined([column[:first], column[first:]])) == said
        with pytest.raises(IndexError):
            column[len(said)]


def test_rows_that_are_alike_are_numbers_alone() -> None:
    column = joined([json_column([{"dataset": "x", "row": i} for i in range(n)]) for n in (5, 7)])
    assert isinstance(column, Records) and column[11] == '{"dataset": "x", "row": 6}'
    assert sum(value.nbytes for value in column.values if not isinstance(value, str)) == 12 * 8


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 7), max_size=6), st.integers(1, 5))
def test_windows_are_cut_from_tables_and_the_last_is_known(sizes: list[int], most: int) -> None:
    samples = [TokenizedSample(i, f"s{i}", np.full(i % 3 + 1, i, np.int32), 9, {"line": i}) for i in range(sum(sizes))]
    ends = list(itertools.accumulate(sizes))
    tables = [TokenTable.of(samples[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
    windows = list(windows_of(iter(tables), most))
    assert [len(table) for table, _ in windows] == [min(most, len(samples) - at) for at in range(0, len(samples), most)]
    assert [is_last for _, is_last in windows] == [False] * (len(windows) - 1) + [True] * bool(windows)
    back = [sample for table, _ in windows for sample in table]
    for sample, own in zip(back, samples, strict=True):
        assert (sample.sample_index, sample.sample_id, sample.meta) == (own.sample_index, own.sample_id, own.meta)
        assert sample.full_length == 9 and sample.token_ids.tolist() == own.token_ids.tolist()


def test_contexts_are_cut_into_windows_with_their_pieces() -> None:
    documents = [TokenizedSample(i, f"d{i}", np.arange(i % 5 + 1, dtype=np.int32), 9, {"row": i}) for i in range(40)]

    def contexts(cut: int) -> Iterator[TokenTable]:
        tables = (TokenTable.of(documents[at : at + cut]) for at in range(0, 40, cut))
        return join(tables, ContextForm(7, 99, 98), ContextCounts(), InputCounts())

    expected = [(c.sample_id, c.token_ids.tolist(), c.meta) for table in contexts(40) for c in table]
    windows = [table for table, _ in windows_of(contexts(3), 4)]
    assert [(c.sample_id, c.token_ids.tolist(), c.meta) for table in windows for c in table] == expected
    assert expected[1][2]["pieces"][0] == {"document": "d2", "first": 1, "tokens": 2, "at": 1, "meta": {"row": 2}}


def test_a_plain_row_takes_few_bytes_beside_its_tokens() -> None:
    def constant(texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[7] * 12 if text else [] for text in texts]}

    count = 20_000
    samples = (Sample(f"lines:{i}", "text", {"line": i}) for i in range(count))
    tracemalloc.start()
    try:
        tables = tokenized_tables(samples, constant, 100, Wrapping(), InputCounts(chained=False))
        windows = [table for table, _ in windows_of(tables, 8_192)]
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(map(len, windows)) == count
    assert held / count < 4 * 12 + 75, held / count
    assert peak - held < 12_000_000, "what is under way does not grow with the input"
