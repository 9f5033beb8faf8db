"""The other fields of a row (an answer, a label) stay with its sample; how many, and in which runs, is bounded.

In every format; as plain JSON; no more than 2,000 characters a sample, and what is left out is named. A run that the
version before began goes on without them, byte for byte. The column that a text was found in is told.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet
from small_run import Told, run_here, snapshot, write_arc

from jax_extract import open_activations
from jax_extract.config import ExtractConfig
from jax_extract.extraction.command import extract_to_directory
from jax_extract.inputs.fields import Fields, other_fields
from jax_extract.inputs.hub import open_dataset
from jax_extract.inputs.sources import open_source
from jax_extract.inputs.text import row_samples
from jax_extract.store.ledger import RUN_FILE

ROWS = [
    {
        "id": "a",
        "question": "What is it?",
        "answer": "It.",
        "label": 1,
        "score": 0.5,
        "ok": True,
        "tags": ["x", {"y": 1}],
    },
    {"id": "b", "question": "Which one?", "answer": "That.", "label": 0, "score": None, "ok": False, "tags": []},
]
KEPT = [
    {"answer": "It.", "label": 1, "score": 0.5, "ok": True, "tags": ["x", {"y": 1}]},
    {"answer": "That.", "label": 0, "ok": False, "tags": []},
]
OPTIONS: dict[str, Any] = {
    "n_tasks": None,
    "n_samples": None,
    "encoder": "digits",
    "seed": 0,
    "split": None,
    "dataset_config": None,
    "text_column": None,
}


def write_rows(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_fields_stay_with_their_sample_in_every_format(tmp_path: Path) -> None:
    write_rows(tmp_path / "q.jsonl")
    (tmp_path / "q.json").write_text(json.dumps(ROWS))
    for name in ("q.jsonl", "q.json"):
        source = open_source(str(tmp_path / name), None, **OPTIONS)
        assert [sample.meta["fields"] for sample in source.samples()] == KEPT
        assert source.text_column == "question"
    (tmp_path / "q.csv").write_text('id,text,label\n7,"a text",positive\n8,other,\n')
    source = open_source(str(tmp_path / "q.csv"), None, **OPTIONS)
    assert [sample.meta["fields"] for sample in source.samples()] == [{"label": "positive"}, {"label": ""}]
    assert source.text_column == "text"
    (tmp_path / "q.txt").write_text("a line\n")
    source = open_source(str(tmp_path / "q.txt"), None, **OPTIONS)
    assert [dict(sample.meta) for sample in source.samples()] == [{"line": 1}]
    assert source.text_column is None


@pytest.mark.parametrize("as_dataset", [False, True])
def test_columns_of_bytes_are_not_read_for_it(
    tmp_path: Path, as_dataset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = {
        "text": ["one"],
        "when": [datetime.date(2024, 1, 5)],
        "image": [{"bytes": b"png", "path": "x.png"}],
        "raw": [b"bytes"],
        "labels": [[1, 2]],
    }
    path = tmp_path / "p.parquet"
    parquet.write_table(pa.table(columns), path)
    if as_dataset:
        (sample,) = open_dataset(str(path), None, None, None, keeps_others=True)()
    else:
        read, asked = parquet.ParquetFile.iter_batches, []
        monkeypatch.setattr(
            parquet.ParquetFile, "iter_batches", lambda *a, **k: (asked.append(k["columns"]), read(*a, **k))[1]
        )
        (sample,) = row_samples(path, Fields(keeps_others=True))
        assert asked == [["text", "when", "labels"]]
    assert sample.meta["fields"] == {"when": "2024-01-05", "labels": [1, 2]}
    assert "fields_left_out" not in sample.meta


def test_images_of_a_dataset_are_not_decoded(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "image": datasets.Image(),
            "images": datasets.List(datasets.Image()),
            "of": {"page": datasets.Value("int64")},
        }
    )
    row = {"text": ["one"], "label": [1], "image": [None], "images": [[]], "of": [{"page": 3}]}
    datasets.Dataset.from_dict(row, features=features).save_to_disk(str(tmp_path / "saved"))
    rows = open_dataset(str(tmp_path / "saved"), None, None, None, keeps_others=True)
    (sample,) = rows()
    assert sample.meta["fields"] == {"label": 1, "of": {"page": 3}}
    assert rows.text_column == "text"


def test_what_is_too_long_or_no_json_is_left_out_and_named() -> None:
    row = {"a": "x" * 1_500, "b": "y" * 1_500, "c": 3, "d": b"bytes", "e": float("nan"), "f": None, "g": {"h": {1, 2}}}
    assert other_fields(row) == {"fields": {"a": "x" * 1_500, "c": 3}, "fields_left_out": ["b", "d", "e", "g"]}
    many = other_fields({f"name {'n' * 200} {i}": "z" * 3_000 for i in range(50)})
    assert list(many) == ["fields_left_out"]
    assert [len(name) for name in many["fields_left_out"]] == [80] * 8
    assert other_fields({"f": None}) == {}
    assert len(json.dumps(other_fields({str(i): i for i in range(10_000)})["fields"])) <= 2_000 + 10


@pytest.mark.parametrize(
    ("fields", "row", "kept"),
    [
        (Fields("q", "n", True), {"q": "t", "n": 1, "id": "i", "text": "u"}, {"id": "i", "text": "u"}),
        (Fields("m.0.content", None, True), {"m": [{"content": "t"}], "id": "i", "l": 1}, {"l": 1}),
        (Fields(None, None, True), {"input_ids": [1, 2], "attention_mask": [1, 1], "l": 1}, {"l": 1}),
        (Fields(None, None, True), {"messages": [{"role": "user", "content": "t"}], "l": 1}, {"l": 1}),
    ],
)
def test_what_is_read_as_text_or_id_is_not_kept_twice(fields: Fields, row: dict[str, Any], kept: Any) -> None:
    assert fields.sample(row, "here", "x", {}).meta == {"fields": kept}


def test_a_run_gives_them_with_its_samples_and_says_where_texts_were_found(model: Path, tmp_path: Path) -> None:
    tasks = write_rows(tmp_path / "q.jsonl")
    terminal = Told()
    options = {"layers_to_extract": (3,), "activations_dir": str(tmp_path / "run")}
    extract_to_directory(ExtractConfig(model_path=str(model), tasks_file=str(tasks), **options), terminal)
    assert [
        line for line in terminal.lines if "texts from column 'question'" in line and line.startswith("input q.jsonl")
    ]
    run = open_activations(tmp_path / "run")
    assert [sample.fields for sample in run] == KEPT
    assert run["a"].meta["line"] == 1
    write_arc(tmp_path / "arc.json", 1)
    run_here(model, tmp_path / "arc.json", tmp_path / "arc", layers_to_extract=(3,))
    assert open_activations(tmp_path / "arc")[0].fields == {}


def test_documents_of_contexts_keep_theirs(model: Path, tmp_path: Path) -> None:
    tasks = write_rows(tmp_path / "q.jsonl")
    run_here(model, tasks, tmp_path / "run", layers_to_extract=(3,), context_tokens=16)
    pieces = open_activations(tmp_path / "run")[0].meta["pieces"]
    assert [piece["meta"]["fields"]["answer"] for piece in pieces] == ["It.", "That."]


def test_a_run_that_the_version_before_began_goes_on_without_them(model: Path, tmp_path: Path) -> None:
    tasks = write_rows(tmp_path / "q.jsonl")
    (tmp_path / "bare").mkdir()
    bare = write_rows(tmp_path / "bare" / "q.jsonl", [{k: row[k] for k in ("id", "question")} for row in ROWS])
    options: dict[str, Any] = {"layers_to_extract": (3,), "batch_size": 1}
    run_here(model, bare, tmp_path / "before", **options)  # has what that version wrote
    run_here(model, tasks, tmp_path / "run", **options)
    path = tmp_path / "run" / RUN_FILE
    began = json.loads(path.read_text())
    del began["description"]["kept"]["fields"]
    path.write_text(json.dumps(began))
    assert open_activations(tmp_path / "run")[0].fields
    for folder in ("commits", "parts", "tokens"):
        for file in (tmp_path / "run/_run" / folder).glob("*"):
            file.unlink()
    run_here(model, tasks, tmp_path / "run", **options)
    assert [sample.fields for sample in open_activations(tmp_path / "run")] == [{}, {}]
    assert snapshot(tmp_path / "run/_run/parts") == snapshot(tmp_path / "before/_run/parts")
