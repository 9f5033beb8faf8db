"""What the same command need not do again: read, tokenise and plan what is kept of its run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from gcs_server import RunningServer
from small_run import Told, make_model, run_cli, run_here, shards, snapshot, texts, write_jsonl

from jax_extract import UserError, open_activations
from jax_extract.cli import main
from jax_extract.config import ExtractConfig
from jax_extract.extraction import prepare
from jax_extract.extraction.command import extract_to_directory
from jax_extract.inputs import sources, tokenize
from jax_extract.store import token_files
from jax_extract.store.ledger import Ledger
from jax_extract.store.storage.opening import open_storage

LENGTHS = [33, 60, 40, 61, 35, 50, 47, 62, 63, 34]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "two", layers=2)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "in.jsonl", LENGTHS)


@pytest.fixture(scope="module")
def whole(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of the same samples."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(prepare, "WINDOW_SAMPLES", 4)
        run_here(small, write_jsonl(folder / "in.jsonl", LENGTHS), folder / "run", layers_to_extract=(1,), batch_size=2)
    return folder / "run"


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "WINDOW_SAMPLES", 4)


@pytest.fixture
def again(small: Path, tasks: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command; gives the lines that it tells."""

    def command(directory: str = "run", told: list[str] | None = None, **changes: Any) -> list[str]:
        options: dict[str, Any] = {"tasks_file": str(tasks), "layers_to_extract": (1,), "batch_size": 2, **changes}
        place = directory if directory.startswith("gs://") else str(tmp_path / directory)
        terminal = Told(told)
        config = ExtractConfig(model_path=str(small), activations_dir=place, **options)
        extract_to_directory(config, terminal)
        return terminal.lines

    return command


