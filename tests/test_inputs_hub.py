"""Hugging Face datasets: rows of local files, clear refusals, and a hub that cannot be reached."""

from __future__ import annotations

import json
import logging
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet
import pytest

from jax_extract.errors import UserError
from jax_extract.inputs import hub
from jax_extract.inputs.hub import dataset_samples, open_dataset
from jax_extract.inputs.sources import Source, open_source

COLUMNS = {"id": [5, 6], "text": ["a", "b"], "label": [0, 1]}


def write_parquet(path: Path, columns: dict[str, list[Any]] = COLUMNS) -> Path:
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), path)
    return path


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path | str, split: str | None = None, text_column: str | None = None) -> list[tuple[str, str]]:
    return [(sample.sample_id, sample.text) for sample in dataset_samples(str(path), None, split, text_column)]


def open_dataset_source(name: Path | str, **changes: Any) -> Source:
    arguments: dict[str, Any] = {
        "n_tasks": None,
        "n_samples": None,
        "encoder": "digits",
        "seed": 0,
        "split": None,
        "dataset_config": None,
        "text_column": None,
    }
    return open_source(None, str(name), **{**arguments, **changes})


@pytest.fixture
def unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


def test_the_id_column_names_the_samples(tmp_path: Path) -> None:
    assert read(write_parquet(tmp_path / "p.parquet")) == [("5", "a"), ("6", "b")]


def test_without_an_id_column_name_split_and_row_do(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", {"question": "a"}, {"question": "b"})
    assert read(path) == [(f"{path}:train:0", "a"), (f"{path}:train:1", "b")]


def test_a_sample_can_be_traced_back_to_its_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "p.parquet")
    last = list(dataset_samples(str(path), None, None, None))[-1]
    assert last.meta == {"dataset": str(path), "config": None, "split": "train", "row": 1}


def test_a_json_array_is_read(tmp_path: Path) -> None:
    (tmp_path / "j.json").write_text('[{"id": "x", "text": "a"}, {"id": "y", "text": "b"}]', encoding="utf-8")
    assert read(tmp_path / "j.json") == [("x", "a"), ("y", "b")]


def test_a_csv_file_is_read_and_one_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("id,text\nx,a\ny,b\n", encoding="utf-8")
    (tmp_path / "empty.csv").write_text("id,text\n", encoding="utf-8")
    assert read(tmp_path / "c.csv") == [("x", "a"), ("y", "b")]
    with pytest.raises(UserError, match="is empty"):
        read(tmp_path / "empty.csv")


def test_a_dataset_saved_to_disk_is_read(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_dict(COLUMNS)
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"dev": saved, "test": saved}).save_to_disk(str(tmp_path / "several"))
    assert read(tmp_path / "one") == [("5", "a"), ("6", "b")]
    assert read(tmp_path / "several", "dev") == [("5", "a"), ("6", "b")]


def test_a_folder_has_the_splits_of_its_files_and_a_missing_split_lists_them(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d" / "train-0.parquet")
    write_parquet(tmp_path / "d" / "test-0.parquet", {"id": [7], "text": ["c"]})
    assert read(tmp_path / "d") == [("5", "a"), ("6", "b")]
    assert read(tmp_path / "d", "test") == [("7", "c")]
    with pytest.raises(UserError, match="no split 'dev': take one of train, test"):
        read(tmp_path / "d", "dev")


def test_the_only_split_needs_no_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d" / "test-0.parquet")
    assert read(tmp_path / "d") == [("5", "a"), ("6", "b")]


def test_a_missing_column_lists_those_there_are(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", {"body": "a", "n": 1})
    assert [text for _, text in read(path, text_column="body")] == ["a"]
    for text_column in (None, "nope"):
        with pytest.raises(UserError, match="only body, n: name what holds the text with --text_column"):
            open_dataset(str(path), None, None, text_column)


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"text": ["a", None]}, "row 1, field 'text', holds None"),
        ({"text": [1, 2]}, r"row 0, field 'text', holds 1 \(int\)"),
        ({"id": [1.5, 2.5], "text": ["a", "b"]}, r"row 0, field 'id', holds 1\.5"),
    ],
)
def test_a_value_of_the_wrong_type_is_told_with_its_row(
    tmp_path: Path, columns: dict[str, list[Any]], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        read(write_parquet(tmp_path / "p.parquet", columns))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("p.parquet", b"damaged bytes", "cannot be opened"),
        ("p.jsonl", b'{"text": }\n{"text": "a"}\n', r"p\.jsonl, line 1, column 10, is not JSON"),
        ("p.jsonl", b"", "is empty"),
        ("p.pkl", b"", "ends in '.pkl'"),
    ],
)
def test_a_damaged_or_empty_file_is_told_when_it_is_opened(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=problem):
        open_dataset(str(tmp_path / name), None, None, None)


