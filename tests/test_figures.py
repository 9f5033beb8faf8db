"""The same figures everywhere: real tokens, padding within rows, idle devices, attention across samples.

Guarded: what they mean (`StepCounts`, a loop's statistics, metadata.json), that `compile` counts the steps that a run's
own samples have on a slice, and that reading and tokenising is a stage that can bind a run. No TPU program is compiled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import whole_lines, write_jsonl

from jax_extract import UserError
from jax_extract.compilation import command
from jax_extract.compilation.config import CompileConfig
from jax_extract.compilation.models import open_config
from jax_extract.compilation.programs import Compiled, Subject
from jax_extract.compilation.report import Report
from jax_extract.config import ExtractConfig
from jax_extract.devices import libtpu
from jax_extract.devices.planner import ModelCounts
from jax_extract.estimation.figures import Estimate, ReadProbe, Work
from jax_extract.estimation.output import Output
from jax_extract.estimation.probe import ComputeProbe, WriteProbe
from jax_extract.estimation.telling import tell
from jax_extract.extraction.accounting import StepCounts, TokenShares
from jax_extract.extraction.loop import LoopStatistics
from jax_extract.extraction.summary import hosts_text, idle_text, shares_text
from jax_extract.inputs.planning.slabs import SlabShape
from jax_extract.store import metadata
from jax_extract.terminal import Terminal
from jax_extract.weights.load import parameter_shapes
from models.accelerated_attention import attention_block, computed_pairs

needs_compiler = pytest.mark.skipif(
    not libtpu.is_installed(), reason="libtpu is not installed: pip install -e '.[tpu]'"
)
CHIPS, HOSTS, LAYERS, WIDTH = 64, 16, 14, 896
ARC_LIKE = [n for n in range(80, 3_000, 70) for _ in range(40)]
SHAPE = SlabShape(128, 4, 4)


# ------------------------------------------------------------------------------------------ one meaning


def test_shares_of_computed_tokens_are_real_padded_and_idle_ones_and_nothing_else() -> None:
    assert TokenShares.of(700, 1_000, 200) == pytest.approx((0.7, 0.1, 0.2))
    assert TokenShares.of(0, 0, 0) == (1, 0, 0)
    shares = TokenShares.of(700, 1_000, 200)
    assert shares_text(shares, True) == "real 70.0%, padding within rows 10.0%, idle devices 20.0%"
    assert shares_text(TokenShares.of(9, 10, 0), False) == "real 90.0%, padding within rows 10.0%"


def test_a_loop_and_metadata_have_the_shares_that_its_steps_have() -> None:
    work: Any = type("Work", (), {"tokens": 300})
    busy, waiting = LoopStatistics(), LoopStatistics()
    for of_busy, of_waiting in (([work, work], [work]), ([work], [])):
        busy.add_step(SHAPE, of_busy, 2, [])
        waiting.add_step(SHAPE, of_waiting, 2, [])
    assert (busy.steps, busy.idle_steps, waiting.idle_steps) == (2, 0, 1)
    together = LoopStatistics.side_by_side([vars(busy), vars(waiting)])
    assert (together.tokens, together.slab_tokens, together.idle_tokens) == (4 * 300, 8 * 512, 4 * 512)
    assert hosts_text(together) == "2 steps; the host that sat out most had nothing to compute in 1 of them (50.0%)"
    assert hosts_text(busy) == "2 steps; every host had something to compute in each"
    sessions = [vars(busy), vars(waiting)]
    assert metadata._share(sessions, metadata._idle) == 0.5
    assert metadata._share(sessions, metadata._padding) == pytest.approx(0.5 - 1_200 / 4_096)
    before = {"tokens": 80, "slab_tokens": 100}  # of a version that did not count idle devices apart
    assert metadata._share([before], metadata._padding) == pytest.approx(0.2)
    assert metadata._share([], metadata._padding) is None


def test_the_line_on_idle_devices_says_how_many_would_do() -> None:
    counts = StepCounts(64, slab_tokens=1_000, idle_tokens=400, tokens=590, slabs=300)
    said = idle_text(counts, 100, fewer="a smaller --topology")
    assert said.startswith("idle devices 40.0%: 100 samples of these lengths do not fill 64 devices; about 39 would be")
    assert "(a smaller --topology)" in said and "--n_samples" in said


def test_attention_is_counted_as_its_kernel_computes_it_in_whole_squares() -> None:
    port, config = open_config("qwen2.5-0.5b")
    counts = ModelCounts.of(parameter_shapes(port, config, 24, "bfloat16"), config, 24)
    assert counts.attention_flops(3, 1_000) == 4 * 24 * WIDTH * 3 * 1_000 * 1_001 / 2
    assert counts.attention_flops(3, 1_024, 512) == 4 * 24 * WIDTH * 3 * 3 * 512 * 512
    assert counts.flops(3, 1_024, 512) == counts.product_flops(3 * 1_024) + counts.attention_flops(3, 1_024, 512)


# ----------------------------------------------------------------------------------------- compile


@pytest.fixture
def compiled_shapes(monkeypatch: pytest.MonkeyPatch) -> list[SlabShape]:
    """No program is compiled; the shapes that would be."""
    wanted: list[SlabShape] = []

    def compile_program(subject: Subject, _: Any, shape: SlabShape) -> Compiled:
        wanted.append(shape)
        return Compiled(shape, 10**9, 10**6, 10**9, 10**6, (), (), CHIPS, 1 if subject.rows_travel else CHIPS, 1.0)

    monkeypatch.setattr(command, "compile_program", compile_program)
    return wanted


def _compile(path: Path | None, **options: Any) -> Report:
    given = {} if path is None else {"lengths": str(path)}
    return command.compile_for(CompileConfig(**{"model_path": "qwen2.5-0.5b", **given, **options}), Terminal())


def _lengths(path: Path, lengths: list[int]) -> Path:
    path.write_text("\n".join(map(str, lengths)))
    return path


@needs_compiler
@pytest.mark.parametrize("positions", ["last", "all"])
def test_compile_counts_the_steps_of_the_runs_own_samples_on_the_slice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], compiled_shapes: list[SlabShape], positions: str
) -> None:
    found = _compile(
        _lengths(tmp_path / "n.txt", ARC_LIKE), n_samples=4_000, positions=positions, price_per_chip_hour=2.0
    )
    assert found.planned is not None
    counts, lengths = found.planned.counts, np.resize(np.array(ARC_LIKE), 4_000)
    assert (found.planned.samples, counts.tokens) == (4_000, lengths.sum())
    assert counts.devices == CHIPS and counts.slab_tokens == sum(
        CHIPS * shape.tokens * count for shape, count in counts.steps.items()
    )
    assert sum(counts.shares) == pytest.approx(1) and min(counts.shares) >= 0
    assert compiled_shapes == list(found.planned.shapes)
    assert compiled_shapes[0] == max(counts.steps, key=lambda shape: counts.steps[shape] * shape.tokens)
    rows = 4_000 if positions == "last" else lengths.sum()
    assert found.output_bytes == rows * LAYERS * WIDTH * 4
    assert found.output_seconds == pytest.approx(found.output_bytes / HOSTS / 1e9)
    assert found.reading_seconds == pytest.approx(lengths.sum() / HOSTS / 1.5e6)
    assert found.computing_seconds == pytest.approx(
        sum(count * found.step_seconds(shape) for shape, count in counts.steps.items())
    )
    said = whole_lines(capsys.readouterr().out)
    plan = next(line for line in said.splitlines() if line.startswith("plan"))
    assert shares_text(counts.shares, True) in plan and "attention across samples" in plan
    assert "no padding" not in said
    run = next(line for line in said.splitlines() if line.startswith("run"))
    assert f"4,000 samples, {lengths.sum():,} tokens: " in run
    assert f"{found.seconds / 3_600 * CHIPS * 2:,.2f} at 2 a chip and hour" in run


@needs_compiler
def test_a_step_costs_what_its_slabs_cost_and_captured_rows_that_travel_come_on_top(
    tmp_path: Path, compiled_shapes: list[SlabShape]
) -> None:
    found = _compile(_lengths(tmp_path / "n.txt", ARC_LIKE), search=False)
    assert compiled_shapes == [found.shape]
    assert found.planned is not None
    for shape in found.planned.shapes:
        counts, pairs = found.subject.counts, shape.rows * computed_pairs(shape.length, attention_block(shape.length))
        flops = counts.product_flops(shape.tokens) + counts.pair_flops(pairs)
        assert found.costs[shape].compute_seconds == pytest.approx(flops / (0.5 * 197e12))
        assert found.step_seconds(shape) >= found.costs[shape].compute_seconds
        if found.subject.rows_travel:
            own = shape.rows * shape.samples * LAYERS * WIDTH * 4
            assert found.travelling_bytes(shape) == (CHIPS - 1) * own


@needs_compiler
def test_what_binds_a_run_can_be_reading_and_output_too_and_idle_chips_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], compiled_shapes: list[SlabShape]
) -> None:
    few = _lengths(tmp_path / "few.txt", [500] * 40)
    assert _compile(few, host_tokens_per_second=10.0, search=False).bound == "reading and tokenising"
    assert "bound    by reading and tokenising: " in whole_lines(capsys.readouterr().out)
    assert _compile(few, host_gb_per_second=1e-9, search=False).bound == "host output"
    said = whole_lines(capsys.readouterr().out)
    assert "note     idle devices" in said and "40 samples of these lengths do not fill 64 devices" in said


@needs_compiler
def test_without_inputs_the_figures_are_for_full_slabs_and_it_is_said_what_counts_padding(
    capsys: pytest.CaptureFixture[str], compiled_shapes: list[SlabShape]
) -> None:
    found = _compile(None, positions="all", max_seq_length=2_048, tokens=10**9, search=False)
    said = whole_lines(capsys.readouterr().out)
    assert "plan     none: figures are for full slabs, 8 x 2,048 tokens a chip; --tasks_file FILE" in said
    assert "no padding" not in said
    assert compiled_shapes == [(2_048, 8, 1)]
    assert found.output_bytes == pytest.approx(10**9 * LAYERS * WIDTH * 4)
    last = _compile(None, positions="last", max_seq_length=2_048, tokens=10**9, search=False)
    assert last.output_bytes == pytest.approx(10**9 / 2_048 * LAYERS * WIDTH * 4), "positions decide what is written"


@needs_compiler
def test_texts_are_tokenised_as_the_run_does(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], compiled_shapes: list[SlabShape]
) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", [30, 2_000, 70])
    found = _compile(None, model_path=str(model), tasks_file=str(texts), search=False)
    assert found.planned is not None
    assert sorted(found.planned.parts[0].lengths.tolist()) == [30, 70, 1_024]
    assert "3 samples, 1,124 tokens, longest 2,000; 1 sample truncated" in whole_lines(capsys.readouterr().out)
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    for path, words in ((str(tmp_path), "no usable tokenizer in"), ("qwen2.5-0.5b", "or token counts as --lengths")):
        with pytest.raises(UserError, match=words):
            _compile(None, model_path=path, tasks_file=str(texts))


@needs_compiler
@pytest.mark.parametrize(("text", "lengths"), [
    ("3\n4 5, 6", [3, 4, 5, 6]),
    ("[3, 4]", [3, 4]),
    ("7", [7]),
    ("", "holds no list of token counts"),
    ("{}", "holds no list of token counts"),
    ("3 four", "holds 'four', which is no token count"),
    ("[3, 0]", "holds 0, which is no token count"),
    ("[3, 4.5]", "holds 4.5, which is no token count"),
])  # fmt: skip
def test_lengths_are_read_as_a_text_or_json_list(
    tmp_path: Path, compiled_shapes: list[SlabShape], text: str, lengths: list[int] | str
) -> None:
    path = tmp_path / "lengths"
    path.write_text(text)
    if isinstance(lengths, str):
        with pytest.raises(UserError, match=lengths):
            _compile(path, search=False)
        return
    found = _compile(path, search=False)
    assert found.planned is not None
    assert sorted(found.planned.parts[0].lengths.tolist()) == lengths


@pytest.mark.parametrize(("options", "words"), [
    ({"tasks_file": "a.json", "lengths": "b"}, "--tasks_file and --lengths both say"),
    ({"n_samples": 5}, "--n_samples needs samples"),
    ({"n_samples": 0, "lengths": "b"}, "--n_samples 0 must be from 1"),
    ({"tokens": 5, "lengths": "b"}, "--tokens 5 is for runs without inputs"),
    ({"lengths": "b", "grid_encoder": "json"}, "--grid_encoder is about texts"),
    ({"host_tokens_per_second": 0.0}, "--host_tokens_per_second 0.0 must be a positive number"),
])  # fmt: skip
def test_what_contradicts_itself_is_refused_before_anything_is_read(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        CompileConfig(model_path="qwen2.5-0.5b", **options).check()


# ----------------------------------------------------------------------------------------- estimate


def _estimate(reading: ReadProbe, workers: int = 1) -> Estimate:
    output = Output(1_000, 400_000, 1_000, 10, 10**9, {}, 100, 10**7, 30, 10**9)
    compute = ComputeProbe(load_seconds=5, compile_seconds=10, step_seconds={SHAPE: 0.1}, tried=20)
    work = Work(output, {SHAPE: 1_000}, "run", 0, 8)
    return Estimate(ExtractConfig(), work, reading, compute, {"here": WriteProbe(1e8, 0.0)}, workers, 1, None)


def test_a_finite_input_is_read_before_the_first_step_and_a_stream_while_others_are_computed() -> None:
    at_once = _estimate(ReadProbe(50.0, 400_000, "before"))
    assert (at_once.bound, at_once.start_seconds) == ("computing", 65)
    assert at_once.seconds == 50 + 5 + 10 + 100
    stream = _estimate(ReadProbe(50.0, 100_000, "beside"))
    assert stream.reading_seconds == 200, "of four times as many tokens"
    assert (stream.bound, stream.start_seconds, stream.seconds) == ("reading", 15, 215)
    between = _estimate(ReadProbe(50.0, 100_000, "between"))
    assert between.seconds == 15 + 200 + 100, "several processes tokenise a stream in turn with computing"
    four = _estimate(ReadProbe(50.0, 400_000, "before"), workers=4)
    assert four.reading_seconds == 50, "independent workers each read all of it"
    assert four.bound == "reading"


def test_an_estimate_that_reading_binds_says_so_and_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    tell(_estimate(ReadProbe(500.0, 400_000, "before")), Terminal())
    said = whole_lines(capsys.readouterr().out)
    assert "read     8.3 min to read, tokenise and plan the input before the first step: 800 tokens/s" in said
    assert "bound    by reading and tokenising the input: computing takes 100 s, writing takes 10 s, reading" in said
    assert "more processor cores" in said
