"""The benchmark tasks: their frozen prompts, rows from local files and the hub, and texts that are too long."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets.config
import huggingface_hub
import pytest

from jax_extract.errors import UserError
from jax_extract.inputs import benchmarks_rows
from jax_extract.inputs.benchmarks import BENCHMARKS, UNANSWERABLE, VALIDATION_SAMPLES, Benchmark, benchmark_named
from jax_extract.inputs.benchmarks_prompts import (
    ANSWER_TOKENS,
    fitted_prompt,
    prompt_ids,
    prompt_samples,
    prompt_token_counter,
)
from jax_extract.inputs.benchmarks_rows import read_examples

ROWS: dict[str, list[dict[str, Any]]] = {
    "mrpc": [{"sentence1": "A cat sat.", "sentence2": "It sat, the cat.", "label": 1, "idx": 7}],
    "sst2": [{"sentence": "dull , null and void ", "label": 0}, {"sentence": "NA", "label": 1}],
    "rte": [{"sentence1": "Ann met Bob.", "sentence2": "Bob met no one.", "label": 1}],
    "squad_v2": [
        {
            "id": "56be",
            "title": "x",
            "context": "Ann, born in Rome, met Bob {there}.",
            "question": "Where was Ann born?",
            "answers": {"text": ["Rome", "in Rome"], "answer_start": [13, 10]},
        },
        {"id": "5ad3", "context": "Ann met Bob.", "question": "Who is Eve?", "answers": {"text": []}},
    ],
}
# Words that are changed make another task: what was trained on the old ones does not compare.
PROMPTS = {
    "mrpc": "First sentence: A cat sat.\nSecond sentence: It sat, the cat.\nDo both mean the same? Answer:",
    "sst2": "Review: dull , null and void\nSentiment:",
    "rte": "Text: Ann met Bob.\nStatement: Bob met no one.\nDoes the statement follow from the text? Answer:",
    "squad_v2": "Context: Ann, born in Rome, met Bob {there}.\nQuestion: Where was Ann born?\nAnswer:",
}
ANSWERS = {
    "mrpc": [("yes",)],
    "sst2": [("negative",), ("positive",)],
    "rte": [("no",)],
    "squad_v2": [("Rome", "in Rome"), (UNANSWERABLE,)],
}
TASKS = [benchmark.name for benchmark in BENCHMARKS]


def words(text: str) -> int:
    return len(text.split())


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: json.dumps(v) if isinstance(v, dict) else v for k, v in row.items()} for row in rows)
    return path


@pytest.mark.parametrize("task", TASKS)
def test_the_prompts_and_answers_of_each_task_are_frozen(task: str, tmp_path: Path) -> None:
    benchmark = benchmark_named(task)
    examples = read_examples(benchmark, "validation", str(write_jsonl(tmp_path / "v.jsonl", ROWS[task])))
    assert [example.answers for example in examples] == ANSWERS[task]
    assert fitted_prompt(benchmark, examples[0], words, 384) == PROMPTS[task]


@pytest.mark.parametrize("task", TASKS)
def test_hub_jsonl_and_csv_give_the_same_examples(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = benchmark_named(task)
    plain = [{k: v for k, v in row.items() if k not in ("title", "idx")} for row in ROWS[task]]

    def open_rows(name: str, config: str | None, split: str, columns: Any, optional: Any, revision: str | None) -> Any:
        assert (name, config, split, revision) == (benchmark.dataset, benchmark.dataset_config, "validation", None)
        return lambda: iter(plain)

    monkeypatch.setattr(benchmarks_rows, "open_rows", open_rows)
    of_hub = read_examples(benchmark, "validation")
    assert read_examples(benchmark, "validation", str(write_jsonl(tmp_path / "v.jsonl", plain))) == of_hub
    assert read_examples(benchmark, "validation", str(write_csv(tmp_path / "v.csv", plain))) == of_hub
    expected = ["56be", "5ad3"] if task == "squad_v2" else [f"{task}:validation:{i}" for i in range(len(plain))]
    assert [example.sample_id for example in of_hub] == expected


def test_the_first_750_rows_are_taken_and_all_where_there_are_fewer(tmp_path: Path) -> None:
    sst2 = benchmark_named("sst2")
    many = [{"sentence": f"s {i}", "label": i % 2} for i in range(VALIDATION_SAMPLES + 5)]
    path = str(write_jsonl(tmp_path / "v.jsonl", many))
    assert [e.texts["sentence"] for e in read_examples(sst2, "validation", path, 750)] == [f"s {i}" for i in range(750)]
    path = str(write_jsonl(tmp_path / "few.jsonl", many[:408]))
    assert len(read_examples(sst2, "validation", path, 750)) == 408


@pytest.mark.parametrize("name", ["SST-2", "sst2", "sst_2", "SST2"])
def test_a_task_is_found_however_it_is_spelled(name: str) -> None:
    assert benchmark_named(name).name == "sst2"


def test_an_unknown_task_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'squad' is none of mrpc, sst2, rte, squad_v2; did you mean squad_v2\?"):
        benchmark_named("squad")


def test_a_long_context_is_cut_and_the_question_stays() -> None:
    squad = benchmark_named("squad_v2")
    [example] = list(_examples(squad, [{**ROWS["squad_v2"][0], "context": " ".join(f"w{i}" for i in range(500))}]))
    prompt = fitted_prompt(squad, example, words, 384)
    assert words(prompt) == 384 - ANSWER_TOKENS
    assert prompt.startswith("Context: w0 w1 w2 ")
    assert prompt.endswith("\nQuestion: Where was Ann born?\nAnswer:")


def test_a_prompt_is_counted_without_the_end_that_its_tokenizer_adds() -> None:
    class Ending:
        eos_token_id = 1

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [0, *[5] * words(text), 1]}

    assert prompt_ids(Ending(), "a b") == (0, 5, 5)
    assert prompt_token_counter(Ending())("a b") == 3
    squad = benchmark_named("squad_v2")
    [example] = list(_examples(squad, [{**ROWS["squad_v2"][0], "context": " ".join(f"w{i}" for i in range(500))}]))
    prompt = fitted_prompt(squad, example, prompt_token_counter(Ending()), 384)
    assert words(prompt) + 1 == 384 - ANSWER_TOKENS


def test_a_question_that_does_not_fit_is_refused_with_the_length_that_would_do() -> None:
    squad = benchmark_named("squad_v2")
    [example] = list(_examples(squad, [{**ROWS["squad_v2"][0], "question": "why " * 100}]))
    with pytest.raises(UserError, match=r"raise --max_length to 135 or more"):
        fitted_prompt(squad, example, words, 64)
    assert fitted_prompt(squad, example, words, 135).startswith("Context:")


def test_the_samples_of_an_extraction_are_the_prompts_that_were_trained_on() -> None:
    rte = benchmark_named("rte")
    [sample] = prompt_samples(rte, _examples(rte, ROWS["rte"]), words, 384)
    assert (sample.sample_id, sample.text) == ("rte:validation:0", PROMPTS["rte"])
    assert sample.meta == {"task": "rte", "label": 1, "answers": ["no"]}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("v.jsonl", '{"text": "a", "label": 1}\n', "has no column 'sentence' but text, label"),
        ("v.jsonl", '{"sentence": "a", "label": -1}\n', "the labels of a test split are hidden"),
        ("v.jsonl", '{"sentence": "a", "label": true}\n', "label True; it must be one of 0, 1"),
        ("v.jsonl", '{"sentence": 5, "label": 1}\n', "where a string is expected"),
        ("v.jsonl", '{"sentence": "a", "label": 1, "id": 1}\n' * 2, "line 2 repeats the id '1'"),
        ("v.jsonl", "[]\n", "holds no row"),
        ("v.jsonl", "", "holds no row"),
        ("v.csv", "sentence,label\na,b,1\n", "quote commas"),
        ("v.csv", 'sentence,label\n"a,1\n', "is not CSV"),
        ("v.csv", "sentence,label,label\na,0,1\n", "names the column 'label' more than once"),
        ("v.csv", "id,sentence,label\n,a,1\n", "line 2, has an empty id"),
        ("v.csv", "sentence,label\na,2\n", "line 2 has the label '2'"),
        ("v.csv", "sentence;label\na;1\n", "has no column 'sentence' but sentence;label"),
        ("v.txt", "a\n", "give a .jsonl or a .csv"),
        ("v.csv", None, "there is no file"),
    ],
)
def test_a_file_that_is_not_the_tasks_is_refused_in_one_sentence(
    name: str, content: str | None, said: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        read_examples(benchmark_named("sst2"), "validation", str(tmp_path / name))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("answers", ['"Rome"', '"{"', "5", '{"start": [1]}'])
def test_answers_of_another_shape_are_refused(answers: str, tmp_path: Path) -> None:
    row = f'{{"context": "a", "question": "b", "answers": {answers}}}\n'
    (tmp_path / "v.jsonl").write_text(row)
    with pytest.raises(UserError, match="column answers, holds"):
        read_examples(benchmark_named("squad_v2"), "validation", str(tmp_path / "v.jsonl"))


def test_a_hub_that_cannot_be_reached_is_told_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    began = time.monotonic()
    with pytest.raises(UserError, match="hub could not be reached for dataset nyu-mll/glue"):
        read_examples(benchmark_named("rte"), "train")
    assert time.monotonic() - began < 15


def test_a_dataset_of_the_hub_without_the_columns_is_refused(tmp_path: Path) -> None:
    from jax_extract.inputs.hub import open_rows

    path = str(write_jsonl(tmp_path / "d.jsonl", [{"text": "a", "label": 1}]))
    assert list(open_rows(path, None, "train", ("label",), ("text", "id"))()) == [{"text": "a", "label": 1}]
    with pytest.raises(UserError, match="has no column 'sentence' but text, label"):
        open_rows(path, None, "train", ("sentence", "label"))


def test_the_tasks_need_no_torch() -> None:
    names = "benchmarks, benchmarks_rows, benchmarks_prompts"
    code = f"import sys; from jax_extract.inputs import {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _examples(benchmark: Benchmark, rows: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    from jax_extract.inputs.benchmarks import example_of

    return (example_of(benchmark, row, "validation", i, f"row {i}") for i, row in enumerate(rows))
