"""Layers are understood as people write them, wherever they are named: flags, files, classes, notebooks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from small_run import LAYERS, SCRIPT, run_cli, run_here, shards, write_arc

from jax_extract import cli, extract
from jax_extract.compilation.config import CompileConfig
from jax_extract.config import ExtractConfig, from_mapping, from_yaml, to_yaml
from jax_extract.errors import UserError
from jax_extract.extraction.capture import choose_layers
from jax_extract.layer_words import layer_words
from jax_extract.post_training.extractors import RepresentationExtractor
from jax_extract.representations.config import RepresentationsConfig

AS_WRITTEN = [
    ("-1", [11]),
    ("all", list(range(LAYERS))),
    ("3-5", [3, 4, 5]),
    ("10,11", [10, 11]),
    ("9 10 11", [9, 10, 11]),
    ("0-2 -1", [0, 1, 2, 11]),
    ("-3--1", [9, 10, 11]),
    ("8--2", [8, 9, 10]),
    ("4,2-3 -1", [2, 3, 4, 11]),
    ("10-23", [10, 11]),  # the default, as far as the model goes
]


@pytest.mark.parametrize(("said", "layers"), AS_WRITTEN)
def test_words_mean_these_layers_of_a_model_of_twelve(said: str, layers: list[int]) -> None:
    words = layer_words(said)
    assert words is not None
    assert list(choose_layers(words, LAYERS)) == layers


@pytest.mark.parametrize("flag", ["--layers_to_extract", "--layers-to-extract", "--layers", "--layer"])
@pytest.mark.parametrize("command", ["extract", "compile"])
@pytest.mark.parametrize(("said", "layers"), AS_WRITTEN)
def test_a_command_takes_them_by_every_name_of_the_flag(
    flag: str, command: str, said: str, layers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = _taken(command, monkeypatch, "--model_path", "m", flag, *said.split(), "--batch_size", "3")
    assert taken.batch_size == 3
    assert list(choose_layers(taken.layers_to_extract, LAYERS)) == layers


def test_the_value_may_stand_behind_an_equals_sign_and_the_flag_come_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _taken("extract", monkeypatch, "--layers=-2").layers_to_extract == (-2,)
    assert _taken("extract", monkeypatch, "--layer", "3", "--layer=5-6").layers_to_extract == (3, "5-6")
    assert _taken("extract", monkeypatch, "--layers", "None").layers_to_extract is None


def test_token_representations_take_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    named = ["--model_path", "m", "--representation_dir", "d", "--layer", "-1", "0-1", "--batch_size", "2"]
    taken = _taken("token-representations", monkeypatch, *named)
    assert (taken.layers, taken.batch_size) == ((-1, "0-1"), 2)


def _taken(command: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """The options that a command makes of its words; what it would do with them is left out."""
    if command == "extract":
        return cli._extract_config(list(words), "jax-extract extract")
    taken: list[Any] = []

    def check(options: Any) -> None:
        taken.append(options)
        raise UserError("enough")

    monkeypatch.setattr(
        {"compile": CompileConfig, "token-representations": RepresentationsConfig}[command], "check", check
    )
    assert cli.main([command, *words]) == 2
    return taken[0]


@pytest.mark.parametrize("name", ["layers_to_extract", "layers", "layer"])
@pytest.mark.parametrize("said", ["10-11", [10, 11], "10, 11", ["10-11"], [10, -1]])
def test_a_yaml_file_takes_them(name: str, said: object, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({name: said}))
    config = from_yaml(str(tmp_path / "a.yaml"), ExtractConfig())
    config.check()
    assert choose_layers(config.layers_to_extract, LAYERS) == (10, 11)
    (tmp_path / "kept.yaml").write_text(to_yaml(config))
    assert from_yaml(str(tmp_path / "kept.yaml"), ExtractConfig()) == config


def test_a_yaml_file_that_names_them_twice_is_refused() -> None:
    with pytest.raises(UserError, match="has both layers_to_extract and layers, which mean the same"):
        from_mapping({"layers": 1, "layers_to_extract": 2}, ExtractConfig(), "configuration 'a'")


def test_a_run_with_them_is_the_run_with_the_numbers_and_resumes_it(model: Path, tmp_path: Path) -> None:
    tasks = write_arc(tmp_path / "tasks.json")
    run_here(model, tasks, tmp_path / "a", layers_to_extract=(10, 11))
    before = shards(tmp_path / "a")
    again = run_here(model, tasks, tmp_path / "a", layers_to_extract="10 -1")
    assert again["layers_extracted"] == [10, 11] and len(again["sessions"]) == 1 + 1
    assert shards(tmp_path / "a") == before


def test_edited_defaults_of_the_documented_class_may_be_written_so(model: Path, tmp_path: Path) -> None:
    tasks = write_arc(tmp_path / "tasks.json")
    source = SCRIPT.read_text().replace(
        "List[int] = field(default_factory=lambda: list(range(10, 24)))", 'str = "-2,-1"'
    )
    (tmp_path / "edited.py").write_text(source)
    done = run_cli("--model_path", model, "--tasks_file", tasks, cwd=tmp_path, script=tmp_path / "edited.py")
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "activations/metadata.json").read_text())
    assert said["layers_extracted"] == [10, 11]


@pytest.mark.parametrize("layers", ["10-23", range(-2, 0), np.array([10, 11]), ["10", -1]])
def test_a_notebook_takes_them(layers: Any, model: Path) -> None:
    assert extract(str(model), ["a text"], layers=layers).layers == [10, 11]


def test_the_extractor_of_trained_models_takes_them(model: Path) -> None:
    extractor = RepresentationExtractor(str(model), layers="10 -1", backend="jax", hook_points="after_block")
    assert extractor.extract(["a text"]).layers == [10, 11]


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("ten", "--layers_to_extract 'ten' names no layer; write 12, -1 (the last), 10-23, all, or several of these"),
        ("10:12", "'10:12' names no layer"),
        ("1.5", "'1.5' names no layer"),
        ("23-10", "--layers_to_extract 23-10 runs backwards; write 10-23"),
        (True, "True names no layer"),
        ([None], "None names no layer"),
        (1.5, "1.5 names no layer"),
    ],
)
def test_a_word_that_is_no_layer_is_refused_by_name(said: object, sentence: str) -> None:
    with pytest.raises(UserError) as refusal:
        ExtractConfig(layers_to_extract=said)  # type: ignore[arg-type]
    assert sentence in str(refusal.value)


@pytest.mark.parametrize("words", ["-x", "--layers", "10-", "1 --layer two"])
def test_a_flag_with_a_word_that_is_no_layer_is_one_sentence(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["extract", "--model_path", "m", "--tasks_file", "t", "--layers", *words.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --layers_to_extract ") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((12,), "layer 12 does not exist; the model has layers 0 to 11"),
        (("10-12",), "layer 12 does not exist; the model has layers 0 to 11"),
        ((-13,), "layer -13 does not exist; the model has layers 0 to 11, or -12 to -1 from the end"),
        (("0-999999999",), "layer 999999999 does not exist; the model has layers 0 to 11"),
        (("11--5",), "layers 11--5 run backwards"),
    ],
)
def test_a_layer_that_the_model_lacks_is_refused_with_those_it_has(words: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(UserError) as refusal:
        choose_layers(words, LAYERS)
    assert sentence in str(refusal.value)
