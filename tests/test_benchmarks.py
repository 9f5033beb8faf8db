"""The benchmark's own promises: its arithmetic, equal work on all sides, and a page that nobody wrote by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from small_run import make_model, run_here, write_jsonl

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import extraction  # noqa: E402
import report  # noqa: E402
from figures import figures_of  # noqa: E402
from machine import Watch  # noqa: E402
from protocol import Side, SideFailed  # noqa: E402
from rows import OtherRows, compare, row_errors  # noqa: E402
from work import Shape, padding_waste  # noqa: E402
from workloads import RANDOM_MODELS, WORKLOADS, Case, gsm8k_texts, parse_layers  # noqa: E402

from jax_extract.errors import UserError  # noqa: E402

RESULTS = report.read_results(report.RESULTS)


# -------------------------------------------------------------------------------------------- the page


def test_the_performance_page_is_what_the_committed_results_generate() -> None:
    template = report.TEMPLATE.read_text(encoding="utf-8")
    made = report.page(template, RESULTS)
    assert made == report.PAGE.read_text(encoding="utf-8"), "run benchmarks/report.py"


def test_the_figures_of_a_committed_result_are_those_of_its_rounds() -> None:
    for result in RESULTS:
        if result["rounds"]:
            assert json.loads(json.dumps(figures_of(result))) == result["figures"], report.headline(result)


def test_a_committed_result_has_the_name_of_its_case() -> None:
    for path in report.RESULTS.glob("*.json"):
        case = json.loads(path.read_text(encoding="utf-8"))["case"]
        assert path.stem == Case(**{**case, "layers": tuple(case["layers"])}).name


def test_the_page_names_a_peer_that_cannot_do_a_case() -> None:
    result = {**_result(), "cannot": {"sae_lens": "caches one layer a run, and 14 are asked for"}}
    assert "SAELens           cannot: caches one layer a run, and 14 are asked for" in report.table(result)


def test_the_table_says_the_ratios_and_the_cost_over_the_bare_forward() -> None:
    text = report.table(_result())
    assert "best peer: nnsight; jax_extract is 1.25 times as fast" in text
    assert "capturing, copying and writing cost 10.0% over the bare forward" in text
    assert "compiling 1 slab shape took 2.5 s, once" in text


# ------------------------------------------------------------------------------------------ arithmetic


def test_flops_are_those_of_products_and_causal_attention_counted_by_hand() -> None:
    shape = Shape(products=((4, 8), (4, 4), (4, 12), (6, 4)), query_rows=4, blocks=3)
    by_hand = 0
    for token in range(5):
        by_hand += 2 * (4 * 4 + 2 * 4 * 2)  # q, k, v
        by_hand += 2 * 4 * 4  # attention's output
        by_hand += 2 * 3 * 4 * 6  # gate, up, down
        by_hand += 2 * 4 * (token + 1) * 2  # logits and mix
    assert shape.flops(5) == 3 * by_hand


def test_the_qwen_shape_needs_the_blocks_of_its_deepest_layer_and_the_flops_of_its_parameters() -> None:
    config = RANDOM_MODELS["qwen2.5-0.5b"]
    whole, half = Shape.of(config, [10, 23]), Shape.of(config, [11])
    assert whole.blocks == 24
    assert whole.flops(100) == 2 * half.flops(100)
    weights = 24 * (896 * (896 + 2 * 128) + 896 * 896 + 3 * 896 * 4864)  # 357,826,560 of the model's 358 M
    assert whole.flops(1) == 2 * weights + 24 * 4 * 896


def test_the_products_whose_peak_is_measured_are_all_the_products_of_a_block() -> None:
    shape = Shape.of(RANDOM_MODELS["qwen2.5-0.5b"], [0])
    attention = 4 * shape.query_rows
    assert 2 * sum(inputs * outputs for inputs, outputs in shape.products) + attention == shape.flops(1)


def test_padding_waste_is_the_share_of_computed_tokens_that_are_not_real() -> None:
    assert padding_waste(75, 100) == 0.25
    assert padding_waste(100, 100) == 0


def test_ratios_are_those_of_medians_and_by_round_and_the_best_peer_is_the_fastest() -> None:
    figures = figures_of(_result())
    medians = {"jax_extract": 100, "bare_forward": 110, "huggingface": 50, "nnsight": 80}
    assert figures["tokens_per_second"] == pytest.approx(medians)
    assert figures["best_peer"] == "nnsight"
    assert figures["ratio"]["nnsight"] == pytest.approx(1.25)
    assert figures["ratio_by_round"]["huggingface"] == pytest.approx([2.25, 2.0, 2.2])
    assert figures["cost_over_bare"] == pytest.approx(0.1)
    assert figures["share_of_peak"]["xla"]["jax_extract"] == pytest.approx(100 * 7 / 1000)
    assert figures["padding"]["huggingface"] == pytest.approx(1 - 1000 / 1600)


def test_a_peer_that_failed_in_a_later_round_has_no_figures() -> None:
    result = _result()
    del result["rounds"][2]["sides"]["nnsight"]
    figures = figures_of(result)
    assert "nnsight" not in figures["tokens_per_second"]
    assert figures["best_peer"] == "huggingface"


def _result() -> dict[str, Any]:
    """Three rounds whose medians are round numbers."""
    speeds = {
        "jax_extract": (90, 100, 110),
        "bare_forward": (110, 99, 120),
        "huggingface": (40, 50, 50),
        "nnsight": (80, 70, 90),
    }
    slabs = {"huggingface": 1600}

    def side(name: str, number: int) -> dict[str, float]:
        seconds = 1000 / speeds[name][number]
        return {
            "tokens": 1000,
            "slab_tokens": slabs.get(name, 1010),
            "seconds": seconds,
            "peak_memory": 1e9,
            "others": 0,
        }

    rounds = [
        {"sides": {name: side(name, number) for name in speeds}, "peaks": {"xla": 1000, "torch": 900}}
        for number in range(3)
    ]
    result: dict[str, Any] = {
        "case": {
            "workload": "arc1024",
            "model": "tiny",
            "dtype": "float32",
            "layers": [10, 11],
            "positions": "all",
            "prompts": 4,
            "writes": True,
        },
        "machine": {"architecture": "x86_64", "processor": "a processor", "cores": 2},
        "versions": {},
        "shapes": 1,
        "compile_seconds": 2.5,
        "tokens": 1000,
        "flops": 7000,
        "rounds": rounds,
    }
    return {**result, "figures": figures_of(result)}


# ------------------------------------------------------------------------------------------ equal work


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A run of ours; and the same rows as a peer writes them: sorted by length, in files of two prompts."""
    from jax_extract import open_activations

    folder = tmp_path_factory.mktemp("sides")
    tasks = write_jsonl(folder / "texts.jsonl", [9, 30, 20, 12])
    ours, theirs = folder / "ours", folder / "theirs"
    run_here(make_model(folder / "model", layers=2), tasks, ours, positions="all", layers_to_extract=(0, 1))
    run = open_activations(ours)
    theirs.mkdir()
    order = sorted(range(4), key=lambda i: -len(run.sample(run.sample_ids[i]).token_ids))
    (theirs / "order.json").write_text(json.dumps(order))
    for layer in (0, 1):
        for number in (0, 1):
            group = [run.sample(run.sample_ids[i]).get(layer=layer) for i in order[2 * number : 2 * number + 2]]
            name = f"layer_{layer}_batch_{number + 1:06d}.safetensors"
            safetensors.numpy.save_file({"activations": np.concatenate(group)}, theirs / name)
    return ours, theirs, {"ids": list(run.sample_ids)}


