"""Edits while answering, and from a file: what the commands and a loaded model make of them.

Guarded: answers under edits are those of Hugging Face's model with such hooks, token for token, on JAX, on a mesh and
on torch; `--edits` of extract and generate does what `Model` does, belongs to what a run is, and is verified; files
that hold no edits are refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from small_run import run_cli
from test_edits import SOME, at_positions
from test_processes import program
from tiny_models import families, random_ids, text_of, tiny_folder, tiny_model
from torch_hooks import TorchChange, changed

from jax_extract import Edit, Model, UserError, load_model, open_activations
from jax_extract.forward.edit_files import read_edits
from jax_extract.terminal import Terminal
from jax_extract.verification.command import verify

MOST = 24
PROMPTS = random_ids([17, 9, 12], seed=21)


def steered(model: Model) -> tuple[list[Edit], list[TorchChange]]:
    """Of every token; of a position in the answer; of the last one of the prompt, by a function."""
    width = model.config.hidden_size
    random = np.random.default_rng(5)
    v, w = (random.standard_normal(width).astype(np.float32) for _ in range(2))
    t = torch.from_numpy
    edits = [
        Edit("after_block", "add", layer=1, value=v, scale=8.0),
        Edit("ffn_out", "replace", layer=2, value=w, positions=[25]),
        Edit("attention_out", halved, layer=[0, 3], positions=[-1]),
    ]
    changes = [TorchChange("after_block", 1, lambda x: x + 8.0 * t(v))]
    changes.append(TorchChange("ffn_out", 2, lambda x: at_positions([25], t(w))(x) if len(x) > 25 else x))
    return edits, changes


def halved(rows: Any, _: Any) -> Any:
    return rows / 2


def halved_at(position: int, layer: int) -> TorchChange:
    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[position] /= 2
        return x

    return TorchChange("attention_out", layer, change)


def greedy(name: str, prompt: np.ndarray, changes: list[TorchChange]) -> tuple[list[int], float]:
    """Every step computes all tokens again; and by how much the likeliest token led at least."""
    tokens, lead = prompt.tolist(), float("inf")
    changes = [*changes, halved_at(len(prompt) - 1, 0), halved_at(len(prompt) - 1, 3)]
    with torch.inference_mode(), changed(tiny_model(name), changes):
        for _ in range(MOST):
            logits = tiny_model(name)(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            best = torch.topk(logits, 2)
            lead = min(lead, float(best.values[0] - best.values[1]))
            tokens.append(int(best.indices[0]))
    return tokens[len(prompt) :], lead


@pytest.fixture(scope="module", params=families("qwen2_window gpt_neox", "mistral"))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_steered_answers_are_hugging_faces_token_for_token(name: str) -> None:
    model = load_model(tiny_folder(name), mesh_shape="1,1")
    edits, changes = steered(model)
    answers = model.generate(PROMPTS, max_new_tokens=MOST, edits=edits)
    plain = model.generate(PROMPTS, max_new_tokens=MOST)
    by_torch = load_model(tiny_folder(name), backend="torch").generate(PROMPTS, max_new_tokens=MOST, edits=edits)
    for prompt, answer, other in zip(PROMPTS, answers, by_torch, strict=True):
        expected, lead = greedy(name, prompt, changes)
        assert lead > 1e-4, "choose another seed: a tie decides nothing"
        assert list(answer.token_ids) == expected
        assert list(other.token_ids) == expected, "on torch"
    assert [a.token_ids for a in answers] != [a.token_ids for a in plain], "the edits must act"


# ------------------------------------------------------------------------------------------- from a file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A file of edits with an array of each kind beside it, and texts."""
    width = tiny_model(SOME[0]).config.hidden_size
    vectors = np.random.default_rng(7).standard_normal((3, width)).astype(np.float32)
    np.save(tmp_path / "direction.npy", vectors[0])
    np.savez(tmp_path / "several.npz", one=vectors[1], two=vectors[2])
    edits = [
        {"hook": "after_block", "change": "add", "layer": 1, "value": "direction.npy", "scale": 4.0},
        {
            "hook": "ffn_out",
            "change": "replace",
            "layer": [2, 3],
            "value": {"file": "several.npz", "name": "two"},
            "positions": [-1],
        },
        {"hook": "blocks.0.hook_attn_out", "change": "zero", "samples": ["b"]},
    ]
    (tmp_path / "edits.yaml").write_text(yaml.safe_dump(edits))
    lines = [{"id": chr(97 + i), "text": text_of(prompt)} for i, prompt in enumerate(PROMPTS)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def words(folder: Path, out: str, *more: str) -> list[str]:
    given = ["--model_path", str(tiny_folder(SOME[0])), "--tasks_file", str(folder / "texts.jsonl")]
    return [*given, "--activations_dir", str(folder / out), "--edits", str(folder / "edits.yaml"), *more]


CAPTURE = ["--layers_to_extract", "0", "1", "2", "3", "4", "--positions", "all"]


def test_extract_with_edits_writes_what_a_loaded_model_gives(folder: Path) -> None:
    done = run_cli(*words(folder, "run", *CAPTURE), cwd=folder)
    assert done.returncode == 0, done.stderr
    edits = read_edits(str(folder / "edits.yaml"))
    model = load_model(tiny_folder(SOME[0]), mesh_shape="1,1")
    texts = {chr(97 + i): prompt for i, prompt in enumerate(PROMPTS)}
    expected = model.run(texts, capture={"after_block": "all"}, edits=edits).run
    run = open_activations(folder / "run")
    for sample in texts:
        for layer in range(5):
            got, rows = run.sample(sample).get(layer=layer), expected.sample(sample).get(layer=layer)
            assert np.linalg.norm(got - rows) <= 1e-5 * np.linalg.norm(rows)
    assert run.metadata["edits"] == [repr(edit) for edit in edits]
    by_torch = run_cli(*words(folder, "torch", *CAPTURE, "--backend", "torch"), cwd=folder, fresh=True)
    assert by_torch.returncode == 0, by_torch.stderr
    for sample in texts:
        got, rows = open_activations(folder / "torch").sample(sample).get(layer=4), run.sample(sample).get(layer=4)
        assert np.linalg.norm(got - rows) <= 1e-5 * np.linalg.norm(rows)


def test_extract_with_edits_on_a_mesh_of_two_hosts_writes_the_same_rows(folder: Path) -> None:
    """Every device puts rows of a source of its own samples."""
    assert run_cli(*words(folder, "source", *CAPTURE), cwd=folder).returncode == 0
    given = yaml.safe_load((folder / "edits.yaml").read_text())
    given.append({"hook": "after_block", "change": "mean", "layer": 3, "source": "source"})
    given.append({"hook": "after_block", "change": "patch", "layer": 2, "source": "source", "positions": [1, -2]})
    (folder / "edits.yaml").write_text(yaml.safe_dump(given))
    for out, hosts, devices, shape in (("one", 1, 1, "1,1"), ("eight", 2, 4, "2,4")):
        program(words(folder, out, *CAPTURE, "--mesh_shape", shape, "--batch_size", "1"), hosts, devices)
    one, eight = open_activations(folder / "one"), open_activations(folder / "eight")
    for sample in one.sample_ids:
        for layer in range(5):
            np.testing.assert_array_equal(one[sample].get(layer=layer), eight[sample].get(layer=layer))


def test_a_run_with_edits_is_verified_under_them(folder: Path) -> None:
    """By Hugging Face's model with hooks; where torch is not there, by our own forward. Other edits are refused."""
    assert run_cli(*words(folder, "run", *CAPTURE), cwd=folder).returncode == 0
    verdict = verify(str(folder / "run"), terminal=Terminal(silent=True))
    assert verdict.verdict == "verified"
    assert "Hugging Face" in verdict.reference["name"]
    assert len(verdict.samples) == len(PROMPTS)
    (folder / "moved").mkdir()
    for file in ("edits.yaml", "direction.npy", "several.npz"):
        (folder / file).rename(folder / "moved" / file)
    with pytest.raises(UserError, match="say where it is now with --edits"):
        verify(str(folder / "run"), terminal=Terminal(silent=True))
    moved = str(folder / "moved" / "edits.yaml")
    assert verify(str(folder / "run"), edits=moved, terminal=Terminal(silent=True)).verdict == "verified"
    np.save(folder / "moved" / "direction.npy", np.zeros_like(np.load(folder / "moved" / "direction.npy")))
    with pytest.raises(UserError, match="are not those of the run"):
        verify(str(folder / "run"), edits=moved, terminal=Terminal(silent=True))


def test_edits_are_part_of_what_a_run_is(folder: Path) -> None:
    assert run_cli(*words(folder, "run", *CAPTURE), cwd=folder).returncode == 0
    again = run_cli(*words(folder, "run", *CAPTURE), cwd=folder)
    assert again.returncode == 0, again.stderr
    np.save(folder / "direction.npy", np.ones_like(np.load(folder / "direction.npy")))
    other = run_cli(*words(folder, "run", *CAPTURE), cwd=folder)
    assert other.returncode == 2
    assert "edits" in other.stderr
    without = [word for word in words(folder, "run", *CAPTURE) if "edits" not in word]
    assert run_cli(*without, cwd=folder).returncode == 2


def test_generate_with_edits_answers_as_a_loaded_model(folder: Path) -> None:
    given = words(folder, "answers", "--max_new_tokens", str(MOST))
    done = run_cli("generate", *given, cwd=folder, script=None)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "answers" / "answers.jsonl").read_text().splitlines()]
    model = load_model(tiny_folder(SOME[0]), mesh_shape="1,1")
    texts = {chr(97 + i): prompt for i, prompt in enumerate(PROMPTS)}
    answers = model.generate(texts, max_new_tokens=MOST, edits=read_edits(str(folder / "edits.yaml")))
    assert [line["token_ids"] for line in lines] == [list(answer.token_ids) for answer in answers]


