"""What a person sees: words for what is done, one line that moves, a time left that comes true, nothing too wide."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from small_run import ROOT, command, environment, run_cli, texts, whole_lines, write_jsonl

from jax_extract import cli, extract
from jax_extract.extraction.cost import StepCost
from jax_extract.inputs.planning.slabs import SlabShape
from jax_extract.progress import COMPILING, COMPUTING, Progress
from jax_extract.terminal import Terminal, folded

OF_THE_PLAN = re.compile(r"\b(slab|part|site)s?\b")
WIDEST = 100


class Screen:
    """What a terminal of so many columns shows: the lines that stay, and everything that the last one has been."""

    def __init__(self, said: str, columns: int) -> None:
        self.lines, self.seen, self.widest = [""], [], 0
        at = 0
        for character in re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", said):
            if character == "\n":
                self._see()
                self.lines.append("")
                at = 0
            elif character == "\r":
                self._see()
                at = 0
            else:
                line = self.lines[-1].ljust(at)
                self.lines[-1] = line[:at] + character + line[at + 1 :]
                at += 1
        self._see()
        self.lines = [line.rstrip() for line in self.lines]
        assert self.widest <= columns, self.seen

    def _see(self) -> None:
        if line := self.lines[-1].rstrip():
            self.seen.append(line)
            self.widest = max(self.widest, len(line))


def on_a_terminal(*words: object, cwd: Path, columns: int = 80) -> Screen:
    """A command in a terminal so wide, to its end."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {name: value for name, value in environment().items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(list(map(str, words)), stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd, env=env)
    os.close(theirs)
    said = b""
    while True:
        try:
            piece = os.read(ours, 65_536)
        except OSError:  # its last writer has gone
            break
        if not piece:
            break
        said += piece
    os.close(ours)
    text = said.decode().replace("\r\n", "\n")
    assert process.wait() == 0, text
    return Screen(text, columns)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "prompts.jsonl", [40, 12, 30, 20])
    return tmp_path


def test_loading_compiling_and_computing_are_told_apart_on_one_line_of_which_nothing_stays(
    model: Path, place: Path
) -> None:
    words = ["--model_path", model, "--tasks_file", "prompts.jsonl", "--positions", "all"]
    shown = on_a_terminal(*command(*words), cwd=place)
    moving = [line.partition(":")[0] for line in shown.seen if re.match(r"(loading|compiling|computing):", line)]
    assert list(dict.fromkeys(moving)) == ["loading", "compiling", "computing"]
    bars = [line for line in shown.seen if line.startswith("computing:")]
    assert any(re.search(r"\d+/102 \[\d\d:\d\d<.+ tokens/s\]$", line) for line in bars), bars
    labels = [line.split()[0] for line in shown.lines if line and not line.startswith(" ")]
    assert labels == ["model", "capture", "input", "plan", "done", "stages", "output", "read"]


