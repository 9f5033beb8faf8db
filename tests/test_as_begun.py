"""The same command makes the same tokens on another day.

Guarded: the clock, the commits and the names that a run keeps from its start; runs that were begun before any of this.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import Told, make_model, write_jsonl
from test_tokens import CLOCK, letters, tokens

from jax_extract import extract, open_activations
from jax_extract.config import ExtractConfig
from jax_extract.devices.processes import Processes
from jax_extract.errors import UserError
from jax_extract.extraction import command
from jax_extract.extraction.as_begun import of_the_same_commits
from jax_extract.extraction.command import extract_to_directory
from jax_extract.extraction.place import Place
from jax_extract.generation.answers import KEPT, AnswerFiles
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.sources import Source
from jax_extract.inputs.wrapping import Kept
from jax_extract.store.ledger import Ledger
from jax_extract.store.storage.local import Directory


def test_a_template_is_shown_the_clock_of_the_run_and_no_other_one_is_touched() -> None:
    tokenizer = letters(CLOCK, opens=False)
    day = datetime(2026, 11, 30, 8, 5)
    (found,), counts = tokens(tokenizer, "a", chat_template=True, kept=Kept(day))
    assert tokenizer.decode(found) == "30 Nov 2026 08:05 a" and counts.clock_text == "30 Nov 2026 08:05"
    theirs = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert theirs.endswith(" a") and not theirs.startswith("30 Nov 2026 08:05")
    given = letters("{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}"
                    "{{ date_string }}", opens=False)  # fmt: skip
    (found,), counts = tokens(given, "a", chat_template=True, variables={"date_string": "26 Jul"}, kept=Kept(day))
    assert given.decode(found) == "26 Jul" and counts.clock_text is None, "nothing of today is in it"


@pytest.fixture(scope="module")
def clocked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template writes the time."""
    folder = make_model(tmp_path_factory.mktemp("clocked") / "model", layers=1)
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1})
    )
    (folder / "chat_template.jinja").write_text(CLOCK)
    return folder


def _on(monkeypatch: pytest.MonkeyPatch, day: datetime) -> None:
    monkeypatch.setattr(Kept, "from_now_on", classmethod(lambda cls: cls(day)))


