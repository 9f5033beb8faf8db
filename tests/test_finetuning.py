"""Fine-tuning: it learns, whole or by LoRA; killed anywhere it ends with the same weights; mistakes come before it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from finetune_worker import Ended, end, finetune, start
from safetensors.numpy import load_file, save_file
from small_run import ROOT
from tiny_models import tiny_folder
from tiny_reviews import OTHERS, VOCABULARY, finetune_words, llama_config
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from jax_extract import cli
from jax_extract.errors import UserError
from jax_extract.inputs.benchmarks import UNANSWERABLE, Example, benchmark_named
from jax_extract.inputs.benchmarks_prompts import prompt_ids, prompt_samples, prompt_token_counter
from jax_extract.pytorch.finetuning import command, scores, training
from jax_extract.pytorch.finetuning.base_model import absolute, describe_base
from jax_extract.pytorch.finetuning.config import FinetuneConfig
from jax_extract.pytorch.finetuning.examples import Collator, Encoder
from jax_extract.pytorch.finetuning.folder import Results, half_saved_models, open_trained, trained_models
from jax_extract.pytorch.finetuning.processes import Processes, SharedRefusal
from jax_extract.pytorch.finetuning.scoring import answer
from jax_extract.store.storage.failpoints import VARIABLE
from jax_extract.terminal import Terminal
from jax_extract.weights.open_model import OpenModel
from jax_extract.weights.opening import open_checkpoint

METHODS = ["full_finetune", "lora"]
# peft asks for it, and transformers calls it deprecated.
OF_PEFT = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
SHORT = ["--max_steps", 12, "--save_steps", 4]


def _only_folder(results: Path) -> Path:
    [folder] = results.iterdir()
    return folder


def _weights(folder: Path) -> dict[str, np.ndarray]:
    [file] = (folder / "final_model").glob("*.safetensors")
    return load_file(file)


def _same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a short training by each method that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for method in METHODS:
        ended = finetune(finetune_words(base, method, *SHORT, "--output_dir", method), folder)
        assert (ended.code, ended.err.count("Traceback")) == (0, 0), ended.err
    return {method: _only_folder(folder / method) for method in METHODS}


# -------------------------------------------------------------------------------------------------- it learns


@pytest.mark.parametrize("method", METHODS)
def test_a_model_learns_what_no_guess_could_score(method: str, base: Path, tmp_path: Path) -> None:
    ended = finetune(finetune_words(base, method, "--max_steps", 80), tmp_path)
    assert ended.code == 0, ended.err
    folder = _only_folder(tmp_path / "results")
    assert re.fullmatch(rf"{method}_\d{{8}}_\d{{6}}", folder.name)
    found = open_trained(folder).metadata["scores"]
    assert found["p_value"] < 0.01
    assert found["accuracy"] > found["majority_share"]
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    right = sum(line["given"] == line["answers"][0] for line in lines)
    assert (right, len(lines)) == (found["right"], found["samples"])
    labels = [json.loads(line)["label"] for line in (base / "validation.jsonl").read_text().splitlines()]
    assert found["majority_share"] == max(labels.count(0), labels.count(1)) / len(labels)
    lost = open_trained(folder).metadata["losses"]
    assert lost[-1][1] < lost[0][1]


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_holds_the_model_its_configuration_and_metadata(method: str, undisturbed: dict[str, Path]) -> None:
    folder = undisturbed[method]
    visible = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert visible == {"config.yaml", "final_model", "metadata.json", "predictions.jsonl"}
    files = {path.name for path in (folder / "final_model").iterdir()}
    whole = {"config.json", "generation_config.json", "model.safetensors"}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert files == {*(adapter if method == "lora" else whole), "tokenizer.json", "tokenizer_config.json"}
    [trained] = trained_models(folder.parent)
    assert (trained.method, trained.task, trained.seed) == (method, "sst2", 42)
    said = trained.metadata
    assert said["validation"] | {"source": ""} == {"source": "", "asked_for": 750, "used": 60, "whole_split": True}
    assert (said["steps"], said["train"]["examples"], said["base_model"]["model_type"]) == (12, 320, "llama")
    assert yaml.safe_load((folder / "config.yaml").read_text())["options"]["max_steps"] == 12


@OF_PEFT
def test_jax_extract_reads_what_was_trained(base: Path, undisturbed: dict[str, Path]) -> None:
    from peft import PeftModel

    adapter = str(undisturbed["lora"] / "final_model")
    ours = OpenModel.open(str(base / "model"), None, adapter).checkpoint
    theirs: Any = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base / "model"), adapter)
    merged = theirs.merge_and_unload().state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_allclose(ours.read(name), merged[name].numpy(), atol=1e-6)
    full = OpenModel.open(str(undisturbed["full_finetune"] / "final_model"), None, None).checkpoint
    before = OpenModel.open(str(base / "model"), None, None).checkpoint
    assert full.names() == before.names()
    assert not np.array_equal(full.read(name), before.read(name))
    assert not np.array_equal(ours.read(name), before.read(name))


def test_two_processes_make_one_folder_and_one_speaks(base: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    words = finetune_words(base, "lora", *SHORT)
    ranks = [{**meet, "RANK": str(i), "LOCAL_RANK": str(i), "LOCAL_WORLD_SIZE": "2"} for i in range(2)]
    main, other = [end(each) for each in [start(words, tmp_path, rank, f"rank{rank['RANK']}") for rank in ranks]]
    assert (main.code, other.code) == (0, 0), main.err + other.err
    assert "12 of 32 examples" in main.out
    assert other.out == ""
    trained = open_trained(_only_folder(tmp_path / "results"))
    assert (trained.metadata["processes"], trained.metadata["scores"]["samples"]) == (2, 60)
    lines = (trained.folder / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["sample_id"] for line in lines] == [f"sst2:validation:{i}" for i in range(60)]


# ---------------------------------------------------------------------------------------- it is killed and goes on


@pytest.mark.parametrize(
    ("method", "failpoint", "goes_on_from"),
    [
        ("full_finetune", "finetune.step:after:3", None),  # before the first checkpoint
        ("full_finetune", "finetune.step:after:7", 4),
        ("lora", "finetune.step:after:7", 4),
        ("full_finetune", "finetune.mark:before:2", 4),  # the second checkpoint is written, but does not count yet
        ("lora", "finetune.mark:after:2", 8),
        ("full_finetune", "finetune.name_model:after:1", 12),  # the model has its name, but there are no metadata
        ("lora", "finetune.finish:before:1", 12),
    ],
)
def test_a_killed_training_ends_with_the_weights_of_one_that_was_not(
    method: str, failpoint: str, goes_on_from: int | None, base: Path, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    words = finetune_words(base, method, *SHORT)
    assert finetune(words, tmp_path, {VARIABLE: failpoint}).code == -9
    folder = _only_folder(tmp_path / "results")
    with pytest.raises(UserError, match="half-saved"):
        open_trained(folder)
    assert trained_models(tmp_path / "results") == []
    ended = finetune(words, tmp_path)
    assert ended.code == 0, ended.err
    assert _only_folder(tmp_path / "results") == folder
    again = open_trained(folder)
    assert again.metadata["resumed_from_step"] == goes_on_from
    assert ("from step" in ended.out) == (goes_on_from is not None)
    assert _same(_weights(folder), _weights(undisturbed[method]))
    first = open_trained(undisturbed[method])
    assert again.metadata["scores"] == first.metadata["scores"]
    assert again.metadata["losses"] == first.metadata["losses"]


def test_a_checkpoint_that_was_cut_short_is_passed_over(
    base: Path, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    words = finetune_words(base, "full_finetune", *SHORT)
    assert finetune(words, tmp_path, {VARIABLE: "finetune.step:after:9"}).code == -9
    folder = _only_folder(tmp_path / "results")
    optimizer = folder / "checkpoint-8" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    assert finetune(words, tmp_path).code == 0
    assert open_trained(folder).metadata["resumed_from_step"] == 4
    assert _same(_weights(folder), _weights(undisturbed["full_finetune"]))


def test_a_done_training_is_not_done_again_and_another_seed_is_another_folder(
    base: Path, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    results = tmp_path / "results"
    shutil.copytree(undisturbed["lora"].parent, results)
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*") if path.is_file() and path.name != ".lock"}
    ended = finetune(finetune_words(base, "lora", *SHORT, "--save_steps", 5), tmp_path)
    assert (ended.code, "done     already: " in ended.out) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    ended = finetune(finetune_words(base, "lora", "--max_steps", 1, "--seed", 7), tmp_path)
    assert (ended.code, len(list(results.iterdir()))) == (0, 2)
    assert sorted(model.seed for model in trained_models(results)) == [7, 42]


def test_two_commands_do_not_train_in_one_folder(base: Path, tmp_path: Path) -> None:
    words = finetune_words(base, "lora", *SHORT)
    assert finetune(words, tmp_path, {VARIABLE: "finetune.step:after:2"}).code == -9
    with Results(_only_folder(tmp_path / "results")).claim():
        _refused(finetune(words, tmp_path), "another process is training in")


def test_a_training_that_was_moved_and_linked_is_found_and_nothing_is_removed_through_the_link(
    undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    away, results = tmp_path / "away", tmp_path / "results"
    shutil.copytree(undisturbed["lora"], away)
    (away / "checkpoint-4").mkdir()
    results.mkdir()
    link = results / undisturbed["lora"].name
    link.symlink_to(away)
    assert [model.folder for model in trained_models(results)] == [link]
    identity = yaml.safe_load((away / "config.yaml").read_text())["identity"]
    found = Results.open(results, "lora", {}, identity)
    found.remove_checkpoints()
    assert (found.path, found.is_whole, (away / "checkpoint-4").is_dir()) == (link, True, True)
    (away / "metadata.json").unlink()
    assert (trained_models(results), half_saved_models(results)) == ([], [link])
    with pytest.raises(UserError, match="a link to a half-saved training"):
        Results.open(results, "lora", {}, identity)
    assert list(results.iterdir()) == [link]


def test_a_default_said_aloud_is_the_same_training(base: Path, tmp_path: Path) -> None:
    options = {"model_path": str(base / "model"), "task": "sst2", "device": "cpu", "max_length": 64}
    files = {f"{split}_file": str(base / f"{split}.jsonl") for split in ("train", "validation")}
    deciding = []
    for dtype in (None, "float32", "bfloat16"):
        config: Any = FinetuneConfig(**options, **files, dtype=dtype)  # type: ignore[arg-type]
        deciding.append(replace(config, dtype=command._dtype(config)).deciding())
    assert deciding[0] == deciding[1] != deciding[2]


def test_a_base_model_is_the_same_from_every_folder(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base)
    assert describe_base(open_checkpoint("model"))["model_path"] == str(base / "model")
    assert absolute("owner/name") == "owner/name"


# ------------------------------------------------------------------------------------------------ what is learned


def _encoder(base: Path, task: str, max_length: int = 64) -> Encoder:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base / "model")
    return Encoder(tokenizer, benchmark_named(task), max_length)


def _example(label: int, sentence: str = "w1 fine w2") -> Example:
    return Example(f"e{label}{sentence}", {"sentence": sentence}, (("negative", "positive")[label],), label)


def test_only_the_answer_and_its_end_are_learned(base: Path) -> None:
    encoder = _encoder(base, "sst2")
    learned = encoder.training([_example(1), _example(0, "w3")])
    batch = Collator(encoder.padding)(learned.tokens)
    positive, negative, ends = VOCABULARY.index("positive"), VOCABULARY.index("negative"), 1
    assert [row[row >= 0].tolist() for row in batch["labels"]] == [[positive, ends], [negative, ends]]
    assert batch["input_ids"][0, -2:].tolist() == [positive, ends]
    assert batch["attention_mask"].sum(dim=1).tolist() == [tokens.length for tokens in learned.tokens]
    assert batch["labels"][1, batch["attention_mask"][1] == 0].tolist() == [-100, -100]


def test_an_answer_that_was_cut_off_is_not_learned(base: Path) -> None:
    encoder = _encoder(base, "squad_v2")
    context = " ".join(["w1"] * 60)

    def asked(answer: str, text: str) -> Example:
        return Example(answer, {"context": text, "question": "w2 ?"}, (answer,), None)

    learned = encoder.training([asked("fine", f"{context} fine"), asked("fine", f"fine {context}")])
    assert (len(learned.tokens), learned.cut_answers, learned.long_answers) == (1, 1, 0)
    learned = encoder.training([asked(UNANSWERABLE, context), asked(" ".join(["w1"] * 50), "w1 " * 50)])
    assert (len(learned.tokens), learned.long_answers + learned.cut_answers) == (1, 1)
    assert all(tokens.length <= 64 for tokens in learned.tokens)


def test_a_blank_question_of_a_context_that_was_cut_is_compared_with_the_context(base: Path) -> None:
    encoder = _encoder(base, "squad_v2")
    rows = [f"{' '.join(['w1'] * 60)} fine", f"fine {' '.join(['w1'] * 60)}"]
    examples = [Example(text, {"context": text, "question": ""}, ("fine",), None) for text in rows]
    learned = encoder.training(examples)
    assert (len(learned.tokens), learned.cut_answers) == (1, 1)


def test_an_end_that_the_tokenizer_adds_changes_no_prompt_and_no_answer(base: Path) -> None:
    class Ending:
        def __init__(self, tokenizer: Any) -> None:
            self._tokenizer = tokenizer

        def __getattr__(self, name: str) -> Any:
            return getattr(self._tokenizer, name)

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            ids = self._tokenizer(text)["input_ids"]
            return {"input_ids": [*ids, self.eos_token_id] if add_special_tokens else ids}

    tokenizer = PreTrainedTokenizerFast.from_pretrained(base / "model")
    squad, text = benchmark_named("squad_v2"), {"context": " ".join(["w1"] * 60), "question": "w2 ?"}
    example = Example("e", text, (UNANSWERABLE,), None)
    [plain], [ended] = (Encoder(each, squad, 64).training([example]).tokens for each in (tokenizer, Ending(tokenizer)))
    assert (ended.ids.tolist(), ended.prompt) == (plain.ids.tolist(), plain.prompt)
    [sample] = prompt_samples(squad, [example], prompt_token_counter(Ending(tokenizer)), 64)
    assert prompt_ids(Ending(tokenizer), sample.text) == tuple(ended.ids[: ended.prompt].tolist())


@OF_PEFT
@pytest.mark.parametrize("method", METHODS)
def test_scoring_computes_in_float32_also_behind_a_training_in_bfloat16(
    method: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # Trainer sets it
    words = finetune_words(base, method, "--max_steps", 1, "--dtype", "bfloat16", "--output_dir", tmp_path)
    config: Any = cli._parse(FinetuneConfig, list(map(str, words)), "finetune")
    encoder = _encoder(base, "sst2")
    examples = encoder.training([_example(i % 2, f"w{i}") for i in range(16)]).tokens
    model = training.load_model(config, None)
    ids = torch.tensor([examples[0].ids.tolist()])
    results = Results.open(tmp_path, method, {}, {})
    run = training.Training(
        model,
        encoder._tokenizer,
        config,
        examples,
        encoder.padding,
        results,
        Processes(cpu=True),
        Terminal(silent=True),
    )
    trained = run.run(None).eval()
    with torch.no_grad():
        given = trained(input_ids=ids).logits
        expected = type(trained).forward(trained, input_ids=ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            rounded = type(trained).forward(trained, input_ids=ids).logits.float()
    assert torch.equal(given, expected)
    assert not torch.equal(given, rounded)


@OF_PEFT
@pytest.mark.parametrize("targets", [None, ("q_proj", "down_proj")])
def test_an_adapter_of_a_model_that_reads_pictures_too_is_of_its_language_model(
    targets: tuple[str, ...] | None, tmp_path: Path
) -> None:
    base = tiny_folder("gemma3_with_pictures")
    config = FinetuneConfig(str(base), "sst2", "lora", lora_target_modules=targets)
    adapted = training.load_model(config, None)
    trained = {name for name, each in adapted.named_parameters() if each.requires_grad}
    assert trained
    assert all(".language_model.layers." in name for name in trained)
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    assert OpenModel.open(str(base), None, str(tmp_path)).checkpoint.adapter == str(tmp_path)


def test_the_likelier_answer_counts_whatever_its_length_and_the_batch(base: Path) -> None:
    """Against one sum of log-probabilities at a time, without padding, label words of two tokens among them."""
    benchmark = replace(benchmark_named("sst2"), label_words=("w1 w2", "positive"))
    encoder = Encoder(PreTrainedTokenizerFast.from_pretrained(base / "model"), benchmark, 64)
    examples = [_example(i % 2, " ".join(OTHERS[i : 2 * i + 1])) for i in range(12)]
    torch.manual_seed(1)
    model = LlamaForCausalLM(llama_config(initializer_range=0.6)).eval()
    expected = []
    for scored in encoder.scored(examples):
        likelihoods = []
        for word in scored.labels:
            with torch.no_grad():
                logits = model(torch.tensor([[*scored.prompt, *word]])).logits[0].log_softmax(-1)
            places = range(len(scored.prompt) - 1, len(scored.prompt) + len(word) - 1)
            likelihoods.append(sum(float(logits[i, token]) for i, token in zip(places, word, strict=True)))
        expected.append(benchmark.label_words[int(np.argmax(likelihoods))])
    assert len(set(expected)) == 2
    assert [each.given for each in answer(model, benchmark, encoder, encoder.scored(examples))] == expected


def test_a_free_answer_is_the_same_alone_and_in_a_batch(base: Path) -> None:
    benchmark, encoder = benchmark_named("squad_v2"), _encoder(base, "squad_v2")
    texts = [{"context": " ".join(OTHERS[: 3 * i + 1]), "question": "w1 ?"} for i in range(4)]
    scored = encoder.scored(Example(str(i), text, ("w3",), None) for i, text in enumerate(texts))
    torch.manual_seed(1)
    model = LlamaForCausalLM(llama_config(initializer_range=0.6))
    alone = [answer(model, benchmark, encoder, [each])[0] for each in scored]
    assert answer(model, benchmark, encoder, scored) == alone
    assert len({each.given for each in alone}) > 1


def test_squad_is_scored_by_exact_match_and_f1() -> None:
    assert scores.exact_match("The Rome.", ["in Rome", "rome"]) == 1
    assert scores.f1("in Rome, Italy", ["Rome"]) == pytest.approx(0.5)
    assert scores.f1("Paris", ["Rome", "the city of Paris"]) == pytest.approx(0.5)
    assert (scores.exact_match("Unanswerable.", [UNANSWERABLE]), scores.f1("", [UNANSWERABLE])) == (1, 1)
    assert (scores.exact_match("Rome", [UNANSWERABLE]), scores.f1(UNANSWERABLE, ["Rome"])) == (0, 0)


def test_the_p_value_is_the_exact_tail_of_the_binomial() -> None:
    share = Fraction(2, 3)
    tail = sum(math.comb(60, k) * share**k * (1 - share) ** (60 - k) for k in range(48, 61))
    assert scores.p_value(48, 60, 2 / 3) == pytest.approx(float(tail), rel=1e-9)
    assert scores.majority_share([0, 1, 1]) == pytest.approx(2 / 3)


def test_squad_is_trained_and_answered(base: Path, tmp_path: Path) -> None:
    rows = [
        {"context": f"w{i} fine w2", "question": "w1 ?", "answers": {"text": ["fine"] if i % 2 else []}}
        for i in range(24)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = finetune_words(base, "lora", "--task", "squad_v2", "--max_steps", 2)
    files = ["--train_file", "d.jsonl", "--validation_file", "d.jsonl"]
    ended = finetune(
        [*_without(words, "task", "train_file", "validation_file"), "--task", "squad_v2", *files], tmp_path
    )
    assert ended.code == 0, ended.err
    said = open_trained(_only_folder(tmp_path / "results")).metadata
    assert {said[split]["source"] for split in ("train", "validation")} == {str(tmp_path / "d.jsonl")}
    found = said["scores"]
    assert (found["samples"], found["majority_share"]) == (24, 0.5)
    assert 0 <= found["exact_match"] <= found["f1"] <= 1


# ---------------------------------------------------------------------------------------------------- mistakes


def _without(words: Sequence[object], *names: str) -> list[object]:
    flags = {f"--{name}" for name in names}
    return [word for i, word in enumerate(words) if word not in flags and (i == 0 or words[i - 1] not in flags)]


def _refused(ended: Ended, said: str) -> None:
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    assert (ended.err.count("\n"), "Traceback" in ended.err) == (1, False)
    assert said in ended.err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "cola"}, "task 'cola' is none of mrpc, sst2, rte, squad_v2"),
        ({"method": "prefix"}, "--method 'prefix' is none of"),
        ({"task": "rte"}, "has no column 'sentence1' but sentence, label"),
        ({"model_path": "nowhere"}, "model 'nowhere' was not found"),
        ({"model_path": ""}, "--model_path is missing"),
        ({"train_file": None}, "--train_file and --validation_file belong together"),
        ({"lora_rank": 4}, "--lora_rank is of LoRA adapters, and --method is full_finetune"),
        ({"max_length": 63}, "--max_length 63 must be at least 64"),
        ({"max_length": 256}, "--max_length 256 is more than the 128 positions"),
        ({"learning_rate": "nan"}, "--learning_rate nan must be a number above 0"),
        ({"seed": -1}, "--seed -1 must be from 0"),
        ({"validation_samples": 1}, "all 1 validation examples have the label"),
        ({"batch_size": 0}, "--batch_size 0 must be from 1"),
    ],
)
def test_a_mistake_is_one_sentence_before_any_training(
    changes: dict[str, Any],
    said: str,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = _without(finetune_words(base, "full_finetune"), *changes)
    words += [word for name, value in changes.items() if value is not None for word in (f"--{name}", value)]
    code = cli.main(["finetune", *map(str, words)])
    caught = capsys.readouterr()
    _refused(Ended(code, caught.out, caught.err), said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none_is_told_before_any_training(base: Path, tmp_path: Path) -> None:
    words = [*_without(finetune_words(base, "lora"), "device"), "--device", "cuda"]
    _refused(finetune(words, tmp_path), "--device cuda was asked for, and torch ")
    assert not (tmp_path / "results").exists()


def test_a_dataset_is_told_to_be_out_of_reach_before_any_training(base: Path, tmp_path: Path) -> None:
    words = _without(finetune_words(base, "lora"), "train_file", "validation_file")
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    ended = finetune(words, tmp_path, env)
    _refused(ended, "nyu-mll/glue")
    assert not (tmp_path / "results").exists()


def test_a_half_saved_model_is_refused(base: Path, undisturbed: dict[str, Path], tmp_path: Path) -> None:
    half = tmp_path / undisturbed["full_finetune"].name
    shutil.copytree(undisturbed["full_finetune"], half)
    (half / "metadata.json").unlink()
    words = [*_without(finetune_words(base, "lora"), "model_path"), "--model_path", half / "final_model"]
    _refused(finetune(words, tmp_path), "is half-saved: it has no metadata.json")
    torn = tmp_path / "torn"
    shutil.copytree(base / "model", torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    words = [*_without(finetune_words(base, "lora"), "model_path"), "--model_path", torn]
    _refused(finetune(words, tmp_path), "it is truncated or damaged")
    tensors = load_file(base / "model" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, {"format": "pt"})
    _refused(finetune(words, tmp_path), "no usable weights for 'model.layers.1.mlp.up_proj.weight'")


def test_a_trained_file_of_another_size_is_told(undisturbed: dict[str, Path], tmp_path: Path) -> None:
    damaged = tmp_path / undisturbed["lora"].name
    shutil.copytree(undisturbed["lora"], damaged)
    assert open_trained(damaged).final_model == damaged / "final_model"
    with (damaged / "final_model" / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is not the file of [\d,]+ bytes"):
        open_trained(damaged)


@pytest.mark.parametrize(
    "said",
    [
        {"method": "../../../../evil"},
        {"method": "base"},
        {"method": ["lora"]},
        {"task": "SST-2"},
        {"seed": -1},
        {"seed": 10**12},
        {"seed": True},
        {"seed": "42"},
        {"final_model": {}},
        {"final_model": {"../model": 5}},
        {"final_model": {"..": 5}},
        {"final_model": {"model": 5.5}},
        {"final_model": ["model"]},
    ],
)
def test_metadata_that_no_training_wrote_are_damaged(
    said: dict[str, Any], undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    metadata = json.loads((undisturbed["lora"] / "metadata.json").read_text())
    (tmp_path / "metadata.json").write_text(json.dumps({**metadata, **said}))
    (tmp_path / "final_model").symlink_to(undisturbed["lora"] / "final_model")
    with pytest.raises(UserError, match=r"metadata\.json is damaged \(.+\); restore it from a copy, or train again$"):
        open_trained(tmp_path)


def test_another_process_says_what_it_alone_is_refused_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["finetune", "--model_path", str(tmp_path / "nowhere"), "--task", "sst2"]) == 2
    assert capsys.readouterr().err.startswith("error: process 1: model ")
    refusal: Any = None

    def refuse(*_: Any) -> None:
        raise refusal

    monkeypatch.setattr(command, "finetune", refuse)
    config = FinetuneConfig(model_path="model", task="sst2")
    refusal = SharedRefusal("said by the main one")
    assert command.finetune_command(config) == 2
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SharedRefusal, match=r"^said by the main one$"):
        command.finetune_command(config)
    refusal = UserError("its own")
    with pytest.raises(UserError, match=r"^its own$"):
        command.finetune_command(config)
    with pytest.raises(SharedRefusal):
        Processes(cpu=True).from_main(refuse)


def test_a_loss_that_is_no_number_ends_the_training(base: Path, tmp_path: Path) -> None:
    words = [
        *_without(finetune_words(base, "full_finetune"), "learning_rate"),
        "--learning_rate",
        "1e30",
        "--max_steps",
        20,
    ]
    ended = finetune(words, tmp_path)
    assert ended.code == 2
    assert ended.err.splitlines()[-1].startswith("error: the loss is ")
    assert "lower --learning_rate" in ended.err


def test_a_module_that_is_not_there_cannot_be_adapted(base: Path, tmp_path: Path) -> None:
    words = finetune_words(base, "lora", "--lora_target_modules", "query")
    _refused(finetune(words, tmp_path), "name modules of it with --lora_target_modules")


# -------------------------------------------------------------------------------------------- all models, one by one

FAKE = """#!/bin/bash
echo "$@" >>calls
code=$(head -1 codes) && sed -i 1d codes
exit "${code:-0}"
"""


def _finetune_all(folder: Path, *words: object, codes: str = "") -> subprocess.CompletedProcess[str]:
    """The script with a fake `jax-extract` that ends with these exit codes, then with 0."""
    tool = folder / "tools" / "jax-extract"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(FAKE)
    tool.chmod(0o755)
    (folder / "codes").write_text(codes)
    (folder / "calls").write_text("")
    return subprocess.run(
        [str(ROOT / "launch/phase2/finetune_all.sh"), "--model_path", "a b", *map(str, words)],
        cwd=folder,
        env={**os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_all_models_are_of_three_tasks_two_methods_and_three_seeds(tmp_path: Path) -> None:
    done = _finetune_all(tmp_path, "--", "--max_length", 384)
    assert done.returncode == 0, done.stderr
    expected = {
        f"finetune --model_path a b --task {task} --method {method} --seed {seed} --output_dir results --max_length 384"
        for task in ("mrpc", "sst2", "rte")
        for method in METHODS
        for seed in (42, 43, 44)
    }
    assert (set(_calls(tmp_path)), len(_calls(tmp_path))) == (expected, 18)


def test_a_model_that_fails_does_not_keep_the_others_waiting_and_a_refused_one_does(tmp_path: Path) -> None:
    done = _finetune_all(tmp_path, codes="0\n137\n0\n")
    assert (done.returncode, len(_calls(tmp_path))) == (1, 18)
    assert "1 of 18 models are not whole" in done.stderr
    done = _finetune_all(tmp_path, codes="0\n2\n")
    assert (done.returncode, len(_calls(tmp_path))) == (2, 2)


def test_local_data_are_found_for_every_task_before_the_first_model(tmp_path: Path) -> None:
    for task, suffix in (("sst2", "jsonl"), ("rte", "csv")):
        (tmp_path / "data" / task).mkdir(parents=True)
        for split in ("train", "validation"):
            (tmp_path / "data" / task / f"{split}.{suffix}").touch()
    chosen = ["--data_dir", "data", "--method", "lora", "--seed", 1]
    assert _finetune_all(tmp_path, *chosen, "--task", "sst2", "--task", "rte").returncode == 0
    first, second = _calls(tmp_path)
    assert first.endswith("--train_file data/sst2/train.jsonl --validation_file data/sst2/validation.jsonl")
    assert second.endswith("--train_file data/rte/train.csv --validation_file data/rte/validation.csv")
    done = _finetune_all(tmp_path, *chosen, "--task", "sst2", "--task", "mrpc")
    assert (done.returncode, _calls(tmp_path)) == (2, [])
    assert "data/mrpc has neither train.jsonl nor train.csv" in done.stderr
