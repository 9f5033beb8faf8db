"""The hook points of attention in runs: how they are named, how long samples of the pattern may be, who knows it.

Guarded: names, globs and reasons; that a sample which is too long is refused before anything is written; the pattern's
length as part of a run; a glob that means what it meant when the run was begun; verification by both references; the
torch backend, and changes through it; keys and values that an answer remembers. Parity is in test_parity.py.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from small_run import Told, make_model, run_here, write_config, write_jsonl
from test_edits import KINDS, Case, everything
from test_parity import assert_parity
from tiny_models import families, random_ids, reference, row_errors, run_rows, tiny_folder, tiny_model
from torch_hooks import TorchChange, base_of, modules_of, truth_of

from jax_extract import UserError, extract, load_model, open_activations
from jax_extract.compilation.command import compile_for
from jax_extract.compilation.config import CompileConfig
from jax_extract.config import ExtractConfig
from jax_extract.devices import libtpu
from jax_extract.generation.command import infer
from jax_extract.pytorch.hooks import listen
from jax_extract.store.ledger import RUN_FILE
from jax_extract.terminal import Terminal
from jax_extract.verification import reference as verification
from jax_extract.verification.command import verify
from jax_extract.weights.open_model import OpenModel
from models.capture_plan import CapturePlan
from models.hooks import BEFORE_NORMS_BEHIND, GATED, HOOK_POINTS, UNGATED, resolve_hook_points
from models.interventions import Intervention
from models.kv_cache import Decoding, KeyValueCache, Prefill
from models.layers import Numerics
from models.packing import Packing
from models.ports import hook_width
from models.positions import Positions
from models.self_attention import AttentionRule, WithinRows
from models.taps import Taps

PATTERN = "attention_pattern"


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("blocks.{i}.attn.hook_q", {"query": None}),
        ("blocks.3.attn.hook_k", {"key": {3}}),
        ("blocks.*.attn.hook_v", {"value": None}),
        ("blocks.2.attn.hook_rot_q", {"query_rotated": {2}}),
        ("blocks.2.attn.hook_rot_k", {"key_rotated": {2}}),
        ("blocks.2.attn.hook_z", {"attention_heads": {2}}),
        ("blocks.2.attn.hook_pattern", {PATTERN: {2}}),
        (PATTERN, {PATTERN: None}),
        ("attention_*", {"attention_heads": None, "attention_out": None}),
        ("*_rotated", {"query_rotated": None, "key_rotated": None}),
        ("attention_out_raw", {"attention_out": None}),  # which is the same where no norm lies behind
        ("blocks.1.mlp.hook_out", {"ffn_out": {1}}),
    ],
)
def test_the_names_of_transformer_lens_and_globs_mean_the_hook_points_of_attention(
    name: str, meant: dict[str, Any]
) -> None:
    assert resolve_hook_points([name]) == meant


def test_what_comes_before_a_norm_behind_a_sublayer_is_another_hook_point_where_there_is_one() -> None:
    available = {**GATED, **BEFORE_NORMS_BEHIND}
    for name in ("attention_out_raw", "blocks.{i}.attn.hook_out"):
        assert resolve_hook_points([name], available) == {"attention_out_raw": None}
    assert resolve_hook_points(["attention_out", "ffn_out_raw"], available) == {
        "attention_out": None,
        "ffn_out_raw": None,
    }


def test_no_glob_means_the_pattern_and_one_that_could_mean_nothing_else_is_refused() -> None:
    assert set(resolve_hook_points(["*"])) == set(GATED) - {PATTERN}
    with pytest.raises(UserError, match=f"'attention_p\\*' means {PATTERN} alone.*whole name"):
        resolve_hook_points(["attention_p*"])


def test_a_model_without_rotations_says_why_it_has_no_rotated_queries() -> None:
    with pytest.raises(UserError, match=r"'query_rotated' does not exist in this architecture \(it has no rotary"):
        extract(str(tiny_folder("gpt2")), ["!"], layers=0, hook_points="query_rotated")
    assert "query_rotated" in UNGATED


@pytest.mark.parametrize(("name", "meant"), [("hook_q", "query"), ("blocks.1.hook_z", "blocks.{i}.attn.hook_z")])
def test_a_name_without_its_module_leads_to_the_hook_point(name: str, meant: str) -> None:
    with pytest.raises(UserError, match="unknown hook point") as error:
        resolve_hook_points([name])
    assert f"the nearest name is {meant!r}" in str(error.value)


# ----------------------------------------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with four query heads, 8 wide, and two key/value heads."""
    folder = make_model(tmp_path_factory.mktemp("attention") / "model", layers=2)
    write_config(folder, num_hidden_layers=2)
    return folder


