"""Shard files: plain libraries open them, equal content gives equal bytes, and a hostile file runs nothing."""

from __future__ import annotations

import builtins
import gc
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

from jax_extract.errors import UserError
from jax_extract.store.formats import DTYPES, ENCODERS, SUFFIXES, ShardHeader, load_shard
from jax_extract.store.ledger import Ledger
from jax_extract.store.parts import PartContent, Site
from jax_extract.store.reader import open_activations
from jax_extract.store.sidecar import Sidecar
from jax_extract.store.storage.local import Directory
from jax_extract.store.writer import PartWriter, RowPiece

SITE = Site("after_block", 3, 5)
FORMATS = tuple(ENCODERS)
every_format = pytest.mark.parametrize("shard_format", FORMATS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def _dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _values(rows: int, dtype: str) -> np.ndarray:
    return np.random.default_rng(1).normal(0, 3, (rows, SITE.width)).astype(_dtype(dtype))


def _write(root: Path, shard_format: str, dtype: str, lengths: tuple[int, ...] = (3, 1, 4), layer: bool = True) -> Path:
    """Writes one part whose samples have `lengths` rows, through the writer; returns the shard."""
    directory = Directory(root)
    directory.make()
    site = SITE if layer else Site("final_norm", None, 5)
    ledger = Ledger.start(
        directory,
        {
            "identity": {"sites": [{"hook": site.hook, "layer": site.layer, "width": 5}], "capture_dtype": dtype},
            "numerics": {},
            "description": {"model_name": "m", "hidden_dim": 5},
        },
    )
    writer = PartWriter(ledger, [site], shard_format, dtype, "abc")
    positions = tuple(np.arange(n, dtype=np.int32) for n in lengths)
    part = writer.begin(
        PartContent(
            batch=1,
            part=1,
            parts_in_batch=1,
            sample_indices=np.arange(len(lengths)),
            sample_ids=tuple(f"sample-é{i}" for i in range(len(lengths))),
            token_ids=positions,
            positions=positions,
            full_lengths=np.array(lengths, np.int64),
            meta=tuple({} for _ in lengths),
            plan="p",
        )
    )
    rows = iter(_values(sum(lengths), dtype))
    block = np.zeros((len(lengths) + 1, max(lengths), site.width), _dtype(dtype))  # with a dummy sample at the end
    for i, length in enumerate(lengths):
        for position in range(length):
            block[i, position] = next(rows)
    part.append({site.key: block}, [RowPiece(i, 0, n) for i, n in enumerate(lengths)], lambda: None)
    part.commit()
    writer.close()
    return root / site.shard_name(1, 1, 1, SUFFIXES[shard_format])


def _open_plainly(path: Path) -> dict[str, Any]:
    """With the format's own library and nothing of ours."""
    if path.suffix == ".pkl":
        with path.open("rb") as file:
            return pickle.load(file)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    if path.suffix == ".pt":
        plain = torch.load(path, weights_only=True)
        rows = plain["activations"]
        return {**plain, "activations": (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()}
    return safetensors.numpy.load_file(path)


@every_format
@every_dtype
def test_a_shard_opens_with_the_plain_library_and_with_load_shard_to_the_same_values(
    tmp_path: Path, shard_format: str, dtype: str
) -> None:
    path = _write(tmp_path, shard_format, dtype)
    expected = _values(8, dtype)
    plain = _open_plainly(path)
    assert plain["activations"].tobytes() == expected.tobytes()
    assert plain["activations"].shape == expected.shape
    if dtype != "bfloat16" or shard_format == "safetensors":
        assert plain["activations"].dtype == expected.dtype
    assert plain["row_offsets"].tolist() == [0, 3, 4, 8]
    shard = load_shard(path)
    assert shard["activations"].dtype == expected.dtype
    np.testing.assert_array_equal(shard["activations"], expected)
    assert (shard["layer"], shard["hook"], shard["dtype"]) == (3, "after_block", dtype)
    assert shard["sample_ids"].tolist() == ["sample-é0", "sample-é1", "sample-é2"]
    assert shard["row_offsets"].tolist() == [0, 3, 4, 8]


@every_format
def test_a_hook_point_without_a_layer_is_read_back_with_layer_none(tmp_path: Path, shard_format: str) -> None:
    shard = load_shard(_write(tmp_path, shard_format, "float32", layer=False))
    assert (shard["layer"], shard["hook"]) == (None, "final_norm")


@every_format
@every_dtype
def test_equal_content_gives_equal_bytes(tmp_path: Path, shard_format: str, dtype: str) -> None:
    first, second = (_write(tmp_path / name, shard_format, dtype) for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


@every_format
@every_dtype
def test_the_offset_in_the_sidecar_gives_the_array_by_a_plain_range_read(
    tmp_path: Path, shard_format: str, dtype: str
) -> None:
    path = _write(tmp_path, shard_format, dtype)
    record = next(iter(Ledger.open(Directory(tmp_path)).committed().values()))
    sidecar = Sidecar.read(Directory(tmp_path), record["sidecar"]["path"], record["sidecar"]["crc32c"])
    expected = _values(8, dtype)
    with path.open("rb") as file:
        file.seek(sidecar.arrays[0].offset)
        found = np.frombuffer(file.read(expected.nbytes), _dtype(dtype)).reshape(expected.shape)
    np.testing.assert_array_equal(found, expected)


@every_format
@every_dtype
def test_a_part_of_zero_rows_is_written_and_read(tmp_path: Path, shard_format: str, dtype: str) -> None:
    path = _write(tmp_path, shard_format, dtype, lengths=(0, 0))
    assert _open_plainly(path)["activations"].shape == (0, SITE.width)
    shard = load_shard(path)
    assert shard["activations"].shape == (0, SITE.width)
    assert shard["activations"].dtype == _dtype(dtype)
    assert shard["row_offsets"].tolist() == [0, 0, 0]
    assert open_activations(tmp_path).sample("sample-é1").get(layer=3).shape == (0, SITE.width)


class _Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return self._call


@pytest.mark.parametrize("depth", ["whole", "value", "key"])
@pytest.mark.parametrize("kind", ["system", "eval", "open", "tofile", "load"])
def test_a_malicious_pickle_is_refused_and_nothing_of_it_runs(tmp_path: Path, kind: str, depth: str) -> None:
    trace = tmp_path / "trace"
    call = {
        "system": _Call(os.system, f"touch {trace}"),
        "eval": _Call(builtins.eval, f"open({str(trace)!r}, 'w')"),
        "open": _Call(builtins.open, str(trace), "w"),
        "tofile": _Call(np.ndarray.tofile, np.zeros(1), str(trace)),
        "load": _Call(np.save, str(trace), np.zeros(1)),
    }[kind]
    arrays = {"activations": np.zeros((1, 2)), "row_offsets": np.array([0, 1])}
    content: Any = {"whole": call, "value": {**arrays, "layer": call}, "key": {call: 1}}[depth]
    path = tmp_path / "layer_3_batch_000001.pkl"
    path.write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(UserError, match="holds plain arrays and nothing else"):
        load_shard(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"layer": 1},
        "text",
        None,
        {"activations": [1.0], "row_offsets": [0, 1], "layer": 0, "hook": "", "dtype": ""},
    ],
)
def test_a_pickle_of_something_else_is_a_user_error(tmp_path: Path, content: object) -> None:
    path = tmp_path / "other.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"other\.pkl"):
        load_shard(path)


def _torch_zip(path: Path, content: bytes, **changes: Any) -> Path:
    """A file of torch whose pickle is `content`; changes are of the zip's entries."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"data.pkl": content, "data/0": bytes(64)}.items():
            entry = zipfile.ZipInfo(f"archive/{name}")
            for field, value in changes.items():
                setattr(entry, field, value)
            archive.writestr(entry, data)
    return path


def _tensor(shape: bytes) -> bytes:
    """The instructions of a tensor over the first 16 floats, its shape spelled so."""
    storage = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + storage + b"K\x00" + shape + b"(K\x01t\x89NtR"


_HOSTILE = {
    "it calls posix.system": pickle.dumps({"activations": _Call(os.system, "true")}, 2),
    "no plain array needs": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",
    "remembers more": b"\x80\x02}r\xff\xff\xff\x3f.",
    "sample ids are no list": b"\x80\x02}X\x0a\x00\x00\x00sample_ids]q\x00(h\x00h\x00es.",
    "its bytes cannot have": b"\x80\x02}X\x01\x00\x00\x00a" + _tensor(b"(J\xff\xff\xff\x7ft") + b"s.",
}


@pytest.mark.parametrize("said", _HOSTILE)
def test_a_hostile_file_of_torch_is_refused_and_nothing_of_it_runs(said: str, tmp_path: Path) -> None:
    path = _torch_zip(tmp_path / "layer_3.pt", _HOSTILE[said])
    with pytest.raises(UserError, match=said):
        load_shard(path)


def test_what_is_packed_small_is_not_unpacked(tmp_path: Path) -> None:
    path = _torch_zip(tmp_path / "layer_3.pt", pickle.dumps({}), compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="is compressed or encrypted"):
        load_shard(path)


@every_format
def test_whatever_bytes_are_damaged_it_is_told_or_makes_no_difference_to_the_form(
    tmp_path: Path, shard_format: str
) -> None:
    path = _write(tmp_path, shard_format, "float32")
    whole, random = path.read_bytes(), np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(whole)
        for at in random.integers(len(whole), size=3):
            damaged[at] = random.integers(256)
        path.write_bytes(damaged)
        try:
            shard = load_shard(path)
        except UserError:
            continue
        assert shard["activations"].ndim == 2


@pytest.mark.parametrize("shard_format", ["npz", "pt"])
def test_a_file_that_is_given_up_is_forgotten_in_silence(shard_format: str) -> None:
    header = ShardHeader(4, 2, "float32", "after_block", 3, ("a",), np.array([0, 4]))
    encoder = ENCODERS[shard_format](CountingSink(), header)
    encoder.append(bytes(8))
    encoder.abandon()
    del encoder
    gc.collect()  # a complaint would be an error of this test


class CountingSink:
    size = 0

    def write(self, data: Any) -> int:
        self.size += len(data)
        return len(data)


@every_format
def test_a_file_cut_anywhere_is_a_user_error_that_names_it(tmp_path: Path, shard_format: str) -> None:
    path = _write(tmp_path, shard_format, "float32")
    whole = path.read_bytes()
    cut = tmp_path / f"cut{path.suffix}"
    for size in (0, 1, 9, len(whole) // 4, len(whole) // 2, len(whole) * 3 // 4, len(whole) - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"cut{path.suffix}"):
            load_shard(cut)


def test_a_missing_file_and_a_strange_suffix_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_shard(tmp_path / "layer_1_batch_000001.pkl")
    (tmp_path / "layer.txt").write_text("x")
    with pytest.raises(UserError, match=r"'\.txt'"):
        load_shard(tmp_path / "layer.txt")
