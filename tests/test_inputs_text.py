"""JSONL and text files: which samples they give, and what a wrong line or file is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jax_extract.errors import UserError
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.sources import Source, open_source
from jax_extract.inputs.text import jsonl_samples, text_samples


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def open_file(path: str | Path | None, **changes: Any) -> Source:
    arguments: dict[str, Any] = {
        "dataset": None,
        "n_tasks": None,
        "n_samples": None,
        "encoder": "digits",
        "seed": 0,
        "split": None,
        "dataset_config": None,
        "text_column": None,
    }
    return open_source(None if path is None else str(path), **{**arguments, **changes})


# JSONL


def test_a_line_gives_its_id_and_text(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "q.jsonl", {"id": "x", "text": "one", "label": 1}, {"id": 7, "text": "two"})
    assert list(jsonl_samples(path)) == [Sample("x", "one", {"line": 1}), Sample("7", "two", {"line": 2})]


def test_a_line_without_an_id_is_named_by_file_and_line_counting_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('\n{"text": "one"}\n  \r\n{"text": "two"}', encoding="utf-8")
    assert [sample.sample_id for sample in jsonl_samples(tmp_path / "q.jsonl")] == ["q:2", "q:4"]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"question": "q", "prompt": "p", "text": "t"}, "t"),
        ({"question": "q", "prompt": "p"}, "p"),
        ({"question": "q", "answer": "a"}, "q"),
    ],
)
def test_the_text_is_the_first_there_is_of_text_prompt_and_question(
    tmp_path: Path, row: dict[str, str], text: str
) -> None:
    assert [sample.text for sample in jsonl_samples(write_lines(tmp_path / "q.jsonl", row))] == [text]


def test_the_text_column_overrides_the_usual_names(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "q.jsonl", {"text": "t", "answer": "a"})
    assert [sample.text for sample in jsonl_samples(path, "answer")] == ["a"]


def test_line_separators_inside_a_text_do_not_cut_it(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b\nc"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [sample.text for sample in jsonl_samples(path)] == ["a\u2028b\nc"]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    (tmp_path / "q.txt").write_bytes(b"\xef\xbb\xbfa\n")
    assert [sample.text for sample in jsonl_samples(tmp_path / "q.jsonl")] == ["a"]
    assert [sample.text for sample in text_samples(tmp_path / "q.txt")] == ["a"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": }', "column 10, is not JSON"),
        (b'["a"]', "a JSON list where an object"),
        (b'{"body": "b", "n": 1}', "has no text, prompt or question, only body, n"),
        (b"{}", "nothing at all"),
        (b'{"text": 5}', r"field 'text', holds 5 \(int\)"),
        (b'{"text": null}', "field 'text', holds None"),
        (b'{"text": "a\\ud800"}', "half a surrogate pair"),
        (b'{"id": "x", "text": "b"}', "repeats the id 'x'"),
        (b'{"id": "q:1", "text": "b"}', "repeats the id 'q:1'"),
        (b'{"id": true, "text": "b"}', "field 'id', holds True"),
        (b'{"id": 1.5, "text": "b"}', r"field 'id', holds 1\.5"),
        (b'{"id": "", "text": "b"}', "empty id"),
        (b'{"text": "\xff"}', "byte 10, is not UTF-8"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
    ],
)
def test_a_wrong_line_is_told_with_its_file_and_number(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"id": "x", "text": "a"}\n' + line + b'\n{"text": "c"}\n')
    samples = jsonl_samples(path)
    assert [next(samples).text, next(samples).text] == ["a", "a"]
    with pytest.raises(UserError, match=rf"q\.jsonl, line 3, .*{problem}"):
        next(samples)


def test_a_text_column_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "q.jsonl", {"text": "a", "n": 1})
    with pytest.raises(UserError, match="has no body, only text, n"):
        next(jsonl_samples(path, "body"))


def test_characters_beyond_the_basic_plane_are_kept(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "q.jsonl", {"text": "\U0001f600"})
    assert [sample.text for sample in jsonl_samples(path)] == ["\U0001f600"]


# Plain text


def test_each_line_that_is_not_blank_is_a_sample_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"  one \r\n\n \t\ntwo")
    samples = list(text_samples(tmp_path / "t.txt"))
    assert samples == [Sample("t:1", "  one ", {"line": 1}), Sample("t:4", "two", {"line": 4})]


def test_text_that_is_not_utf8_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"one\nnai\xefve\n")
    with pytest.raises(UserError, match=r"t\.txt, line 2, byte 3, is not UTF-8"):
        list(text_samples(tmp_path / "t.txt"))


# Through the door


@pytest.mark.parametrize(("name", "kind"), [("q.jsonl", "jsonl"), ("q.txt", "text"), ("Q.TXT", "text")])
def test_the_suffix_chooses_the_reader_and_the_source_starts_anew(tmp_path: Path, name: str, kind: str) -> None:
    path = write_lines(tmp_path / name, {"text": "a"}, {"text": "b"}, {"text": "c"})
    source = open_file(path, n_samples=2)
    assert (source.kind, source.finite, source.name) == (kind, True, str(path))
    assert [sample.meta["line"] for sample in source.samples()] == [1, 2]
    assert list(source.samples()) == list(source.samples())
    assert len(list(open_file(path, n_samples=9).samples())) == 3


def test_just_one_of_the_two_inputs_is_given(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither of them"):
        open_file(None)
    with pytest.raises(UserError, match="both of them"):
        open_file(tmp_path, dataset="name")


def test_a_missing_file_is_told_with_the_place_that_was_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=str(tmp_path / "nothing.jsonl")):
        open_file("nothing.jsonl")


def test_an_unknown_suffix_lists_those_that_are_known(tmp_path: Path) -> None:
    (tmp_path / "q.pkl").write_bytes(b"")
    with pytest.raises(UserError, match=r"ends in '\.pkl': .*\.json, \.jsonl, \.csv, \.tsv, \.parquet or a \.txt"):
        open_file(tmp_path / "q.pkl")


@pytest.mark.parametrize("name", ["q.jsonl", "q.txt"])
def test_an_input_without_a_sample_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n \n", encoding="utf-8")
    with pytest.raises(UserError, match="no sample"):
        open_file(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("q.jsonl", {"n_tasks": 1}),
        ("q.jsonl", {"split": "train"}),
        ("q.jsonl", {"dataset_config": "x"}),
        ("q.jsonl", {"n_samples": 0}),
        ("q.jsonl", {"encoder": "digit"}),
        ("q.jsonl", {"text_column": "body"}),
        ("q.txt", {"n_tasks": 1}),
        ("q.txt", {"text_column": "text"}),
    ],
)
def test_an_argument_without_meaning_for_the_input_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    path = write_lines(tmp_path / name, {"text": "a"})
    with pytest.raises(UserError):
        open_file(path, **changes)
