"""The four benchmark tasks as data: MRPC, SST-2, RTE and SQuAD v2, each row a prompt with its right answers.

In: rows of a dataset, as dictionaries. Out: `Example`s, and the prompt of each. Decoders are trained on these prompts,
and what they represent is extracted from the same ones, so words and samples are frozen: another wording is another
task. The first `VALIDATION_SAMPLES` of the validation split, in its order, are the validation samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jax_extract.errors import UserError
from jax_extract.inputs.fields import checked_id, checked_text
from models.nearest import nearest

VALIDATION_SAMPLES = 750
MAX_LENGTH = 384  # of a prompt with its answer, in tokens
UNANSWERABLE = "unanswerable"
TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class Benchmark:
    """One task.

    Attributes:
      name: as commands and folders spell it.
      dataset, dataset_config: on the Hugging Face hub.
      texts: the columns of a row that the prompt holds.
      long_text: which of them is shortened where a prompt is too long.
      template: of the prompt; the answer follows after a space.
      label_words: the answer for each number in the column `label`; empty where a row has its own in `answers`.
    """

    name: str
    dataset: str
    dataset_config: str | None
    texts: tuple[str, ...]
    long_text: str
    template: str
    label_words: tuple[str, ...] = ()

    @property
    def answer_column(self) -> str:
        return "label" if self.label_words else "answers"

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.texts, self.answer_column)

    def prompt(self, texts: Mapping[str, str]) -> str:
        return self.template.format_map(texts)


@dataclass(frozen=True)
class Example:
    """One row of a task.

    Attributes:
      sample_id: the row's `id`, else TASK:SPLIT:ROW, rows from 0; the same from the hub and from a file.
      texts: the task's text columns.
      answers: right ones; the first is what is learned.
      label: of a classification.
    """

    sample_id: str
    texts: Mapping[str, str]
    answers: tuple[str, ...]
    label: int | None


_GLUE = "nyu-mll/glue"
BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark(
        "mrpc",
        _GLUE,
        "mrpc",
        ("sentence1", "sentence2"),
        "sentence1",
        "First sentence: {sentence1}\nSecond sentence: {sentence2}\nDo both mean the same? Answer:",
        ("no", "yes"),
    ),
    Benchmark(
        "sst2",
        _GLUE,
        "sst2",
        ("sentence",),
        "sentence",
        "Review: {sentence}\nSentiment:",
        ("negative", "positive"),
    ),
    Benchmark(
        "rte",
        _GLUE,
        "rte",
        ("sentence1", "sentence2"),
        "sentence1",
        "Text: {sentence1}\nStatement: {sentence2}\nDoes the statement follow from the text? Answer:",
        ("yes", "no"),
    ),
    Benchmark(
        "squad_v2",
        "rajpurkar/squad_v2",
        None,
        ("context", "question"),
        "context",
        "Context: {context}\nQuestion: {question}\nAnswer:",
    ),
)


def benchmark_named(name: str) -> Benchmark:
    """The task of that name, however its capitals and hyphens are written (SST-2, squad-v2); UserError for others."""
    plain = {_plain(benchmark.name): benchmark for benchmark in BENCHMARKS}
    if found := plain.get(_plain(name)):
        return found
    names = ", ".join(benchmark.name for benchmark in BENCHMARKS)
    near = nearest(_plain(name), plain)
    meant = f"; did you mean {plain[near].name}?" if near else ""
    raise UserError(f"task {name[:80]!r} is none of {names}{meant}")


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def example_of(benchmark: Benchmark, row: Mapping[str, Any], split: str, number: int, where: str) -> Example:
    """A row as an example.

    Args:
      number: of the row in its split, from 0.
      where: what an error begins with.

    Raises:
      UserError: a column is missing, or holds something else than the task's does.
    """
    lacking = [column for column in benchmark.columns if column not in row]
    if lacking:
        raise UserError(
            f"{where} has no column {lacking[0]!r} but {', '.join(map(str, row)) or 'nothing at all'}; "
            f"{benchmark.name} needs {', '.join(benchmark.columns)}"
        )
    texts = {column: checked_text(row[column], f"{where}, column {column!r},").strip() for column in benchmark.texts}
    has_id = row.get("id") is not None
    sample_id = checked_id(row["id"], where) if has_id else f"{benchmark.name}:{split}:{number}"
    if benchmark.label_words:
        label = _label(row["label"], len(benchmark.label_words), where)
        return Example(sample_id, texts, (benchmark.label_words[label],), label)
    return Example(sample_id, texts, _answers(row["answers"], where) or (UNANSWERABLE,), None)


def _label(value: object, labels: int, where: str) -> int:
    """CSV files have numbers as text."""
    text = str(value).strip() if isinstance(value, str) else value
    numbers = range(labels)
    for number in numbers:
        if text in (str(number), number) and not isinstance(value, bool):
            return number
    hidden = " (the labels of a test split are hidden)" if text in (-1, "-1") else ""
    raise UserError(f"{where} has the label {value!r:.40}{hidden}; it must be one of {', '.join(map(str, numbers))}")


def _answers(value: object, where: str) -> tuple[str, ...]:
    """The texts of SQuAD's {"text": […], …}, or a list of texts; CSV files have either as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UserError(f'{where}, column answers, holds {value!r:.40}; write {{"text": […]}} as JSON') from None
    texts = value.get("text") if isinstance(value, Mapping) else value
    if not isinstance(texts, list | tuple):
        raise UserError(f'{where}, column answers, holds {value!r:.40}; {{"text": […]}} or a list of texts is expected')
    return tuple(checked_text(text, f"{where}, column answers,").strip() for text in texts)
