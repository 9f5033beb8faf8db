"""The commands as the user's document writes them, run as a user runs them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import (
    ROOT,
    SCRIPT,
    environment,
    make_model,
    run_cli,
    run_here,
    shards,
    whole_lines,
    write_arc,
    write_jsonl,
)

from jax_extract import cli, open_activations
from jax_extract.config import ExtractConfig
from jax_extract.store.ledger import Ledger, RunStartedMeanwhile
from jax_extract.store.storage.verbs import Storage
from jax_extract.terminal import Terminal

IMPORT = """
import sys
from distributed_inference_with_activations import DistributedARCConfig

config = DistributedARCConfig()
print(f"Extracting layers: {config.layers_to_extract}")
print(f"Number of layers: {len(config.layers_to_extract)}")
print(sorted({name.partition(".")[0] for name in sys.modules} & {"jax", "jaxlib", "flax", "torch", "transformers"}))
"""
# A program that says when it comes to import a module and is busy there: in Python, where an exception is swallowed as
# libraries do, or in C, where none comes.
BUSY = """
import ctypes, runpy, sys, time

module, where, script = sys.argv[1:]

class Busy:
    def find_spec(self, name, path=None, target=None):
        if name != module:
            return
        print("told", flush=True)
        if where == "C":
            mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
            libc.pthread_mutex_lock(mutex)
            libc.pthread_mutex_lock(mutex)
        for _ in range(2):
            try:
                time.sleep(30)
            except BaseException:
                pass

sys.meta_path.insert(0, Busy())
if script:
    runpy.run_path(script, run_name="__main__")
