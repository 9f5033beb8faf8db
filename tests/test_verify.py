"""`jax-extract verify` finds what is wrong with a run and names it, and finds nothing where nothing is wrong.

Guarded: every checksum and every agreement that is promised; what only a recomputation can notice; both
references; the bounds of float32, of 16 stored bits and of bfloat16; runs that are unfinished or in a bucket.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gcs_server import running
from small_run import make_model, run_here, snapshot, write_jsonl

from jax_extract.cli import main
from jax_extract.errors import UserError
from jax_extract.pytorch import loading
from jax_extract.store import integrity
from jax_extract.store.formats import SUFFIXES
from jax_extract.store.metadata import VERIFICATION_FILE
from jax_extract.store.parts import PartContent
from jax_extract.store.sidecar import BlockChecksums, Sidecar
from jax_extract.store.storage.local import Directory
from jax_extract.store.storage.opening import open_storage
from jax_extract.store.storage.verbs import crc32c
from jax_extract.terminal import Terminal, bytes_text
from jax_extract.upkeep.uploading import UploadConfig, upload
from jax_extract.verification import reference
from jax_extract.verification.command import Verdict, VerifyConfig, verify, verify_command
from jax_extract.verification.reference import SiteVerdict, Wanted, rounding_interval, row_errors
from models.hooks import HOOK_POINTS

LENGTHS = [33, 60, 40, 21, 35, 50, 47, 62, 28, 34]  # three parts of four, four and two samples
LAYERS = (1, 3)
RESIDUAL = {name for name, point in HOOK_POINTS.items() if point.residual_stream}
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), layers=4)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("input") / "texts.jsonl", LENGTHS)


@pytest.fixture(scope="module")
def make(model: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run with these options; equal options give the same run."""
    made: dict[str, Path] = {}

    def run(**options: Any) -> Path:
        name = repr(sorted(options.items()))
        if name not in made:
            made[name] = tmp_path_factory.mktemp("run") / "a"
            run_here(model, tasks, made[name], **{"layers_to_extract": LAYERS, "batch_size": 4, **options})
        return made[name]

    return run


