"""Answers are those of Hugging Face, whatever the batch, the mesh and the interruptions, and go where they should."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gcs_server import running
from small_run import make_model, run_cli, snapshot, write_arc, write_jsonl
from test_processes import program
from tiny_models import families, random_ids, reference, row_errors, text_of, tiny_folder, tiny_model
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from jax_extract import open_activations
from jax_extract.config import ExtractConfig
from jax_extract.errors import UserError
from jax_extract.generation import arc
from jax_extract.generation.answers import Answer, AnswerFiles, Batch, batches_of, own_first
from jax_extract.generation.command import infer
from jax_extract.generation.reading import readings
from jax_extract.generation.sampling import Sampling
from jax_extract.inputs.arc import arc_samples, read_tasks
from jax_extract.inputs.arc_augment import Augmentation
from jax_extract.inputs.arc_encoders import ENCODERS, grid_encoder
from jax_extract.inputs.planning.slabs import PlanSettings
from jax_extract.inputs.token_table import TokenizedSample
from jax_extract.store.storage.opening import open_storage
from jax_extract.terminal import Terminal
from models.positions import Positions

NEAR_TIE = 1e-4  # of the two largest logits: below it, either token is right
NEW_TOKENS = 64
LENGTHS = (3, 1, 40, 90, 17)
# One a kind of attention and of head: windows at some layers, q/k norms, learned positions and scales by layer, a part
# of a head rotated beside parallel blocks, norms with biases, two rotations. Capped logits, plain attention and tied
# heads are those of the activations of answers.
KINDS = families("qwen2_window gpt2_variant gpt_neox phi_variant gemma3", "qwen3")


def write_texts(path: Path, sequences: Sequence[np.ndarray]) -> Path:
    rows = ({"id": f"s{i}", "text": text_of(sequence)} for i, sequence in enumerate(sequences))
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def generated(model: Path, inputs: Path, out: Path, *, extracts: bool = False, **options: Any) -> list[dict[str, Any]]:
    """The lines of answers.jsonl."""
    given = {"max_new_tokens": NEW_TOKENS, "model_path": str(model), "tasks_file": str(inputs), **options}
    infer(ExtractConfig(**given, activations_dir=str(out)), extracts=extracts, terminal=Terminal(silent=True))
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


def assert_greedy(family: str, prompt: np.ndarray, answer: Sequence[int], stop: int) -> None:
    """Each token is the one with Hugging Face's largest logit, or nearly as large a one."""
    whole = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))[None]
    with torch.inference_mode():
        logits = tiny_model(family)(whole, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    best = logits.max(dim=-1).values
    chosen = logits.gather(1, torch.tensor(list(answer))[:, None])[:, 0]
    assert (best - chosen <= NEAR_TIE).all(), (family, (best - chosen).max())
    assert stop not in answer[:-1]


@pytest.mark.parametrize("family", KINDS)
def test_greedy_answers_are_those_of_hugging_face(family: str, tmp_path: Path) -> None:
    prompts = random_ids(LENGTHS, seed=3)
    answers = generated(tiny_folder(family), write_texts(tmp_path / "t.jsonl", prompts), tmp_path / "run", batch_size=5)
    assert [answer["sample_id"] for answer in answers] == [f"s{i}" for i in range(len(prompts))]
    stop = 94  # the tiny tokenizer's end
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer["token_ids"]) == NEW_TOKENS or (answer["ended"] and answer["token_ids"][-1] == stop)
        assert_greedy(family, prompt, answer["token_ids"], stop)


