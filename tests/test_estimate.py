"""`estimate` against what runs then do: bytes and files exactly, seconds by arithmetic, and nothing stays behind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gcs_server import running
from small_run import run_here, shards, snapshot, whole_lines, write_jsonl

from jax_extract import UserError
from jax_extract.config import ExtractConfig
from jax_extract.devices.processes import Processes
from jax_extract.estimation import command as estimate
from jax_extract.estimation import probe
from jax_extract.estimation.command import Estimate, Output, Work, estimate_command, output_of, tell
from jax_extract.estimation.figures import ReadProbe
from jax_extract.estimation.probe import ComputeProbe, WriteProbe, probe_writing
from jax_extract.extraction.loop import LoopStatistics
from jax_extract.inputs.planning.slabs import PlanSettings, SlabShape
from jax_extract.inputs.planning.windows import Part, plan_windows
from jax_extract.inputs.token_table import TokenizedSample
from jax_extract.store.budget import ByteBudget
from jax_extract.store.parts import ShardName, Site
from jax_extract.store.storage.local import Directory
from jax_extract.store.storage.opening import open_storage
from jax_extract.terminal import Terminal, bytes_text, duration_text
from models.positions import Positions

LENGTHS = [33, 60, 40, 61, 35, 50, 47, 62, 63, 34, 48, 64, 200, 100, 90, 120] * 3
LONG, SHORT, OTHER = SlabShape(128, 8, 1), SlabShape(64, 8, 1), SlabShape(256, 8, 1)
COMPUTE = ComputeProbe(load_seconds=5, compile_seconds=10, step_seconds={LONG: 2.0, SHORT: 0.5}, tried=20)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("input") / "texts.jsonl", LENGTHS)


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No probe is run; bytes and files follow from the plan."""

    def computing(job: Any, _weights: Any, parts: list[Part], *_: Any) -> ComputeProbe:
        return ComputeProbe(5, 10, dict.fromkeys(job.step_counts(parts).steps, 1.0), 10)

    monkeypatch.setattr(estimate, "probe_computing", computing)
    monkeypatch.setattr(estimate, "probe_writing", lambda *_: WriteProbe(1e9, 0.001))


def _estimate(model: Path, tasks: Path, directory: Path, **options: Any) -> Estimate:
    config = ExtractConfig(model_path=str(model), tasks_file=str(tasks), activations_dir=str(directory), **options)
    return estimate.estimate(config, Terminal(silent=True))


def _written(directory: Path) -> tuple[int, int]:
    """(files, bytes) of a run."""
    files = snapshot(directory)
    return len(files), sum(map(len, files.values()))


# -------------------------------------------------------------------------------- bytes and files


@pytest.mark.parametrize(("at_once", "seconds"), [(False, 25.0), (True, 15.0)])
def test_programs_that_are_compiled_at_once_take_as_long_as_one(at_once: bool, seconds: float) -> None:
    assert replace(COMPUTE, compiles_at_once=at_once).start_seconds(programs=2) == seconds


def test_the_figures_of_the_users_document_come_out() -> None:
    """Qwen2.5-0.5B, layers 10-23, last position, float32, 50,000 samples in batches of 512.

    The document rounds 3,584 bytes to 3.6 KB first and multiplies then, so its later figures are 0.5 % larger.
    """
    positions = Positions.parse("last")
    settings = PlanSettings(512, 8, 4_096, 128, 8_192, positions, bytes_per_row=3_584)
    ids = np.zeros(4, np.int32)
    samples = (TokenizedSample(i, str(i), ids, 4, {}) for i in range(50_000))
    parts = [part for window in plan_windows(samples, settings) for part in window.parts]
    sites = [Site("after_block", layer, 896) for layer in range(10, 24)]
    output = output_of(parts, sites, positions, "float32", "pickle")
    assert output.row_bytes / len(sites) / output.samples == 3_584 == pytest.approx(3.6e3, rel=0.005)
    assert output.row_bytes / output.samples == 50_176 == pytest.approx(50.4e3, rel=0.005)
    assert output.row_bytes / output.samples * 512 == 25_690_112 == pytest.approx(25.8e6, rel=0.005)
    assert output.row_bytes == 2_508_800_000 == pytest.approx(2.52e9, rel=0.005)
    assert output.shards == 98 * 14 == pytest.approx(1_400, rel=0.02)
    assert output.file_bytes == pytest.approx(output.row_bytes, rel=0.02)
    assert [bytes_text(n) for n in (3_584, 50_176, 25_690_112, output.row_bytes)] == [
        "3.58 kB",
        "50.2 kB",
        "25.7 MB",
        "2.51 GB",
    ]


