"""Cells are what the file says: CSV and JSON character for character, compressed files, fields within fields."""

from __future__ import annotations

import bz2
import csv
import gc
import gzip
import json
import lzma
import warnings
import zipfile
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest

from jax_extract.errors import UserError
from jax_extract.inputs import files
from jax_extract.inputs.hub import _tables, open_dataset
from jax_extract.inputs.rows import json_values
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.sources import Source, open_source
from jax_extract.inputs.text import jsonl_samples

# What readers that guess types change: numbers, missing values, truths, dates, white space, quotes, line ends.
CELLS = [
    *("007", "0010", "42", "3.10", "1e5", "-0", "12345678901234567890123", "0x1F", "1_000", "Infinity"),
    *("null", "NA", "N/A", "nan", "None", "True", "false", "yes", "<NA>", "#N/A"),
    *("2024-01-05", "2024-01-05T00:00:00Z", "10:30", "01/02/03", "1 day"),
    *(" padded ", "tab\tin", 'a "quoted" word', "'", "a,b;c", "two\nlines", "cr\r\nlf", "U+2028 \u2028", "naïve 😀"),
]


def open_file(path: Path, **changes: Any) -> Source:
    arguments: dict[str, Any] = dict.fromkeys(("n_tasks", "n_samples", "split", "dataset_config", "text_column"))
    return open_source(str(path), None, **{**arguments, "encoder": "digits", "seed": 0, **changes})


def samples(path: Path, through: str = "file", **changes: Any) -> list[Sample]:
    if through == "file":
        return list(open_file(path, **changes).samples())
    text_column, id_column = changes.get("text_column"), changes.get("id_column")
    return list(open_dataset(str(path), None, None, text_column, id_column=id_column)())


def pairs(*arguments: Any, **changes: Any) -> list[tuple[str, str]]:
    return [(sample.sample_id, sample.text) for sample in samples(*arguments, **changes)]