def wanted(**options: Any) -> dict[str, Any]:
    return {"layers_to_extract": (0, 1), "hook_points": ("*", PATTERN), "positions": "all", **options}


def test_a_run_is_read_by_every_name_and_its_widths_are_those_of_heads(small: Path, tmp_path: Path) -> None:
    run_here(
        small, write_jsonl(tmp_path / "in.jsonl", [5, 20, 9]), tmp_path / "a", **wanted(attention_pattern_tokens=24)
    )
    run = open_activations(tmp_path / "a")
    widths = {site.hook: site.width for site in run.sites}
    assert widths["query"] == widths["query_rotated"] == widths["attention_heads"] == 32
    assert widths["key"] == widths["key_rotated"] == widths["value"] == 16
    assert widths[PATTERN] == 4 * 24 and run.metadata["attention_pattern_tokens"] == 24
    sample = run.sample("s0001")
    for ours, theirs in (("key", "hook_k"), (PATTERN, "hook_pattern"), ("attention_out", "hook_out")):
        np.testing.assert_array_equal(sample.get(1, ours), sample.get(hook=f"blocks.1.attn.{theirs}"))
    # Values and weights are what attention is made of: key/value head h // 2 is that of query head h.
    pattern = sample.get(1, PATTERN).reshape(20, 4, 24)[:, :, :20]
    value = sample.get(1, "value").reshape(20, 2, 8).repeat(2, axis=1)
    mixed = np.einsum("qhk,khw->qhw", pattern, value).reshape(20, 32)
    assert row_errors(sample.get(1, "attention_heads"), mixed).max() < 1e-6


def test_another_length_of_the_pattern_is_another_run_and_the_flag_is_named(small: Path, tmp_path: Path) -> None:
    tasks = write_jsonl(tmp_path / "in.jsonl", [5, 20])
    run_here(small, tasks, tmp_path / "a", **wanted(attention_pattern_tokens=24))
    with pytest.raises(UserError, match="holds another run: --attention_pattern_tokens was 24, is now 30;"):
        run_here(small, tasks, tmp_path / "a", **wanted(attention_pattern_tokens=30))


def test_a_run_without_the_pattern_does_not_speak_of_its_length(small: Path, tmp_path: Path) -> None:
    """Else runs that were begun before would be other runs."""
    tasks = write_jsonl(tmp_path / "in.jsonl", [5])
    run_here(small, tasks, tmp_path / "a", layers_to_extract=(0,), hook_points=("*",))
    assert "attention_pattern_tokens" not in json.loads((tmp_path / "a" / RUN_FILE).read_text())["identity"]
    with pytest.raises(UserError, match="--attention_pattern_tokens 9 is about attention_pattern, which is not asked"):
        run_here(small, tasks, tmp_path / "b", layers_to_extract=(0,), attention_pattern_tokens=9)


def test_a_glob_means_the_hook_points_that_there_were_when_the_run_was_begun(small: Path, tmp_path: Path) -> None:
    tasks, place = write_jsonl(tmp_path / "in.jsonl", [5, 20, 9]), tmp_path / "a"
    before = ("residual_before", "attention_out", "ffn_gate", "after_block")
    run_here(small, tasks, place, layers_to_extract=(0,), hook_points=before)
    said = json.loads((place / RUN_FILE).read_text())
    said["description"]["model_hook_points"] = {name: HOOK_POINTS[name].alias for name in before}
    (place / RUN_FILE).write_text(json.dumps(said))  # as the version before wrote it
    metadata = run_here(small, tasks, place, layers_to_extract=(0,), hook_points=("*",))
    assert metadata["hook_points"] == list(before)
    with pytest.raises(UserError, match=r"--hook_points was .*, is now "):
        run_here(small, tasks, place, layers_to_extract=(0,), hook_points=("*", "query"))


LONG = {"short": "a" * 9, "long": "b" * 40}


def test_a_sample_that_is_too_long_is_refused_before_anything_is_written(small: Path, tmp_path: Path) -> None:
    said = r"sample 's0001' has 40 tokens, and attention_pattern is kept of samples of at most 24; give "
    mend = r"--attention_pattern_tokens 40, or cut samples with --max_seq_length 24"
    tasks = write_jsonl(tmp_path / "in.jsonl", [9, 40])
    for source in ({}, {"dataset": str(tasks)}):
        options = wanted(attention_pattern_tokens=24, **source)
        with pytest.raises(UserError, match=said + mend):
            run_here(small, None if source else tasks, tmp_path / "a", **options)
        assert not (tmp_path / "a").exists()
    metadata = run_here(small, tasks, tmp_path / "a", **wanted(attention_pattern_tokens=24, max_seq_length=24))
    assert metadata["total_tokens"] == 9 + 24