from jax_extract.cli import main
sys.argv[1:] = ["extract"]
main()
"""
DEFAULT_LAYERS = [str(layer) for layer in range(10, 24)]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_arc(tmp_path / "arc_tasks.json")


def _extract(*words: object) -> int:
    return cli.main(["extract", *map(str, words)])


def test_the_documented_command_works_quietly_and_its_shards_are_where_the_document_says(
    model: Path, tasks: Path, tmp_path: Path
) -> None:
    words = ["--model_path", model, "--tasks_file", "arc_tasks.json", "--layers_to_extract", *DEFAULT_LAYERS]
    done = run_cli(*words, "--batch_size", 8, "--mesh_shape", "1,1", cwd=tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    assert set(shards(tmp_path / "activations")) == {"layer_10_batch_000001.pkl", "layer_11_batch_000001.pkl"}
    assert json.loads((tmp_path / "activations/metadata.json").read_text())["total_samples"] == 4
    labels = [line.split()[0] for line in whole_lines(done.stdout).splitlines()]
    assert labels == ["model", "capture", "input", "plan", "done", "stages", "output", "read"]
    assert "after_block at layers 10-11 (2)" in done.stdout
    assert not re.search("warn", done.stdout + done.stderr, re.IGNORECASE)
    bar = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()]
    assert bar
    assert all(line.startswith("computing:") for line in bar)
    inspected = run_cli("inspect", "activations", cwd=tmp_path, script=None)
    assert (inspected.returncode, inspected.stderr) == (0, "")
    assert "norm of a row" in inspected.stdout
    run = open_activations(tmp_path / "activations")
    for layer in (10, 11):
        norms = [float((s.get(layer).astype("float64") ** 2).sum() ** 0.5) for s in run.samples()]
        assert re.search(rf"after_block +{layer} +32 +{sum(norms) / 4:#.4g} ", inspected.stdout)


def test_the_one_host_command_works(model: Path, tasks: Path, tmp_path: Path) -> None:
    script = ROOT / "simple_extraction_inference.py"
    done = run_cli("--model_path", model, "--tasks_file", tasks, cwd=tmp_path, script=script, fresh=True)
    assert done.returncode == 0, done.stderr
    assert set(shards(tmp_path / "activations")) == {"layer_10_batch_000001.pkl", "layer_11_batch_000001.pkl"}


def test_the_documented_verification_prints_what_the_document_prints_and_imports_no_jax(tmp_path: Path) -> None:
    (tmp_path / "check.py").write_text(IMPORT)
    done = run_cli(cwd=tmp_path, script=tmp_path / "check.py", fresh=True)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "Extracting layers: [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23]",
        "Number of layers: 14",
        "[]",
    ]


def test_edited_defaults_of_the_documented_class_are_used(model: Path, tasks: Path, tmp_path: Path) -> None:
    source = (
        SCRIPT.read_text()
        .replace("list(range(10, 24))", "[3, 5]")
        .replace("batch_size: int = 8", "batch_size: int = 2")
    )
    (tmp_path / "edited.py").write_text(source)
    done = run_cli("--model_path", model, "--tasks_file", tasks, cwd=tmp_path, script=tmp_path / "edited.py")
    assert done.returncode == 0, done.stderr
    assert set(shards(tmp_path / "activations")) == {f"layer_{i}_batch_{b:06d}.pkl" for i in (3, 5) for b in (1, 2)}


@pytest.mark.parametrize("layers", [None, tuple(range(10, 24))])
def test_default_layers_are_10_to_the_last_also_when_the_default_is_written_out(
    model: Path, tasks: Path, tmp_path: Path, layers: tuple[int, ...] | None
) -> None:
    assert run_here(model, tasks, tmp_path / "a", layers_to_extract=layers)["layers_extracted"] == [10, 11]


def test_a_model_of_fewer_than_10_layers_gives_all_of_them(tasks: Path, tmp_path: Path) -> None:
    small = make_model(tmp_path / "small", layers=3)
    assert run_here(small, tasks, tmp_path / "a")["layers_extracted"] == [0, 1, 2]


def test_flags_go_over_the_yaml_file_and_the_file_over_the_defaults(model: Path, tasks: Path, tmp_path: Path) -> None:
    options = {"model_path": str(model), "tasks_file": str(tasks), "layers_to_extract": [4, 5], "batch_size": 3}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    words = ["--config", tmp_path / "run.yaml", "--batch_size", 2, "--activations_dir", tmp_path / "a"]
    assert _extract(*words) == 0
    assert set(shards(tmp_path / "a")) == {f"layer_{i}_batch_{b:06d}.pkl" for i in (4, 5) for b in (1, 2)}


def test_the_configuration_written_beside_the_output_can_be_fed_back(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--layers_to_extract", 4, 5, "--positions", "every:3", "--hook_points", "ffn_out", "after_block"]
    assert _extract("--model_path", model, "--tasks_file", tasks, "--activations_dir", tmp_path / "a", *words) == 0
    config = tmp_path / "a/_run/config.yaml"
    assert set(yaml.safe_load(config.read_text())) == {field.name for field in dataclasses.fields(ExtractConfig)}
    capsys.readouterr()
    assert _extract("--config", config) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert _extract(f"--config={config}", "--activations_dir", tmp_path / "b") == 0
    assert shards(tmp_path / "b") == shards(tmp_path / "a")


@pytest.mark.parametrize("word", [[], ["True"]])
def test_overwrite_starts_anew_bare_or_with_true(
    model: Path, tasks: Path, tmp_path: Path, word: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model_path", model, "--tasks_file", tasks, "--activations_dir", tmp_path / "a"]
    assert _extract(*words, "--layers_to_extract", 1) == 0
    assert _extract(*words, "--overwrite", *word, "--layers_to_extract", 2) == 0
    assert set(shards(tmp_path / "a")) == {"layer_2_batch_000001.pkl"}
    capsys.readouterr()
    assert _extract(*words, "--layers_to_extract", 2, "--overwrite", "False") == 0
    assert "nothing to do" in capsys.readouterr().out


def test_the_configuration_of_an_overwriting_run_fed_back_does_not_overwrite_it(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(model, tasks, tmp_path / "a", layers_to_extract=(1,), overwrite=True)
    assert _extract("--config", tmp_path / "a/_run/config.yaml") == 0
    assert "nothing to do" in capsys.readouterr().out


def test_dashes_in_flags_mean_underscores(model: Path, tasks: Path, tmp_path: Path) -> None:
    words = ["--model-path", model, "--tasks-file", tasks, "--activations-dir", tmp_path / "a"]
    assert _extract(*words, "--layers-to-extract", 1) == 0
    assert set(shards(tmp_path / "a")) == {"layer_1_batch_000001.pkl"}


def test_inspect_reads_one_shard_and_an_unfinished_run(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = write_jsonl(tmp_path / "in.jsonl", [40] * 6)
    run_here(model, tasks, tmp_path / "a", layers_to_extract=(1,), batch_size=4)
    assert cli.main(["inspect", str(tmp_path / "a/layer_1_batch_000001.pkl")]) == 0
    out = capsys.readouterr().out
    assert "4 samples, 4 rows, stored as float32" in out and re.search(r"after_block +1 +32 ", out)
    (tmp_path / "a/_run/commits/000002_001.json").unlink()
    assert cli.main(["inspect", str(tmp_path / "a")]) == 0
    assert "4 samples, 160 tokens" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "nothing")]) == 2
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert all(line.startswith("error: ") for line in capsys.readouterr().err.splitlines())


def test_usage_is_printed_without_a_command_and_an_unknown_command_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([]) == cli.main(["--help"]) == 0
    assert capsys.readouterr().out.count("usage: jax-extract") == 2
    assert cli.main(["extrct"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown command 'extrct'")


def test_help_lists_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        _extract("--help")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(f"--{field.name}" in out for field in dataclasses.fields(ExtractConfig))
    assert "--config" in out
    assert sys.executable not in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("extract --batchsize 3", "there is no flag --batchsize; did you mean --batch_size?"),
        ("extract --shard-formt=npz", "there is no flag --shard-formt; did you mean --shard_format?"),
        ("status --xyzzy gs://bucket/run", "there is no flag --xyzzy;"),
        ("extract --batch_size", "--batch_size needs a value;"),
        ("extract --batch_size many", "--batch_size 'many' is no whole number;"),
        ("extract --num_workers many", "--num_workers 'many' is no whole number;"),
        ("extract --host_memory_gb much", "--host_memory_gb 'much' is no number;"),
        ("extract --capture_dtype int8", "--capture_dtype 'int8' is none of 'float32', 'bfloat16', 'float16';"),
        ("extract arc_tasks.json", "'arc_tasks.json' is not expected there;"),
        ("status", "PLACE is missing (run directory or gs://bucket/prefix);"),
        ("upload", "DIRECTORY and BUCKET are missing;"),
    ],
)
def test_a_flag_that_is_wrong_is_told_in_one_sentence_with_what_is_meant(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words.split()) == 2
    line = capsys.readouterr().err
    command = f"jax-extract {words.partition(' ')[0]}"
    assert line == f"error: {said} {command} --help lists the flags\n"


def test_a_worker_whose_run_another_one_started_meanwhile_tells_its_request_and_plan_once(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Ledger.start

    def by_another(storage: Storage, run: Mapping[str, Any]) -> Ledger:
        start(storage, run)
        raise RunStartedMeanwhile

    monkeypatch.setattr(Ledger, "start", by_another)
    words = ["--model_path", model, "--tasks_file", tasks, "--activations_dir", tmp_path / "a"]
    assert _extract(*words, "--worker_id", 0, "--num_workers", 2) == 0
    labels = [line.split()[0] for line in whole_lines(capsys.readouterr().out).splitlines()]
    assert labels == ["model", "capture", "input", "plan", "done", "stages", "hosts", "output", "read"]


def test_the_work_goes_on_when_the_reader_of_its_log_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, log = os.pipe()
    os.close(reader)  # as `extract 2>&1 | head -1` does
    with os.fdopen(log, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr("jax_extract.progress._LOG_SECONDS", 0.0)
        with Terminal().progress(3) as bar:
            for _ in range(3):
                bar.update(1)  # raises nothing
        with contextlib.suppress(BrokenPipeError):  # what waits in the stream's own buffer
            stream.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), log)


def test_a_reader_that_has_gone_is_told_by_the_exit_code_of_the_shell() -> None:
    reader, out = os.pipe()
    os.close(reader)
    code = "import sys; from jax_extract import cli; sys.exit(cli.guarded(lambda: print('said', flush=True)))"
    words = [sys.executable, "-c", code]
    end = subprocess.run(words, check=False, stdout=out, stderr=subprocess.PIPE, env=environment(), cwd=ROOT)
    os.close(out)
    assert (end.returncode, end.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize(
    ("total", "lines"),
    [
        (100_000, ["computing: 30% 30.0k/100k [00:30<01:10, 1.00k tokens/s]", "computing: 60% 60.0k/100k"]),
        (None, ["computing: 30.0k [00:30, 1.00k tokens/s]", "computing: 60.0k ["]),
    ],
)
def test_in_a_log_progress_is_a_line_every_30_seconds_and_one_at_the_end(
    total: int | None, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1_000.0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    with Terminal().progress(total) as bar:
        for _ in range(80):
            now += 1
            bar.update(1_000)
        bar.clear()  # before a line of another kind
        bar.update(40_000)  # more than was expected
    said = capsys.readouterr().err
    assert "\r" not in said
    assert len(said.splitlines()) == 3
    assert all(line.startswith(start) for line, start in zip(said.splitlines(), lines, strict=False))
    assert said.endswith("k tokens/s]\n") and "120k" in said.splitlines()[-1]


def test_a_second_configuration_file_is_refused_instead_of_replacing_the_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["extract", "--config", "a.yaml", "--config=b.yaml"]) == 2
    assert "--config was given 2 times" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "module", "where", "times"),
    [
        (SCRIPT, "jax", "Python", 1),
        (ROOT / "simple_extraction_inference.py", "jax", "Python", 1),
        (SCRIPT, "tyro", "C", 1),
        ("", "tyro", "Python", 2),
    ],
)
def test_ctrl_c_while_a_command_starts_ends_it_with_one_sentence(
    script: Path | str, module: str, where: str, times: int
) -> None:
    line = [sys.executable, "-c", BUSY, module, where, str(script)]
    with subprocess.Popen(
        line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "told\n"
        for _ in range(times):
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert (out, err) == ("", "interrupted; what is committed is safe: run the same command again to go on\n")


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == importlib.metadata.version("jax_extract")