@pytest.fixture
def copy(make: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a run, to be damaged."""

    def copied(**options: Any) -> Path:
        return shutil.copytree(make(**options), tmp_path / "copy", ignore=shutil.ignore_patterns(VERIFICATION_FILE))

    return copied


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "torch_is_installed", lambda: False)


def verified(place: object, **options: Any) -> Verdict:
    return verify(str(place), terminal=Terminal(silent=True), **options)


def out_of_bounds(verdict: Verdict) -> list[str]:
    return [site.name for site in verdict.sites if site.ok is False]


def change_byte(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def make_right(
    directory: Path, part: str = "000001_001", change: Callable[[PartContent], PartContent] | None = None
) -> None:
    """Makes sidecar and record of a part agree with its files as they are now, and with a changed content."""
    path = directory / f"_run/commits/{part}.json"
    record = json.loads(path.read_text())
    itemsize = (
        4 if json.loads((directory / "_run/run.json").read_text())["identity"]["capture_dtype"] == "float32" else 2
    )
    sidecar = Sidecar.read(open_storage(directory), record["sidecar"]["path"], record["sidecar"]["crc32c"])
    arrays = []
    for array in sidecar.arrays:
        blocks = BlockChecksums()
        size = sidecar.content.rows * array.site.width * itemsize
        blocks.update((directory / array.path).read_bytes()[array.offset : array.offset + size])
        arrays.append(dataclasses.replace(array, blocks=tuple(blocks.values())))
    content = change(sidecar.content) if change else sidecar.content
    data = Sidecar(content, tuple(arrays)).to_bytes()
    (directory / record["sidecar"]["path"]).write_bytes(data)
    record["sidecar"] |= {"bytes": len(data), "crc32c": crc32c(data)}
    record |= {"samples": len(content.sample_ids), "tokens": content.tokens, "rows": content.rows}
    for file in record["files"]:
        data = (directory / file["path"]).read_bytes()
        file |= {"bytes": len(data), "crc32c": crc32c(data)}
    path.write_text(json.dumps(record))


def rows_on_disk(directory: Path, name: str, dtype: Any, part: str = "000001_001") -> np.memmap:
    """The rows of a shard where they lie, to be changed."""
    record = json.loads((directory / f"_run/commits/{part}.json").read_text())
    sidecar = Sidecar.read(open_storage(directory), record["sidecar"]["path"], record["sidecar"]["crc32c"])
    array = next(array for array in sidecar.arrays if array.path == name)
    shape = (sidecar.content.rows, array.site.width)
    return np.memmap(directory / name, dtype, "r+", array.offset, shape)


# ------------------------------------------------------------------------------------ nothing is wrong

KINDS = {
    "pickle": {"positions": "all", "hook_points": ("*",)},
    "npz": {"positions": "last", "hook_points": ("after_block", "ffn_hidden", "final_norm")},
    "safetensors": {"positions": "mean", "hook_points": ("residual_before", "ffn_gate", "embeddings")},
}


@pytest.mark.parametrize("shard_format", KINDS)
def test_a_good_run_is_verified_by_hugging_face(make: Callable[..., Path], shard_format: str) -> None:
    directory = make(shard_format=shard_format, **KINDS[shard_format])
    verdict = verified(directory, samples=5)
    assert (verdict.verdict, verdict.exit_status, verdict.damaged, verdict.missing) == ("verified", 0, [], [])
    assert verdict.reference["name"] == "Hugging Face transformers in float32"
    stored = list(directory.glob(f"*.{SUFFIXES[shard_format]}")) + list((directory / "_run/parts").iterdir())
    assert verdict.read["bytes"] == sum(path.stat().st_size for path in stored)
    assert (verdict.read["parts"], verdict.read["files"], verdict.read["samples"]) == (3, len(stored), len(LENGTHS))
    assert verdict.read["blocks"] == len(stored) - 3  # none of these arrays is longer than a block
    for site in verdict.sites:
        assert site.bound == (1e-5 if site.hook in RESIDUAL else 5e-5)
        assert site.ok and site.rows == sum(sample["rows"] for sample in verdict.samples)
    assert sum(site.worst > 0 for site in verdict.sites) >= len(verdict.sites) - 2, "it compared nothing with nothing"


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize("shard_format", KINDS)
def test_a_good_run_is_verified_by_our_own_forward_where_torch_is_not(
    make: Callable[..., Path], shard_format: str
) -> None:
    verdict = verified(make(shard_format=shard_format, **KINDS[shard_format]), samples=2)
    assert verdict.verdict == "verified"
    assert verdict.reference["name"] == "jax_extract's own forward, unbatched, in float32"
    assert any("torch is not installed" in note for note in verdict.notes)
    assert all(site.ok for site in verdict.sites)


@pytest.mark.parametrize("positions", ["every:7", "at:0,30", "from:30", "mean_from:30"])
def test_every_choice_of_positions_is_compared_row_by_row(make: Callable[..., Path], positions: str) -> None:
    verdict = verified(make(positions=positions), samples=len(LENGTHS))
    assert verdict.verdict == "verified"
    assert verdict.sites[0].rows == {"every:7": 61, "at:0,30": 18, "from:30": 121, "mean_from:30": 8}[positions]


def test_weights_that_transformers_cannot_read_are_read_by_us(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: object) -> None:
        raise ValueError("it is no file of theirs")

    monkeypatch.setattr(loading, "load_theirs", cannot)
    verdict = verified(make(positions="all", shard_format="pickle", hook_points=("*",)), samples=2)
    assert verdict.verdict == "verified"
    assert verdict.reference["name"] == "Hugging Face transformers in float32, weights read by jax_extract"
    assert any("it is no file of theirs" in note for note in verdict.notes)


def test_tensors_that_transformers_did_not_find_are_not_made_up(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModel

    load = AutoModel.from_pretrained

    def lacking(*words: Any, **named: Any) -> Any:
        loaded, info = load(*words, **named)
        return loaded, {**info, "missing_keys": {"layers.0.mlp.up_proj.weight"}}

    monkeypatch.setattr(AutoModel, "from_pretrained", lacking)
    verdict = verified(make(), samples=2)
    assert any("layers.0.mlp.up_proj.weight" in note for note in verdict.notes)
    assert (verdict.verdict, "read by jax_extract" in verdict.reference["name"]) == ("verified", True)


def test_the_verdict_is_written_beside_the_metadata_and_replaced(copy: Callable[..., Path], model: Path) -> None:
    directory = copy()
    before = snapshot(directory)
    verified(directory, samples=3)
    again = verified(directory, samples=3, seed=1)
    said = json.loads((directory / VERIFICATION_FILE).read_text())
    assert set(snapshot(directory)) == {*before, VERIFICATION_FILE}
    assert {name: data for name, data in snapshot(directory).items() if name != VERIFICATION_FILE} == before
    assert said["verdict"] == "verified" and said["date"] == again.date and said["date"].endswith("+00:00")
    assert said["run_id"] == json.loads((directory / "_run/run.json").read_text())["run_id"]
    assert said["reference"]["model"] == str(model)
    assert set(said["reference"]["versions"]) == {"torch", "transformers", "jax_extract"}
    assert [sample["sample_id"] for sample in said["samples"]] == [s["sample_id"] for s in again.samples]
    [site] = [site for site in said["sites"] if site["layer"] == 3]
    assert (site["hook"], site["rows"], site["bound"], site["ok"]) == ("after_block", 3, 1e-5, True)
    assert 0 < site["median"] <= site["worst"] <= 1e-5


def test_the_command_prints_a_line_a_site_and_the_verdict(
    copy: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = copy()
    assert verify_command(VerifyConfig(str(directory), samples=2)) == 0
    out = capsys.readouterr().out
    assert sum(line.split()[:1] == ["after_block"] and line.endswith("ok") for line in out.splitlines()) == len(LAYERS)
    assert out.splitlines()[-1].startswith("verdict  verified: ")
    change_byte(directory / "layer_1_batch_000002.pkl", 300)
    assert verify_command(VerifyConfig(str(directory), samples=2)) == 1
    out = capsys.readouterr().out
    assert "damaged  part 000002_001: layer_1_batch_000002.pkl is changed" in out
    assert out.splitlines()[-1] == "verdict  damaged: 1 thing, named above"


# --------------------------------------------------------------------------------- something is damaged

DAMAGE: dict[str, tuple[Damage, str]] = {
    "a row": (
        lambda d: change_byte(d / "layer_1_batch_000002.pkl", 300),
        r"part 000002_001: layer_1_batch_000002\.pkl is changed: block 0 of its array",
    ),
    "a shard's head": (
        lambda d: change_byte(d / "layer_1_batch_000002.pkl", 3),
        r"part 000002_001: layer_1_batch_000002\.pkl is changed: it does not match",
    ),
    "a shard cut": (
        lambda d: (d / "layer_3_batch_000001.pkl").write_bytes((d / "layer_3_batch_000001.pkl").read_bytes()[:-5]),
        r"part 000001_001: layer_3_batch_000001\.pkl has \d+ bytes where the record says \d+",
    ),
    "a shard gone": (
        lambda d: (d / "layer_3_batch_000003.pkl").unlink(),
        r"part 000003_001: layer_3_batch_000003\.pkl is missing",
    ),
    "a sidecar": (
        lambda d: change_byte(d / "_run/parts/000002_001.safetensors", -9),
        r"part 000002_001: sidecar _run/parts/000002_001\.safetensors is changed: it does not match its checksum",
    ),
    "a record": (
        lambda d: (d / "_run/commits/000003_001.json").write_text("{"),
        r"commit record .*000003_001\.json is damaged",
    ),
    "a foreign record": (
        lambda d: edit(d / "_run/commits/000003_001.json", run="0" * 32),
        r"000003_001\.json is damaged \(it belongs to another run",
    ),
    "a part of the plan": (
        lambda d: edit_plan(d, lambda parts: [{**parts[0], "slabs": "x"}, *parts[1:]]),
        r"part 000001_001: what its record, its sidecar or the plan says is damaged",
    ),
    "the plan": (
        lambda d: (d / "_run/plan/000000.json").write_text("[]"),
        r"_run/plan/000000\.json cannot be read",
    ),
}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_plan(directory: Path, change: Callable[[list[Any]], list[Any]]) -> None:
    path = directory / "_run/plan/000000.json"
    edit(path, parts=change(json.loads(path.read_text())["parts"]))


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_and_the_rest_is_verified_all_the_same(copy: Callable[..., Path], what: str) -> None:
    directory = copy()
    damage, sentence = DAMAGE[what]
    damage(directory)
    verdict = verified(directory, samples=2)
    assert (verdict.verdict, verdict.exit_status) == ("damaged", 1)
    [told] = verdict.damaged
    assert re.search(sentence, told), told
    assert verdict.samples and all(site.ok for site in verdict.sites)
    assert json.loads((directory / VERIFICATION_FILE).read_text())["damaged"] == [told]


def test_every_damaged_thing_of_a_part_is_named(copy: Callable[..., Path]) -> None:
    directory = copy()
    for name in ("layer_1_batch_000002.pkl", "layer_3_batch_000002.pkl", "layer_3_batch_000001.pkl"):
        change_byte(directory / name, 300)
    told = " ".join(verified(directory, samples=1).damaged)
    assert all(name in told for name in ("layer_1_batch_000002", "layer_3_batch_000002", "layer_3_batch_000001"))


def test_files_are_read_in_pieces_and_the_damaged_block_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = write_jsonl(tmp_path / "in.jsonl", [1_000] * 6)
    run_here(model, tasks, tmp_path / "a", layers_to_extract=(0,), hook_points=("ffn_up",), positions="all")
    monkeypatch.setattr(integrity, "_CHUNK", 100_003)  # no piece begins or ends where a block does
    assert verified(tmp_path / "a", samples=1).read["blocks"] == 2
    change_byte(tmp_path / "a/layer_0_ffn_up_batch_000001.pkl", (1 << 20) + 5_000)
    [told] = verified(tmp_path / "a", samples=1).damaged
    assert "block 1 of its array" in told


def _twice(content: PartContent) -> PartContent:
    indices = content.sample_indices.copy()
    indices[0] = next(index for index in range(len(indices) + 1) if index not in indices)
    return dataclasses.replace(content, sample_indices=indices)


def _other_tokens(content: PartContent) -> PartContent:
    changed = content.token_ids[0].copy()
    changed[2] += 1
    return dataclasses.replace(content, token_ids=(changed, *content.token_ids[1:]))


def _other_positions(content: PartContent) -> PartContent:
    return dataclasses.replace(content, positions=(content.positions[0] - 1, *content.positions[1:]))


@pytest.mark.parametrize(
    ("change", "sentences"),
    [
        (
            _twice,
            [
                r"part 000001_001: its samples or their tokens are not those of the plan",
                r"sample \d of the input .* again",
            ],
        ),
        (_other_tokens, [r"part 000001_001: its samples or their tokens are not those of the plan"]),
        (_other_positions, [r"part 000001_001: the positions of sample 's\d+' are not last"]),
        (lambda content: dataclasses.replace(content, parts_in_batch=2), [r"says parts_in_batch 2 .* record 1"]),
    ],
    ids=["twice", "tokens", "positions", "counts"],
)
def test_a_sidecar_with_right_checksums_is_held_against_plan_and_record(
    copy: Callable[..., Path], change: Any, sentences: list[str]
) -> None:
    directory = copy()
    make_right(directory, change=change)
    told = verified(directory, samples=1).damaged
    assert len(told) == len(sentences)
    for sentence, said in zip(sentences, told, strict=True):
        assert re.search(sentence, said), said


# ---------------------------------------------------------------------------- what is damaged is given up


def given_up(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    """What is gone; of the rest only metadata.json may be another."""
    assert all(after[name] == before[name] for name in after if name != "metadata.json")
    return set(before) - set(after)


def files_of_part(directory: Path, batch: int) -> set[str]:
    shards = {path.name for path in directory.glob(f"layer_*_batch_{batch:06d}.*")}
    name = f"{batch:06d}_001"
    return {*shards, f"_run/parts/{name}.safetensors", f"_run/commits/{name}.json"}


@pytest.mark.parametrize("what", ["a row", "a shard's head", "a sidecar", "a shard gone", "a record"])
def test_verify_names_the_command_that_gives_a_damaged_part_up_and_it_is_computed_again_byte_for_byte(
    copy: Callable[..., Path], model: Path, tasks: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    directory = copy()
    whole, batch = snapshot(directory), int(re.search(r"00000(\d)_001", DAMAGE[what][1])[1])  # type: ignore[index]
    expected = files_of_part(directory, batch)
    DAMAGE[what][0](directory)
    assert verify_command(VerifyConfig(str(directory), samples=1)) == 1
    said = re.search(r"jax-extract (sweep .* --damaged)", capsys.readouterr().out)
    assert said and said[1] == f"sweep {directory} --damaged"
    before = snapshot(directory)

    assert main([*said[1].split(), "--dry_run"]) == 0
    dry = capsys.readouterr().out
    assert snapshot(directory) == before
    assert main(said[1].split()) == 0
    out = capsys.readouterr().out
    gone = given_up(before, snapshot(directory))
    assert gone == {*expected & set(before), VERIFICATION_FILE}
    for words in (dry, out):
        assert {line.split()[0] for line in words.splitlines() if line.endswith((" kB", " bytes"))} == gone
        size = sum(len(before[name]) for name in gone)
        assert f"{len(gone)} files, {bytes_text(size)}, 1 part of the run among them" in words

    metadata = run_here(model, tasks, directory, layers_to_extract=LAYERS, batch_size=4)
    assert [session["parts"] for session in metadata["sessions"]] in ([1, 3], [3, 1])
    told = ("metadata.json", "_run/config.yaml", "_run/sessions", "_run/commits")  # which say when and by whom
    rows, again = (
        {name: data for name, data in files.items() if not name.startswith(told)}
        for files in (whole, snapshot(directory))
    )
    assert again == rows
    assert main(["sweep", str(directory), "--damaged"]) == 0
    assert "0 files, 0 bytes, removed" in capsys.readouterr().out


def test_a_plan_that_is_damaged_costs_no_part_that_is_whole(copy: Callable[..., Path]) -> None:
    directory = copy()
    DAMAGE["a part of the plan"][0](directory)
    before = snapshot(directory)
    assert main(["sweep", str(directory), "--damaged"]) == 0
    assert not given_up(before, snapshot(directory))


def test_what_cannot_be_read_or_was_damaged_on_its_way_is_not_given_up(
    copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = copy()
    before, read_into, seen = snapshot(directory), Directory.read_into, set()

    def fails(self: Directory, name: str, offset: int, buffer: memoryview, generation: int | None = None) -> int:
        if name == "layer_1_batch_000002.pkl":
            raise PermissionError(13, "Permission denied")
        got = read_into(self, name, offset, buffer, generation)
        if name == "layer_3_batch_000003.pkl" and name not in seen:
            seen.add(name)
            buffer[0] ^= 1
        return got

    monkeypatch.setattr(Directory, "read_into", fails)
    assert main(["sweep", str(directory), "--damaged"]) == 1
    out = capsys.readouterr().out
    assert "not judged: layer_1_batch_000002.pkl cannot be read (Permission denied)" in out
    assert seen and "layer_3" not in out
    assert not given_up(before, snapshot(directory))


# --------------------------------------------------------------------- what only a recomputation can notice


def test_swapped_rows_with_right_checksums_are_noticed_by_recomputing(copy: Callable[..., Path]) -> None:
    directory = copy()
    one, other = (rows_on_disk(directory, f"layer_{layer}_batch_000001.pkl", np.float32) for layer in LAYERS)
    one[:], other[:] = other.copy(), one.copy()
    one.flush()
    other.flush()
    make_right(directory)
    verdict = verified(directory, samples=3)
    assert (verdict.verdict, verdict.exit_status, verdict.damaged) == ("out of bounds", 1, [])
    assert out_of_bounds(verdict) == ["after_block of layer 1", "after_block of layer 3"]


def test_one_value_of_one_row_beyond_the_bound_is_noticed(copy: Callable[..., Path]) -> None:
    directory = copy()
    rows = rows_on_disk(directory, "layer_3_batch_000001.pkl", np.float32)
    rows[0, 5] += 2e-5 * np.linalg.norm(rows[0])  # of the longest sample, which is always computed again
    rows.flush()
    make_right(directory)
    verdict = verified(directory, samples=1)
    assert out_of_bounds(verdict) == ["after_block of layer 3"]
    assert 1e-5 < verdict.sites[1].worst < 3e-5


@pytest.mark.parametrize(("name", "dtype"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
def test_of_16_stored_bits_one_unit_in_the_last_place_is_noticed(
    copy: Callable[..., Path], name: str, dtype: Any
) -> None:
    directory = copy(capture_dtype=name, hook_points=("after_block", "ffn_hidden"), positions="all")
    good = verified(directory, samples=3)
    assert good.verdict == "verified"
    assert all(site.worst < 1e-6 < site.worst_as_stored < 4e-3 for site in good.sites), "rounding is not explained"
    rows = rows_on_disk(directory, "layer_3_batch_000001.pkl", dtype)
    rows[0] = np.nextafter(rows[0], dtype(np.inf))
    rows.flush()
    make_right(directory)
    assert out_of_bounds(verified(directory, samples=1)) == ["after_block of layer 3"]


def test_a_bfloat16_run_is_no_further_than_hugging_face_in_bfloat16(copy: Callable[..., Path]) -> None:
    options = {"dtype": "bfloat16", "positions": "all", "hook_points": ("after_block", "ffn_hidden", "embeddings")}
    directory = copy(**options)
    good = verified(directory, samples=4)
    assert (good.verdict, good.reference["judged_by"]) == ("verified", "Hugging Face transformers in bfloat16")
    assert good.reference["name"] == "Hugging Face transformers in float32 on weights rounded to bfloat16"
    for site in good.sites[1:]:
        assert site.median_bound is not None and site.bound is not None
        assert 1e-4 < site.median < site.median_bound < site.bound < 0.1
    rows = rows_on_disk(directory, "layer_1_batch_000001.pkl", np.float32)
    rows *= np.random.default_rng(0).normal(1, 0.02, rows.shape)
    rows.flush()
    make_right(directory)
    worse = verified(directory, samples=4)
    assert (worse.verdict, out_of_bounds(worse)) == ("out of bounds", ["after_block of layer 1"])


@pytest.mark.usefixtures("without_torch")
def test_a_bfloat16_run_is_not_judged_without_hugging_face_and_that_is_said(
    make: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"dtype": "bfloat16", "positions": "all", "hook_points": ("after_block", "ffn_hidden", "embeddings")}
    verdict = verify(str(make(**options)), samples=2)
    assert [site.ok for site in verdict.sites] == [None] * len(verdict.sites)
    assert all(site.bound is None and site.worst < 0.1 for site in verdict.sites)
    assert any("told and not judged" in note for note in verdict.notes)
    assert "not judged" in capsys.readouterr().out.splitlines()[-1]


# ------------------------------------------------------------------------------------ runs and their models


def test_a_run_that_lacks_a_record_is_unfinished_and_what_is_there_is_verified(
    copy: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = copy()
    (directory / "_run/commits/000002_001.json").unlink()
    verdict = verified(directory, samples=8)
    assert (verdict.verdict, verdict.exit_status, verdict.damaged) == ("unfinished", 0, [])
    assert verdict.missing == ["1 of 3 parts with 4 samples: 000002_001"]
    assert {sample["part"] for sample in verdict.samples} == {"000001_001", "000003_001"}
    for name in ("000001_001", "000003_001"):
        (directory / f"_run/commits/{name}.json").unlink()
    nothing = verify(str(directory))
    assert "verdict  unfinished: parts are still to be computed" in capsys.readouterr().out
    assert (nothing.verdict, nothing.samples, nothing.sites) == ("unfinished", [], [])


def test_an_input_that_is_not_planned_to_its_end_is_unfinished(copy: Callable[..., Path]) -> None:
    directory = copy()
    edit(directory / "_run/plan/000000.json", last=False)
    verdict = verified(directory, samples=1)
    assert (verdict.verdict, verdict.missing) == ("unfinished", ["the input is not planned to its end yet"])
    (directory / "_run/plan/000000.json").unlink()  # as in a directory from which parts are uploaded
    verdict = verified(directory, samples=1)
    assert (verdict.verdict, verdict.damaged) == ("unfinished", [])
    assert "no plan is stored here" in verdict.missing[0]


def test_a_plan_that_lost_a_part_with_its_record_is_damaged_and_not_finished(copy: Callable[..., Path]) -> None:
    directory = copy()
    edit_plan(directory, lambda parts: parts[:-1])
    (directory / "_run/commits/000003_001.json").unlink()
    verdict = verified(directory, samples=1)
    assert verdict.verdict == "damaged"
    assert "it names other samples than the input had" in verdict.damaged[0]


def test_other_weights_are_refused_and_moved_ones_are_found(
    copy: Callable[..., Path], model: Path, tmp_path: Path
) -> None:
    directory = copy()
    other = make_model(tmp_path / "other", layers=4, seed=1)
    with pytest.raises(UserError, match=r"weights of .*other are sha256:.* those of the run sha256:.*--model_path"):
        verified(directory, model_path=str(other))
    moved = shutil.copytree(model, tmp_path / "moved")
    edit(directory / "_run/run.json", description={"model_path": str(tmp_path / "gone"), "model_revision": None})
    with pytest.raises(UserError, match=r"gone' was not found.*say where it is now with --model_path"):
        verified(directory)
    assert not (directory / VERIFICATION_FILE).exists()
    assert verified(directory, samples=1, model_path=str(moved)).reference["model"] == str(moved)


def test_what_cannot_be_verified_is_refused_in_one_sentence(copy: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        verified(tmp_path / "nothing")
    with pytest.raises(UserError, match="--samples 0 must be at least 1"):
        verified(copy(), samples=0)


@pytest.mark.parametrize(("verb", "name"), [("read", "_run/parts/"), ("read_into", "layer_3")])
def test_trouble_with_the_place_is_told_and_is_no_damage(
    copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, verb: str, name: str
) -> None:
    directory = copy()
    works = getattr(Directory, verb)

    def fails(self: Directory, asked: str, *words: Any, **named: Any) -> Any:
        if asked.startswith(name):
            raise UserError("the network is gone")
        return works(self, asked, *words, **named)

    monkeypatch.setattr(Directory, verb, fails)
    with pytest.raises(UserError, match="the network is gone"):
        verified(directory)
    assert not (directory / VERIFICATION_FILE).exists()


@pytest.mark.parametrize(("count", "expected"), [(1, 2), (2, 2), (5, 5), (16, 10)])
def test_the_longest_and_the_shortest_sample_are_always_computed_again(
    make: Callable[..., Path], count: int, expected: int
) -> None:
    verdict = verified(make(), samples=count, seed=count)
    tokens = sorted(sample["tokens"] for sample in verdict.samples)
    assert (tokens[0], tokens[-1], len(tokens)) == (min(LENGTHS), max(LENGTHS), expected)
    assert len({sample["sample_id"] for sample in verdict.samples}) == expected
    if count > 2:
        assert {sample["part"] for sample in verdict.samples} == {f"00000{i}_001" for i in (1, 2, 3)}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with running() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        server.make_bucket("verified")
        yield "gs://verified/runs/one"


def test_a_run_in_a_bucket_and_its_emptied_directory_are_verified_where_the_shards_are(
    copy: Callable[..., Path], bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = copy()
    assert upload(UploadConfig(str(directory), bucket, delete_local=True), Terminal(silent=True)) == 0
    assert not list(directory.glob("*.pkl"))
    here, there = verified(directory, samples=3), verified(bucket, samples=3)
    assert (here.verdict, there.verdict) == ("verified", "verified")
    assert [site.worst for site in here.sites] == [site.worst for site in there.sites]
    assert json.loads(open_storage(bucket).read(VERIFICATION_FILE))["place"] == bucket
    storage = open_storage(bucket)
    storage.replace("layer_1_batch_000001.pkl", b"x" * len(storage.read("layer_1_batch_000001.pkl")))
    capsys.readouterr()
    for place in (directory, bucket):  # wherever the part is looked at from, it is given up where it lies
        assert "layer_1_batch_000001.pkl" in verify(str(place), samples=1).damaged[0]
        assert f"jax-extract sweep {bucket} --damaged" in capsys.readouterr().out
    assert main(["sweep", str(bucket), "--damaged"]) == 0
    assert "it was uploaded to" in verify(str(directory), samples=1).damaged[0]
    assert f"jax-extract sweep {directory} --damaged" in capsys.readouterr().out
    assert main(["sweep", str(directory), "--damaged"]) == 0
    assert verified(directory, samples=1).missing == ["1 of 3 parts with 4 samples: 000001_001"]
    assert not (directory / "_run/uploaded/000001_001.json").exists()


# ------------------------------------------------------------------------------------------- row errors


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_the_rounding_interval_is_what_rounds_to_a_value_and_nothing_else(dtype: Any) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    every = every[~np.isnan(every.astype(np.float32))]
    low, high = rounding_interval(every)
    just = {np.float16: np.float64, ml_dtypes.bfloat16: np.float32}[dtype]  # ml_dtypes rounds from float32
    with np.errstate(over="ignore"):
        for edge, inside, outside in ((low, np.inf, -np.inf), (high, -np.inf, np.inf)):
            finite = np.isfinite(edge) & (np.abs(edge) < np.finfo(np.float32).max)
            near = edge[finite].astype(just)
            np.testing.assert_array_equal(np.nextafter(near, just(inside)).astype(dtype), every[finite])
            assert (np.nextafter(near, just(outside)).astype(dtype) != every[finite]).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_what_rounding_does_not_explain_is_no_more_than_the_error_before_it(dtype: Any) -> None:
    random = np.random.default_rng(0)
    truth = random.normal(size=(300, 64)) * 10.0 ** random.integers(-8, 2, (300, 1))  # subnormal in float16, too
    for size in (0.0, 1e-5, 1e-3, 1e-2):
        before = (truth * (1 + size * random.normal(size=truth.shape))).astype(np.float32)
        as_stored, unexplained = row_errors(before.astype(dtype), truth)
        error, _ = row_errors(before, truth)
        assert (unexplained <= error + 1e-15).all() and (unexplained <= as_stored).all()
    assert np.median(unexplained) > 1e-3, "an error of a hundredth is not explained away"


def test_row_errors_are_relative_absolute_where_the_truth_is_zero_and_never_lost_in_infinities() -> None:
    truth = np.array([[3.0, 4.0], [0.0, 0.0], [np.inf, 1.0], [1.0, 1.0], [1.0, np.nan]])
    stored = np.array([[3.0, 4.5], [0.0, 0.25], [np.inf, 1.0], [1.0, np.nan], [1.0, np.nan]], np.float32)
    np.testing.assert_allclose(row_errors(stored, truth)[0], [0.1, 0.25, 0, np.inf, 0])
    truth = np.array([[70_000.0, 1.0], [60_000.0, 1.0], [3e-8, 0.0], [-3e-8, 0.0]])
    stored = np.array([[np.inf, 1.0], [np.inf, 1.0], [6e-8, 0.0], [6e-8, 0.0]], np.float16)
    as_stored, unexplained = row_errors(stored, truth)
    assert np.isinf(as_stored[:2]).all()
    np.testing.assert_allclose(unexplained, [0, 5_520 / 60_000, 0, 2], rtol=0.01)  # 65,520 rounds to infinity


def test_beginnings_of_a_sample_give_the_rows_that_a_run_would_store_of_them() -> None:
    values = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    tokens = np.arange(9, dtype=np.int32)
    last = Wanted.of(tokens, np.array([8], np.int32), 4)
    np.testing.assert_array_equal(last.select(values), values[[8, *last.beginnings]])
    mean = Wanted.of(tokens, np.array([-1], np.int32), 4)
    expected = [values[: end + 1].mean(0, dtype=np.float64) for end in (8, *mean.beginnings)]
    np.testing.assert_allclose(mean.select(values), expected, rtol=1e-12)
    assert mean.beginnings.tolist() == [0, 2, 5, 8]
    rest = Wanted.of(tokens, np.array([-1], np.int32), 4, begins=3)
    expected = [values[3 : end + 1].mean(0, dtype=np.float64) for end in (8, *rest.beginnings)]
    np.testing.assert_allclose(rest.select(values), expected, rtol=1e-12)
    assert rest.beginnings.tolist() == [3, 4, 6, 8]


def test_a_site_is_judged_by_both_of_its_bounds() -> None:
    site = SiteVerdict("after_block", 1, 4, worst=3.0, median=2.0, worst_as_stored=3.0, bound=3.0, median_bound=2.0)
    assert site.ok
    assert dataclasses.replace(site, worst=3.1).ok is False
    assert dataclasses.replace(site, median=2.1).ok is False
    assert dataclasses.replace(site, bound=None).ok is None
