"""Training computes what transformers and torch compute, comes near the walk's entropy, and survives SIGKILL."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from small_run import ROOT, run_cli, started, whole_lines
from stage02 import make_walks, settings, trained, write_preset
from transformers import AutoModelForCausalLM, AutoTokenizer

from jax_extract.devices.mesh import make_mesh
from jax_extract.errors import UserError
from jax_extract.inputs.walk_dataset import Walks
from jax_extract.training.checkpoints import TrainerState, checkpoint_folder, read_state, saved_steps
from jax_extract.training.optimizer_state import save_optimizer
from jax_extract.walks.batches import Batches
from jax_extract.walks.command import train
from jax_extract.walks.model import TrainedModel
from jax_extract.walks.saved import KIND, SavedModel
from jax_extract.walks.step import TrainProgram, linear_decay_adamw
from jax_extract.weights.folder import SafetensorsCheckpoint
from jax_extract.weights.load import Weights
from jax_extract.weights.save import hugging_face_tensors
from models.layers import Numerics

VOCABULARY, ROWS, LONGEST, RATE, STEPS = 25, 6, 11, 3e-3, 10
# Width, layers, heads and feed-forward width as documented; and how many parameters that are, for 100 nodes.
PRESETS = {
    "400K": ((64, 6, 4, 256), 406_848),
    "2M": ((128, 8, 8, 512), 2_124_928),
    "6M": ((256, 6, 8, 1024), 6_345_984),
    "12M": ((384, 8, 8, 1536), 18_957_696),
}


@pytest.fixture
def model(tmp_path: Path) -> TrainedModel:
    return TrainedModel.open(str(write_preset(tmp_path / "preset.json")), VOCABULARY, LONGEST)


@pytest.fixture
def walks() -> Walks:
    random = np.random.default_rng(0)
    return Walks(
        random.integers(0, VOCABULARY, (ROWS, LONGEST)).astype(np.int32), np.array([11, 11, 4, 7, 1, 9], np.int32)
    )


def _torch_model(model: TrainedModel, tensors: dict[str, np.ndarray]) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = LlamaForCausalLM(LlamaConfig(**model.said))
    ours.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in tensors.items()})
    return ours.train()


def _torch_loss(model: torch.nn.Module, walks: Walks) -> torch.Tensor:
    tokens = torch.from_numpy(walks.tokens.astype(np.int64))
    real = torch.arange(LONGEST)[None] < torch.from_numpy(walks.lengths)[:, None]
    return model(input_ids=tokens, attention_mask=real.long(), labels=torch.where(real, tokens, -100)).loss


def _program(model: TrainedModel) -> TrainProgram:
    optimizer = linear_decay_adamw(RATE, STEPS)
    return TrainProgram(model.port, model.config, make_mesh(None), Numerics("float32"), optimizer)


def _tensors(model: TrainedModel, params: dict) -> dict[str, np.ndarray]:
    return hugging_face_tensors(model.port, model.config, params)


def test_the_loss_is_that_of_transformers_on_the_same_batch(model: TrainedModel, walks: Walks) -> None:
    params = model.first_parameters(seed=1)
    program = _program(model)
    _, loss = program.step(program.start(params), walks.tokens[None], walks.lengths[None])
    expected = float(_torch_loss(_torch_model(model, _tensors(model, params)), walks).detach())
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    evaluated = program.evaluate(program.place(params), walks.tokens, walks.lengths)
    assert float(evaluated) / walks.transitions == pytest.approx(expected, rel=1e-5)


def test_steps_are_those_of_torch(model: TrainedModel, walks: Walks) -> None:
    """AdamW with clipped gradients and a linear decay, as transformers' Trainer has them by default."""
    params = model.first_parameters(seed=1)
    theirs = _torch_model(model, _tensors(model, params))
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    program = _program(model)
    state = program.start(params)
    for _ in range(3):
        _torch_loss(theirs, walks).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        state, _ = program.step(state, walks.tokens[None], walks.lengths[None])
    expected = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}
    for name, value in _tensors(model, state.params).items():
        moved = np.abs(expected[name] - _tensors(model, params)[name]).max()
        assert moved > 1e-3  # three steps of RATE
        # A gradient near Adam's epsilon is a quotient of roundings: hence the share of values.
        assert np.quantile(np.abs(value - expected[name]), 0.99) < 2e-3 * RATE, name
        assert np.abs(value - expected[name]).max() < RATE, name


def test_batches_that_are_accumulated_are_one_batch(model: TrainedModel, walks: Walks) -> None:
    params = model.first_parameters(seed=1)
    whole, parts = _program(model), _program(model)
    one, loss = whole.step(whole.start(params), walks.tokens[None], walks.lengths[None])
    cut = walks.tokens.reshape(3, 2, LONGEST), walks.lengths.reshape(3, 2)
    other, same = parts.step(parts.start(params), *cut)
    assert float(same) == pytest.approx(float(loss), rel=1e-6)
    for of_one, of_other in zip(jax.tree.leaves(one.optimizer), jax.tree.leaves(other.optimizer), strict=True):
        np.testing.assert_allclose(np.asarray(of_one), np.asarray(of_other), rtol=1e-3, atol=1e-7)