def test_a_run_is_finished_on_another_day_and_so_is_one_that_kept_no_clock(
    tmp_path: Path, clocked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = datetime(2026, 11, 30, 23, 59, 58)
    tasks = write_jsonl(tmp_path / "t.jsonl", [5, 9, 3])
    config = ExtractConfig(
        model_path=str(clocked), tasks_file=str(tasks), activations_dir=str(tmp_path / "run"), chat_template=True
    )

    def again(day: datetime) -> list[str]:
        _on(monkeypatch, day)
        told = Told()
        extract_to_directory(config, told)
        return told.lines

    note = "note the chat template writes the date; this run keeps '30 Nov 2026 23:59', of when it was begun"
    assert note in again(first)
    run = tmp_path / "run" / "_run" / "run.json"
    ids = open_activations(str(tmp_path / "run")).sample("s0000").token_ids
    tasks.write_text(tasks.read_text() + "\n")  # other bytes, so that the input is tokenised and compared
    assert note in again(first + timedelta(days=1)), "the plan is that of the first day, or this would be refused"

    said = json.loads(run.read_text())
    assert said["description"].pop("kept")["clock"] == first.isoformat()
    del said["description"]["input_fingerprint"]
    run.write_text(json.dumps(said))  # as the version before wrote it
    os.utime(run, (first.timestamp(), first.timestamp()))
    assert note in again(first + timedelta(days=2)), "the day on which it was written"
    os.utime(run, (0, 0))
    with pytest.raises(UserError, match="other inputs"):
        again(first)
    assert np.array_equal(ids, open_activations(str(tmp_path / "run")).sample("s0000").token_ids)


def test_workers_that_begin_answers_at_once_go_by_one_clock(tmp_path: Path) -> None:
    files = AnswerFiles(Directory(tmp_path), 4, 300)
    ours, theirs = ({"samples_per_batch": 2, "x": 1, KEPT: {"clock": clock}} for clock in ("a", "b"))
    assert not files.start(theirs, False)
    assert files.start(ours, False), "another was faster: it is told, and looked at again"
    assert not files.start(theirs, False)
    with pytest.raises(UserError, match="their x is 1 and not 2"):
        files.start({**theirs, "x": 2}, False)


def _begun(place: Path, **description: Any) -> Ledger:
    return Ledger.start(Directory(place), {"identity": {}, "numerics": {}, "description": description})


def test_a_dataset_may_be_named_by_another_path_when_its_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.csv").touch()
    found = _begun(tmp_path / "run", source="./d.csv")
    for other in ("d.csv", str(tmp_path / "d.csv")):
        meta = {"dataset": other, "split": "train", "row": 7}
        samples = [Sample(f"{other}:train:7", "one", meta), Sample("an id", "two", meta)]
        source = Source(other, "dataset", False, lambda samples=samples: iter(samples))
        named = command.named_as_begun(source, ExtractConfig(dataset=other), found)
        assert [sample.sample_id for sample in named.samples()] == ["./d.csv:train:7", "an id"]
        assert all(sample.meta == {**meta, "dataset": "./d.csv"} for sample in named.samples())
        assert command.named_as_begun(source, ExtractConfig(dataset=other), None) is source


def test_a_hub_name_means_the_commit_that_its_run_was_begun_with(tmp_path: Path) -> None:
    _begun(tmp_path, model_path="owner/name", model_revision="c0ffee", adapter="owner/lora@beef")
    config = ExtractConfig(model_path="owner/name", adapter="owner/lora", activations_dir=str(tmp_path))

    def opened(**changes: Any) -> tuple[str | None, str | None]:
        changed = dataclasses.replace(config, **changes)
        same = of_the_same_commits(changed, Place.of(changed), Processes())
        return same.revision, same.adapter

    assert opened() == ("c0ffee", "owner/lora@beef")
    assert opened(revision="main", adapter="owner/lora@v2") == ("main", "owner/lora@v2"), "what is asked for goes first"
    assert opened(model_path="owner/other", adapter="owner/dora") == (None, "owner/dora")
    assert opened(overwrite=True) == (None, "owner/lora")

    asked = {"revision": "main", "adapter": "owner/lora@v2"}
    place = tmp_path / "another"
    _begun(place, model_path="owner/name", model_revision="c0ffee", adapter="owner/lora@beef", asked=asked)
    assert opened(activations_dir=str(place), **asked) == ("c0ffee", "owner/lora@beef"), "a branch moves too"
    assert opened(activations_dir=str(place)) == (None, "owner/lora"), "which is another command"


def test_options_of_texts_are_part_of_what_a_run_is_only_where_they_are_given(clocked: Path) -> None:
    def identity(**options: Any) -> dict[str, Any]:
        config = ExtractConfig(model_path=str(clocked), **options)
        config.check()
        return command.text_identity(config)

    assert identity() == identity(chat_template=True) == {}
    assert identity(add_special_tokens=False) == {"add_special_tokens": False}
    one = identity(chat_template=True, chat_template_kwargs='{"b": 1, "a": 2}', system_prompt="")
    assert one == identity(chat_template=True, chat_template_kwargs={"a": 2, "b": 1}, system_prompt="")
    assert set(one) == {"chat_template_kwargs", "system_prompt"}


def test_a_notebook_takes_the_same_options_with_a_dictionary(tmp_path: Path, clocked: Path) -> None:
    model = shutil.copytree(clocked, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ mood }}{% for m in messages %}{{ m.content }}{% endfor %}")
    run = extract(str(model), ["a"], chat_template=True, system_prompt="b", chat_template_kwargs={"mood": "c"})
    found = [chr(33 + token) for token in run.sample("0").token_ids]
    assert found == ["c", "b", "a"]