@pytest.mark.parametrize(
    ("shard_format", "positions", "capture_dtype"),
    [
        ("pickle", "all", "float32"),
        ("pickle", "last", "float32"),  # heads are a tenth of such shards
        ("npz", "every:3", "bfloat16"),
        ("safetensors", "first:40", "float16"),
    ],
)
def test_a_run_writes_the_bytes_and_files_that_were_estimated(
    model: Path,
    tasks: Path,
    tmp_path: Path,
    untimed: None,
    shard_format: str,
    positions: str,
    capture_dtype: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hooks = ("after_block", "ffn_hidden", "final_norm")  # two widths, and a hook point without a layer
    options = {"shard_format": shard_format, "positions": positions, "capture_dtype": capture_dtype}
    found = _estimate(model, tasks, tmp_path / "a", hook_points=hooks, **options)
    assert not (tmp_path / "a").exists()
    metadata = run_here(model, tasks, tmp_path / "a", hook_points=hooks, **options)
    values = 4 if capture_dtype == "float32" else 2
    sites = list(found.output.site_bytes)
    assert found.output.rows == metadata["total_rows"]
    assert found.output.row_bytes == metadata["total_rows"] * values * sum(site.width for site in sites)
    assert [(s.hook, s.layer) for s in sites] == [(s["hook"], s["layer"]) for s in metadata["sites"]]
    written: Counter[tuple[str, int | None]] = Counter()
    for name, data in shards(tmp_path / "a").items():
        shard = ShardName.parse(name)
        assert shard
        written[shard.hook, shard.layer] += len(data)
    assert {site.key: size for site, size in found.output.site_bytes.items()} == written
    assert found.output.shard_bytes == metadata["total_bytes"]
    tell(found, Terminal())
    assert f" a layer and hook point: {bytes_text(metadata['total_bytes'])} in " in whole_lines(capsys.readouterr().out)
    assert found.output.shards == len(shards(tmp_path / "a"))
    assert found.output.largest_shard == max(map(len, shards(tmp_path / "a").values()))
    files, size = _written(tmp_path / "a")
    assert found.output.objects == files
    assert found.output.file_bytes == pytest.approx(size, rel=0.03)
    assert (found.output.samples, found.output.tokens) == (metadata["total_samples"], metadata["total_tokens"])


def test_of_a_run_that_is_there_only_what_is_left_is_counted(
    model: Path, tasks: Path, tmp_path: Path, untimed: None
) -> None:
    run_here(model, tasks, tmp_path / "a", positions="all")
    whole_files, _ = _written(tmp_path / "a")
    for batch in ("000002", "000005"):
        for path in (tmp_path / "a").rglob(f"*{batch}*"):
            path.unlink()
    before = snapshot(tmp_path / "a")
    found = _estimate(model, tasks, tmp_path / "a", positions="all")
    assert snapshot(tmp_path / "a") == before
    assert (found.output.parts, found.work.committed_samples, found.output.samples) == (2, 32, 16)
    assert found.output.objects == whole_files - len(before) + 1  # and a session
    run_here(model, tasks, tmp_path / "a", positions="all")
    files, size = _written(tmp_path / "a")
    assert files == whole_files + 1
    assert found.output.file_bytes == pytest.approx(size - sum(map(len, before.values())), rel=0.03)


def test_where_everything_is_committed_nothing_is_tried_and_nothing_is_left(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(model, tasks, tmp_path / "a")
    monkeypatch.delattr(estimate, "probe_computing")
    monkeypatch.delattr(estimate, "probe_writing")
    before = snapshot(tmp_path / "a")
    found = _estimate(model, tasks, tmp_path / "a")
    assert (found.output.objects, found.output.file_bytes, found.seconds) == (0, 0, 0)
    assert snapshot(tmp_path / "a") == before
    tell(found, Terminal())
    assert "everything is committed already; nothing to do" in whole_lines(capsys.readouterr().out)


def test_another_run_in_the_directory_is_refused_as_the_run_itself_would_be(
    model: Path, tasks: Path, tmp_path: Path, untimed: None
) -> None:
    run_here(model, tasks, tmp_path / "a", layers_to_extract=(10,))
    with pytest.raises(UserError, match=r"holds another run: --layers_to_extract was 10, is now 11;"):
        _estimate(model, tasks, tmp_path / "a", layers_to_extract=(11,))
    assert _estimate(model, tasks, tmp_path / "a", layers_to_extract=(11,), overwrite=True).output.samples == 48
    other = write_jsonl(tmp_path / "other.jsonl", LENGTHS, seed=1)
    with pytest.raises(UserError, match="holds a run over other inputs"):
        _estimate(model, other, tmp_path / "a", layers_to_extract=(10,))


def test_a_run_that_cannot_fit_is_refused_at_once_with_the_sentence_of_the_run(
    model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Directory, "free_bytes", lambda _: 100_000)
    monkeypatch.delattr(estimate, "probe_computing")
    told = []
    for command in (_estimate, run_here):
        with pytest.raises(UserError) as error:
            command(model, tasks, tmp_path / "a", positions="all")
        told.append(str(error.value))
    sentence = rf"the run needs [89]\d\d kB but {tmp_path}/a has 100 kB free; choose another --activations_dir, "
    assert all(re.match(sentence, text) for text in told), told
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------------------------------- streams


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax_extract.extraction.prepare.WINDOW_SAMPLES", 16)


def _stream(model: Path, tasks: Path, directory: Path, **options: Any) -> ExtractConfig:
    return ExtractConfig(model_path=str(model), dataset=str(tasks), activations_dir=str(directory), **options)


def test_of_a_stream_of_known_length_the_first_window_foretells_the_rest(
    model: Path, tasks: Path, tmp_path: Path, untimed: None, small_windows: None
) -> None:
    from jax_extract.extraction.command import extract_to_directory

    config = _stream(model, tasks, tmp_path / "a", n_samples=48, positions="all", layers_to_extract=(10, 11))
    found = estimate.estimate(config, Terminal(silent=True))
    metadata = extract_to_directory(config, Terminal(silent=True))
    assert found.work.covers == "foretold"
    assert found.output.samples == metadata["total_samples"] == 48
    assert found.output.rows == metadata["total_rows"]  # windows alike
    files, size = _written(tmp_path / "a")
    assert found.output.objects == files
    assert found.output.file_bytes == pytest.approx(size, rel=0.03)
    assert estimate.estimate(config, Terminal(silent=True)).output.parts == 0


def test_of_a_stream_of_unknown_length_a_million_tokens_are_told(
    model: Path,
    tasks: Path,
    tmp_path: Path,
    untimed: None,
    small_windows: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = _stream(model, tasks, tmp_path / "a", positions="all", layers_to_extract=(10, 11))
    found = estimate_command(config)
    assert found.output.tokens == 1_000_000
    assert found.output.row_bytes == 1_000_000 * 2 * 32 * 4
    said = whole_lines(capsys.readouterr().out)
    assert "1,000,000 tokens like those of the first window" in said
    assert "million tokens" in said.partition("room")[2].partition("\n")[0]
    assert said.splitlines()[-1].startswith("estimate") and said.splitlines()[-1].endswith("for 1,000,000 tokens")


# ---------------------------------------------------------------------------------------- seconds


READ = ReadProbe(60.0, 500_000, "before")


def _found(
    writes: dict[str, WriteProbe], workers: int = 1, writers: int = 1, reading: ReadProbe = READ, **config: Any
) -> Estimate:
    sites = {Site("after_block", layer, 896): 40_000_000_000 for layer in range(10)}
    output = Output(1_000, 500_000, 500_000, 10, 399_000_000_000, sites, 100, 200_000_000, 30, 400_000_000_000)
    work = Work(output, {LONG: 1_000, SHORT: 400, OTHER: 100}, "run", 0, 8)
    return Estimate(ExtractConfig(**config), work, reading, COMPUTE, writes, workers, writers, None)


def test_steps_of_shapes_that_were_not_tried_cost_by_the_token() -> None:
    tried = 1_000 * 2.0 + 400 * 0.5
    by_token = tried / (1_000 * 128 * 8 + 400 * 64 * 8)
    assert COMPUTE.seconds({LONG: 1_000, SHORT: 400}) == tried
    assert COMPUTE.seconds({LONG: 1_000, SHORT: 400, OTHER: 100}) == tried + by_token * 100 * 256 * 8
    assert COMPUTE.seconds({}) == 0


def test_the_longer_of_computing_and_writing_decides_and_what_helps_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    slow = _found({"here": WriteProbe(20e6, 0.01)}, positions="all")
    assert slow.writing_seconds == 400e9 / 20e6 + 130 * 0.01
    assert slow.bound == "writing"
    assert slow.seconds == 60 + 5 + 3 * 10 + slow.writing_seconds
    tell(slow, Terminal())
    said = whole_lines(capsys.readouterr().out)
    assert "read     60 s to read, tokenise and plan the input before the first step: 8,333 tokens/s" in said
    stages = "computing takes 43 min, writing takes 5.6 h, reading takes 60 s"
    assert f"bound    by writing: {stages}; --capture_dtype bfloat16 halves it" in said
    assert "--positions last keeps 0.2% of the rows" in said
    assert said.splitlines()[-1] == "estimate 5.6 h, 400 GB in 130 files"
    fast = _found({"here": WriteProbe(1e9, 0.01)}, positions="all")
    assert fast.bound == "computing"
    assert fast.seconds == 60 + 5 + 3 * 10 + fast.computing_seconds
    tell(fast, Terminal())
    assert "bound    by computing: computing takes 43 min, writing takes 6.7 min" in whole_lines(
        capsys.readouterr().out
    )
    half = _found({"here": WriteProbe(20e6, 0.01)}, capture_dtype="bfloat16", positions="all")
    tell(half, Terminal())
    assert "--capture_dtype" not in whole_lines(capsys.readouterr().out)
    many = _found({"here": WriteProbe(1e9, 60)}, positions="all")
    tell(many, Terminal())
    assert "a larger --batch_size makes fewer" in whole_lines(capsys.readouterr().out)


def test_room_without_a_limit_is_told_apart_from_room_that_nobody_knows(capsys: pytest.CaptureFixture[str]) -> None:
    for place, told in (("gs://bucket/a", "has no limit"), ("/proc/a", "does not say how much room it has")):
        tell(_found({place: WriteProbe(1e9, 0.1)}, activations_dir=place), Terminal())
        assert f"room     {place} {told}" in whole_lines(capsys.readouterr().out)


def test_workers_share_the_computing_and_parts_pass_at_the_speed_of_the_slower_place(
    capsys: pytest.CaptureFixture[str],
) -> None:
    writes = {"spool": WriteProbe(1e9, 0.0), "gs://bucket": WriteProbe(40e6, 0.1)}
    one, four = _found(writes), _found(writes, workers=4, writers=4)
    assert one.writing_seconds == 400e9 / 40e6 + 13
    assert four.computing_seconds == one.computing_seconds / 4
    assert four.writing_seconds == one.writing_seconds / 4
    assert four.start_seconds == one.start_seconds
    tell(four, Terminal())
    said = whole_lines(capsys.readouterr().out)
    assert "by 4 workers, as if each were like this one" in said
    assert "1 GB/s into spool, 40 MB/s into gs://bucket by 4 processes" in said


def test_workers_share_one_directory_but_have_a_spool_each(
    model: Path, tasks: Path, tmp_path: Path, untimed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    four = {"worker_id": 0, "num_workers": 4}
    shared = _estimate(model, tasks, tmp_path / "a", **four)
    assert (shared.workers, shared.writers) == (4, 1)
    assert shared.output.objects == _estimate(model, tasks, tmp_path / "a").output.objects + 3  # sessions
    monkeypatch.setattr(
        "jax_extract.extraction.place.open_storage", lambda text, flag: Directory(tmp_path / str(text)[-1])
    )
    spooled = _estimate(model, tasks, tmp_path / "b", **four, gcs_bucket="gs://bucket/c", upload_to_cloud=True)
    assert (spooled.workers, spooled.writers) == (4, 4)
    assert list(spooled.writes) == [str(tmp_path / "b"), str(tmp_path / "c")]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.01, "less than 0.1 s"),
        (4.04, "4.0 s"),
        (45, "45 s"),
        (400, "6.7 min"),
        (2_900, "48 min"),
        (18_720, "5.2 h"),
        (100_000, "28 h"),
        (270_000, "3.1 days"),
    ],
)
def test_durations_are_told_as_a_person_reads_them(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


# ----------------------------------------------------------------------------------------- probes


class _Program:
    hosts, devices_of_host = 1, 2


def _timed(monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> list[int]:
    """The loop takes so many seconds at each call; returns how many parts each call was given."""
    given: list[int] = []
    answers: Iterator[float] = iter(seconds)

    def run_parts(parts: Any, *_: object) -> LoopStatistics:
        given.append(len(list(parts)))
        return LoopStatistics(seconds=next(answers))

    monkeypatch.setattr(probe, "run_parts", run_parts)
    return given


def test_the_first_step_is_not_timed_unless_it_takes_all_the_time_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    part: Any = "a slab"
    given = _timed(monkeypatch, [0.5, 4.0])
    words: Any = (_Program(), [part], ByteBudget(1), Processes())
    assert probe._time_steps(*words) == (0.4, 10)
    assert given == [2, 20]  # a slab a device
    given = _timed(monkeypatch, [0.001, 1.0])
    assert probe._time_steps(*words) == (0.02, 50)
    given = _timed(monkeypatch, [30.0])
    assert probe._time_steps(*words) == (30.0, 1)
    assert given == [2]


def test_the_shapes_that_carry_most_tokens_are_computed_and_timed(
    model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_SHAPE_SECONDS", 0.05)
    monkeypatch.setattr(probe, "_WRITE_BYTES", 20_000_000)
    found = _estimate(model, tasks, tmp_path / "new" / "a", positions="all")
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.iterdir())
    assert found.compute is not None
    assert found.compute.load_seconds > 0 < found.compute.compile_seconds
    tokens = {shape: count * shape[0] * shape[1] for shape, count in found.work.steps.items()}
    assert set(found.compute.step_seconds) == set(sorted(tokens, key=lambda shape: tokens[shape])[-2:])
    (write,) = found.writes.values()
    assert write.bytes_per_second > 1e6
    assert 0 < write.seconds_per_file < 1
    assert 0 < found.computing_seconds < 60


def test_nothing_stays_in_a_bucket_that_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_WRITE_BYTES", 1)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        server.make_bucket("bucket")
        bucket = open_storage("gs://bucket/run")
        found = probe_writing(bucket, lanes=2)
        assert found.bytes_per_second > 0
        assert found.seconds_per_file > 0
        chunks = [entry["status"] for entry in server.log("chunk")]
        assert chunks == [308, 308]  # each lane sent what its file held; no upload was finished
        assert not server.log("finish")
        assert bucket.entries() == bucket.entries("_run") == {}


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_WRITE_BYTES", 1)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jax_extract.store.storage.local.os.write", full)
    with pytest.raises(UserError, match="no space left for"):
        probe_writing(Directory(tmp_path), 2)
    assert not list(tmp_path.iterdir())


def test_an_output_taken_several_times_keeps_its_shard_size() -> None:
    site = Site("after_block", 1, 8)
    output = Output(10, 100, 100, 2, 3_200, {site: 3_400}, 2, 1_700, 4, 9_000)
    assert output.times(2.5) == Output(25, 250, 250, 5, 8_000, {site: 8_500}, 5, 1_700, 10, 22_500)