def test_every_epoch_sees_every_walk_once_whatever_the_step_it_goes_on_from() -> None:
    walks = Walks(np.arange(23, dtype=np.int32)[:, None] * np.ones((1, 3), np.int32), np.full(23, 3, np.int32))
    batches = Batches(walks, rows=4, batches=2, epochs=2, seed=7, multiple=3)
    assert batches.steps_an_epoch == 3 and batches.steps == 6
    steps = list(batches.from_step(0))
    assert all(tokens.shape == (2, 6, 3) for tokens, _ in steps)
    orders = [
        [int(t) for tokens, lengths in some for t in tokens[lengths > 0][:, 0]] for some in (steps[:3], steps[3:])
    ]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(23)) and orders[0] != orders[1]
    for done in range(7):
        rest = list(batches.from_step(done))
        assert len(rest) == 6 - done
        for (tokens, lengths), (expected, of_expected) in zip(rest, steps[done:], strict=True):
            assert (tokens == expected).all() and (lengths == of_expected).all()


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_have_the_documented_shapes(name: str) -> None:
    model = TrainedModel.open(str(ROOT / f"configs/config_{name}_llama.json"), 100, 128)
    config = model.config
    shape = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    assert (shape, model.parameters) == PRESETS[name]
    assert config.model_type == "llama"


# ------------------------------------------------------------------------------------ whole trainings


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_walks(tmp_path_factory.mktemp("walks") / "dataset")


def test_the_final_model_is_what_transformers_loads_and_computes(dataset: Path, tmp_path: Path) -> None:
    done = trained(write_preset(tmp_path / "p.json"), dataset, tmp_path / "run", save_steps=3)
    assert saved_steps(tmp_path / "run") == [3]
    for folder in (done["folder"], checkpoint_folder(tmp_path / "run", 3)):
        theirs = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = tokenizer("0 1 2 7 24 3", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = theirs(ids).logits[0]
        nats = torch.nn.functional.cross_entropy(expected[:-1], ids[0, 1:], reduction="sum")
        ours = _nats_of(folder, ids.numpy().astype(np.int32))
        assert ours == pytest.approx(float(nats), rel=1e-5)


def _nats_of(folder: Path, tokens: np.ndarray) -> float:
    model = TrainedModel.open(str(folder), VOCABULARY, LONGEST)
    program = _program(model)
    checkpoint = SafetensorsCheckpoint(folder, str(folder))
    params = Weights(checkpoint, model.port, model.config, 2, head=True).load(program.mesh, "float32")
    return float(program.evaluate(params, tokens, np.full(1, tokens.shape[1], np.int32)))


def test_killed_by_sigkill_it_goes_on_to_the_same_weights_bit_by_bit(dataset: Path, tmp_path: Path) -> None:
    """Killed after a step, then before its next checkpoint has its name, then just after one has."""
    preset = write_preset(tmp_path / "p.json")
    options = {"epochs": 4, "batch_size": 10, "grad_accum": 2, "save_steps": 7}
    whole = trained(preset, dataset, tmp_path / "whole", **options)
    assert whole["steps"] == 40 and saved_steps(tmp_path / "whole") == [7, 14, 21, 28, 35]
    flags = _flags(model_config=preset, dataset_dir=dataset, output_dir=tmp_path / "killed", **options)
    for failpoint, saved in (
        ("training.step:after:18", [7, 14]),
        ("folder.rename:before:1", [7, 14]),
        ("folder.rename:after:2", [7, 14, 21, 28]),
    ):
        done = run_cli("train", *flags, script=None, cwd=tmp_path, env={"JAX_EXTRACT_FAILPOINT": failpoint})
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert saved_steps(tmp_path / "killed") == saved
        assert not (tmp_path / "killed" / "final_model").exists()
    again = trained(preset, dataset, tmp_path / "killed", **options)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "vocab.json"):
        assert (again["folder"] / name).read_bytes() == (whole["folder"] / name).read_bytes(), name
    assert again["loss"] == whole["loss"]
    logs = [read_state(KIND, each["folder"], "").log_history for each in (again, whole)]
    assert logs[0] == logs[1] and len(logs[0]) == 5
    assert not list((tmp_path / "killed").glob(".unfinished*"))


def test_sigterm_saves_a_checkpoint_first(dataset: Path, tmp_path: Path) -> None:
    preset = write_preset(tmp_path / "p.json")
    endless = {"epochs": 1_000_000, "save_steps": 1_000_000_000, "eval_steps": 1_000_000_000, "logging_steps": 1}
    flags = _flags(model_config=preset, dataset_dir=dataset, output_dir=tmp_path / "run", **endless)
    with started("train", *flags, script=None) as process:
        next(said for said in process.stdout if said.startswith("train    step 5 of"))
        process.terminate()
        _, told = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    (step,) = saved_steps(tmp_path / "run")
    assert step >= 5
    assert f"stopped by SIGTERM: the checkpoint of step {step} is there; run the same command again to go on" in told
    read_state(KIND, checkpoint_folder(tmp_path / "run", step), "")  # whole