def test_equal_rows_have_no_error_whatever_their_order_and_files(sides: tuple[Path, Path, dict[str, Any]]) -> None:
    assert compare(*sides, (0, 1), "float32") == {"max": 0.0, "median": 0.0}


def test_a_side_whose_rows_belong_to_other_prompts_did_other_work(
    sides: tuple[Path, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs, prompts = sides
    order = json.loads((theirs / "order.json").read_text())
    swapped = {"ids": list(prompts["ids"])}
    swapped["ids"][order[0]], swapped["ids"][order[1]] = swapped["ids"][order[1]], swapped["ids"][order[0]]
    with pytest.raises(OtherRows, match=r"row error|where we wrote"):
        compare(ours, theirs, swapped, (0,), "float32")


def test_a_row_error_is_relative_to_our_row() -> None:
    ours = np.array([[3, 4], [0, 0]], np.float32)
    theirs = np.array([[3, 4.5], [0, 2]], np.float32)
    assert row_errors(theirs, ours).tolist() == pytest.approx([0.1, 2])


# ------------------------------------------------------------------------------------- cases and sides


@pytest.mark.parametrize(("text", "layers"), [("12", (12,)), ("10-12", (10, 11, 12)), ("3,5-6", (3, 5, 6))])
def test_layers_are_numbers_and_ranges(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "x", "3-", "5-3", "-1"])
def test_layers_that_are_no_layers_are_told_with_the_mend(text: str) -> None:
    with pytest.raises(UserError, match=r"such as"):
        parse_layers(text)


def test_a_uniform_workload_takes_prompts_that_fill_it() -> None:
    uniform = WORKLOADS["uniform512"]
    assert [uniform.takes(n) for n in (511, 512, 2000)] == [False, True, True]
    assert [WORKLOADS["arc8192"].takes(n) for n in (1024, 1025, 8192, 8193)] == [False, True, True, False]


def test_gsm8k_without_its_file_says_how_to_get_it() -> None:
    with pytest.raises(UserError, match=r"--gsm8k .* github.com/openai/grade-school-math"):
        gsm8k_texts(None)


def test_gsm8k_questions_come_from_the_file_that_is_named(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "How many?", "answer": "Two."}\n')
    assert dict(gsm8k_texts(str(path))) == {"gsm8k_00000": "How many?"}


def test_only_sae_lens_cannot_keep_several_layers() -> None:
    several = Case("arc1024", "tiny", "float32", (1, 2), "all", 4)
    one = Case("arc1024", "tiny", "float32", (1,), "all", 4)
    assert [peer for peer in extraction.PEERS if extraction.cannot(peer, several)] == ["sae_lens"]
    assert not any(extraction.cannot(peer, one) for peer in extraction.PEERS)


def test_missing_peers_are_told_with_the_mend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--peers_python", str(tmp_path / "python"), "--results", str(tmp_path)]
    assert extraction.main(words) == 2
    assert "make .venv-peers/ready" in capsys.readouterr().err


_SIDE = """
import sys
sys.path.insert(0, {folder!r})
from protocol import serve
def fail():
    raise SystemExit("out of luck")
def run():
    print("a library that talks")
    return {{"tokens": 3}}
sys.exit(serve(lambda: {{"run": run, "fail": fail}}))
"""


def test_a_side_answers_in_turn_and_what_libraries_print_is_no_answer(tmp_path: Path) -> None:
    side = Side([sys.executable, "-c", _SIDE.format(folder=str(ROOT / "benchmarks"))], tmp_path / "log")
    first, second = side.ask("run"), side.ask("run")
    side.close()
    assert first["tokens"] == second["tokens"] == 3
    assert first["peak_memory"] > 1e6
    assert 0 <= first["others"] <= 1


def test_a_side_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    side = Side([sys.executable, "-c", _SIDE.format(folder=str(ROOT / "benchmarks"))], tmp_path / "log")
    with pytest.raises(SideFailed, match="out of luck"):
        side.ask("fail")
    side.close()


def test_others_are_what_this_process_did_not_take() -> None:
    watch = Watch()
    sum(range(100_000))
    elapsed, own, others = watch.read()
    assert elapsed > 0
    assert own > 0
    assert others >= 0