def write_csv(path: Path, rows: list[tuple[str, ...]], **dialect: Any) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, **dialect).writerows(rows)
    return path


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def compress(path: Path, content: bytes) -> Path:
    if path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(content)
    else:
        path.write_bytes({".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[path.suffix](content))
    return path


# Character for character


@pytest.mark.parametrize("through", ["file", "dataset", "folder"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
def test_ids_and_texts_are_what_the_file_says(tmp_path: Path, kind: str, through: str) -> None:
    path = tmp_path / f"train.{kind}"
    expected = [(cell, cell[::-1]) for cell in CELLS]
    rows = [{"id": name, "text": text} for name, text in expected]
    if kind == "jsonl":
        write_lines(path, *rows)
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        write_csv(path, [("id", "text"), *expected], delimiter="\t" if kind == "tsv" else ",")
    assert pairs(tmp_path if through == "folder" else path, "file" if through == "file" else "dataset") == expected


def test_a_list_that_is_called_jsonl_is_read_as_one(tmp_path: Path) -> None:
    for name in ("q.jsonl", "q.jsonl.gz"):
        content = b'[{"id": "007",\n"text": "3.10"}]'
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        for through in ("file", "dataset"):
            assert pairs(tmp_path / name, through) == [("007", "3.10")]


def test_an_empty_text_is_empty_and_an_empty_id_is_refused(tmp_path: Path) -> None:
    assert pairs(write_csv(tmp_path / "t.csv", [("id", "text"), ("a", "")])) == [("a", "")]
    with pytest.raises(UserError, match="line 2, has an empty id"):
        open_file(write_csv(tmp_path / "i.csv", [("id", "text"), ("", "x")]))


def test_a_number_in_json_is_an_id_but_no_text(tmp_path: Path) -> None:
    number = 12345678901234567890123
    assert pairs(write_lines(tmp_path / "i.jsonl", {"id": number, "text": "a"})) == [(str(number), "a")]
    for through in ("file", "dataset"):
        with pytest.raises(UserError, match=r"line 1, field 'text', holds 42 \(int\) where a string is expected"):
            samples(write_lines(tmp_path / "n.jsonl", {"text": 42}), through)


def test_a_dataset_that_says_how_its_csv_is_written_is_read_so_and_still_as_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: semicolons\n  data_files: a.csv\n  sep: ';'\n"
        "- config_name: nameless\n  data_files: b.csv\n  sep: '|'\n  names: ['id', 'text']\n"
        "dataset_info:\n- config_name: semicolons\n  features:\n  - name: id\n    dtype: int64\n"
        "  - name: text\n    dtype: string\n---\n",
        encoding="utf-8",
    )
    (tmp_path / "a.csv").write_text("id;text\n007;null\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text("007|null\n008|42\n", encoding="utf-8")
    with warnings.catch_warnings():
        # `datasets` 5.2 never closes a CSV file; collected here, it cannot fail a later test.
        warnings.simplefilter("ignore", ResourceWarning)
        for config, expected in (("semicolons", [("007", "null")]), ("nameless", [("007", "null"), ("008", "42")])):
            rows = open_dataset(str(tmp_path), config, None, None)()
            assert [(sample.sample_id, sample.text) for sample in rows] == expected
        gc.collect()


def test_files_in_an_archive_are_read_exactly_too(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("a.csv", "id,text\n007,null\n")
    assert pairs(tmp_path, "dataset") == [("007", "null")]


def test_a_folder_called_like_a_format_is_that_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "csv").mkdir()
    write_csv(tmp_path / "csv" / "a.csv", [("text",), ("inside",)])
    write_csv(tmp_path / "b.csv", [("text",), ("outside",)])
    monkeypatch.chdir(tmp_path)
    assert pairs(Path("csv"), "dataset") == [("csv:train:0", "inside")]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'id,text\na,"x\n', "line 2, is not CSV"),
        (b'id,text\na,"x"y\n', "line 2, is not CSV"),
        (b"id,text\na,b,c\n", "line 2, has 3 fields and the first line names 2; quote commas"),
        (b"id,text,text\na,b,c\n", "names the column 'text' more than once"),
        (b"id,text\na\n", "line 2, has no text, prompt or question, only id"),
        (b"id;text\na;b\n", "has no text, prompt or question, only id;text"),
        (b"id,text\na,na\xefve\n", "line 2, byte 4, is not UTF-8"),
        (b"id,text\nx,a\nx,b\n", "line 3, repeats the id 'x'"),
        (b"id,text\n", "holds no sample"),
    ],
)
def test_a_wrong_csv_line_is_told_with_its_number(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(UserError, match=problem):
        samples(tmp_path / "t.csv")


def test_blank_lines_of_a_csv_are_no_rows_and_empty_cells_are(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('id,text,more\n \na,"\n\n",\n\t\nb,c\nd,,,\n', encoding="utf-8")
    assert pairs(tmp_path / "t.csv") == [("a", "\n\n"), ("b", "c"), ("d", "")]


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(
        b"\xef\xbb\xbf,id,text\r\n0,007,a\r\n\r\n1,008\r\n2,009,c\r\n".replace(b"1,008", b"1,008,")
    )
    assert pairs(tmp_path / "t.csv") == [("007", "a"), ("008", ""), ("009", "c")]
    (tmp_path / "n.csv").write_bytes(b'text\r\n"a\r\nb"\r\nc\r\n')
    assert pairs(tmp_path / "n.csv") == [("n:2", "a\r\nb"), ("n:4", "c")]


def test_a_json_file_is_read_a_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax_extract.inputs.rows._PIECE", 3)
    path = tmp_path / "t.json"
    path.write_text('\ufeff [ {"text": "é😀"} ,\n {"text": "b,]"}\n]\n', encoding="utf-8")
    assert pairs(path) == [("t:1", "é😀"), ("t:2", "b,]")]
    for content, problem in (
        ('[{"text": "a"}\n{"text": "b"}]', "line 2, is not JSON: expected ',' or ']'"),
        ('[{"text": "a"},\n', "the list does not end"),
        ('[{"text": "a"}] {}', "more follows its end"),
        ('[{"text": "a"},\n{"text": }]', "line 2, column 10, is not JSON"),
    ):
        path.write_text(content, encoding="utf-8")
        with path.open("rb") as file, pytest.raises(UserError, match=problem):
            list(json_values(str(path), file))


# Compressed


@pytest.mark.parametrize("ending", files.COMPRESSIONS)
def test_compressed_files_are_read_and_damaged_ones_told(tmp_path: Path, ending: str) -> None:
    rows = [{"id": f"{n:03}", "text": f"{n * n}"} for n in range(2_000)]
    plain = write_lines(tmp_path / "plain.jsonl", *rows).read_bytes()
    path = compress(tmp_path / f"q.jsonl{ending}", plain)
    expected = [(row["id"], row["text"]) for row in rows]
    assert pairs(path) == pairs(path, "dataset") == expected
    for damaged in (path.read_bytes()[:-20], plain):
        path.write_bytes(damaged)
        for through in ("file", "dataset"):
            with pytest.raises(UserError, match=rf"q\.jsonl\{ending} is damaged, broken off or not compressed"):
                samples(path, through)


def test_compressed_texts_and_csv_are_called_by_their_stems(tmp_path: Path) -> None:
    assert pairs(compress(tmp_path / "q.txt.gz", b"one\n\ntwo\n")) == [("q:1", "one"), ("q:3", "two")]
    assert pairs(compress(tmp_path / "q.csv.zst", b"text\n42\n")) == [("q:2", "42")]
    assert pairs(compress(tmp_path / "q.json.gz", b'[{"text": "a"}]')) == [("q:1", "a")]


def test_a_line_that_no_memory_holds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST_LINE", 100)
    path = compress(tmp_path / "q.txt.gz", b"a\n" + b"b" * 10_000)
    with pytest.raises(UserError, match="line 2, is longer than"):
        samples(path)


# Parquet


def test_parquet_is_a_file_too(tmp_path: Path) -> None:
    text = pa.array(["a", "b", "a"]).dictionary_encode()
    table = pa.table({"id": pa.array([7, 8, 9]), "text": text, "when": pa.array([0, 1, 2], pa.timestamp("s"))})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    assert pairs(tmp_path / "p.parquet") == [("7", "a"), ("8", "b"), ("9", "a")]
    assert (open_file(tmp_path / "p.parquet").kind, open_file(tmp_path / "p.parquet").finite) == ("parquet", True)
    assert [sample.sample_id for sample in samples(tmp_path / "p.parquet", id_column="text", n_samples=1)] == ["a"]
    for column in ("id", "when"):
        with pytest.raises(UserError, match=f"row 1, field '{column}', holds .* where a string is expected"):
            samples(tmp_path / "p.parquet", text_column=column)
    (tmp_path / "d.parquet").write_bytes(b"damaged bytes")
    with pytest.raises(UserError, match="no Parquet file that can be read"):
        samples(tmp_path / "d.parquet")


# Fields within fields


@pytest.mark.parametrize("through", ["file", "dataset"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_dots_lead_into_a_field_and_a_name_with_dots_comes_first(tmp_path: Path, kind: str, through: str) -> None:
    row = {"uid": "007", "data": {"id": 3, "prompt": "p"}, "list": [{"x": "first"}, {"x": "last"}], "a.b": "own"}
    path = tmp_path / f"q.{kind}"
    if kind == "jsonl":
        write_lines(path, row)
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist([row]), path)
    for column, text in (("data.prompt", "p"), ("list.0.x", "first"), ("list.-1.x", "last"), ("a.b", "own")):
        assert pairs(path, through, text_column=column, id_column="uid") == [("007", text)]
    assert samples(path, through, text_column="data.prompt", id_column="data.id")[0].sample_id == "3"
    for column in ("list.2.x", "data.nothing", "uid.x"):
        with pytest.raises(UserError, match=f"has no {column}, only (list with a list of 2|data with|uid with)"):
            samples(path, through, text_column=column)
    with pytest.raises(UserError, match=r"has no key, only uid, data, list, a.b: name what holds the id"):
        samples(path, through, text_column="a.b", id_column="key")


# Conversations and tokens


@pytest.mark.parametrize(
    "conversation",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "assistant", "content": "b"},
            ]
        },
        {"conversations": {"from": ["human", "gpt"], "value": ["a", "b"]}},
        {"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'},
    ],
)
def test_a_conversation_is_turns(tmp_path: Path, conversation: dict[str, Any]) -> None:
    path = write_lines(tmp_path / "q.jsonl", {"id": "x", "score": 1, **conversation})
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    for found in (samples(path), samples(path, "dataset"), samples(path, text_column=next(iter(conversation)))):
        assert found[0].turns == turns
        assert (found[0].sample_id, found[0].text, found[0].token_ids) == ("x", "", None)


def test_a_turn_keeps_what_else_templates_read(tmp_path: Path) -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    said = [{"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "name": "f", "content": "1"}]
    assert samples(write_lines(tmp_path / "q.jsonl", {"messages": said}))[0].turns == (
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "1", "name": "f"},
    )


def test_the_parts_of_a_turn_are_its_text_when_the_turn_is_named(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    path = write_lines(tmp_path / "q.jsonl", {"messages": [{"role": "user", "content": parts}]})
    assert pairs(path, text_column="messages.0.content") == [("q:1", "ab")]


def test_conversations_in_typed_columns(tmp_path: Path) -> None:
    said = [[{"role": "user", "content": "a", "name": None}], [{"role": "system", "content": "s", "name": "n"}]]
    pyarrow.parquet.write_table(pa.table({"messages": said}), tmp_path / "m.parquet")
    expected = [({"role": "user", "content": "a"},), ({"role": "system", "content": "s", "name": "n"},)]
    for through in ("file", "dataset"):
        assert [sample.turns for sample in samples(tmp_path / "m.parquet", through)] == expected


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([{"role": "user", "content": [{"type": "image", "image": "x"}]}], "part 0, is of the type 'image'"),
        ([{"content": "a"}], "turn 0, names no role, only content"),
        ([{"role": "user", "content": "a"}, "b"], "turn 1, is 'b'"),
        ([{"role": "user", "content": 5}], r"turn 0, content, holds 5 \(int\)"),
        ([{"role": "user"}], "turn 0, content, holds None"),
        ("plain", "holds 'plain' where a list is expected"),
    ],
)
def test_what_is_no_conversation_is_told_with_its_turn(tmp_path: Path, messages: object, problem: str) -> None:
    with pytest.raises(UserError, match=rf"line 1, field 'messages', .*{problem}|line 1, {problem}"):
        samples(write_lines(tmp_path / "q.jsonl", {"messages": messages}))


@pytest.mark.parametrize("through", ["file", "dataset"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_token_ids_are_taken_without_their_padding(tmp_path: Path, kind: str, through: str) -> None:
    rows = [
        {"id": "a", "input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]},
        {"id": "b", "input_ids": [0, 0, 7, 8], "attention_mask": [0, 0, 1, 1]},
    ]
    path = tmp_path / f"q.{kind}"
    if kind == "jsonl":
        write_lines(path, *rows)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_csv(path, [tuple(rows[0]), *((r["id"], str(r["input_ids"]), str(r["attention_mask"])) for r in rows)])
    for text_column in (None, "input_ids"):
        found = samples(path, through, text_column=text_column)
        assert [(sample.sample_id, sample.text, sample.token_ids) for sample in found] == [
            ("a", "", (5, 6)),
            ("b", "", (7, 8)),
        ]


def test_tokens_of_another_name_are_taken_where_they_are_named_and_a_text_comes_first(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "q.jsonl", {"text": "t", "tokens": [1, 2], "input_ids": [3]})
    assert [(sample.text, sample.token_ids) for sample in samples(path)] == [("t", None)]
    assert samples(path, text_column="tokens")[0].token_ids == (1, 2)
    assert samples(path, text_column="input_ids")[0].token_ids == (3,)
    assert samples(write_lines(tmp_path / "t.jsonl", {"tokens": [1, 2]}))[0].token_ids == (1, 2)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"input_ids": [1, -2]}, "holds -2 where token ids are expected"),
        ({"input_ids": [1, 2.0]}, "holds 2.0 where token ids are expected"),
        ({"input_ids": [[1, 2]]}, r"holds \[1, 2\] where token ids are expected"),
        ({"input_ids": [True]}, "holds True where token ids are expected"),
        ({"input_ids": [1], "attention_mask": [1, 1]}, "'attention_mask', is no list of 1 zeros and ones"),
        ({"input_ids": [1], "attention_mask": [2]}, "'attention_mask', is no list of 1 zeros and ones"),
    ],
)
def test_what_are_no_tokens_is_told(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=rf"line 1, field .*{problem}"):
        samples(write_lines(tmp_path / "q.jsonl", row))