def test_an_answer_depends_on_neither_batch_nor_mesh_nor_company(tmp_path: Path) -> None:
    """With sampling, too: what is drawn for a sample is its own."""
    # Of two lengths, nearly: alone, each length is a program.
    prompts = write_texts(tmp_path / "t.jsonl", random_ids((5, 60, 62, 7, 12), seed=5))
    options = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 7, "max_new_tokens": 24}
    model = tiny_folder("qwen2_window")
    alone = generated(model, prompts, tmp_path / "alone", **options, batch_size=1)  # of eight a device: on the mesh
    first = write_texts(tmp_path / "first.jsonl", random_ids((5,), seed=5))
    (again,) = generated(model, first, tmp_path / "again", **options, batch_size=1)
    (other,) = generated(model, first, tmp_path / "other", **{**options, "seed": 8}, batch_size=1)
    assert again == alone[0] and other["token_ids"] != again["token_ids"]
    done = run_cli(
        *(
            "--model_path",
            model,
            "--tasks_file",
            prompts,
            "--activations_dir",
            tmp_path / "mesh",
            "--mesh_shape",
            "2,2",
        ),
        *(word for name, value in options.items() for word in (f"--{name}", value)),
        cwd=tmp_path,
        env={"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "mesh" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == alone


# The command, which sends itself a signal when a batch of answers was written.
STOPPED = """
import os, sys, time
from jax_extract.cli import main
from jax_extract.generation.answers import AnswerFiles

write, number, count = AnswerFiles.write, int(sys.argv.pop(1)), int(sys.argv.pop(1))

def stopping(files, batch, answers):
    if batch.number == count + 1:
        os.kill(os.getpid(), number)
        time.sleep(30)
    return write(files, batch, answers)

AnswerFiles.write = stopping
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [
        (signal.SIGKILL, -signal.SIGKILL, ""),
        (signal.SIGTERM, 143, "stopped by SIGTERM: 2 batches of this session answered; run the same command again"),
        (signal.SIGINT, 130, "interrupted; what is committed is safe: run the same command again"),
    ],
)
def test_a_stopped_command_goes_on_and_answers_nothing_twice(
    sent: signal.Signals, code: int, said: str, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "tiny", layers=2)
    prompts = write_jsonl(tmp_path / "in.jsonl", (30, 12, 50, 44, 9, 20))
    whole = generated(model, prompts, tmp_path / "whole", max_new_tokens=8, batch_size=2)
    words = ["--model_path", model, "--tasks_file", prompts, "--activations_dir", tmp_path / "run"]
    words = [int(sent), 2, "generate", *words, "--max_new_tokens", 8, "--batch_size", 2]
    done = run_cli(*words, cwd=tmp_path, code=STOPPED)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    batches = sorted((tmp_path / "run" / "answers").glob("batch_*.jsonl"))
    assert [path.name for path in batches] == ["batch_000001.jsonl", "batch_000002.jsonl"]
    kept = [path.stat().st_mtime_ns for path in batches]
    # Another batch size is not that of the run, whose batches stay what they were.
    assert generated(model, prompts, tmp_path / "run", max_new_tokens=8, batch_size=4) == whole
    assert [path.stat().st_mtime_ns for path in batches] == kept


def test_a_full_disk_is_told_and_the_same_command_goes_on(tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny", layers=2)
    prompts = write_jsonl(tmp_path / "in.jsonl", (30, 12, 50, 44, 9, 20))
    whole = generated(model, prompts, tmp_path / "whole", max_new_tokens=200)
    words = ["generate", "--model_path", model, "--tasks_file", prompts, "--activations_dir", tmp_path / "run"]
    words += ["--max_new_tokens", 200]
    done = run_cli(*words, cwd=tmp_path, script=None, largest_file=3_000)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"error: .*(too large|No space|full).*\n", done.stderr.splitlines(keepends=True)[-1])
    assert sorted(path.name for path in (tmp_path / "run" / "answers").iterdir()) == ["settings.json"]
    assert generated(model, prompts, tmp_path / "run", max_new_tokens=200) == whole


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_new_tokens": 9}, "max_new_tokens"),
        ({"temperature": 1.0}, "temperature is 0.0 and not 1.0"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_answers_of_another_request_are_never_mixed(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    prompts = write_texts(tmp_path / "t.jsonl", random_ids((6, 9)))
    generated(tiny_folder("llama"), prompts, tmp_path / "run", max_new_tokens=8)
    with pytest.raises(UserError, match=rf"answers of another run: their {said}"):
        generated(tiny_folder("llama"), prompts, tmp_path / "run", **{"max_new_tokens": 8, **change})
    again = {"max_new_tokens": 7}  # for all three, so that it is compiled once
    with pytest.raises(UserError, match="answers of another run"):
        generated(tiny_folder("llama"), prompts, tmp_path / "run", **again)
    assert len(generated(tiny_folder("llama"), prompts, tmp_path / "run", **again, overwrite=True)) == 2


@pytest.mark.parametrize("family", ["qwen2_tied", "gpt2", "gemma2"])
def test_greedy_answers_and_their_activations_are_those_that_hugging_face_computes(family: str, tmp_path: Path) -> None:
    prompts = random_ids((12, 40, 3), seed=9)
    inputs = write_texts(tmp_path / "t.jsonl", prompts)
    options = {"positions": "all", "layers_to_extract": (0, 3), "max_new_tokens": 11}
    answers = generated(tiny_folder(family), inputs, tmp_path / "run", extracts=True, capture_answers=True, **options)
    run = open_activations(tmp_path / "run")
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_greedy(family, prompt, answer["token_ids"], stop=94)
        whole = np.concatenate([prompt, answer["token_ids"]]).astype(np.int32)
        sample = run.sample(answer["sample_id"])
        np.testing.assert_array_equal(sample.token_ids, whole)
        truth = reference(tiny_model(family), whole, layers=(0, 3))
        for layer in (0, 3):
            assert row_errors(sample.get(layer), truth["after_block", layer]).max() <= 1e-5
    alone = generated(tiny_folder(family), inputs, tmp_path / "prompts", extracts=True, **options)
    assert alone == answers
    run = open_activations(tmp_path / "prompts")
    assert [len(run.sample(f"s{i}").token_ids) for i in range(len(prompts))] == list(map(len, prompts))


def test_two_hosts_answer_as_one_does_and_extract_behind_it(tmp_path: Path) -> None:
    model, inputs = make_model(tmp_path / "tiny", layers=2), write_jsonl(tmp_path / "in.jsonl", LENGTHS)
    options = {"max_new_tokens": 9, "batch_size": 1, "temperature": 0.7, "capture_answers": True}
    alone = generated(model, inputs, tmp_path / "alone", extracts=True, **options)
    words = ["--model_path", model, "--tasks_file", inputs, "--activations_dir", tmp_path / "together"]
    program([*map(str, words), *(str(w) for name, value in options.items() for w in (f"--{name}", value))], 2, 2)
    lines = (tmp_path / "together" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == alone
    runs = [open_activations(tmp_path / name) for name in ("alone", "together")]
    for sample_id in runs[0].sample_ids:
        ours, theirs = (run.sample(sample_id).token_ids for run in runs)
        np.testing.assert_array_equal(ours, theirs)


def test_independent_workers_share_the_answers_and_leave_none_out(tmp_path: Path) -> None:
    model, inputs = make_model(tmp_path / "tiny", layers=2), write_jsonl(tmp_path / "in.jsonl", LENGTHS)
    options = {"max_new_tokens": 5, "batch_size": 2, "num_workers": 2}
    alone = generated(model, inputs, tmp_path / "alone", max_new_tokens=5, batch_size=2)
    # The first one finds nobody else at work, and answers all.
    assert generated(model, inputs, tmp_path / "shared", worker_id=1, **options) == alone
    answered = {path: path.stat().st_mtime_ns for path in (tmp_path / "shared" / "answers").iterdir()}
    assert generated(model, inputs, tmp_path / "shared", worker_id=0, **options) == alone
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "shared" / "answers").iterdir()} == answered


def test_workers_begin_with_batches_of_their_own_and_help_from_the_other_end() -> None:
    batches = [Batch(number, (), 64) for number in range(1, 10)]
    orders = [[batch.number for batch in own_first(batches, worker, 3)] for worker in range(3)]
    assert [order[:3] for order in orders] == [[3, 6, 9], [1, 4, 7], [2, 5, 8]]
    assert all(sorted(order) == list(range(1, 10)) for order in orders)
    # Who is done early takes what its owner comes to last, and no two helpers the same.
    assert [order[3] for order in orders] == [8, 6, 3]


def test_of_two_workers_who_answer_one_batch_the_first_one_counts(tmp_path: Path) -> None:
    sample = TokenizedSample(0, "s0", np.zeros(3, np.int32), 3, {})
    batch = Batch(1, (sample,), 64)
    first, second = ([Answer(0, "s0", 3, (token,), False, "")] for token in (1, 2))
    files = AnswerFiles(open_storage(str(tmp_path)), most_tokens=4, vocab_size=9)
    files.start({}, allow_numeric_change=False)
    assert files.write(batch, first) == first
    assert files.write(batch, second) == first == files.read(batch)


def test_answers_and_activations_go_into_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make_model(tmp_path / "tiny", layers=2), write_jsonl(tmp_path / "in.jsonl", LENGTHS)
    with running() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        server.make_bucket("answers")
        config = ExtractConfig(
            model_path=str(model),
            tasks_file=str(inputs),
            max_new_tokens=5,
            capture_answers=True,
            activations_dir="gs://answers/run",
        )
        for _ in range(2):  # the second time everything is there
            infer(config, terminal=Terminal(silent=True))
        lines = open_storage("gs://answers/run").read("answers.jsonl").decode().splitlines()
        found = open_activations("gs://answers/run").sample_ids
    assert [json.loads(line)["sample_id"] for line in lines] == found


# ------------------------------------------------------------------------------------------- choosing


def test_what_may_be_drawn_is_what_hugging_face_draws_from() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (6, 50)).astype(np.float32)
    for top_k, top_p in ((5, None), (None, 0.7), (9, 0.5), (None, 1e-6), (80, 0.99)):
        ours = Sampling(1.0, top_k, top_p).restricted(jnp.asarray(logits))
        theirs = torch.from_numpy(logits)
        if top_k:
            theirs = TopKLogitsWarper(top_k)(None, theirs)
        if top_p:
            theirs = TopPLogitsWarper(top_p)(None, theirs)
        np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs.numpy()))


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]], jnp.float32))
    draw = jax.vmap(lambda step: Sampling(0.5).choose(logits, jnp.zeros(1, jnp.int32), step, jnp.uint32(0))[0])
    drawn = np.bincount(np.asarray(draw(jnp.arange(20_000, dtype=jnp.int32))), minlength=4) / 20_000
    squared = np.array([0.5, 0.3, 0.15, 0.05]) ** 2  # half the temperature squares what is likely
    np.testing.assert_allclose(drawn, squared / squared.sum(), atol=0.015)


# -------------------------------------------------------------------------------------------- batches


def test_batches_hold_every_prompt_once_and_few_widths() -> None:
    lengths = np.random.default_rng(0).integers(1, 4_000, 500)
    samples = [TokenizedSample(i, f"s{i}", np.zeros(n, np.int32), int(n), {}) for i, n in enumerate(lengths)]
    batches = batches_of(samples, 16, 3_999)
    assert sorted(s.sample_index for batch in batches for s in batch.samples) == list(range(500))
    assert all(max(s.length for s in batch.samples) <= batch.columns <= 3_999 for batch in batches)
    assert len({batch.columns for batch in batches}) <= 14
    assert [batch.number for batch in batches] == list(range(1, len(batches) + 1))


# ------------------------------------------------------------------------------------------------ ARC


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
def test_a_grid_is_found_at_the_beginning_of_an_answer(encoder: str) -> None:
    code = grid_encoder(encoder)
    grid = np.array([[0, 1, 2], [9, 8, 7]], np.int8)
    text = code.encode(grid)
    for answer in (text, f"\n{text}\n", f"{text}\n\ninput:\n{text}", f"{text}\nand so on"):
        np.testing.assert_array_equal(code.find(answer, True), grid)
    for nothing in ("", "no grid", f"The answer is {text}", "\n\n"):
        assert code.find(nothing, True) is None


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
def test_an_answer_that_breaks_off_within_a_grid_has_none(encoder: str) -> None:
    text = grid_encoder(encoder).encode(np.array([[0, 1, 2], [9, 8, 7], [3, 4, 5]], np.int8))
    meta = {"encoder": encoder}
    for cut in range(1, len(text)):
        assert arc.predicted_grid(text[:cut], False, meta) is None, text[:cut]
    for goes_on in (f"{text}\n\n", f"{text}\nSo"):
        assert arc.predicted_grid(goes_on, False, meta) is not None
    assert arc.predicted_grid(text, True, meta) is not None


def test_predictions_of_augmented_prompts_are_turned_back_and_vote(tmp_path: Path) -> None:
    tasks = read_tasks(write_arc(tmp_path / "arc.json", tasks=1))
    ((_, solution),) = tasks["task000"].test
    samples = list(arc_samples(tasks, n_samples=6, seed=1))
    wrong = "00\n00"
    predictions = []
    for number, sample in enumerate(samples):
        right = solution
        if "augmentation" in sample.meta:
            right = Augmentation.from_json(sample.meta["augmentation"]).apply_grid(solution)
        text = wrong if number == 0 else "?" if number == 1 else grid_encoder("digits").encode(right)
        predictions.append((("task000", 0), arc.predicted_grid(text, True, sample.meta)))
    tried = arc.attempts(predictions)
    np.testing.assert_array_equal(tried["task000", 0][0], solution)
    assert arc.submission(tried, tasks) == {
        "task000": [{"attempt_1": solution.tolist(), "attempt_2": [[0, 0], [0, 0]]}]
    }
    counted = arc.score(tried, arc.known_solutions(tasks, None))
    assert (counted.inputs, counted.right, counted.right_at_once, counted.tasks_right) == (1, 1, 1, 1)
    none = arc.attempts([(("task000", 0), None)])
    assert arc.submission(none, tasks) == {"task000": [{"attempt_1": [[0]], "attempt_2": [[0]]}]}
    assert arc.score(none, arc.known_solutions(tasks, None)).without_grid == 1


def test_answers_to_arc_tasks_become_a_submission_and_a_score(tmp_path: Path) -> None:
    model, tasks = make_model(tmp_path / "tiny", layers=2), write_arc(tmp_path / "arc.json")
    done = run_cli(
        *("generate", "--model_path", model, "--tasks_file", tasks, "--max_new_tokens", 6),
        *("--activations_dir", tmp_path / "run"),
        cwd=tmp_path,
        script=None,
    )
    assert done.returncode == 0, done.stderr
    submission = json.loads((tmp_path / "run" / "submission.json").read_text())
    assert list(submission) == [f"task{i:03d}" for i in range(4)]
    assert all(set(attempts[0]) == {"attempt_1", "attempt_2"} for attempts in submission.values())
    assert json.loads((tmp_path / "run" / "score.json").read_text())["inputs"] == 4
    assert "of 4 test inputs right" in done.stdout


def test_solutions_may_be_in_a_file_of_their_own(tmp_path: Path) -> None:
    tasks = write_arc(tmp_path / "arc.json", tasks=2)
    content = json.loads(tasks.read_text())
    solutions = {}
    for task_id, task in content.items():
        solutions[task_id] = [pair.pop("output") for pair in task["test"]]
    (tmp_path / "challenges.json").write_text(json.dumps(content))
    (tmp_path / "solutions.json").write_text(json.dumps(solutions))
    bare = read_tasks(tmp_path / "challenges.json")
    assert arc.known_solutions(bare, None) == {}
    known = arc.known_solutions(bare, tmp_path / "solutions.json")
    assert {asked: grid.tolist() for asked, grid in known.items()} == {
        (task_id, 0): grids[0] for task_id, grids in solutions.items()
    }
    (tmp_path / "wrong.json").write_text('{"task000": [[[11]]]}')
    with pytest.raises(UserError, match=r"wrong.json is no file of solutions"):
        arc.known_solutions(bare, tmp_path / "wrong.json")


# ------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": 0}, r"--max_new_tokens 0 must be from 1"),
        ({"max_new_tokens": 600}, r"leaves no room for a prompt"),
        ({"max_new_tokens": None, "temperature": 1.0}, r"--temperature is about answers"),
        ({"top_k": 5}, r"add --temperature"),
        ({"temperature": -1.0}, r"--temperature -1.0 must be 0"),
        ({"temperature": 1e-38}, r"--temperature 1e-38 must be 0 .* or at least 1e-06"),
        ({"seed": 2**32}, r"--seed 4294967296 must be from 0 to 4294967295"),
        ({"temperature": 1.0, "top_p": 1.5}, r"--top_p 1.5 must be above 0"),
        ({"temperature": 1.0, "top_k": 0}, r"--top_k 0 must be at least 1"),
        ({"solutions_file": "x.json"}, r"is for ARC tasks"),
        ({"chat_template": True}, r"this model's tokenizer has no chat template"),
    ],
)
def test_mistakes_are_told_in_one_sentence(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    inputs = write_texts(tmp_path / "t.jsonl", random_ids((5,)))
    with pytest.raises(UserError, match=said):
        generated(tiny_folder("llama"), inputs, tmp_path / "run", **options)


def test_an_input_without_a_token_is_refused(tmp_path: Path) -> None:
    inputs = tmp_path / "t.jsonl"
    inputs.write_text('{"id": "a", "text": ""}\n')
    with pytest.raises(UserError, match=r"t.jsonl gave no sample with a token"):
        generated(tiny_folder("llama"), inputs, tmp_path / "run")
    assert not (tmp_path / "run" / "answers").exists()


def test_a_long_prompt_is_cut_so_that_its_answer_fits(tmp_path: Path) -> None:
    prompt = random_ids((90,), seed=4)[0]
    inputs = write_texts(tmp_path / "t.jsonl", [prompt])
    (answer,) = generated(tiny_folder("gpt2"), inputs, tmp_path / "run", max_seq_length=64, max_new_tokens=16)
    assert answer["prompt_tokens"] == 48
    assert_greedy("gpt2", prompt[:48], answer["token_ids"], stop=94)


def test_a_damaged_batch_of_answers_is_named_with_its_mend(tmp_path: Path) -> None:
    inputs = write_texts(tmp_path / "t.jsonl", random_ids((5, 8)))
    generated(tiny_folder("llama"), inputs, tmp_path / "run", max_new_tokens=4)
    path = tmp_path / "run" / "answers" / "batch_000001.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match=r"batch_000001.jsonl is damaged .* answered again"):
        generated(tiny_folder("llama"), inputs, tmp_path / "run", max_new_tokens=4)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"token_ids": [-5]}, "tokens that the model does not know"),
        ({"token_ids": [1.5]}, "tokens that the model does not know"),
        ({"token_ids": [1] * 5}, "none that was written here"),
        ({"ended": "abc"}, "none that was written here"),
        ({"sample_index": 9}, "other prompts"),
        ({"prompt_tokens": 4}, "other prompts"),
        ({"more": 1}, "is damaged"),
    ],
)
def test_an_edited_answer_is_never_taken_for_the_model_s(edit: dict[str, Any], said: str, tmp_path: Path) -> None:
    inputs, run = write_texts(tmp_path / "t.jsonl", random_ids((5, 8))), tmp_path / "run"
    answers = generated(tiny_folder("llama"), inputs, run, max_new_tokens=4)
    answers.sort(key=lambda answer: -answer["prompt_tokens"])  # as they lie in the batch
    lines = [json.dumps(answers[0] | edit), json.dumps(answers[1])]
    (run / "answers" / "batch_000001.jsonl").write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(UserError, match=said):
        generated(tiny_folder("llama"), inputs, run, max_new_tokens=4, extracts=True, capture_answers=True)


@pytest.mark.parametrize("value", [0, -1, "x", None, 2.5, [2]])
def test_a_lying_batch_size_of_answers_is_told(value: object, tmp_path: Path) -> None:
    inputs, run = write_texts(tmp_path / "t.jsonl", random_ids((5, 8))), tmp_path / "run"
    generated(tiny_folder("llama"), inputs, run, max_new_tokens=4)
    path = run / "answers" / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"samples_per_batch": value}))
    with pytest.raises(UserError, match=r"settings.json is damaged \(its samples_per_batch is no number of prompts\)"):
        generated(tiny_folder("llama"), inputs, run, max_new_tokens=4)


def test_files_of_the_user_are_neither_removed_nor_written_over(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("submission.json", "score.json", "answers.jsonl"):
        write_texts(run / name, random_ids((5,)))
        before = snapshot(run)
        inputs = run / name if name == "answers.jsonl" else write_texts(tmp_path / "t.jsonl", random_ids((5, 8)))
        with pytest.raises(UserError, match=rf"{name} is there, and no answers were begun here|is where answers go"):
            generated(tiny_folder("llama"), inputs, run, max_new_tokens=4, overwrite=name == "score.json")
        assert {k: v for k, v in snapshot(run).items() if k in before} == before
        (run / name).unlink()


def test_answers_whose_settings_are_gone_are_not_taken_over(tmp_path: Path) -> None:
    inputs, run = write_texts(tmp_path / "t.jsonl", random_ids((5, 8))), tmp_path / "run"
    generated(tiny_folder("llama"), inputs, run, max_new_tokens=4)
    (run / "answers" / "settings.json").unlink()
    with pytest.raises(UserError, match=r"batch_000001.jsonl is there, and no answers were begun here"):
        generated(tiny_folder("llama"), inputs, run, max_new_tokens=4, temperature=1.0)


def test_answers_under_their_activations_are_not_overwritten_alone(tmp_path: Path) -> None:
    inputs, run = write_texts(tmp_path / "t.jsonl", random_ids((5, 8))), tmp_path / "run"
    options = {"max_new_tokens": 4, "temperature": 1.0}
    generated(tiny_folder("llama"), inputs, run, extracts=True, capture_answers=True, **options)
    before = snapshot(run)
    with pytest.raises(UserError, match=r"holds activations of the answers that --overwrite would remove"):
        generated(tiny_folder("llama"), inputs, run, overwrite=True, seed=2, **options)
    assert snapshot(run) == before


@pytest.mark.parametrize("value", ["abc", {"a": 1}, ["a"], [None], 1.5, True, -1, 10**12])
def test_an_end_that_is_no_token_is_refused(value: object, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    inputs = write_texts(tmp_path / "t.jsonl", random_ids((5, 8)))
    with pytest.raises(UserError, match=r"generation_config.json of .* has eos_token_id .*; expected a token id"):
        generated(folder, inputs, tmp_path / "run", max_new_tokens=4)


def test_the_smallest_temperature_draws_what_is_likeliest(tmp_path: Path) -> None:
    inputs = write_texts(tmp_path / "t.jsonl", random_ids((5, 8)))
    likeliest = generated(tiny_folder("llama"), inputs, tmp_path / "greedy", max_new_tokens=8)
    assert generated(tiny_folder("llama"), inputs, tmp_path / "run", max_new_tokens=8, temperature=1e-6) == likeliest


def test_prompts_are_read_in_few_slabs_with_hardly_any_padding() -> None:
    lengths = sorted(np.random.default_rng(0).integers(20, 900, 64).tolist(), reverse=True)
    samples = [TokenizedSample(i, f"s{i}", np.full(n, i, np.int32), n, {}) for i, n in enumerate(lengths)]
    settings = PlanSettings(8, 8, 2_048, 16, 1_000, Positions("all"), 4, compile_tokens=1_000, packed=True)
    computed, shapes = 0, set()
    for reading in readings(batches_of(samples, 16, 1_000), 2, settings):
        read: dict[int, np.ndarray] = {}
        for slabs in reading.steps():
            computed, shapes = computed + slabs.tokens.size, shapes | {slabs.tokens.shape}
            for i, (row, row_lengths, rows) in enumerate(zip(slabs.tokens, slabs.lengths, slabs.rows, strict=True)):
                ends = np.cumsum(row_lengths)
                for start, end, place in zip(ends - row_lengths, ends, rows, strict=True):
                    if start < end:
                        read[reading.place(i, int(place))] = row[start:end]
        for place, prompt in reading.prompts():
            np.testing.assert_array_equal(read[place], prompt.token_ids)
    assert computed <= 1.15 * sum(lengths)  # padded to the longest of each batch it is 1.24
    assert len(shapes) <= 8


def test_overwriting_answers_removes_them_and_nothing_of_the_user(tmp_path: Path) -> None:
    inputs, run = write_texts(tmp_path / "t.jsonl", random_ids((5, 8))), tmp_path / "run"
    (run / "answers").mkdir(parents=True)
    note = run / "answers" / "note.txt"
    note.write_text("mine")
    generated(tiny_folder("llama"), inputs, run, max_new_tokens=4, overwrite=True)
    (run / "score.json").write_text("{}")
    generated(tiny_folder("llama"), inputs, run, max_new_tokens=5, overwrite=True)
    assert note.read_text() == "mine" and not (run / "score.json").exists()


def test_a_line_of_answers_is_one_line_whatever_the_model_says() -> None:
    answer = Answer(0, "a\u2028b\ud800", 1, (1, 2), True, "x\u2029\x85y\nz")
    line = answer.to_line()
    assert line.encode().decode().splitlines() == [line[:-1]]
    assert Answer.of_line(line) == answer


def test_a_run_of_another_request_is_refused_before_anything_is_answered(tmp_path: Path) -> None:
    inputs = write_texts(tmp_path / "t.jsonl", random_ids((5, 8)))
    generated(tiny_folder("llama"), inputs, tmp_path / "run", extracts=True, layers_to_extract=(1,), max_new_tokens=4)
    shutil.rmtree(tmp_path / "run" / "answers")
    with pytest.raises(UserError, match=r"holds another run"):
        generated(
            tiny_folder("llama"), inputs, tmp_path / "run", extracts=True, layers_to_extract=(2,), max_new_tokens=4
        )
    assert not (tmp_path / "run" / "answers").exists()


def test_a_kaggle_file_without_solutions_gives_a_submission_and_no_score(tmp_path: Path) -> None:
    model, tasks = make_model(tmp_path / "tiny", layers=2), write_arc(tmp_path / "arc.json", tasks=1)
    content = json.loads(tasks.read_text())
    del content["task000"]["test"][0]["output"]
    tasks.write_text(json.dumps(content))
    generated(model, tasks, tmp_path / "run", max_new_tokens=4)
    assert (tmp_path / "run" / "submission.json").exists()
    assert not (tmp_path / "run" / "score.json").exists()
