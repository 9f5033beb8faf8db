"""What the same command need not do again: read, tokenise and plan what is kept of its run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gcs_server import RunningServer
from small_run import make_model, run_cli, run_here, shards, snapshot, texts, write_arc, write_jsonl

from jax_extract import UserError, open_activations
from jax_extract.cli import main
from jax_extract.config import ExtractConfig
from jax_extract.extraction import prepare
from jax_extract.extraction.command import _open_source, extract_to_directory
from jax_extract.extraction.kept_windows import KeptWindow, Planned, keep, kept_windows
from jax_extract.inputs import sources, tokenize
from jax_extract.inputs.contexts import ContextCounts, ContextForm, KnownContexts, join
from jax_extract.inputs.fingerprint import fingerprint
from jax_extract.inputs.planning.slabs import PlanSettings
from jax_extract.inputs.planning.windows import WindowPlanner
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.sources import open_source
from jax_extract.inputs.token_table import TokenizedSample, TokenTable
from jax_extract.inputs.tokenize import InputCounts, tokenized_tables
from jax_extract.inputs.wrapping import Wrapping
from jax_extract.store import token_files
from jax_extract.store.ledger import Ledger
from jax_extract.store.storage.local import Directory
from jax_extract.store.storage.opening import open_storage
from jax_extract.terminal import Terminal
from models.positions import Positions

LENGTHS = [33, 60, 40, 61, 35, 50, 47, 62, 63, 34]
SETTINGS = PlanSettings(4, 2, 128, 16, 64, Positions.parse("last"), 128, version=2)


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


class Told(Terminal):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(silent=True)
        self.lines = lines

    def line(self, label: str, text: str) -> None:
        self.lines.append(f"{label} {text}")


@pytest.fixture
def again(small: Path, tasks: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command; gives the lines that it tells."""

    def command(directory: str = "run", told: list[str] | None = None, **changes: Any) -> list[str]:
        options: dict[str, Any] = {"tasks_file": str(tasks), "layers_to_extract": (1,), "batch_size": 2, **changes}
        place = directory if directory.startswith("gs://") else str(tmp_path / directory)
        terminal = Told([] if told is None else told)
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


# ------------------------------------------------------------------------------------------- whole runs


def test_a_killed_run_goes_on_from_what_it_keeps_and_tokenises_nothing(
    again: Any, stopped: Any, tokenised: list[str], whole: Path, tmp_path: Path
) -> None:
    stopped(1)
    kept = sorted(path.name for path in (tmp_path / "run/_run/tokens").iterdir())
    assert kept == [f"{number:06d}.safetensors" for number in range(3)]
    tokenised.clear()
    told = again()
    assert not tokenised
    assert "input in.jsonl: 10 samples, 485 tokens, longest 63" in told
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
    assert "input in.jsonl: 10 samples, 485 tokens, longest 63" in told
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
    assert [line.endswith("the input is tokenised again") for line in notes] == [True]
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


# ------------------------------------------------------------------------------------------- files of windows


def samples(count: int, first: int = 0) -> list[TokenizedSample]:
    draw = np.random.default_rng(first)
    return [
        TokenizedSample(
            first + i, f"s{first + i} \ud800é", draw.integers(0, 99, 5 + 7 * i % 50, dtype=np.int32), 70, {"line": i}
        )
        for i in range(count)
    ]


def described(sample: TokenizedSample) -> tuple[Any, ...]:
    return sample.sample_index, sample.sample_id, sample.token_ids.tolist(), sample.full_length, sample.meta


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.start(Directory(tmp_path), {"identity": {}, "numerics": {}, "description": {}})


@pytest.fixture
def planned(ledger: Ledger) -> list[Planned]:
    """Two windows, which are kept."""
    planner = WindowPlanner(SETTINGS)
    tables = [TokenTable.of(samples(9)), TokenTable.of(samples(7, 9))]
    counts = InputCounts(samples=16, first_empty_samples=["x"], chained=False)
    windows = [Planned.now(planner.window(table, number == 1), counts) for number, table in enumerate(tables)]
    for window in windows:
        keep(ledger, window, "0a")
    return windows