def test_readers_of_texts_alone_refuse_lists(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1, holds a list where a string is expected"):
        list(jsonl_samples(write_lines(tmp_path / "q.jsonl", {"text": [1, 2]}), "text"))


@pytest.mark.parametrize("form", ["numpy", "torch"])
def test_a_dataset_that_was_saved_as_tensors_is_read_as_what_it_holds(tmp_path: Path, form: str) -> None:
    rows = {"id": [7, 8], "input_ids": [[1, 2, 3], [4, 5]], "attention_mask": [[1, 1, 0], [1, 1]]}
    tokens = datasets.Dataset.from_dict(rows).with_format(form, columns=["input_ids"])
    tokens.save_to_disk(tmp_path / "tokens")
    found = samples(tmp_path / "tokens", "dataset")
    assert [(s.sample_id, s.token_ids) for s in found] == [("7", (1, 2)), ("8", (4, 5))]


def test_rows_as_public_conversations_have_them(tmp_path: Path) -> None:
    """An id column without values, as OpenHermes has it, and conversations that were emptied, as ShareGPT has them."""
    said = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    path = write_lines(tmp_path / "q.jsonl", {"id": None, "conversations": said}, {"id": "x", "conversations": []})
    assert [(s.sample_id, len(s.turns or ())) for s in samples(path)] == [("q:1", 2), ("x", 0)]


def test_a_dataset_saved_to_disk_has_conversations_too(tmp_path: Path) -> None:
    said = [[{"from": "human", "value": "a"}]]
    datasets.Dataset.from_dict({"conversations": said, "other": [1]}).save_to_disk(str(tmp_path / "saved"))
    assert samples(tmp_path / "saved", "dataset")[0].turns == ({"role": "user", "content": "a"},)


def test_files_elsewhere_are_read_as_those_here(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/cells/a.csv", b"id,text\n007,null\n")
    memory.pipe("/cells/b.csv.zst", compress(tmp_path / "b.csv.zst", b"id,text\n008,3.10\n").read_bytes())
    urls = [f"memory://cells/{name}" for name in ("a.csv", "b.csv.zst")]
    table = _tables("there", datasets.load_dataset_builder("csv", data_files={"train": urls}))["train"]
    assert [row for _, row in table.read()] == [{"id": "007", "text": "null"}, {"id": "008", "text": "3.10"}]
    memory.rm("/cells/a.csv")
    with pytest.raises(UserError, match="cannot be read on"):
        next(table.read())