def test_whoever_knows_how_long_samples_become_refuses_them_too(small: Path, tmp_path: Path) -> None:
    options = {"layers": 0, "hook_points": PATTERN, "attention_pattern_tokens": 24}
    with pytest.raises(UserError, match="sample 'long' has 40 tokens"):
        extract(str(small), LONG, **options)
    with pytest.raises(UserError, match="sample 'long' has 40 tokens"):
        extract(str(small), LONG, backend="torch", **options)
    with pytest.raises(
        UserError, match="--context_tokens 32 is more than the 24 tokens that attention_pattern is kept"
    ):
        extract(str(small), LONG, context_tokens=32, context_start="none", context_separator="none", **options)
    tasks = write_jsonl(tmp_path / "in.jsonl", [9, 20])
    with pytest.raises(UserError, match="sample 's0001' has 20 tokens before an answer of up to 8, and"):
        infer(
            ExtractConfig(
                **wanted(attention_pattern_tokens=24, hook_points=(PATTERN,)),
                model_path=str(small),
                tasks_file=str(tasks),
                activations_dir=str(tmp_path / "answers"),
                max_new_tokens=8,
                capture_answers=True,
            ),
            terminal=Terminal(silent=True),
        )
    assert not (tmp_path / "answers").exists()


@pytest.mark.skipif(not libtpu.is_installed(), reason="libtpu is not installed: pip install -e '.[tpu]'")
def test_a_length_that_is_too_long_is_refused_before_a_pod_is_compiled_for(small: Path, tmp_path: Path) -> None:
    (tmp_path / "lengths.txt").write_text("9\n40\n")
    config = CompileConfig(
        model_path=str(small),
        topology="v5e:2x2",
        lengths=str(tmp_path / "lengths.txt"),
        hook_points=(PATTERN,),
        attention_pattern_tokens=24,
    )
    with pytest.raises(UserError, match=r"lengths.txt:2' has 40 tokens"):
        compile_for(config)


@pytest.mark.parametrize("has_torch", [True, False])
def test_both_references_verify_every_hook_point_of_attention(
    small: Path, tmp_path: Path, has_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "torch_is_installed", lambda: has_torch)
    run_here(
        small, write_jsonl(tmp_path / "in.jsonl", [5, 20, 9]), tmp_path / "a", **wanted(attention_pattern_tokens=24)
    )
    told = Told()
    verdict = verify(str(tmp_path / "a"), terminal=told)
    assert verdict.verdict == "verified", told.lines
    assert {site.hook for site in verdict.sites} == set(GATED)
    assert ("Hugging Face" in verdict.reference["name"]) == has_torch


# -------------------------------------------------------------------------------------------- by torch


@pytest.mark.parametrize("family", ["qwen3", "gpt2_variant", "gpt_neox", "phi_variant", "gemma2"])
def test_torch_gives_the_pattern_that_hugging_face_computes(family: str) -> None:
    sequences = random_ids((1, 40, 90))
    options: dict[str, Any] = {
        "layers": (0, 2),
        "hook_points": (PATTERN, "query", "attention_heads"),
        "positions": "all",
    }
    run = extract(
        str(tiny_folder(family)),
        ["".join(chr(33 + i) for i in ids) for ids in sequences],
        backend="torch",
        attention_pattern_tokens=93,
        batch_size=3,
        **options,
    )
    for i, sequence in enumerate(sequences):
        truth = reference(tiny_model(family), sequence, (0, 2), pattern_tokens=93)
        kept = {site: rows for site, rows in truth.items() if site[0] in options["hook_points"]}
        assert_parity(run_rows(run, str(i)), kept, f"{family}, text {i}")


CHANGED = ("query", "value", "query_rotated", "key_rotated", PATTERN, "attention_heads", "attention_out")


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "gemma2"])
def test_what_is_seen_on_torch_can_be_changed(family: str) -> None:
    """As forward hooks of the test's own change it, which know nothing of the product's."""
    model, base = tiny_model(family), base_of(tiny_model(family))
    config = OpenModel.open(str(tiny_folder(family))).config
    [ids] = random_ids([23])
    given = torch.from_numpy(ids.astype(np.int64))[None]
    random = torch.Generator().manual_seed(0)

    def logits() -> np.ndarray:
        with torch.inference_mode():
            return model(given, use_cache=False).logits[0].numpy()

    attention, before = base.config._attn_implementation, logits()
    for hook in CHANGED:
        width = hook_width(config, hook)
        change = functools.partial(torch.add, torch.rand(len(ids), width, generator=random))
        rows, truth = truth_of(model, ids, [TorchChange(hook, 1, change)])
        handle = listen(base, modules_of(model)[hook], 1, change)
        got, found = logits(), reference(model, ids)
        handle.remove()
        assert row_errors(got, truth).max() < 2e-5, hook
        assert row_errors(found["after_block", 1], rows["after_block", 1]).max() < 1e-5, hook
        assert row_errors(got, before).max() > 1e-3, f"{hook} must act"
        assert row_errors(logits(), before).max() < 2e-5, f"{hook} must end with its handle"
        assert base.config._attn_implementation == attention, "the model is as it was before"