def _flags(**options: object) -> list[str]:
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


def test_a_training_that_is_done_is_told_and_not_repeated(dataset: Path, tmp_path: Path) -> None:
    preset = write_preset(tmp_path / "p.json")
    first = trained(preset, dataset, tmp_path / "run")
    before = (first["folder"] / "model.safetensors").stat().st_mtime_ns
    assert trained(preset, dataset, tmp_path / "run") == first
    assert (first["folder"] / "model.safetensors").stat().st_mtime_ns == before


def test_the_state_of_a_checkpoint_says_what_was_logged(dataset: Path, tmp_path: Path) -> None:
    trained(write_preset(tmp_path / "p.json"), dataset, tmp_path / "run", save_steps=2, eval_steps=2, logging_steps=2)
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and state["max_steps"] == 4 and state["epoch"] == 0.5
    assert [entry["step"] for entry in state["log_history"]] == [2, 2]
    assert {"loss", "learning_rate"} <= set(state["log_history"][0])
    assert {"eval_loss", "walk_entropy"} <= set(state["log_history"][1])


def test_a_walk_of_one_word_is_left_out_and_told(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_short = Path(shutil.copytree(dataset, tmp_path / "short"))
    for name in ("train.jsonl", "validation.jsonl"):
        with (with_short / name).open("a") as file:
            file.write('{"text": "3"}\n')
    preset = write_preset(tmp_path / "p.json", num_hidden_layers=1)
    expected = trained(preset, dataset, tmp_path / "without")
    done = train(settings(preset, with_short, tmp_path / "run"))
    assert "200 walks to train on, 30 to evaluate on" in (said := whole_lines(capsys.readouterr().out))
    assert "; 2 walks of fewer than 2 words left out" in said
    assert done["loss"] == expected["loss"]
    names = [each["folder"] / "model.safetensors" for each in (done, expected)]
    assert names[0].read_bytes() == names[1].read_bytes()


RARE = {"logging_steps": 1000, "eval_steps": 1000}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({**RARE, "logging_steps": 1}, "the loss is nan at step [2-4]"),
        ({**RARE, "eval_steps": 1}, "the loss is nan at step 2"),
        ({**RARE, "save_steps": 1}, "a parameter is no finite number at step 2"),
    ],
)
def test_a_training_that_diverges_is_refused_and_nothing_of_it_is_kept(
    options: dict[str, int], said: str, dataset: Path, tmp_path: Path
) -> None:
    preset = write_preset(tmp_path / "p.json", num_hidden_layers=1, hidden_size=8)
    with pytest.raises(UserError, match=rf"{said}, so training does not converge; give a smaller --learning_rate"):
        trained(preset, dataset, tmp_path / "run", learning_rate=1e30, **options)
    assert not (tmp_path / "run" / "final_model").exists()
    for step in saved_steps(tmp_path / "run"):
        file = SafetensorsCheckpoint(checkpoint_folder(tmp_path / "run", step), "")
        assert all(np.isfinite(file.read(name)).all() for name in file.names())


@pytest.mark.parametrize("large", ["weights", "optimizer"])
def test_a_full_disk_is_told_and_leaves_no_checkpoint(large: str, tmp_path: Path) -> None:
    """Each in its library's own way, by a limit on the size of a file."""
    numbers = np.random.default_rng(0).standard_normal(200_000, np.float32)
    tensors = {"w": numbers if large == "weights" else numbers[:1]}
    state = jax.device_put(numbers if large == "optimizer" else numbers[:1])
    said = TrainerState(1, 2, 0.5, [], {"model_config": {}}, {}, [])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"checkpoint-1 cannot be written \(.*\); what is whole stays"):
            saved = SavedModel({}, {"0": 0}, 9)
            saved.save(tmp_path / "checkpoint-1", tensors, said, lambda to: save_optimizer(to, state))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_sizes_beyond_the_data_are_those_of_the_data(dataset: Path, tmp_path: Path) -> None:
    preset = write_preset(tmp_path / "p.json", num_hidden_layers=1)
    done = trained(preset, dataset, tmp_path / "run", batch_size=2**31 - 1, grad_accum=2**31 - 1)
    assert done["steps"] == 1


def test_several_devices_share_a_batch_and_come_to_the_same_loss(dataset: Path, tmp_path: Path) -> None:
    preset = write_preset(tmp_path / "p.json")
    one = trained(preset, dataset, tmp_path / "one")
    words = ["--model_config", preset, "--dataset_dir", dataset, "--output_dir", tmp_path / "three", "--device", "cpu"]
    words = ["train", *words, "--mesh_shape", "3,1"]
    done = run_cli(*words, script=None, cwd=tmp_path, env={"JAX_NUM_CPU_DEVICES": "3"})
    assert done.returncode == 0, done.stderr
    assert "on 3 cpu devices, mesh 3,1" in " ".join(done.stdout.split())
    log = json.loads((tmp_path / "three" / "final_model" / "trainer_state.json").read_text())["log_history"]
    assert log[-1]["eval_loss"] == pytest.approx(one["loss"], rel=1e-5)
