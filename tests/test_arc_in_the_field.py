"""ARC tasks in the forms that people have them: a task a line, folders of folders, lists of pairs, rows beyond 30."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet
import pytest
from small_run import whole_lines

from jax_extract.config import ExtractConfig
from jax_extract.errors import UserError
from jax_extract.extraction.command import _left_out
from jax_extract.extraction.named_source import source_named
from jax_extract.extraction.prepare import Job
from jax_extract.extraction.summary import tell_input
from jax_extract.generation.arc import predicted_grid
from jax_extract.inputs.arc import ArcTask, arc_samples, read_tasks
from jax_extract.inputs.arc_encoders import ENCODERS
from jax_extract.inputs.arc_task import ArcTasks, grid_from_rows
from jax_extract.inputs.sources import Source, open_source
from jax_extract.inputs.tokenize import InputCounts
from jax_extract.terminal import Terminal


def task(first: int = 0, side: int = 1) -> dict[str, Any]:
    row = [first % 10] * side
    return {"train": [{"input": [row], "output": [row]}] * 2, "test": [{"input": [row], "output": [row]}]}


def pair(first: int) -> dict[str, Any]:
    return {"input": [[first % 10, first // 10 % 10]], "output": [[first // 100]]}


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def open_arc(path: Path, **changes: Any) -> Source:
    arguments: dict[str, Any] = dict.fromkeys(("n_tasks", "n_samples", "split", "dataset_config", "text_column"))
    return open_source(str(path), None, **{**arguments, "encoder": "digits", "seed": 0, **changes})


def ids(source: Source) -> list[str]:
    return [sample.sample_id for sample in source.samples()]


# One task a line


def test_a_task_a_line_is_called_by_its_id_or_by_file_and_line(tmp_path: Path) -> None:
    rows = [{"task_id": "a", **task()}, {"id": 7, **task()}, {"name": "c", **task(), "metadata": {"x": 1}}, task()]
    source = open_arc(write_lines(tmp_path / "corpus.jsonl", *rows))
    assert (source.kind, source.finite) == ("arc", True)
    assert ids(source) == ["a_0", "7_0", "c_0", "corpus:4_0"]
    assert list(source.tasks) == ["a", "7", "c", "corpus:4"]


def test_a_column_of_ids_can_be_named(tmp_path: Path) -> None:
    rows = [{"id": "same", "key": f"k{n}", **task()} for n in range(2)]
    path = write_lines(tmp_path / "corpus.jsonl", *rows)
    assert ids(open_arc(path, id_column="key")) == ["k0_0", "k1_0"]
    with pytest.raises(UserError, match="repeats the task id 'same'"):
        open_arc(path)


def test_compressed_lists_and_parquet_hold_the_same_tasks(tmp_path: Path) -> None:
    rows = [{"id": f"t{n}", **task(n)} for n in range(3)]
    plain = write_lines(tmp_path / "a.jsonl", *rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    (tmp_path / "lines.json").write_bytes(plain.read_bytes())
    (tmp_path / "dictionary.json.gz").write_bytes(gzip.compress(json.dumps({r["id"]: r for r in rows}).encode()))
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    expected = list(open_arc(plain, n_samples=7).samples())
    for path in sorted(tmp_path.iterdir()):
        assert list(open_arc(path, n_samples=7).samples()) == expected, path


def test_rows_with_a_text_are_texts_even_if_they_have_pairs_too(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "q.jsonl", {"id": "x", "text": "t", **task()})
    assert [sample.text for sample in open_arc(path).samples()] == ["t"]
    path = write(tmp_path / "q.json", [{"id": "x", "text": "t", "input": [[1]]}])
    assert [sample.text for sample in open_arc(path).samples()] == ["t"]


def test_a_large_corpus_takes_little_more_than_its_cells(tmp_path: Path) -> None:
    tasks, side = 12, 30
    grids = [[[(n + k) % 10 for k in range(side)] for _ in range(side)] for n in range(10)]
    with (tmp_path / "big.jsonl").open("w") as file:
        for n in range(tasks):
            pairs = [{"input": grids[n % 10], "output": grids[(n + k) % 10]} for k in range(4)]
            file.write(json.dumps({"id": f"t{n}", "train": pairs[:3], "test": pairs[3:]}) + "\n")
    tracemalloc.start()
    source = open_arc(tmp_path / "big.jsonl")
    assert len(source.tasks) == tasks
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1.5 * tasks * 8 * side * side


def test_a_kept_task_is_the_task(tmp_path: Path) -> None:
    content = {"train": [pair(123), pair(456)], "test": [{"input": [[1], [2]]}, pair(789)]}
    tasks = read_tasks(write(tmp_path / "t.json", content))
    kept = tasks["t"]
    assert isinstance(tasks, ArcTasks)
    assert [[grid.tolist() for grid in shown] for shown in kept.train] == [[[[3, 2]], [[1]]], [[[6, 5]], [[4]]]]
    assert kept.test[0][0].tolist() == [[1], [2]]
    assert kept.test[0][1] is None
    assert kept.test[1][1] is not None
    assert kept.test[1][1].tolist() == [[7]]
    assert (len(tasks), "t" in tasks, tasks.test_inputs("t")) == (1, True, 2)


# Folders


def test_folders_within_a_folder_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b/x2", "b/x10", "a/deep/x3", "B/x4"):
        write(tmp_path / f"{name}.json", task())
    write(tmp_path / ".git" / "x5.json", task())
    write(tmp_path / "__MACOSX" / "x6.json", {})
    assert list(open_arc(tmp_path).tasks) == ["x4", "x3", "x10", "x2"]


def test_the_order_of_a_folder_is_not_the_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/x2", "b/x1", "a/x3", "ä/x4", "Z/x5"):
        write(tmp_path / f"{name}.json", task())
    (tmp_path / "a" / "round").symlink_to(tmp_path, target_is_directory=True)
    expected = ["x5", "x3", "x1", "x2", "x4"]
    listed = Path.iterdir
    for backwards in (False, True):
        monkeypatch.setattr(Path, "iterdir", lambda path, order=backwards: iter(sorted(listed(path), reverse=order)))
        assert list(open_arc(tmp_path).tasks) == expected


def test_where_two_files_have_one_name_every_id_is_a_path(tmp_path: Path) -> None:
    for name in ("training/a", "evaluation/a", "evaluation/b"):
        write(tmp_path / f"{name}.json", task())
    assert ids(open_arc(tmp_path)) == ["evaluation/a_0", "evaluation/b_0", "training/a_0"]


def test_a_folder_with_task_files_is_read_as_ever_and_what_is_within_it_is_told(tmp_path: Path) -> None:
    write(tmp_path / "a.json", task())
    assert open_arc(tmp_path).notes == ()
    write(tmp_path / "more" / "b.json", task())
    source = open_arc(tmp_path)
    assert ids(source) == ["a_0"]
    assert "its folders (more) are not read" in source.notes[0]


def test_a_description_beside_the_folders_of_a_corpus_is_no_task_of_it(tmp_path: Path) -> None:
    """As re-arc's archive and ARC's own repository are."""
    write(tmp_path / "metadata.json", {"a": {"examples": 1000}})
    with pytest.raises(UserError, match=r"metadata\.json is no ARC task"):
        open_arc(tmp_path)
    for name in ("data/training/a", "data/evaluation/b"):
        write(tmp_path / f"{name}.json", task())
    source = open_arc(tmp_path)
    assert ids(source) == ["b_0", "a_0"]
    assert source.notes[0].startswith("metadata.json of ")
    write(tmp_path / "z.json", task())  # from here on the folder's own count
    assert ids(open_arc(tmp_path, skip_bad_tasks=True)) == ["z_0"]


def test_a_folder_may_hold_corpora_of_a_task_a_line(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", {"id": "z", **task()}, task())
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(task()).encode()))
    assert list(open_arc(tmp_path).tasks) == ["a:1", "z", "b:2"]


# Pairs without parts


def test_a_short_list_of_pairs_is_one_task_whose_last_pair_is_asked(tmp_path: Path) -> None:
    tasks = open_arc(write(tmp_path / "t.json", [pair(n) for n in range(10)])).tasks
    assert list(tasks) == ["t"]
    assert (len(tasks["t"].train), tasks["t"].test[0][0].tolist()) == (9, [[9, 0]])


def test_a_long_list_of_pairs_is_a_task_for_each_four(tmp_path: Path) -> None:
    write(tmp_path / "tasks" / "a.json", [pair(n) for n in range(14)])
    write(tmp_path / "tasks" / "b.json", [pair(n) for n in range(3)])
    tasks = open_arc(tmp_path / "tasks").tasks
    assert list(tasks) == ["a:1", "a:2", "a:3", "b"]
    assert [len(tasks[name].train) for name in tasks] == [3, 3, 5, 2]
    assert [tasks[name].test[0][0].tolist()[0][0] for name in ("a:1", "a:2")] == [3, 7]


def test_examples_of_two_grids_each_are_pairs(tmp_path: Path) -> None:
    row = {"source": "x = 1", "examples": [[[[1, 2]], [[3]]], [[[4]], [[5]]]]}
    tasks = open_arc(write_lines(tmp_path / "barc.jsonl", row)).tasks
    assert tasks["barc:1"].train[0][0].tolist() == [[1, 2]]
    assert tasks["barc:1"].test[0][0].tolist() == [[4]]


def test_one_test_pair_need_not_be_in_a_list(tmp_path: Path) -> None:
    content = {"train": [pair(1)], "test": pair(2)}
    assert open_arc(write(tmp_path / "t.json", content)).tasks["t"].test[0][0].tolist() == [[2, 0]]
    assert list(open_arc(write(tmp_path / "d.json", {"a": content, "b": [pair(1), pair(2)]})).tasks) == ["a", "b"]


# Rows beyond 30 cells


def test_rows_beyond_thirty_cells_are_prompts_and_can_be_augmented(tmp_path: Path) -> None:
    tasks = open_arc(write(tmp_path / "t.json", task(3, side=37))).tasks
    for encoder in ENCODERS:
        plain, changed = arc_samples(tasks, encoder, n_samples=2)
        assert plain.text.count("input:") == 3
        assert "augmentation" in changed.meta
    with pytest.raises(UserError, match="rows of 1001 cells"):
        open_arc(write(tmp_path / "far.json", task(side=1001)))


def test_an_answer_beyond_thirty_cells_counts_where_the_task_has_such(tmp_path: Path) -> None:
    usual, long = (grid_from_rows([[1] * side]) for side in (30, 31))
    sides = [ArcTask("t", ((grid, grid),), ((grid, None),)).longest_side for grid in (usual, long)]
    text, meta = "1" * 31, {"encoder": "digits"}
    assert predicted_grid(text, True, meta, sides[0]) is None
    answer = predicted_grid(text, True, meta, sides[1])
    assert answer is not None
    assert answer.tolist() == [[1] * 31]


# What is no task


@pytest.mark.parametrize("form", ["folder", "lines", "dictionary", "list"])
def test_one_unusable_task_is_an_error_or_is_left_out_by_name(tmp_path: Path, form: str) -> None:
    good, bad = task(), {"train": [pair(1)], "test": [{"input": [[11]]}]}
    if form == "folder":
        path = tmp_path / "folder"
        for name, content in (("a", good), ("b", bad), ("c", good)):
            write(path / f"{name}.json", content)
        (path / "d.json").write_text("{", encoding="utf-8")
        left_out = ("b.json", "d.json")
    elif form == "lines":
        path = write_lines(tmp_path / "t.jsonl", {"id": "a", **good}, {"id": "b", **bad}, {"id": "c", **good})
        with path.open("ab") as file:
            file.write(b'{"id": "\xff"}\n{"id": "a",\n')
        left_out = ("t.jsonl, line 2", "t.jsonl, line 4", "t.jsonl, line 5")
    elif form == "dictionary":
        path = write(tmp_path / "t.json", {"a": good, "b": bad, "c": good})
        left_out = ("task b",)
    else:
        path = write(tmp_path / "t.json", [{"id": "a", **good}, {"id": "b", **bad}, {"id": "c", **good}])
        left_out = ("t.json, object 2",)
    with pytest.raises(UserError, match=r"has the cell 11 where .*; --skip_bad_tasks True leaves such tasks out"):
        open_arc(path)
    source = open_arc(path, skip_bad_tasks=True)
    assert ids(source) == ["a_0", "c_0"]
    assert source.left_out == left_out


def test_an_input_of_unusable_tasks_alone_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", {"train": [], "test": []})
    with pytest.raises(UserError, match=r"holds no ARC task.*line 1 has no train pairs"):
        open_arc(path, skip_bad_tasks=True)


def test_a_list_of_pairs_has_no_ids_to_name(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps([pair(1), pair(2)]))
    with pytest.raises(UserError, match=r"--id_column 'key' is for lists of tasks, and .*t\.json is a list of pairs"):
        open_arc(tmp_path / "t.json", id_column="key")


def test_a_folder_of_texts_is_no_folder_of_tasks(tmp_path: Path) -> None:
    write_lines(tmp_path / "t.jsonl", {"text": "a"})
    with pytest.raises(UserError, match=r"t\.jsonl, line 1 has no train and test pairs, only text: .*--dataset"):
        open_arc(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([pair(1)], "1 pairs and no parts"),
        ([pair(1), {"input": [[1]]}, pair(2)], "train pair 1, has no output"),
        ([pair(1), 5], "pair 1, is no object"),
        ([{"id": "a", **task()}] * 2, "object 2, repeats the task id 'a'"),
        ([task(), 5], "object 2 is no object with train and test pairs"),
        ({"a": {"examples": []}}, "0 pairs and no parts"),
    ],
)
def test_a_wrong_form_is_told_with_its_place(tmp_path: Path, content: object, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        open_arc(write(tmp_path / "t.json", content))


def test_the_options_reach_the_reader_and_the_input_line_says_what_was_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"key": f"k{n}", **(task() if n < 2 else {"train": []})} for n in range(6)]
    path = write_lines(tmp_path / "corpus.jsonl", *rows)
    source = source_named(ExtractConfig(tasks_file=str(path), id_column="key", skip_bad_tasks=True))
    assert ids(source) == ["k0_0", "k1_0"]
    counts = InputCounts(samples=2, tokens=8, longest_sample=4)
    job = SimpleNamespace(contexts=None, model=SimpleNamespace(tokenizer_notes=()))
    tell_input(source, counts, cast(Job, job), Terminal())
    told = whole_lines("".join(capsys.readouterr()))
    assert "4 unusable tasks left out: corpus.jsonl, line 3, corpus.jsonl, line 4, corpus.jsonl, line 5, …" in told
    assert _left_out(source)["unusable_tasks"]["count"] == 4
    assert _left_out(open_arc(write(tmp_path / "a.json", task()))) == {}