# ---------------------------------------------------------------------------------------- while answering


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("changes", [False, True])
def test_an_answer_has_the_pattern_of_the_whole_sample_and_changes_of_it_act(window: int, changes: bool) -> None:
    """Prompts of 5 and 9 tokens in 12 columns, and 3 tokens behind them, one at a time."""
    groups, heads, width, most, prompt_columns, steps = 2, 6, 4, 20, 12, 3
    total, lengths, both = prompt_columns + steps, np.array([5, 9]), np.arange(2)
    rule, numerics = AttentionRule(windows=(window,), soft_cap=2.0), Numerics()
    plan = CapturePlan(((PATTERN, (0,)),), Positions("all"), pattern_tokens=most)
    random = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(random.standard_normal((2, total, n, width)), jnp.float32) for n in (heads, groups, groups)
    )

    def packing(tokens: int, lengths: np.ndarray) -> Packing:
        return Packing(jnp.asarray(lengths, jnp.int32)[:, None], tokens)

    @jax.jit
    def attended(attention: Any, packed: Packing, query: Any, key: Any, value: Any) -> Any:
        half = Intervention(
            PATTERN,
            "add",
            np.ones((1, 2), bool),
            np.zeros(query.shape[:2], np.int32),
            np.full((1, heads * most), 0.5, np.float32),
        )
        taps = Taps.start(plan, 1, packed, {PATTERN: heads * most}, (half,) if changes else ())
        mixed, taps, attention = attention.attend_visibly(rule, jnp.int32(0), query, key, value, taps, numerics)
        return mixed, taps.buffers[PATTERN][0], attention

    whole = WithinRows(jnp.broadcast_to(jnp.arange(total, dtype=jnp.int32), (2, total)))
    truth, pattern, _ = attended(whole, packing(total, np.full(2, total)), query, key, value)
    plain, _ = whole.attend(rule, jnp.int32(0), query, key, value, numerics)
    assert bool(jnp.allclose(truth, plain, atol=1e-5)) != changes

    cache = KeyValueCache.empty(
        jnp.asarray(lengths, jnp.int32), jnp.int32(prompt_columns), (1, groups, total, width), "float32"
    )
    prompts = packing(prompt_columns, lengths)
    prefill = Prefill.into(cache, prompts, jnp.arange(2, dtype=jnp.int32)[:, None])
    prefill = attended(prefill, prompts, *(x[:, :prompt_columns] for x in (query, key, value)))[2]
    decoding = Decoding(prefill.cache, jnp.int32(0))
    for step in range(steps):
        at = lengths + step
        token = (x[both, at][:, None] for x in (query, key, value))
        mixed, row, decoding = attended(decoding, packing(1, np.ones(2)), *token)
        decoding = dataclasses.replace(decoding, step=jnp.int32(step + 1))
        np.testing.assert_allclose(row[:, 0], pattern[both, at], atol=1e-6)
        np.testing.assert_allclose(mixed[:, 0], truth[both, at], atol=1e-5)


# ---------------------------------------------------------------------------------------------- the door


@pytest.mark.parametrize("family", families("gemma2", "gpt_neox"))
def test_every_change_of_what_attention_computes_with_is_the_same_on_torch(family: str) -> None:
    """Of those that tests/test_edits.py holds JAX to."""
    ours, theirs = (load_model(tiny_folder(family), backend=backend) for backend in ("jax", "torch"))
    kept = {**everything(ours), PATTERN: "all"}
    [other] = random_ids([31], seed=5)
    source = ours.run({"source": other}, capture=kept).run
    hooks = [hook for hook in ours.hook_points if HOOK_POINTS[hook].width in ("query_heads", "key_heads", "pattern")]
    sites = [(hook, kind) for hook in hooks for kind in KINDS]
    layers = ours.config.num_hidden_layers
    edits = [Case(ours, *site, i % layers, i, source).edit for i, site in enumerate(sites)]
    texts = random_ids([(23, 9, 40)[i % 3] for i in range(len(edits))], seed=3)
    outs = [model.run(texts, capture=kept, edits=edits, logits="all") for model in (ours, theirs)]
    for i, edit in enumerate(edits):
        rows, truth = (run_rows(out.run, str(i)) for out in (outs[1], outs[0]))
        assert_parity(rows, truth, repr(edit))
        assert row_errors(outs[1].logits[i], outs[0].logits[i]).max() < 2e-5, repr(edit)