def test_a_window_that_is_kept_is_the_same_and_its_tokens_wait(
    ledger: Ledger, planned: list[Planned], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    array = token_files.TokenFile.array
    monkeypatch.setattr(token_files.TokenFile, "array", lambda self, name: read.append(name) or array(self, name))
    found, *wrong = kept_windows(ledger, ())
    assert (len(found), wrong) == (2, ["", ""])
    planner = WindowPlanner(SETTINGS)
    for kept, (window, counts) in zip(found, planned, strict=True):
        there = kept.planned(planner, InputCounts())
        assert there
        assert there.counts == counts
        assert there.window.digest == window.digest
        assert [part.digest for part in there.window.parts] == [part.digest for part in window.parts]
        assert "token_ids" not in read
        table, before = there.window.arrangement.table, window.arrangement.table
        assert list(map(described, table)) == list(map(described, before))
        assert np.array_equal(table.token_ids, before.token_ids)
        assert table.token_ids.base is not None, "mapped, not read"
        read.clear()
    passing = WindowPlanner(SETTINGS)
    assert found[0].planned(passing, InputCounts())
    found[1].pass_over(passing)
    more = TokenTable.of(samples(5, 16))
    assert passing.window(more, True).digest == planner.window(more, True).digest
    other = WindowPlanner(replace(SETTINGS, rows=1))
    assert found[0].planned(other, InputCounts()) is None, "laid out otherwise"


def test_files_of_others_and_damaged_ones_are_no_windows(ledger: Ledger, planned: list[Planned]) -> None:
    path = Path(ledger.storage.where(token_files.file_name(0)))
    whole = path.read_bytes()
    assert token_files.TokenFile.open(ledger, 2) is None
    assert token_files.TokenFile.open(Ledger(ledger.storage, {**ledger.run, "run_id": "0" * 32}), 0) is None
    header = 8 + int.from_bytes(whole[:8], "little")
    assert header % 8 == 0
    for wrong in (b"", b"\xff" * 20, whole[: header - 9], whole[:-1]):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match=r"000000\.safetensors is damaged .* give the same command again"):
            KeptWindow.open(ledger, 0, is_done=False)
    for place in range(header, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(UserError, match="damaged"):
            kept = KeptWindow.open(ledger, 0, is_done=False)
            assert kept
            _ = kept.table.token_ids
    path.write_bytes(whole)
    assert kept_windows(ledger, ())[1:] == ("", "")
    path.write_bytes(whole[:100])
    found, name, damaged = kept_windows(ledger, ())
    assert (found, name) == ([], token_files.file_name(0))
    assert "000000.safetensors is damaged" in damaged


def test_a_window_is_kept_once(ledger: Ledger, planned: list[Planned]) -> None:
    before = snapshot(Path(str(ledger.storage)))
    token_files.write(ledger, 0, {"offsets": np.zeros(1, np.int64)}, {}, "0b")
    assert snapshot(Path(str(ledger.storage))) == before


@pytest.mark.parametrize("known", [1, 2, 3, 5, 8])
def test_contexts_go_on_where_others_end(known: int) -> None:
    form = ContextForm(8, start=7, separator=8)
    lengths = [3, 7, 1, 1, 30, 2, 0, 5, 8]  # contexts end within documents, at their ends, and with a separator
    given = [Sample(f"d{i}", "x", token_ids=tuple(range(20, 20 + n))) for i, n in enumerate(lengths)]

    def made(known: KnownContexts | None) -> tuple[list[Any], Any]:
        counts, read = ContextCounts(chained=False), InputCounts(chained=False)
        tables = tokenized_tables(given, None, 99, Wrapping(), read, known=known and known.documents)
        return [s for table in join(tables, form, counts, read, known) for s in map(described, table)], counts

    whole, counts = made(None)
    tokens = (np.array(sample[2], np.int32) for sample in whole)
    table = TokenTable.of(TokenizedSample(s[0], s[1], ids, s[3], s[4]) for s, ids in zip(whole, tokens, strict=True))
    there = KnownContexts([table.between(0, known - 1), table.between(known - 1, known)][known == 1 :])
    assert made(there) == (whole[known:], counts)


# ------------------------------------------------------------------------------------------- fingerprints


def test_a_fingerprint_is_of_bytes_names_and_options(tmp_path: Path) -> None:
    path, folder = write_jsonl(tmp_path / "a.jsonl", [3, 4]), tmp_path / "arc"
    (folder / "sub").mkdir(parents=True)

    def of(tasks_file: Path, **changes: Any) -> str | None:
        options: dict[str, Any] = dict.fromkeys(
            ["n_tasks", "n_samples", "split", "dataset_config", "text_column", "id_column"]
        )
        source = open_source(str(tasks_file), None, **{**options, "encoder": "digits", "seed": 0, **changes})
        return source.fingerprint()

    first = of(path)
    assert first == of(path)
    assert str(first).startswith("sha256:")
    assert len({first, of(path, n_samples=1), of(path, text_column="text"), of(path, id_column="id")}) == 4
    config = ExtractConfig(tasks_file=str(path))
    assert _open_source(config).fingerprint() == first
    assert _open_source(replace(config, max_new_tokens=9)).fingerprint() not in (None, first), "prompts are shorter"
    path.write_text(path.read_text() + "\n")
    assert of(path) != first
    task = folder / "sub" / "x.json"
    task.write_text(json.dumps(json.loads(write_arc(tmp_path / "arc.json", 1).read_text())["task000"]))
    said = {of(folder), of(folder, seed=1), of(folder, n_samples=2), of(folder, encoder="spaced")}
    assert len(said) == 4
    task.rename(folder / "sub" / "y.json")
    assert of(folder) not in said, "the id of a task is the name of its file"


def test_a_fingerprint_is_not_made_of_what_may_change(tmp_path: Path) -> None:
    commit = "hf://datasets/owner/name@" + "0" * 40 + "/data/x.parquet"
    assert fingerprint({}, [commit]) != fingerprint({}, [commit.replace("x", "y")])
    assert fingerprint({}, [commit.replace("@" + "0" * 40, "@main")]) is None
    assert fingerprint({}, None) is fingerprint({}, [tmp_path / "gone"]) is None
    path = write_jsonl(tmp_path / "a.jsonl", [30])
    assert fingerprint({}, [path], most=10) is None
    assert fingerprint({}, [path], most=1_000) == fingerprint({}, [path])


def test_what_was_counted_counts_when_the_input_ends(ledger: Ledger) -> None:
    plan = {"window": 0, "last": False, "digest": "a", "parts": [], "input": {"samples": 8}}
    last = {"window": 1, "last": True, "digest": "b", "parts": [], "input": {"samples": 9}}
    ledger.keep_plan(0, plan)
    ledger.keep_plan(1, last)
    ledger.keep_plan(0, {**plan, "input": {"samples": 6}})  # read less far ahead
    assert ledger.holds_plan(0, "a", {"samples": 6})
    assert ledger.holds_plan(1, "b", {"samples": 9})
    assert not ledger.holds_plan(1, "b", {"samples": 6})
    for changed in ({**last, "input": {"samples": 6}}, {**plan, "digest": "c", "input": {"samples": 6}}):
        with pytest.raises(UserError, match="other inputs"):
            ledger.keep_plan(changed["window"], changed)