@pytest.fixture
def stopped(again: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The command, which ends with trouble after so many parts; gives the lines that it tells until then."""

    def command(parts: int, **options: Any) -> list[str]:
        commit, seen = Ledger.commit, []

        def until(self: Ledger, record: Mapping[str, Any]) -> bool:
            seen.append(record)
            if len(seen) > parts:
                raise UserError("stopped")
            return commit(self, record)

        with monkeypatch.context() as patched:
            patched.setattr(Ledger, "commit", until)
            told: list[str] = []
            with pytest.raises(UserError, match="stopped"):
                again(told=told, **options)
        return told

    return command


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the samples that a tokenizer is asked for."""
    asked: list[str] = []
    encode = tokenize.Encoder.encode

    def encoded(self: Any, prepared: Any) -> Any:
        asked.extend(sample.sample_id for sample in prepared.samples)
        return encode(self, prepared)

    monkeypatch.setattr(tokenize.Encoder, "encode", encoded)
    return asked


def rows(directory: Path) -> dict[str, bytes]:
    return {sample.sample_id: sample.get(1).tobytes() for sample in open_activations(directory).samples()}


def plans(directory: Path) -> list[Any]:
    return [json.loads(path.read_text()) for path in sorted((directory / "_run/plan").iterdir())]


def test_a_killed_run_goes_on_from_what_it_keeps_and_tokenises_nothing(
    again: Any, stopped: Any, tokenised: list[str], whole: Path, tmp_path: Path
) -> None:
    stopped(1)
    kept = sorted(path.name for path in (tmp_path / "run/_run/tokens").iterdir())
    assert kept == [f"{number:06d}.safetensors" for number in range(3)]
    tokenised.clear()
    told = again()
    assert not tokenised
    assert "input in.jsonl: 10 samples, 485 tokens, longest 63; texts from column 'text'" in told
    assert "resume 2 samples committed already" in told
    assert shards(tmp_path / "run") == shards(whole)
    assert plans(tmp_path / "run") == plans(whole)
    assert not list((tmp_path / "run/_run/tokens").iterdir()), "sidecars hold the same"


def test_a_finished_run_is_known_without_reading_a_sample(
    again: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    again()
    before = snapshot(tmp_path / "run")

    def unread(*_: Any) -> Iterator[Any]:
        raise AssertionError("a sample was asked for")

    monkeypatch.setattr(sources, "_first", lambda *_: unread)
    told = again()
    assert "input in.jsonl: 10 samples, 485 tokens, longest 63; texts from column 'text'" in told
    assert "done everything was committed already; nothing to do" in told
    after = snapshot(tmp_path / "run")
    assert {name for name in after if after[name] != before.get(name)} <= {
        name for name in after if name == "metadata.json" or name.startswith(("_run/sessions/", "_run/config"))
    }
    token_file = tmp_path / "run/_run/tokens/000000.safetensors"
    token_file.write_bytes(b"left by a kill after the last record")
    again()
    assert not token_file.exists()


def test_other_bytes_are_compared_as_ever(again: Any, stopped: Any, tasks: Path, tokenised: list[str]) -> None:
    stopped(1)
    text = tasks.read_text()
    tasks.write_text(text.replace("s0003", "other"))
    with pytest.raises(UserError, match=r"holds a run over other inputs, of .*in\.jsonl.* restore the inputs"):
        again()
    tokenised.clear()
    tasks.write_text(text.replace('", "text"', '",  "text"'))
    again()
    assert len(tokenised) == len(LENGTHS), "the samples are the same, which shows only when they are read"


def test_a_run_that_knows_no_fingerprint_is_read_again_and_keeps_nothing(
    again: Any, stopped: Any, tokenised: list[str], whole: Path, tmp_path: Path
) -> None:
    stopped(1)
    run = tmp_path / "run/_run/run.json"
    said = json.loads(run.read_text())
    del said["description"]["input_fingerprint"]  # as the version before wrote it
    run.write_text(json.dumps(said))
    for path in (tmp_path / "run/_run/tokens").iterdir():
        path.unlink()
    (tmp_path / "run/_run/tokens").rmdir()
    tokenised.clear()
    stopped(1)
    assert len(tokenised) == len(LENGTHS)
    assert not (tmp_path / "run/_run/tokens").exists()
    again()
    assert rows(tmp_path / "run") == rows(whole)


def test_a_damaged_file_is_told_once_and_made_again(
    again: Any, stopped: Any, tokenised: list[str], whole: Path, tmp_path: Path
) -> None:
    stopped(1)
    path = tmp_path / "run/_run/tokens/000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    tokenised.clear()
    notes = [line for line in stopped(1) if line.startswith("note")]
    [note] = notes
    assert note.startswith(f"note {path} is damaged (") and note.endswith("); the input is tokenised again")
    assert tokenised == [f"s{number:04d}" for number in range(4, 10)], "the first window is sound"
    assert not [line for line in again() if line.startswith("note")]
    assert shards(tmp_path / "run") == shards(whole)


def test_a_stream_goes_on_behind_what_is_kept(
    again: Any, stopped: Any, tasks: Path, tokenised: list[str], tmp_path: Path
) -> None:
    options = {"tasks_file": None, "dataset": str(tasks)}
    lines = [*texts(LENGTHS).items(), ("empty", ""), ("last", "a text")]
    tasks.write_text("".join(json.dumps({"id": key, "text": text}) + "\n" for key, text in lines))
    again("whole", **options)
    stopped(2, **options)  # of six parts in three windows
    kept = len(list((tmp_path / "run/_run/tokens").iterdir()))
    assert kept >= 1
    tokenised.clear()
    again(**options)
    assert tokenised == [key for key, _ in lines[4 * kept :]]
    assert shards(tmp_path / "run") == shards(tmp_path / "whole")
    there, whole = plans(tmp_path / "run"), plans(tmp_path / "whole")
    assert [plan["digest"] for plan in there] == [plan["digest"] for plan in whole]
    assert there[-1]["input"] == whole[-1]["input"], "what was not tokenised again is counted all the same"
    tokenised.clear()
    assert "done everything was committed already; nothing to do" in again(**options)
    assert not tokenised


def test_a_stream_of_contexts_goes_on(
    again: Any, stopped: Any, tasks: Path, tokenised: list[str], tmp_path: Path
) -> None:
    options = {"tasks_file": None, "dataset": str(tasks), "context_tokens": 40}
    again("whole", **options)
    stopped(3, **options)
    tokenised.clear()
    again(**options)
    assert "s0000" not in tokenised
    assert shards(tmp_path / "run") == shards(tmp_path / "whole")
    assert plans(tmp_path / "run")[-1] == plans(tmp_path / "whole")[-1]


def test_workers_use_what_one_of_them_has_kept(
    again: Any, stopped: Any, tokenised: list[str], whole: Path, tmp_path: Path
) -> None:
    stopped(0, worker_id=0, num_workers=2)
    tokenised.clear()
    again(worker_id=1, num_workers=2)
    assert not tokenised
    assert rows(tmp_path / "run") == rows(whole)
    assert not list((tmp_path / "run/_run/tokens").iterdir())


def test_a_run_in_a_bucket_goes_on_from_what_is_kept_there(
    again: Any,
    stopped: Any,
    tokenised: list[str],
    whole: Path,
    bucket_server: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket_server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    bucket_server.make_bucket("restarts")
    place = {"directory": "gs://restarts/one"}
    stopped(3, **place)  # of six parts in three windows
    tokenised.clear()
    bucket_server.forget_log()
    again(**place)
    assert not tokenised
    read = {entry["range"] for entry in bucket_server.log(name="_run/tokens/000000") if entry["range"]}
    assert len(read) == 9, "the header and eight arrays, and not the token ids, which nobody needs"
    run = open_activations(place["directory"])
    assert {sample.sample_id: sample.get(1).tobytes() for sample in run.samples()} == rows(whole)
    assert not token_files.sizes(open_storage(place["directory"]))


def test_what_cannot_be_kept_is_told_and_the_run_goes_on(
    again: Any, monkeypatch: pytest.MonkeyPatch, whole: Path, tmp_path: Path
) -> None:
    def full(*_: Any) -> None:
        raise UserError("no space left")

    monkeypatch.setattr(token_files, "write", full)
    assert [line for line in again() if "token ids could not be kept" in line and "no space left" in line]
    assert shards(tmp_path / "run") == shards(whole)


@pytest.mark.parametrize("when", ["before:1", "after:1", "before:3"])
def test_a_run_killed_while_it_keeps_a_window_goes_on(
    small: Path, tasks: Path, whole: Path, tmp_path: Path, when: str
) -> None:
    words = ["--model_path", small, "--tasks_file", tasks, "--layers_to_extract", 1, "--batch_size", 2]
    code = """
import sys
from jax_extract.cli import main
from jax_extract.extraction import prepare
prepare.WINDOW_SAMPLES = 4
sys.exit(main(["extract", *sys.argv[1:]]))
"""
    env = {"JAX_EXTRACT_FAILPOINT": f"tokens.file:{when}"}
    killed = run_cli(*words, "--activations_dir", "killed", cwd=tmp_path, env=env, code=code)
    assert killed.returncode == -9
    ended = run_cli(*words, "--activations_dir", "killed", cwd=tmp_path, code=code)
    assert ended.returncode == 0, ended.stderr
    assert shards(tmp_path / "killed") == shards(whole)
    assert not list((tmp_path / "killed/_run/tokens").iterdir())


def test_sweep_removes_what_a_whole_run_needs_no_more(again: Any, stopped: Any, tmp_path: Path, capsys: Any) -> None:
    stopped(1)
    place = str(tmp_path / "run")
    kept = tmp_path / "run/_run/tokens/000000.safetensors"
    data = kept.read_bytes()
    main(["sweep", place])
    assert kept.read_bytes() == data, "the run is not whole"
    again()
    kept.write_bytes(data)
    assert main(["status", place]) == 0
    assert main(["sweep", place]) == 0
    assert "_run/tokens/000000.safetensors" in capsys.readouterr().out
    assert not kept.exists()
