"""Phase 3: rows of trained models and of their base model, where the documents say, and none that could mislead.

Guarded: layout and names; rows against transformers and peft; adapter weights; checkpoints; kills; what is there
already; every results folder that cannot be trusted.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_worker import finetune
from peft import LoraConfig, PeftModel, get_peft_model
from small_run import ROOT
from tiny_reviews import finetune_words, save_changed, seem_trained
from transformers import LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

import jax_extract
from jax_extract import LoRARepresentationExtractor, RepresentationExtractor, cli, find_representations
from jax_extract.errors import UserError
from jax_extract.inputs.benchmarks import benchmark_named
from jax_extract.post_training.command import representations
from jax_extract.post_training.config import PostTrainingConfig
from jax_extract.post_training.names import Name
from jax_extract.store.storage.failpoints import VARIABLE
from jax_extract.terminal import Terminal

# peft asks transformers for what that calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")

OUTPUT = Path("results/phase3_representations/representations")
BOUND = 1e-5  # of the residual stream's rows, as for every port


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with a model of each method."""
    results = tmp_path_factory.mktemp("trained") / "results"
    seem_trained(base, results, "full_finetune")
    seem_trained(base, results, "lora")
    return results


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """A directory with a copy of it."""
    shutil.copytree(trained, tmp_path / "results")
    return tmp_path


def run(place: Path, **options: Any) -> list[Path]:
    options = {"results_dir": str(place / "results"), "device": "cpu", **options}
    if options.get("backend") == "jax":
        del options["device"]
    return representations(PostTrainingConfig(**options), Terminal(silent=True))