def test_a_notebook_shows_the_same_and_nothing_where_it_does_not_want_to(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    extract(str(model), texts([40, 12]), layers=-1)
    assert said.getvalue() == ""
    extract(str(model), texts([40, 12]), layers=-1, progress=True)
    for word in ("loading: ", "compiling: ", "computing: "):
        assert word in said.getvalue()
    assert Screen(said.getvalue(), WIDEST).lines == [""]


def test_in_a_log_a_wait_is_told_once_it_is_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Terminal().waiting("loading"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("jax_extract.progress._LOG_SECONDS", 0.01)
    with Terminal().waiting("loading") as waiting:
        waiting.say(COMPILING)
        while not (said := capsys.readouterr().err):
            pass
    assert said.splitlines()[0] == "compiling: [00:00]"


def test_a_line_that_is_told_while_another_moves_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    both = io.StringIO()
    monkeypatch.setattr(sys, "stderr", both)
    monkeypatch.setattr(sys, "stdout", both)
    terminal = Terminal()
    with terminal.waiting("loading"):
        terminal.line("note", "one")
    with terminal.progress(10):
        terminal.line("note", "two")
    assert Screen(both.getvalue(), WIDEST).lines == ["note     one", "note     two", ""]


# ------------------------------------------------------------------------------------------- time left


def test_the_time_left_is_nearer_where_it_is_weighted_by_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longest first, as the plan has them; a machine on which attention takes half as long again as it is counted."""
    counted, true = StepCost(pair=1 / 1_500), StepCost(pair=1 / 1_000)
    shapes = [SlabShape(length, 1, 1) for length in (8_000, 6_000, 4_000, 2_000, 1_000, 500) for _ in range(20)]
    now = 1_000.0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    tokens = sum(shape.tokens for shape in shapes)
    by_cost = Progress(tokens, COMPUTING, " tokens", sum(map(counted, shapes)))
    by_tokens = Progress(tokens, COMPUTING, " tokens")
    seconds, in_all = 0.0, sum(true(shape) / 1_000 for shape in shapes)
    wrong_by_cost, wrong_by_tokens = [], []
    for shape in shapes:
        step = true(shape) / 1_000
        now, seconds = now + step, seconds + step
        by_cost.spend(shape.tokens, counted(shape), seconds)
        by_tokens.update(shape.tokens)
        for bar, wrong in ((by_cost, wrong_by_cost), (by_tokens, wrong_by_tokens)):
            told = bar._seconds_left(bar.format_dict)
            assert told is not None
            wrong.append(abs(told - (in_all - seconds)) / in_all)
    assert max(wrong_by_tokens) > 0.3, "these samples do not differ enough to tell the two apart"
    assert max(wrong_by_cost) < max(wrong_by_tokens) / 5


def test_the_cost_of_a_step_grows_with_the_square_of_its_rows_and_counts_all_of_them() -> None:
    cost = StepCost(pair=0.01)
    assert cost(SlabShape(100, 1, 1)) == 100 + 0.01 * 5_050
    assert cost(SlabShape(100, 3, 1)) == 3 * cost(SlabShape(100, 1, 1))
    assert cost.of_all({SlabShape(100, 1, 1): 2, SlabShape(10, 1, 1): 1}) == 2 * 150.5 + 10 + 0.55


def test_the_whole_cost_is_that_of_all_steps_so_that_no_time_is_left_at_the_end(
    model: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Progress] = []
    progress = Terminal.progress

    def kept(terminal: Terminal, *words: Any, **options: Any) -> Progress:
        bars.append(progress(terminal, *words, **options))
        return bars[-1]

    monkeypatch.setattr(Terminal, "progress", kept)
    monkeypatch.chdir(place)
    assert cli.main(["extract", "--model_path", str(model), "--tasks_file", "prompts.jsonl", "--batch_size", "2"]) == 0
    (bar,) = bars
    assert bar._cost is not None and bar._cost_done == pytest.approx(bar._cost) and bar.n == bar.total


# ----------------------------------------------------------------------------------------------- width


def test_a_long_line_goes_on_below_its_text_and_a_path_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = "/a/" + "long-path/" * 12
    lines = folded(
        "output   ", f"samples and rows and more words than one line of eighty has room for, in {path} or so"
    )
    first, *others = lines.splitlines()
    assert first.startswith("output   samples") and all(line.startswith(" " * 9) for line in others)
    assert path in [line.strip() for line in others]
    assert all(len(line) <= 80 for line in lines.splitlines() if path not in line)
    monkeypatch.setenv("COLUMNS", "300")
    assert max(map(len, folded("", "word " * 99).splitlines())) <= WIDEST


def test_a_command_of_ours_and_a_number_with_its_unit_stay_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for words in ("jax-extract verify gs://bucket/run --damaged", "1,500,000 tokens/s", "3 min"):
        for before in range(80):
            assert words in folded("", f"{'x' * before} {words} {words}")


def test_a_row_of_a_table_keeps_its_columns_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    Terminal().line("", "a    b" * 14)
    assert capsys.readouterr().out == " " * 9 + "a    b" * 14 + "\n"


def too_wide(said: str) -> list[str]:
    return [line for line in said.splitlines() if len(line) > WIDEST]


@pytest.fixture(scope="module")
def begun(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Commands on a small run, each with what it tells."""
    place = tmp_path_factory.mktemp("begun")
    write_jsonl(place / "prompts.jsonl", [40, 12, 30, 20])
    (place / "model").symlink_to(model)
    request = ["--model_path", "model", "--tasks_file", "prompts.jsonl"]
    several = ["--hook_points", "after_block", "ffn_*", "final_norm"]
    commands: dict[str, list[str]] = {
        "extract": ["extract", *request, "--positions", "all", "--explain"],
        "extract of several": ["extract", *request, *several, "--activations_dir", "several"],
        "generate": ["generate", *request, "--max_new_tokens", "3", "--activations_dir", "answers"],
        "estimate": ["estimate", *request, "--activations_dir", "other"],
        "status": ["status", "activations"],
        "verify": ["verify", "activations"],
        "sweep": ["sweep", "activations", "--dry_run"],
    }
    told: dict[str, str] = {}
    for name, words in commands.items():
        done = run_cli(*words, cwd=place, script=None)
        assert done.returncode == 0, done.stderr
        told[name] = done.stdout
    return place, told


def test_nothing_that_a_command_tells_is_wider_than_a_hundred_columns(begun: tuple[Path, dict[str, str]]) -> None:
    _, told = begun
    assert {name: wide for name, said in told.items() if (wide := too_wide(said))} == {}
    helps = (
        "extract",
        "generate",
        "estimate",
        "compile",
        "status",
        "verify",
        "train",
        "walks",
        "token-representations",
    )
    for name in helps:
        with pytest.MonkeyPatch.context() as patch, io.StringIO() as said:
            patch.setattr(sys, "stdout", said)
            with pytest.raises(SystemExit):
                cli.main([name, "--help"])
            assert too_wide(said.getvalue()) == []


def test_the_first_summaries_speak_of_rows_batches_and_files(begun: tuple[Path, dict[str, str]]) -> None:
    _, told = begun
    for name in ("extract", "extract of several", "generate"):
        lines = [line for line in told[name].splitlines() if not line.startswith("layout")]
        assert [line for line in lines if OF_THE_PLAN.search(line)] == []
    assert "4 samples, 102 rows a layer, 2 pkl files, " in told["extract"]
    assert "4 samples, 4 rows a layer and hook point, 11 pkl files, " in told["extract of several"]


def test_an_error_is_one_line_in_a_log_and_folded_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "extract",
        "--model_path",
        "m",
        "--tasks_file",
        "no-such-file-with-a-name-of-some-length.jsonl",
        "--layers",
        "ten",
    ]
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert cli.main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1 and all(len(line) <= 80 for line in lines)


# ------------------------------------------------------------------------------------------------ torch


def test_torch_on_a_processor_says_that_jax_is_faster_there_in_one_note(
    model: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    words = ["extract", "--model_path", str(model), "--tasks_file", "prompts.jsonl"]
    assert cli.main([*words, "--backend", "torch", "--device", "cpu", "--activations_dir", "torch"]) == 0
    notes = [line for line in whole_lines(capsys.readouterr().out).splitlines() if line.startswith("note")]
    assert len(notes) == 1 and "1.02 to 2.25 times as fast" in notes[0]
    page = (ROOT / "docs/performance.md").read_text()
    ratios = [float(said) for said in re.findall(r"^Hugging Face .*% .* (\d\.\d\d)   ", page, re.MULTILINE)]
    assert len(ratios) > 5 and (min(ratios), max(ratios)) == (1.02, 2.25), ratios
    assert cli.main([*words, "--activations_dir", "jax"]) == 0
    assert "note" not in capsys.readouterr().out
