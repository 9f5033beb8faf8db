"""A mistake in stage 02 is one sentence with exit code 2, told before anything is computed; what is there stays."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_run import snapshot
from stage02 import make_walks, trained, write_preset

from jax_extract import cli
from jax_extract.inputs.walk_dataset import WalkDataset
from jax_extract.training.checkpoints import STATE_FILE
from jax_extract.walks.step import TrainProgram

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a preset, and a training with checkpoints of steps 2 and 4 of 5, and its final model."""
    root = tmp_path_factory.mktemp("made")
    make_walks(root / "dataset", train_walks=50)
    trained(write_preset(root / "preset.json"), root / "dataset", root / "run", batch_size=10, save_steps=2)
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "place"))


@pytest.fixture
def refused(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs a command with some options changed, checks how it ends and that all files stay, returns the sentence."""
    monkeypatch.setattr(TrainProgram, "step", lambda *_: pytest.fail("a step was computed"))

    def run(command: str, **options: object) -> str:
        before = snapshot(place)
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        try:
            code: Any = cli.main([command, *words])
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr().err
        assert code == 2, said
        assert said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said and len(said) < 600
        after = {name: content for name, content in snapshot(place).items() if not name.endswith(".lock")}
        assert after == {name: content for name, content in before.items() if not name.endswith(".lock")}
        return said

    return run


@pytest.fixture
def train(place: Path, refused: Refused) -> Refused:
    def run(**options: object) -> str:
        named = {
            "model_config": place / "preset.json",
            "dataset_dir": place / "dataset",
            "output_dir": place / "new",
            **options,
        }
        return refused("train", **named)

    return run


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, "--epochs 0 must be from 1"),
        ({"max_length": 1}, "--max_length 1 must be from 2"),
        ({"learning_rate": -1}, "--learning_rate -1.0 must be a positive number"),
        ({"learning_rate": 1e300}, "--learning_rate 1e+300 must be a positive number below 1e+38"),
        ({"learning_rate": "fast"}, "--learning_rate 'fast' is no number"),
        ({"max_length": 129}, "more than the max_position_embeddings 128"),
        ({"device": "gpu"}, "--device gpu was asked for and JAX finds only cpu devices here"),
        ({"device": "tpu"}, "--device tpu was asked for and JAX finds only cpu devices here"),
        ({"mesh_shape": "2,1"}, "mesh shape 2,1 has 2 places but there is 1 cpu device"),
        ({"text_column": "walk"}, "has no walk, only text"),
    ],
)
def test_an_option_that_cannot_be_is_refused(
    options: dict[str, object], said: str, train: Refused, place: Path
) -> None:
    assert said in train(**options)
    assert not (place / "new").exists()


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("walks", {"nodes": 10}, "a torus of 10 nodes is no square; give a square number from 9, such as NODES 100"),
        ("walks", {"graph": "tor"}, "the graphs are: torus, ring, random_regular, erdos_renyi (GRAPH=tor)"),
        ("train", {"learning_rate": "abc"}, "error: LEARNING_RATE 'abc' is no number\n"),
        ("train", {"epochs": 0}, "error: EPOCHS 0 must be from 1"),
        ("train", {"max_length": 129}, "error: MAX_LENGTH 129 is more than the max_position_embeddings 128"),
        ("train", {"model_config": "config_3M_llama.json"}, "given as CONFIG; "),
        ("train", {"mesh_shape": "2,1"}, "use MESH_SHAPE 1,1"),
        ("token-representations", {"representations": "ffn_gat"}, "(REPRESENTATIONS=ffn_gat)"),
        ("token-representations", {"source": "walks"}, "error: SOURCE 'walks' is none of 'tokens', 'occurrences'"),
    ],
)
def test_with_check_only_a_mistake_is_told_before_anything_is_there_in_the_words_of_the_script(
    command: str, options: dict[str, object], said: str, refused: Refused, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = place / "new"
    needed: dict[str, dict[str, object]] = {
        "walks": {"dataset_dir": new / "walks"},
        "train": {"model_config": place / "preset.json", "dataset_dir": new / "walks", "output_dir": new / "run"},
        "token-representations": {"model_path": new / "run" / "final_model", "representation_dir": new / "rows"},
    }
    given = {**needed[command], **options}
    variables = {flag: {"model_config": "CONFIG"}.get(flag, flag.upper()) for flag in given}
    monkeypatch.setenv("JAX_EXTRACT_VARIABLES", " ".join(f"{flag}={name}" for flag, name in variables.items()))
    for flag, name in variables.items():
        monkeypatch.setenv(name, str(given[flag]))
    assert said in refused(command, **given, check_only=True)


def test_with_check_only_nothing_is_made_where_nothing_is_wrong(place: Path) -> None:
    new = place / "new"
    for command, options in (
        ("walks", {"dataset_dir": new / "walks"}),
        ("train", {"model_config": place / "preset.json", "dataset_dir": new / "walks", "output_dir": new / "run"}),
        ("token-representations", {"model_path": new / "final_model", "representation_dir": new / "rows"}),
    ):
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        assert cli.main([command, *words, "--check_only", "True"]) == 0
    assert not new.exists()


def test_an_unknown_preset_is_refused_with_those_there_are(train: Refused, place: Path) -> None:
    (place / "config_2M_llama.json").write_text("{}")
    said = train(model_config=place / "config_3M_llama.json")
    assert "there is no model configuration" in said and "config_2M_llama.json" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 1200}, "has vocab_size 1200 and the dataset 25 words; leave vocab_size out"),
        ({"model_type": "gpt2"}, "has the model_type 'gpt2'; training is for qwen2, qwen3, llama, mistral"),
        ({"model_type": None}, "has the model_type None"),
        ({"hidden_size": None}, "config.json lacks 'hidden_size'"),
        ({"hidden_act": "mish"}, "asks for hidden_act 'mish'"),
        ({"attention_dropout": 0.1}, "asks for attention_dropout"),
        ({"initializer_range": "wide"}, "has initializer_range 'wide'; it must be a positive number"),
        ({"initializer_range": True}, "has initializer_range True; it must be a positive number"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"moe_layers": 2}, "has 'moe_layers', which no model of that type reads"),
    ],
)
def test_a_configuration_that_cannot_be_trained_is_refused(
    changes: dict[str, Any], said: str, train: Refused, place: Path
) -> None:
    assert said in train(model_config=write_preset(place / "other.json", **changes))


def test_a_configuration_that_is_no_json_is_refused(train: Refused, place: Path) -> None:
    (place / "broken.json").write_text('{"model_type": ')
    assert "broken.json, line 1 is not valid JSON" in train(model_config=place / "broken.json")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("train.jsonl", '{"input_ids": [1, 2]}\n', "has no text, only input_ids: name what holds the text with"),
        ("train.jsonl", '{"text": "0 1 99"}\n', "has the word '99', which is not among the 25 of vocab.json"),
        ("train.jsonl", '{"text": "0 1', "is not JSON"),
        ("train.jsonl", "", "holds no walk"),
        ("train.jsonl", '{"text": "3"}\n', "no walk of"),
        ("validation.jsonl", '{"text": "0 x"}\n', "has the word 'x'"),
        ("vocab.json", '{"0": 0, "1": 2}', "its token ids are not 0 to 1, each once"),
        ("vocab.json", '{"\\ud800": 0}', r"'\ud800' is no word"),
        ("vocab.json", '{"": 0}', "'' is no word"),
        ("vocab.json", '{"0": 0, "a b": 1}', "'a b' is no word: it is empty, has a space in it or is not Unicode"),
        ("vocab.json", '{"0": 0, "1": 1}', "has 25 nodes and vocab.json 2 words that are not those nodes"),
        ("train.jsonl", '{"text": "0 1 1"}\n', "line 1, goes from 1 to 1, which are no neighbours in graph.json"),
        ("validation.jsonl", '{"text": "0 1"}\n{"text": "0 12"}\n', "line 2, goes from 0 to 12, which are"),
        ("graph.json", '{"name": "g", "nodes": 25, "edges": [[3, 3]]}', "its edges are not pairs of nodes"),
        ("graph.json", "[]", "is damaged"),
    ],
)
def test_a_dataset_that_is_none_is_refused(file: str, content: str, said: str, train: Refused, place: Path) -> None:
    (place / "dataset" / file).write_text(content)
    assert said in train()
    assert not (place / "new").exists()


@pytest.mark.parametrize("file", ["train.jsonl", "validation.jsonl", "vocab.json"])
def test_a_dataset_with_a_file_missing_is_refused(file: str, train: Refused, place: Path) -> None:
    (place / "dataset" / file).unlink()
    assert f"lacks {file}" in train()


def test_a_dataset_that_is_not_there_is_refused_with_the_command_that_makes_it(train: Refused, place: Path) -> None:
    assert "make one with jax-extract walks --dataset_dir" in train(dataset_dir=place / "none")


# --------------------------------------------------------------------------- what is there already


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def _edit(**changes: object) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes})) and None


def _edit_files(lost: str) -> Callable[[Path], None]:
    """Takes the files with such names out of what is said of them."""

    def change(path: Path) -> None:
        files = json.loads(path.read_text())["files"]
        _edit(files={name: of for name, of in files.items() if not name.startswith(lost)})(path)

    return change


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("model.safetensors", _cut, "damaged: model.safetensors has "),
        ("model.safetensors", _flip, "damaged: model.safetensors is not as it was written"),
        ("model.safetensors", Path.unlink, "lacks model.safetensors"),
        ("optimizer/state/manifest.ocdbt", Path.unlink, "lacks optimizer/state/manifest.ocdbt"),
        ("trainer_state.json", Path.unlink, "has no trainer_state.json"),
        ("trainer_state.json", _cut, "is damaged"),
        ("trainer_state.json", _edit(log_history=None), "is damaged"),
        ("trainer_state.json", _edit(log_history=[1]), "is damaged"),
        ("trainer_state.json", _edit(log_history=[{"eval_loss": "x"}]), "is damaged"),
        ("trainer_state.json", _edit(log_history=[{"eval_loss": float("nan")}]), "is damaged"),
        ("trainer_state.json", _edit(pending_losses={"2": 1}), "is damaged"),
        ("trainer_state.json", _edit(settings={"model_config": "x"}), "is damaged"),
        ("trainer_state.json", _edit(numerics=None), "is damaged"),
        ("trainer_state.json", _edit(epoch="1"), "is damaged"),
        ("trainer_state.json", _edit(global_step=4.0), "is damaged"),
        ("trainer_state.json", _edit(files={}), "is damaged"),
        ("trainer_state.json", _edit(files=[]), "is damaged"),
        ("trainer_state.json", _edit(files={"config.json": 5}), "is damaged"),
        ("trainer_state.json", _edit_files("model.safetensors"), "is damaged"),
        ("trainer_state.json", _edit_files("optimizer/"), "is damaged"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_named_with_what_to_remove(
    file: str, change: Callable[[Path], None], said: str, train: Refused, place: Path
) -> None:
    shutil.rmtree(place / "run" / "final_model")
    change(place / "run" / "checkpoint-4" / file)
    told = train(output_dir=place / "run", batch_size=10, save_steps=2)
    assert said in told
    # What overwriting may remove is what trainer_state.json says, so it is no mend where that is damaged itself.
    assert told.endswith("checkpoint-4 to go on from step 2\n") == (file == STATE_FILE)
    assert ("checkpoint-4 to go on from step 2, or start anew with --overwrite True" in told) == (file != STATE_FILE)


def test_a_final_model_that_is_not_whole_is_refused(train: Refused, place: Path) -> None:
    _cut(place / "run" / "final_model" / "model.safetensors")
    assert "damaged: model.safetensors" in train(output_dir=place / "run", batch_size=10)


@pytest.mark.parametrize("history", [None, [1], [{"eval_loss": "x"}]])
def test_a_final_model_whose_log_is_none_is_refused(history: object, train: Refused, place: Path) -> None:
    _edit(log_history=history)(place / "run" / "final_model" / STATE_FILE)
    assert f"{STATE_FILE} is damaged" in train(output_dir=place / "run", batch_size=10)


def test_a_model_that_transformers_trained_is_not_called_damaged(train: Refused, place: Path) -> None:
    shutil.rmtree(place / "run" / "final_model")
    (place / "run" / "checkpoint-4" / STATE_FILE).write_text('{"global_step": 4, "log_history": []}')
    told = train(output_dir=place / "run", batch_size=10)
    assert "checkpoint-4 was not written by jax-extract train" in told and "remove" not in told


def test_another_training_is_not_mixed_with_the_one_that_is_there(train: Refused, place: Path) -> None:
    there = {"output_dir": place / "run", "batch_size": 10}
    assert "holds a training with epochs 1, and 2 was asked for" in train(**there, epochs=2)
    other = write_preset(place / "other.json", hidden_size=64)
    assert "holds a model with hidden_size 32, and 64 was asked for" in train(**there, model_config=other)
    lines = (place / "dataset" / "train.jsonl").read_text().splitlines(keepends=True)
    (place / "dataset" / "train.jsonl").write_text("".join(lines[:-1]))
    assert "other data than the dataset holds" in train(**there)


def test_a_column_is_not_mixed_with_another(train: Refused, place: Path) -> None:
    for name in ("train.jsonl", "validation.jsonl"):
        path = place / "dataset" / name
        lines = [{**json.loads(line), "other": "0 1 2"} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    digest = WalkDataset.open(place / "dataset").digest
    state = json.loads((place / "run" / "final_model" / STATE_FILE).read_text())
    _edit(settings={**state["settings"], "dataset": digest})(place / "run" / "final_model" / STATE_FILE)
    said = train(output_dir=place / "run", batch_size=10, text_column="other")
    assert "holds a training with text_column 'text', and 'other' was asked for" in said


def test_other_devices_or_versions_are_not_mixed_unasked(train: Refused, place: Path) -> None:
    shutil.rmtree(place / "run" / "final_model")
    path = place / "run" / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["numerics"]["jax"] = "0.0.1"
    path.write_text(json.dumps(state))
    said = train(output_dir=place / "run", batch_size=10)
    assert "was computed with jax 0.0.1" in said
    assert "--allow_numeric_change True (ALLOW_NUMERIC_CHANGE=true)" in said and "(OVERWRITE=true)" in said


def test_two_trainings_do_not_write_to_one_place(train: Refused, place: Path) -> None:
    with (place / "run" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another training is writing to" in train(output_dir=place / "run", batch_size=10)


def _of_transformers(checkpoint: Path) -> None:
    (checkpoint / STATE_FILE).write_text('{"global_step": 4, "log_history": []}')


def _with_notes(checkpoint: Path) -> None:
    (checkpoint / "optimizer" / "MY_NOTES.txt").write_text("mine")


def _as_a_link(checkpoint: Path) -> None:
    checkpoint.symlink_to(checkpoint.rename(checkpoint.with_name("elsewhere")))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda checkpoint: (checkpoint / STATE_FILE).unlink(), "it is no whole model of jax-extract train; move it"),
        (_of_transformers, "was not written by jax-extract train, as its trainer_state.json shows; move it away"),
        (_with_notes, "MY_NOTES.txt was not written by jax-extract train; move it away"),
        (_as_a_link, "is a link, which jax-extract train does not write; move it away"),
    ],
)
@pytest.mark.parametrize("folder", ["checkpoint-2", "checkpoint-4", "final_model"])
def test_overwriting_removes_nothing_of_the_user_and_then_nothing_else(
    folder: str, change: Callable[[Path], None], said: str, train: Refused, place: Path
) -> None:
    (place / "run" / folder / "optimizer").mkdir(exist_ok=True)
    change(place / "run" / folder)
    assert said in train(output_dir=place / "run", batch_size=10, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_name_that_training_needs_and_that_is_no_folder_is_told_before_it_begins(
    overwrite: bool, train: Refused, place: Path
) -> None:
    shutil.rmtree(place / "run" / "final_model")
    (place / "run" / "checkpoint-2000").write_text("a file of the user")
    assert "checkpoint-2000 is no folder" in train(output_dir=place / "run", batch_size=10, overwrite=overwrite)
    (place / "run" / "checkpoint-2000").unlink()
    (place / "run" / "final_model").symlink_to(place / "nowhere")
    assert "final_model is no folder" in train(output_dir=place / "run", batch_size=10, overwrite=overwrite)


# ---------------------------------------------------------------------------------- representations


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"representations": "after_blok"}, "unknown hook point 'after_blok'; the nearest name is 'after_block'"),
        ({"layers": 7}, "layer 7 does not exist; the model has layers 0 to 1"),
        ({"source": "occurrences"}, "--source occurrences needs walks"),
        ({"model_path": "nowhere"}, "model 'nowhere' was not found"),
        ({"device": "gpu"}, "--device gpu was asked for"),
        ({"representation_dir": "/proc/x/y"}, "--representation_dir /proc/x/y cannot be written to"),
        ({"representation_dir": "/dev/null/sub"}, "/dev/null is no folder; name another directory"),
    ],
)
def test_representations_that_cannot_be_are_refused(
    options: dict[str, object], said: str, refused: Refused, place: Path
) -> None:
    named = {"model_path": place / "run" / "final_model", "representation_dir": place / "tr", **options}
    assert said in refused("token-representations", **named)
    assert not (place / "tr").exists()


def test_a_model_that_is_not_whole_is_refused_and_the_representations_stay(refused: Refused, place: Path) -> None:
    _cut(place / "run" / "final_model" / "model.safetensors")
    (place / "tr").mkdir()
    (place / "tr" / "token_representations.npz").write_bytes(b"of before")
    said = refused("token-representations", model_path=place / "run" / "final_model", representation_dir=place / "tr")
    assert "model.safetensors cannot be read" in said


def test_walks_of_another_vocabulary_are_refused(refused: Refused, place: Path) -> None:
    make_walks(place / "other", nodes=36)
    said = refused(
        "token-representations",
        model_path=place / "run" / "final_model",
        representation_dir=place / "tr",
        dataset_dir=place / "other",
    )
    assert "has the word '25' as token 25 and the tokenizer of" in said


def test_the_walks_of_another_vocabulary_are_refused_by_every_extraction(refused: Refused, place: Path) -> None:
    (place / "other.jsonl").write_text('{"text": "0 1 77"}\n')
    said = refused(
        "extract",
        model_path=place / "run" / "final_model",
        tasks_file=place / "other.jsonl",
        activations_dir=place / "activations",
        layers_to_extract=1,
    )
    assert "this model's tokenizer fails on a text" in said