def files(folder: Path) -> set[str]:
    """Visible ones, by path."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in found if "_run" not in path.parts}


def rows_of_hugging_face(model: Any, base: Path, first: int = 1) -> dict[str, np.ndarray]:
    """Sample id -> float64 [3, width]: of both blocks' outputs and of the final hidden states, means over the tokens
    from `first` on."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base / "model")
    streams: list[torch.Tensor] = []
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    hooks = [block.register_forward_hook(lambda _, __, out: streams.append(out)) for block in inner.model.layers]
    means = {}
    for i, line in enumerate((base / "validation.jsonl").read_text().splitlines()):
        streams.clear()
        ids = tokenizer(benchmark_named("sst2").prompt(json.loads(line)), return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            final = inner.model(ids).last_hidden_state
        means[f"sst2:validation:{i}"] = torch.stack([*streams, final])[:, 0, first:].double().mean(1).numpy()
    for hook in hooks:
        hook.remove()
    return means


def assert_rows(folder: Path, expected: dict[str, np.ndarray]) -> None:
    for slot, name in enumerate(("layer_0.pt", "layer_1.pt", "final_hidden_states.pt")):
        stored = torch.load(folder / name, weights_only=True)
        assert sorted(stored["sample_ids"]) == sorted(expected)
        for row, sample_id in zip(stored["activations"].double().numpy(), stored["sample_ids"], strict=True):
            truth = expected[sample_id][slot]
            assert np.linalg.norm(row - truth) <= BOUND * np.linalg.norm(truth)


# --------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_rows_are_those_of_transformers_and_peft(backend: str, base: Path, place: Path) -> None:
    folders = run(place, backend=backend, dtype="float32")
    by_name = {folder.parent.name: folder for folder in folders}
    whole = next((place / "results").glob("full_finetune_*/final_model"))
    adapter = next((place / "results").glob("lora_*/final_model"))
    before = LlamaForCausalLM.from_pretrained(base / "model")
    assert_rows(by_name["sst2"], rows_of_hugging_face(before, base))
    assert_rows(
        by_name["full_finetune_sst2_seed42"], rows_of_hugging_face(LlamaForCausalLM.from_pretrained(whole), base)
    )
    assert_rows(by_name["lora_sst2_seed42"], rows_of_hugging_face(PeftModel.from_pretrained(before, adapter), base))


def test_a_mean_over_all_tokens_is_there_for_who_asks_for_it(base: Path, place: Path) -> None:
    folder, *_ = run(place, pooling="mean", methods=("lora",))
    of_base = LlamaForCausalLM.from_pretrained(base / "model")
    assert_rows(folder, rows_of_hugging_face(of_base, base, first=0))
    said = json.loads((folder / "metadata.json").read_text())
    assert said["pooling_is"] == "mean over the tokens of the text, special ones included, padding never"


def test_folders_and_files_are_where_the_document_says(place: Path) -> None:
    run(place)
    rows = {"layer_0.pt", "layer_1.pt", "final_hidden_states.pt", "metadata.json"}
    assert files(place / "base_representations") == {f"sst2/step_000000/{name}" for name in rows}
    matrices = {f"adapter_weights/lora_{side}_layer_{layer}.pt" for side in "AB" for layer in (0, 1)}
    matrices.add("adapter_weights/adapter_config.json")
    expected = {f"full_finetune_sst2_seed42/step_000000/{name}" for name in rows}
    expected |= {f"lora_sst2_seed42/step_000000/{name}" for name in rows | matrices}
    assert files(place / OUTPUT) == expected


def test_metadata_say_whose_rows_they_are_and_how_they_were_pooled(base: Path, place: Path) -> None:
    run(place)
    said = json.loads((place / OUTPUT / "lora_sst2_seed42" / "step_000000" / "metadata.json").read_text())
    expected = {"method": "lora", "task": "sst2", "seed": 42, "step": 0, "pooling": "mean_from:1"}
    expected["positions"] = "mean_from:1"
    expected["pooling_is"] = "mean over the tokens of the text but the first, special ones included, padding never"
    assert {name: said[name] for name in expected} == expected
    source = str(base / "validation.jsonl")
    assert said["validation"] == {"source": source, "asked_for": 750, "used": 60, "whole_split": True}
    assert (said["total_samples"], said["layers_extracted"], said["hidden_dim"]) == (60, [0, 1], 32)
    assert said["training"].startswith(str(place / "results" / "lora_"))
    of_base = json.loads((place / "base_representations" / "sst2" / "step_000000" / "metadata.json").read_text())
    assert (of_base["method"], of_base["seed"], of_base["validation"]) == ("base", None, said["validation"])


def test_adapter_matrices_are_those_of_the_adapter(place: Path) -> None:
    from safetensors.numpy import load_file

    run(place, methods=("lora",), base=False)
    stored = load_file(next((place / "results").glob("lora_*/final_model/adapter_model.safetensors")))
    folder = place / OUTPUT / "lora_sst2_seed42" / "step_000000" / "adapter_weights"
    found = {}
    for layer in (0, 1):
        for side in "AB":
            for module, matrix in torch.load(folder / f"lora_{side}_layer_{layer}.pt", weights_only=True).items():
                found[f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight"] = matrix.numpy()
    assert found.keys() == stored.keys()
    assert all(np.array_equal(found[name], stored[name]) for name in stored)


def test_what_is_there_is_read_by_its_name_in_either_order(place: Path) -> None:
    run(place)
    lora = place / OUTPUT / "lora_sst2_seed42"
    lora.rename(place / OUTPUT / "sst2_lora_seed42")
    (place / OUTPUT / "notes").mkdir()
    found = find_representations(place / OUTPUT)
    assert find_representations(place / "results") == found
    assert [(str(each.name), each.step) for each in found] == [
        ("full_finetune_sst2_seed42", 0),
        ("lora_sst2_seed42", 0),
    ]
    row = found[1].open().sample("sst2:validation:7").get(layer=1)
    assert row.shape == (1, 32)
    [of_base] = find_representations(place / "base_representations")
    assert (
        of_base.name,
        of_base.open().sample("sst2:validation:7").meta["answers"][0] in ("negative", "positive"),
    ) == (
        Name("base", "sst2", None),
        True,
    )
    shutil.copytree(place / OUTPUT / "sst2_lora_seed42", lora)
    with pytest.raises(UserError, match="are of the same model; move one of them away"):
        find_representations(place / OUTPUT)
    with pytest.raises(UserError, match="holds no representations"):
        find_representations(place / OUTPUT / "notes")
    with pytest.raises(UserError, match="there is no folder"):
        find_representations(place / "nothing")


@pytest.mark.parametrize("text", ["squad_v2_full_finetune_seed42", "full_finetune_squad_v2_seed42"])
def test_both_documents_names_are_understood(text: str) -> None:
    assert Name.parse(text) == Name("full_finetune", "squad_v2", 42)
    assert str(Name.parse(text)) == "full_finetune_squad_v2_seed42"


@pytest.mark.parametrize(
    "text", ["", "mrpc_seed42", "lora_mrpc", "lora_cola_seed1", "lora_mrpc_seed", "../lora_mrpc_seed1"]
)
def test_other_names_are_none(text: str) -> None:
    assert Name.parse(text) is None


def test_one_command_trains_and_another_extracts_whatever_was_trained(base: Path, tmp_path: Path) -> None:
    """With the real commands and the document's script, checkpoints among what is extracted."""
    for method in ("full_finetune", "lora"):
        words = finetune_words(base, method, "--max_steps", 8, "--save_steps", 4, "--keep_checkpoints")
        ended = finetune(words, tmp_path)
        assert ended.code == 0, ended.err
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "launch" / "phase3" / "vm1.sh"), "--", "--device", "cpu", "--checkpoints"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "7 folders" in done.stdout and "Warning" not in done.stderr
    names = ["full_finetune_sst2_seed42", "lora_sst2_seed42"]
    steps = [(str(each.name), each.step) for each in find_representations(tmp_path / OUTPUT)]
    assert steps == [(name, step) for name in names for step in (0, 4, 8)]
    for name in names:  # the last checkpoint is the final model
        last, final = (tmp_path / OUTPUT / name / f"step_{step:06d}" / "layer_1.pt" for step in (8, 0))
        assert last.read_bytes() == final.read_bytes()


def test_a_killed_command_goes_on_to_the_files_of_one_that_was_not(place: Path, tmp_path: Path) -> None:
    words = ["representations", "--results_dir", "results", "--device", "cpu"]
    env = {**os.environ, VARIABLE: "part.record:before:2"}
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    shutil.copytree(place / "results", undisturbed / "results")
    run(undisturbed)
    killed = subprocess.run([sys.executable, "-m", "jax_extract.cli", *words], cwd=place, env=env, check=False)
    assert killed.returncode == -9
    assert not (place / OUTPUT / "full_finetune_sst2_seed42" / "step_000000" / "metadata.json").exists()
    assert len(run(place)) == 3
    for folder in (OUTPUT, Path("base_representations")):
        for name in files(undisturbed / folder):
            if name.endswith(".pt"):
                assert (place / folder / name).read_bytes() == (undisturbed / folder / name).read_bytes(), name


def test_nothing_is_computed_twice_unless_it_is_asked_for(place: Path) -> None:
    run(place)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("layer_*.pt") if "adapter" not in str(path)}
    assert before
    run(place)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    run(place, overwrite=True)
    assert all(path.stat().st_mtime_ns != then for path, then in before.items())