def test_a_split_without_rows_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    empty = pa.table({"text": pa.array([], pa.string())})
    with pa.ipc.new_stream(str(tmp_path / "e.arrow"), empty.schema) as writer:
        writer.write_table(empty)
    with pytest.raises(UserError, match="split train, is empty"):
        open_dataset(str(tmp_path / "e.arrow"), None, None, None)
    # `datasets` itself cannot read a Parquet file without rows; its reason is passed on.
    with pytest.raises(UserError):
        open_dataset(str(write_parquet(tmp_path / "e.parquet", {"text": []})), None, None, None)


def test_a_configuration_or_revision_of_a_file_is_refused(tmp_path: Path) -> None:
    path = str(write_parquet(tmp_path / "p.parquet"))
    with pytest.raises(UserError, match="no configurations to choose 'mrpc'"):
        open_dataset(path, "mrpc", None, None)
    with pytest.raises(UserError, match="no revision 'main'"):
        open_dataset(path, None, None, None, revision="main")


@pytest.mark.parametrize("name", ["nothing.parquet", "./nothing", "/no/such/folder", "a/b/c"])
def test_a_missing_path_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(UserError, match="no file or folder"):
        open_dataset(name, None, None, None)


@pytest.mark.usefixtures("unreachable_hub")
def test_an_unreachable_hub_is_told_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=r"could not be reached for dataset owner/name.*HF_HUB_OFFLINE=1"):
        open_dataset("owner/name", "config", "train", None)
    assert time.monotonic() - start < 5


@pytest.mark.usefixtures("unreachable_hub")
def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    given_up = threading.Event()

    class SilentClient:
        def head(self, url: str, timeout: float) -> None:
            given_up.wait(10)

    monkeypatch.setattr(huggingface_hub, "get_session", SilentClient)
    monkeypatch.setattr(hub, "HUB_ANSWERS_WITHIN", 0.1)
    start = time.monotonic()
    with pytest.raises(UserError, match="could not be reached"):
        open_dataset("owner/name", None, None, None)
    assert time.monotonic() - start < 5
    given_up.set()


def test_offline_a_dataset_that_was_never_downloaded_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot be opened from the local cache"):
        open_dataset("owner/never-downloaded", None, None, None)


def test_nothing_is_printed_and_the_libraries_settings_are_left_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The library's own handler holds the stderr of its import, which capfd does not see.
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", logged.append)
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [handler])
    path = write_parquet(tmp_path / "p.parquet")
    before = (
        logging.getLogger("datasets").level,
        datasets.are_progress_bars_disabled(),
        list(warnings.filters),
    )
    read(path)
    (tmp_path / "p.jsonl").write_text('{"text": }\n', encoding="utf-8")
    with pytest.raises(UserError):
        open_dataset(str(tmp_path / "p.jsonl"), None, None, None)
    after = logging.getLogger("datasets").level, datasets.are_progress_bars_disabled(), list(warnings.filters)
    assert after == before
    assert not logged
    assert capfd.readouterr() == ("", "")


def test_a_dataset_source_is_a_stream_that_starts_anew(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "p.parquet")
    source = open_dataset_source(path, n_samples=1, split="train")
    assert (source.kind, source.finite, source.name) == ("dataset", False, f"{path}:train")
    assert [sample.sample_id for sample in source.samples()] == ["5"]
    assert list(source.samples()) == list(source.samples())
    assert len(list(open_dataset_source(path).samples())) == 2


def test_opening_a_dataset_source_finds_wrong_arguments(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "p.parquet")
    for changes in ({"n_tasks": 1}, {"n_samples": 0}, {"split": "dev"}, {"text_column": "nope"}):
        with pytest.raises(UserError):
            open_dataset_source(path, **changes)