def test_the_documented_keys_are_read(folder: Path) -> None:
    run = run_cli(*words(folder, "source", *CAPTURE), cwd=folder)
    assert run.returncode == 0
    given = {
        "edits": [
            {"hook": "after_block", "change": "patch", "layer": 2, "source": "source", "positions": [0], "samples": "a"}
        ]
    }
    (folder / "patch.yaml").write_text(yaml.safe_dump(given))
    [edit] = read_edits(str(folder / "patch.yaml"))
    model = load_model(tiny_folder(SOME[0]), mesh_shape="1,1")
    out = model.run({"a": PROMPTS[0]}, capture={"after_block": [2]}, edits=[edit])
    expected = open_activations(folder / "source").sample("a").get(layer=2)[0]
    np.testing.assert_array_equal(out.run.sample("a").get(layer=2)[0], expected)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no list of edits"),
        ("edits: {hook: x}", "holds no list of edits"),
        ("- [", "line 1, is not valid YAML"),
        ("- {hook: ffn_out, change: zero, layer: 1, hook: after_block}", "line 1, names 'hook' twice"),
        ("- {hook: ffn_out, change: zero, layer: 1, positions: 2001-13-45}", "cannot be read (ValueError"),
        ("- {hook: ffn_out, change: zero, layer: !!int abc}", "cannot be read (ValueError"),
        ("[" * 3_000, "cannot be read (RecursionError"),
        (
            "- {hook: ffn_out, change: zero, samples: [&a [x, x], "
            + ", ".join(f"&{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]" for i in range(9))
            + "]}",
            "stands for over 1,000,000 values",
        ),
        ("- {hook: ffn_out, change: zero, layer: 1, samples: 3.5}", "must be ids, or places"),
        ("- {hook: ffn_out, change: add, layer: 1, value: ~nosuchuser/a.npy}", "is not a usable path"),
        ("- 3", "edit 1 of"),
        ("- {hook: ffn_out}", "lacks 'change'"),
        ("- {hook: ffn_out, change: zero, layers: 3}", "has 'layers'"),
        ("- {hook: ffn_out, change: explode, layer: 3}", "the change 'explode'"),
        ("- {hook: ffn_out, change: zero, layer: 99}", "layer 99 does not exist"),
        ("- {hook: ffn_out, change: add, layer: 1, value: nowhere.npy}", "cannot be read (No such file"),
        ("- {hook: ffn_out, change: add, layer: 1, value: texts.jsonl}", "cannot be read"),
        ("- {hook: ffn_out, change: add, layer: 1, value: {file: several.npz, name: three}}", "which holds one, two"),
        ("- {hook: ffn_out, change: add, layer: 1, value: several.npz}", "which holds one, two"),
        ("- {hook: ffn_out, change: add, layer: 1, value: {file: [1], name: three}}", "expected a list of numbers"),
        ("- {hook: ffn_out, change: add, layer: 1, value: [1, 2, 3]}", "3 wide"),
        ("- {hook: ffn_out, change: patch, layer: 1, source: nowhere}", "nowhere"),
        ("- {hook: ffn_out, change: zero, layer: 1, positions: [99]}", "names position 99"),
        ("- {hook: ffn_out, change: zero, layer: 1, samples: [zz]}", "names sample 'zz'"),
        ("- {hook: after_block, change: zero, layer: 4}", "changes nothing that is kept"),
    ],
)
def test_files_without_edits_are_refused_by_name_before_anything_is_written(
    folder: Path, content: str, said: str
) -> None:
    (folder / "edits.yaml").write_text(content)
    layers = ["--layers_to_extract", "1", "--positions", "all"]
    done = run_cli(*words(folder, "run", *layers), cwd=folder)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert said in done.stderr
    assert not (folder / "run" / "_run").exists()


def test_a_pickled_array_is_not_unpickled(folder: Path) -> None:
    np.save(folder / "direction.npy", np.array([print], object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        read_edits(str(folder / "edits.yaml"))