@pytest.mark.parametrize("finished", [True, False])
def test_what_was_begun_with_another_pooling_goes_on_with_it_and_the_command_says_so(
    finished: bool, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As folders were made when `mean` was the default: the same command must not mix them with other rows."""
    first, *_ = run(place, pooling="mean", methods=("full_finetune",))
    if not finished:
        for record in (first / "_run" / "commits").iterdir():
            record.unlink()
        (first / "metadata.json").unlink()
    before = {path: path.read_bytes() for path in place.rglob("layer_*.pt")}
    options = {"results_dir": str(place / "results"), "device": "cpu"}
    made = representations(PostTrainingConfig(**options), Terminal())
    assert "note     the rows are --pooling mean, as those that are there" in capsys.readouterr().out
    assert {json.loads((folder / "metadata.json").read_text())["pooling"] for folder in made} == {"mean"}
    assert before.items() <= {path: path.read_bytes() for path in place.rglob("layer_*.pt")}.items()
    refused(place, r"was made with --pooling mean, and this command says mean_from:1", pooling="mean_from:1")
    anew = run(place, overwrite=True)
    assert {json.loads((folder / "metadata.json").read_text())["pooling"] for folder in anew} == {"mean_from:1"}


def test_an_extractor_goes_on_with_what_a_folder_was_begun_with(base: Path, tmp_path: Path) -> None:
    texts = {"a": "w1 w2 fine", "b": "dull w3"}
    old = RepresentationExtractor(str(base / "model"), pooling="mean", device="cpu")
    new = RepresentationExtractor(str(base / "model"), device="cpu")
    old.save(texts, tmp_path / "saved")
    assert new.save(texts, tmp_path / "saved")["pooling"] == "mean"
    assert new.save(texts, tmp_path / "other")["pooling"] == "mean_from:1"
    with pytest.raises(UserError, match="holds another run"):
        replace(old, pooling="mean_from:1").save(texts, tmp_path / "saved")
    assert new.save(texts, tmp_path / "saved", overwrite=True)["pooling"] == "mean_from:1"


def test_a_text_of_which_nothing_is_left_is_refused_by_its_name(base: Path, tmp_path: Path) -> None:
    texts = {"a": "w1 w2 fine w4", "b": "w3", "c": "dull"}
    extractor = RepresentationExtractor(str(base / "model"), pooling="mean_from:2", device="cpu")
    with pytest.raises(UserError, match=r"sample 'b' \(and 1 other sample\) has no token for mean_from:2"):
        extractor.save(texts, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# ----------------------------------------------------------------------------------------------- which models


def test_models_are_chosen_by_method_seed_name_and_folder(base: Path, place: Path) -> None:
    folder = seem_trained(base, place / "results", "lora", seed=7)
    for options, expected in (
        ({"seeds": (7,)}, ["lora_sst2_seed7"]),
        ({"methods": ("full_finetune",)}, ["full_finetune_sst2_seed42"]),
        ({"tasks": ("SST-2",), "models": ("sst2_lora_seed42",)}, ["lora_sst2_seed42"]),
        ({"models": (folder.name,)}, ["lora_sst2_seed7"]),
    ):
        found = run(place, base=False, **options)  # type: ignore[arg-type]
        assert [path.parent.name for path in found] == expected


def test_a_model_that_was_trained_elsewhere_is_named_by_flags(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data" / "rte"
    data.mkdir(parents=True)
    rows = [{"sentence1": f"w{i} fine", "sentence2": "w2", "label": i % 2} for i in range(5)]
    (data / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_changed(base / "model", "lora", 3, tmp_path / "adapter")
    options: dict[str, Any] = {"model_path": str(tmp_path / "adapter"), "tasks": ("rte",), "methods": ("lora",)}
    options |= {"seeds": (3,), "data_dir": str(tmp_path / "data"), "max_length": 64, "validation_samples": 4}
    of_base, of_model = run(tmp_path, **options, base_model=str(base / "model"))
    assert of_base == tmp_path / "base_representations" / "rte" / "step_000000"
    said = json.loads((of_model / "metadata.json").read_text())
    assert (of_model.parent.name, said["validation"]["used"], said["validation"]["whole_split"]) == (
        "lora_rte_seed3",
        4,
        False,
    )


def test_a_model_from_elsewhere_that_is_something_else_is_refused(base: Path, place: Path) -> None:
    options: dict[str, Any] = {"tasks": ("sst2",), "seeds": (1,), "base_model": str(base / "model")}
    lora, whole = (next((place / "results").glob(f"{method}_*")) for method in ("lora", "full_finetune"))
    adapter = str(lora / "final_model")
    refused(place, r"is an adapter, and --methods says full", model_path=adapter, methods=("full_finetune",), **options)
    (whole / "metadata.json").unlink()
    final = str(whole / "final_model")
    refused(place, r"is half-saved: it has no metadata.json", model_path=final, methods=("full_finetune",), **options)


def test_an_adapter_of_the_head_alone_has_rows_and_no_matrices_of_layers(base: Path, place: Path) -> None:
    shutil.rmtree(next((place / "results").glob("full_finetune_*")))
    folder = next((place / "results").glob("lora_*/final_model"))
    model: Any = get_peft_model(
        LlamaForCausalLM.from_pretrained(base / "model"), LoraConfig(r=4, target_modules=["lm_head"])
    )
    model.save_pretrained(folder, save_embedding_layers=False)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    _rewrite(folder.parent, {"final_model": sizes})
    stale = place / OUTPUT / "lora_sst2_seed42" / "step_000000" / "adapter_weights" / "lora_A_layer_9.pt"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of a deeper adapter")
    run(place)
    assert [path.name for path in stale.parent.iterdir()] == ["adapter_config.json"]


# ------------------------------------------------------------------------------------------------- extractors


def test_an_extractor_gives_in_memory_what_it_saves(base: Path, tmp_path: Path) -> None:
    texts = {"a": "w1 w2 fine", "b": "dull"}
    extractor = RepresentationExtractor(
        str(base / "model"), pooling="last", device="cpu", hook_points=("after_attention",)
    )
    run = extractor.extract(texts)
    metadata = extractor.save(texts, tmp_path / "saved", about={"why": "a test"})
    assert (metadata["why"], metadata["pooling"], metadata["total_samples"]) == ("a test", "last", 2)
    saved = jax_extract.open_activations(str(tmp_path / "saved"))
    for name in texts:
        for layer in (0, 1):
            row = run.sample(name).get(layer, "after_attention")
            assert row.shape == (1, 32)
            np.testing.assert_array_equal(row, saved.sample(name).get(layer, "after_attention"))
    with pytest.raises(UserError, match="single string"):
        extractor.save("w1", tmp_path / "other")


def test_a_model_is_gone_before_the_next_one_comes(base: Path, tmp_path: Path) -> None:
    def models() -> int:
        return sum(type(each) is LlamaModel for each in gc.get_objects())

    gc.collect()
    before = models()
    gc.disable()
    try:
        RepresentationExtractor(str(base / "model"), device="cpu").save(["w1 w2"], tmp_path / "saved")
        assert models() == before
    finally:
        gc.enable()


def test_an_extractor_takes_what_people_write(base: Path, tmp_path: Path) -> None:
    extractor = RepresentationExtractor(base / "model", layers=1, hook_points="after_block", device="cpu")  # type: ignore[arg-type]
    extractor.save((text for text in ("w1 w2", "w2 w1")), tmp_path / "saved", about={"total_samples": 99, "mine": 1})
    saved = jax_extract.open_activations(str(tmp_path / "saved"))
    assert (saved.layers, saved.metadata["total_samples"], saved.metadata["mine"]) == ([1], 2, 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": [0.9]}, "0.9 names no layer"),
        ({"hook_points": None}, "--hook_points is empty"),
        ({"pooling": "first:2"}, "pooling 'first:2' is none of mean_from:k"),
        ({"pooling": "median"}, "pooling 'median' is none of mean_from:k"),
        ({"pooling": "mean_from:9"}, "text '0' has no token for mean_from:9; leave it out, or choose mean or last"),
    ],
)
def test_an_extractor_refuses_what_it_cannot_do(options: dict[str, Any], said: str, base: Path) -> None:
    with pytest.raises(UserError, match=said):
        RepresentationExtractor(str(base / "model"), device="cpu", **options).extract(["w1"])


def test_what_is_said_about_a_run_must_be_json(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="about cannot be written as JSON"):
        RepresentationExtractor(str(base / "model")).save(["w1"], tmp_path / "x", about={"where": tmp_path})
    assert not (tmp_path / "x").exists()


def test_an_adapter_has_an_extractor_of_its_own(base: Path, place: Path) -> None:
    adapter = str(next((place / "results").glob("lora_*/final_model")))
    extractor = LoRARepresentationExtractor(str(base / "model"), adapter, device="cpu")
    weights = extractor.adapter_weights()
    assert sorted(weights) == [0, 1]
    assert weights[0]["A"]["self_attn.q_proj"].shape == (4, 32)
    assert weights[0]["B"]["mlp.up_proj"].shape == (64, 4)
    run = extractor.extract(["w1 w2"])
    plain = RepresentationExtractor(str(base / "model"), device="cpu").extract(["w1 w2"])
    assert run.layers == [0, 1] and run.hook_points == ["after_block", "final_norm"]
    assert not np.allclose(run.sample("0").get(layer=0), plain.sample("0").get(layer=0))
    with pytest.raises(UserError, match=r"no adapter_model.safetensors"):
        LoRARepresentationExtractor(str(base / "model"), str(base / "model"), device="cpu").adapter_weights()


# ---------------------------------------------------------------------------------------------------- mistakes


def refused(place: Path, said: str, **options: Any) -> None:
    before = files(place)
    with pytest.raises(UserError, match=said):
        run(place, **options)
    assert files(place) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"results_dir": "/nowhere"}, r"there is no folder /nowhere; train models with"),
        ({"tasks": ("mrcp",)}, r"task 'mrcp' is none of mrpc, sst2, rte, squad_v2; did you mean mrpc"),
        ({"tasks": ("mrpc",)}, r"no model of .* is of these --tasks.*it holds full_finetune_sst2_seed42, lora_sst2"),
        ({"methods": ("dora",)}, r"--methods 'dora' is none of full_finetune, lora"),
        ({"models": ("lora_sst2_seed1",)}, r"--models 'lora_sst2_seed1' is none of full_finetune_sst2_seed42"),
        ({"seeds": ()}, r"--seeds is empty"),
        ({"device": "cuda"}, r"--device 'cuda' was asked for and torch finds 0 CUDA devices"),
        ({"max_length": 1000}, r"--max_length 1000 is more than the 128 positions"),
        ({"max_length": 10}, r"--max_length 10 must be at least 64"),
        ({"checkpoints": True}, r"holds no checkpoint; train it with --keep_checkpoints True into another"),
        ({"data_dir": "/nowhere"}, r"--data_dir has neither /nowhere/sst2/validation.jsonl nor .csv"),
        ({"base_model": "/nowhere"}, r"model '/nowhere' was not found"),
        ({"model_path": "m"}, r"--model_path names one model and not its tasks; give --tasks with just one"),
        ({"output_dir": ""}, r"--output_dir is empty"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_sentence(options: dict[str, Any], said: str, place: Path) -> None:
    refused(place, said, **options)


def test_a_half_saved_model_is_refused_or_passed_over(place: Path) -> None:
    half = next((place / "results").glob("lora_*"))
    (half / "metadata.json").unlink()
    refused(place, rf"{half} is half-saved: it has no metadata.json; give the command that made it again")
    assert [folder.parent.name for folder in run(place, skip_half_saved=True)] == ["sst2", "full_finetune_sst2_seed42"]


def test_a_model_whose_weights_were_cut_short_is_refused(place: Path) -> None:
    weights = next((place / "results").glob("full_*/final_model/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-8])
    refused(place, r"model.safetensors is not the file of [\d,]+ bytes that was saved")


def test_a_results_folder_without_models_is_told(tmp_path: Path) -> None:
    (tmp_path / "results" / "notes").mkdir(parents=True)
    refused(tmp_path, r"results holds no trained model; train some with jax-extract finetune")


def test_two_trainings_of_one_name_are_not_mixed(base: Path, place: Path) -> None:
    other = seem_trained(base, place / "results", "lora", note="again")
    refused(place, r"are both lora_sst2_seed42; choose one by its folder with --models")
    assert len(run(place, models=(other.name,))) == 2


def test_a_base_model_that_is_another_or_gone_is_told(base: Path, place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(base / "model", other)
    save_changed(base / "model", "full_finetune", 1, other)
    refused(place, r"other is not the model that .* was trained from", base_model=str(other))
    moved = tmp_path / "moved"
    gone = {"base_model": {"model_path": "gone/model", "revision": None, "digest": _digest(place)}}
    for folder in (place / "results").glob("*_2*"):
        _rewrite(folder, gone)
    refused(place, r"the base model of .*, gone/model, cannot be opened .* say with --base_model where it is")
    shutil.copytree(base / "model", moved)
    assert len(run(place, base_model=str(moved))) == 3


def test_models_of_different_base_models_or_prompts_are_not_compared(base: Path, place: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "model", tmp_path / "other")
    save_changed(base / "model", "full_finetune", 1, tmp_path / "other")
    folder = seem_trained(base, place / "results", "lora", seed=9, model=tmp_path / "other")
    refused(place, r"were trained from different base models .* choose those of one with --models")
    shutil.rmtree(folder)
    seem_trained(base, place / "results", "lora", seed=9, max_length=96)
    refused(place, r"were not trained with the same prompts .*--max_length 64.*--max_length 96")
    assert len(run(place, max_length=64)) == 4


def test_validation_data_that_are_gone_or_lack_a_column_are_told(base: Path, place: Path, tmp_path: Path) -> None:
    for folder in (place / "results").glob("*_2*"):
        _rewrite(folder, {"validation": {"source": "gone.jsonl", "asked_for": 750}})
    refused(place, r"was trained with the validation data gone.jsonl, which is not there; give --data_dir DIR")
    data = tmp_path / "data" / "sst2"
    data.mkdir(parents=True)
    (data / "validation.jsonl").write_text('{"text": "w1", "label": 1}\n')
    refused(
        place, r"has no column 'sentence' but text, label; sst2 needs sentence, label", data_dir=str(tmp_path / "data")
    )


def test_rows_of_another_training_or_dtype_are_not_gone_on_with(base: Path, place: Path) -> None:
    run(place)
    refused(place, r"was computed in float32 with torch, and this command would use bfloat16", dtype="bfloat16")
    refused(place, r"was computed in float32 with torch.*float32 with jax; give", backend="jax")
    refused(
        place,
        r"was made with --pooling mean_from:1, and this command says last; give --pooling mean_from:1, or compute all",
        pooling="last",
    )
    shutil.rmtree(next((place / "results").glob("lora_*")))
    other = seem_trained(base, place / "results", "lora", steps=24)
    other.rename(place / "results" / "lora_20300101_000000")
    refused(
        place, r"lora_sst2_seed42/step_000000 is of another training, .*; compute all of them anew with --overwrite"
    )
    assert len(run(place, overwrite=True)) == 3


def test_metadata_that_lie_are_told(place: Path) -> None:
    folder = next((place / "results").glob("lora_*"))
    _rewrite(folder, {"base_model": "a string"})
    refused(place, r"metadata.json .*restore it from a copy, or train again")


def test_the_command_ends_with_one_sentence_and_code_2(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert cli.main(["representations", "--tasks", "imdb"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.main(["representations", "--task", "sst2"]) == 2
    assert "did you mean --tasks" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        ("vm1.sh", [], "jax-extract representations --results_dir results"),
        ("vm1.sh", ["--task", "squad_v2"], "jax-extract representations --results_dir results --tasks squad_v2"),
        ("vm2.sh", [], "jax-extract representations --results_dir results --tasks mrpc sst2 rte"),
        (
            "vm2.sh",
            ["--seed", "42", "--method", "lora", "--data_dir", "d", "--checkpoints", "--", "--pooling", "last"],
            "jax-extract representations --results_dir results --tasks mrpc sst2 rte --methods lora --seeds 42 "
            "--data_dir d --checkpoints True --pooling last",
        ),
    ],
)
def test_a_script_gives_one_command(script: str, words: list[str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    command = ["bash", str(ROOT / "launch" / "phase3" / script), "--dry_run", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip().replace(str(ROOT / ".venv" / "bin") + "/", "") == expected


def test_the_python_script_finds_the_results_where_the_document_starts_it(tmp_path: Path) -> None:
    folder = tmp_path / "launch" / "phase3"
    folder.mkdir(parents=True)
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "launch" / "phase3" / "extract_representations.py", folder)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "extract_representations.py"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.split(" holds no trained model")[0]) == (2, f"error: {tmp_path / 'results'}")


def test_the_python_script_is_the_command() -> None:
    command = [sys.executable, str(ROOT / "launch" / "phase3" / "extract_representations.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--results_dir" in done.stdout and "--checkpoints" in done.stdout


def _digest(place: Path) -> str:
    return json.loads(next((place / "results").glob("*/metadata.json")).read_text())["base_model"]["digest"]


def _rewrite(folder: Path, changes: dict[str, Any]) -> None:
    metadata = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps({**metadata, **changes}))
