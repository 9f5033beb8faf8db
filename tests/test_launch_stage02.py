"""The scripts of stage 02: the documented variables and defaults, in the commands that they start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import ROOT, environment
from stage02 import write_preset

SCRIPTS = ROOT / "launch" / "stage02"
DATASET = "results/king_torus_10x10/dataset"
OF_RUN = ("02a_model_training.sh", "02b_representation_extraction.sh", "run_stage02.sh")
FAKE = """#!/bin/bash
if [[ " $* " == *" --check_only True"* ]]; then
  printf '%s\\n' "$*" >>"$CALLS.checked"
  printf '%s\\n' "$JAX_EXTRACT_VARIABLES" >>"$CALLS.variables"
  [[ -s $CALLS ]] && echo "something ran before all was checked" >&2 && exit 1
  exit 0
fi
printf '%s\\n' "$*" >>"$CALLS"
case $1 in
  train) while [[ $1 != --output_dir ]]; do shift; done && mkdir -p "$2/final_model" ;;
  walks) mkdir -p "$3" ;;
esac
"""


class Scripts:
    """Runs scripts in an empty directory with a `jax-extract` that notes its words."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._calls = place.parent / "calls"
        tools = place.parent / "tools"
        tools.mkdir()
        (tools / "jax-extract").write_text(FAKE)
        (tools / "jax-extract").chmod(0o755)
        self._path = f"{tools}:{os.environ['PATH']}"

    def __call__(self, script: str, *words: str, **variables: str) -> list[str]:
        """The commands that it started, as lines."""
        self._calls.write_text("")
        done = self.run(script, *words, **variables)
        assert done.returncode == 0, done.stderr
        return self._calls.read_text().splitlines()

    def checked(self, **variables: str) -> tuple[list[str], list[str]]:
        """The commands with which the whole stage checks its variables; what it tells each of them about variables."""
        assert self("run_stage02.sh", CHECK_ONLY="true", **variables) == []
        checked, told = (Path(f"{self._calls}.{what}").read_text().splitlines() for what in ("checked", "variables"))
        return checked, told

    def refused(self, script: str, *words: str, **variables: str) -> str:
        self._calls.write_text("")
        done = self.run(script, *words, **variables)
        assert done.returncode == 2 and self._calls.read_text() == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        return done.stderr

    def run(self, script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": self._path, "CALLS": str(self._calls), **variables}
        return subprocess.run(
            [SCRIPTS / script, *words], cwd=self.place, env=env, capture_output=True, text=True, check=False
        )


@pytest.fixture
def start(tmp_path: Path) -> Scripts:
    (tmp_path / "here").mkdir()
    return Scripts(tmp_path / "here")


def test_training_has_the_documented_defaults(start: Scripts) -> None:
    (command,) = start("02a_model_training.sh")
    assert command == (
        f"train --model_config {ROOT}/configs/config_400K_llama.json --dataset_dir {DATASET} "
        "--output_dir results/king_torus_10x10/400K_llama --epochs 1 --batch_size 50 --grad_accum 1 "
        "--learning_rate 5e-4 --max_length 128 --save_steps 200 --eval_steps 200 --logging_steps 10 --device auto"
    )


def test_training_takes_the_documented_variables(start: Scripts) -> None:
    said = {
        "CONFIG": "a b.json",
        "DATASET_DIR": "data dir",
        "OUTPUT_DIR": "out",
        "EPOCHS": "10",
        "BATCH_SIZE": "32",
        "GRAD_ACCUM": "2",
        "LEARNING_RATE": "1e-3",
        "MAX_LENGTH": "64",
        "SAVE_STEPS": "3",
        "EVAL_STEPS": "4",
        "LOGGING_STEPS": "5",
        "USE_CPU": "true",
    }
    (command,) = start("02a_model_training.sh", **said)
    for flag, value in {
        "model_config": "a b.json",
        "dataset_dir": "data dir",
        "output_dir": "out",
        "epochs": "10",
        "batch_size": "32",
        "grad_accum": "2",
        "learning_rate": "1e-3",
        "max_length": "64",
        "save_steps": "3",
        "eval_steps": "4",
        "logging_steps": "5",
        "device": "cpu",
    }.items():
        assert f"--{flag} {value}" in command


def test_a_run_is_called_as_its_preset_is_or_as_it_is_said(start: Scripts) -> None:
    (command,) = start("02a_model_training.sh", CONFIG="configs/config_2M_llama.json", DATASET_NAME="ring")
    assert "--output_dir results/ring/2M_llama " in command
    (command,) = start("02a_model_training.sh", RUN_NAME="6M_llama")
    assert f"--model_config {ROOT}/configs/config_6M_llama.json " in command
    (command,) = start("02a_model_training.sh", RUN_NAME="mine", CONFIG="configs/config_2M_llama.json")
    assert "config_2M_llama.json " in command and "--output_dir results/king_torus_10x10/mine " in command


def test_the_documented_workflow_extracts_from_the_model_that_was_trained(start: Scripts) -> None:
    start("02a_model_training.sh", CONFIG="configs/config_2M_llama.json", EPOCHS="10", BATCH_SIZE="32")
    (command,) = start("02b_representation_extraction.sh", REPRESENTATIONS="after_block ffn_gate ffn_up")
    run = "results/king_torus_10x10/2M_llama"
    assert command == (
        f"token-representations --model_path {run}/final_model --representation_dir {run}/token_representations "
        "--representations after_block ffn_gate ffn_up --device auto"
    )
    (command,) = start("02b_representation_extraction.sh", MODEL_DIR=f"{run}/final_model", REPRESENTATION_DIR="there")
    assert "--representation_dir there --representations after_block " in command


def test_one_script_runs_all_of_it_on_one_run(start: Scripts) -> None:
    walks, train, extract = start("run_stage02.sh", CONFIG="configs/config_6M_llama.json")
    run = "results/king_torus_10x10/6M_llama"
    assert walks == f"walks --dataset_dir {DATASET}"
    assert f"--output_dir {run} " in train
    assert f"--model_path {run}/final_model " in extract and f"--dataset_dir {DATASET}" in extract


def test_the_whole_stage_checks_every_variable_before_anything_runs(start: Scripts) -> None:
    said = {
        **{"GRAPH": "ring", "NODES": "9", "NEIGHBOURS": "4", "GRAPH_SEED": "1", "TRAIN_WALKS": "5"},
        **{"VALIDATION_WALKS": "6", "WALK_LENGTH": "7", "SEED": "8", "CONFIG": "c.json", "OUTPUT_DIR": "out"},
        **{"EPOCHS": "2", "BATCH_SIZE": "3", "GRAD_ACCUM": "4", "LEARNING_RATE": "abc", "MAX_LENGTH": "64"},
        **{"SAVE_STEPS": "10", "EVAL_STEPS": "11", "LOGGING_STEPS": "12", "DTYPE": "float32", "MESH_SHAPE": "1,1"},
        **{"TEXT_COLUMN": "walk", "DEVICE": "cpu", "OVERWRITE": "true", "ALLOW_NUMERIC_CHANGE": "true"},
        **{"REPRESENTATIONS": "ffn_up", "SOURCE": "occurrences", "WALKS": "train", "REPRESENTATION_DIR": "there"},
        "DATASET_DIR": "walks to be made",
    }
    checked, told = start.checked(**said)
    assert [line.split()[0] for line in checked] == ["walks", "train", "token-representations"]
    flags = {pair.partition("=")[::2] for line in told for pair in line.split()}
    variables = {variable: flag for flag, variable in flags}
    for variable, value in said.items():
        assert f"--{variables[variable]} {'True' if value == 'true' else value}" in "\n".join(checked)
    assert list(start.place.iterdir()) == []


def test_a_model_that_is_still_to_be_trained_is_no_mistake_and_another_that_is_not_there_is_one(start: Scripts) -> None:
    checked, _ = start.checked()
    assert "--model_path results/king_torus_10x10/400K_llama/final_model " in checked[-1]
    refused = start.refused("run_stage02.sh", MODEL_DIR="typo")
    assert "there is no trained model typo" in refused


def test_walks_that_are_there_are_compared_with_what_is_said_of_them(start: Scripts) -> None:
    """By 01 itself, which refuses to mix; not where nothing is said, nor where the walks are the user's own."""
    dataset = start.place / DATASET
    dataset.mkdir(parents=True)
    assert [line.split()[0] for line in start("run_stage02.sh", NODES="400")] == ["train", "token-representations"]
    (dataset / "graph.json").touch()
    assert [line.split()[0] for line in start("run_stage02.sh", SEED="4")] == ["train", "token-representations"]
    for name in ("GRAPH", "NODES", "NEIGHBOURS", "GRAPH_SEED", "TRAIN_WALKS", "VALIDATION_WALKS", "WALK_LENGTH"):
        assert start("run_stage02.sh", **{name: "9"})[0] == f"walks --dataset_dir {DATASET} --{name.lower()} 9"


def test_hook_points_may_stand_on_several_lines(start: Scripts) -> None:
    (start.place / "model").mkdir()
    said = {"MODEL_DIR": "model", "REPRESENTATIONS": "\nafter_block\n ffn_gate  ffn_up\n"}
    (command,) = start("02b_representation_extraction.sh", **said)
    assert " --representations after_block ffn_gate ffn_up --device" in command


def test_the_mends_that_are_told_are_variables(start: Scripts) -> None:
    said = {"OVERWRITE": "yes", "ALLOW_NUMERIC_CHANGE": "true", "TEXT_COLUMN": "walk"}
    (command,) = start("02a_model_training.sh", **said)
    assert command.endswith("--text_column walk --overwrite True --allow_numeric_change True")
    (start.place / "model").mkdir()
    (command,) = start("02b_representation_extraction.sh", MODEL_DIR="model", TEXT_COLUMN="walk")
    assert command.endswith("--text_column walk")


def test_representations_lie_beside_the_model_that_they_are_of(start: Scripts) -> None:
    *_, extract = start("run_stage02.sh", OUTPUT_DIR="mine", CONFIG="configs/config_2M_llama.json")
    assert "--model_path mine/final_model --representation_dir mine/token_representations " in extract


def test_walks_take_their_variables(start: Scripts) -> None:
    (command,) = start("01_graph_walks.sh", DATASET_NAME="ring", GRAPH="ring", NODES="50", WALK_LENGTH="9")
    assert command == "walks --dataset_dir results/ring/dataset --graph ring --nodes 50 --walk_length 9"


@pytest.mark.parametrize(
    ("script", "words", "variables", "said"),
    [
        ("02a_model_training.sh", [], {"USE_CPU": "maybe"}, "USE_CPU maybe must be true or false"),
        ("02a_model_training.sh", [], {"USE_CPU": "true", "DEVICE": "gpu"}, "contradict each other"),
        ("02a_model_training.sh", [], {"DATASET_NAME": "../up"}, "is no name of a folder"),
        ("02a_model_training.sh", [], {"RUN_NAME": "$(touch owned)"}, "is no name of a folder"),
        ("02a_model_training.sh", ["EPOCHS=3"], {}, "takes variables of the environment"),
        *((script, [], {"CONFIG": ".."}, "RUN_NAME, as CONFIG gives it, .. is no name") for script in OF_RUN),
        *((script, [], {"CONFIG": "a/config_.json"}, "CONFIG gives it, '' is no name") for script in OF_RUN),
        ("02b_representation_extraction.sh", [], {}, "there is no trained model"),
        (
            "02b_representation_extraction.sh",
            [],
            {"DATASET_DIR": "typo"},
            "there is no dataset folder DATASET_DIR typo",
        ),
        ("02b_representation_extraction.sh", [], {"MODEL_DIR": "/", "REPRESENTATIONS": " \n"}, "names no hook point"),
    ],
)
def test_a_variable_that_is_none_is_refused(
    script: str, words: list[str], variables: dict[str, str], said: str, start: Scripts
) -> None:
    assert said in start.refused(script, *words, **variables)
    assert list(start.place.iterdir()) == []


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with the real `jax-extract`."""
    folder = tmp_path / "tools"
    folder.mkdir()
    (folder / "jax-extract").write_text(f'#!/bin/bash\nexec "{sys.executable}" -m jax_extract.cli "$@"\n')
    (folder / "jax-extract").chmod(0o755)
    return folder


def test_the_whole_stage_names_the_variable_and_makes_nothing(tools: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    env = environment({"PATH": f"{tools}:{os.environ['PATH']}", "LEARNING_RATE": "abc"})
    done = subprocess.run(
        [SCRIPTS / "run_stage02.sh"], cwd=tmp_path / "here", env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: LEARNING_RATE 'abc' is no number\n"
    assert list((tmp_path / "here").iterdir()) == []


def test_the_whole_stage_runs_with_the_real_commands(tools: Path, tmp_path: Path) -> None:
    preset = write_preset(tmp_path / "config_tiny.json")
    small = {
        "CONFIG": str(preset),
        "NODES": "9",
        "TRAIN_WALKS": "20",
        "VALIDATION_WALKS": "5",
        "WALK_LENGTH": "6",
        "LOGGING_STEPS": "1",
    }
    env = environment({"PATH": f"{tools}:{os.environ['PATH']}", "USE_CPU": "true", **small})
    done = subprocess.run(
        [SCRIPTS / "run_stage02.sh"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "results/king_torus_10x10/tiny"
    assert (run / "final_model/model.safetensors").is_file()
    assert (run / "token_representations/representation_info.json").is_file()
    assert "neighbours lie at" in done.stdout
