"""Shards open wherever NumPy is, 1.x or 2.x, with nothing of ours; and those written before this was so open still.

No other NumPy is installed here: what a file asks of the library that opens it is read from the file itself.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.lib import format as npy

from jax_extract.store import torch_file
from jax_extract.store.formats import DTYPES, ENCODERS, SUFFIXES, ShardHeader, load_shard, shard_bytes

# What a pickle of ours may name, with the reason why every Python that reads it has that.
OF_NUMPY = {("numpy", "ndarray")}  # public, under this name, in every NumPy there ever was; takes a dtype as text
OF_TORCH = {
    ("collections", "OrderedDict"),  # of Python
    ("torch._utils", "_rebuild_tensor_v2"),  # what torch.save itself has written since 0.4, and torch.load allows
    ("torch", "FloatStorage"),  # and so on: the names under which torch.save writes dtypes
    ("torch", "HalfStorage"),
    ("torch", "BFloat16Storage"),
    ("torch", "LongStorage"),
}
ROWS, WIDTH = 4, 5
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_layer = pytest.mark.parametrize("layer", [3, None])


class Memory:
    def __init__(self) -> None:
        self.content = bytearray()

    @property
    def size(self) -> int:
        return len(self.content)

    def write(self, data: Any) -> int:
        self.content += data
        return len(data)


def values(dtype: str) -> np.ndarray:
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return np.random.default_rng(0).normal(0, 3, (ROWS, WIDTH)).astype(kind)


def shard(shard_format: str, dtype: str, layer: int | None = 3) -> bytes:
    offsets = np.array([0, 1, ROWS], np.int64)
    header = ShardHeader(ROWS, WIDTH, dtype, "after_block", layer, ("a", "long naïve 例"), offsets)
    sink = Memory()
    encoder = ENCODERS[shard_format](sink, header)
    encoder.append(values(dtype).tobytes())
    encoder.finish()
    assert len(sink.content) == shard_bytes(shard_format, header)
    assert sink.content[encoder.offset :].startswith(values(dtype).tobytes())
    return bytes(sink.content)


def named(stream: bytes) -> set[tuple[str, str]]:
    """Everything that a pickle imports when it is loaded, read from its instructions."""
    found: set[tuple[str, str]] = set()
    memo: list[Any] = []
    last: list[Any] = [None, None]  # the texts put on the stack by the two instructions before
    for instruction, argument, _ in pickletools.genops(stream):
        assert instruction.name not in ("INST", "EXT1", "EXT2", "EXT4")  # would name things in other ways
        if instruction.name == "MEMOIZE":
            memo.append(last[-1])
            continue
        value = memo[argument] if instruction.name in ("BINGET", "LONG_BINGET") and memo else argument  # type: ignore[index]
        if instruction.name == "GLOBAL":
            module, name = str(argument).split(" ")
            found.add((module, name))
        elif instruction.name == "STACK_GLOBAL":
            assert all(isinstance(text, str) for text in last)
            found.add((last[0], last[1]))
            value = None
        last = [last[1], value]
    return found


@every_dtype
@every_layer
def test_a_pickle_names_nothing_that_only_some_versions_of_numpy_have(dtype: str, layer: int | None) -> None:
    assert named(shard("pickle", dtype, layer)) == OF_NUMPY


@every_dtype
def test_a_file_of_torch_names_what_every_torch_has_and_no_numpy(dtype: str) -> None:
    with zipfile.ZipFile(io.BytesIO(shard("pt", dtype))) as archive:
        assert named(archive.read("archive/data.pkl")) <= OF_TORCH


def test_so_does_a_file_of_an_adapters_matrices() -> None:
    file = io.BytesIO()
    torch_file.save(file, {"lora_A": np.ones((2, 3), np.float32), "module": "q_proj"})
    with zipfile.ZipFile(file) as archive:
        assert named(archive.read("archive/data.pkl")) <= OF_TORCH


@every_dtype
def test_an_npz_holds_plain_arrays_in_the_oldest_form_of_npy(dtype: str) -> None:
    with zipfile.ZipFile(io.BytesIO(shard("npz", dtype))) as archive:
        for name in archive.namelist():
            with archive.open(name) as member:
                assert npy.read_magic(member) == (1, 0)
                assert npy.read_array_header_1_0(member)[2].kind in "fiuU"


@every_dtype
@every_layer
def test_what_pickle_load_gives_can_be_written_to_is_aligned_and_has_plain_types(dtype: str, layer: int | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        content = pickle.loads(shard("pickle", dtype, layer))
    assert content["activations"].tobytes() == values(dtype).tobytes()
    assert {name: content[name].dtype.str for name in ("activations", "row_offsets", "sample_ids")} == {
        "activations": {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}[dtype],
        "row_offsets": "<i8",
        "sample_ids": "<U12",
    }
    assert content["sample_ids"].tolist() == ["a", "long naïve 例"]
    assert content["row_offsets"].tolist() == [0, 1, ROWS]
    assert (content["layer"], content["hook"], content["dtype"]) == (layer, "after_block", dtype)
    for name in ("activations", "row_offsets", "sample_ids"):
        assert content[name].flags.writeable and content[name].flags.aligned and content[name].flags.c_contiguous


@every_dtype
@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_shards_that_hold_numpys_own_pickles_of_any_version_are_read_still(
    tmp_path: Path, dtype: str, core: str
) -> None:
    rows = values(dtype)
    content = {
        "activations": rows.view(np.uint16) if dtype == "bfloat16" else rows,
        **{"layer": 3, "hook": "after_block", "dtype": dtype, "sample_ids": np.array(["a", "b"])},
        "row_offsets": np.array([0, 1, ROWS]),
    }
    stream = b"".join(  # without its frames, whose lengths another name would change
        piece for name, piece in _instructions(pickle.dumps(content, protocol=5)) if name != "FRAME"
    )
    own = next(module for module, name in named(stream) if name == "_frombuffer").encode()
    text = f"{core}.numeric".encode()
    path = tmp_path / "layer_3_batch_000001.pkl"
    path.write_bytes(stream.replace(bytes([0x8C, len(own)]) + own, bytes([0x8C, len(text)]) + text))
    found = load_shard(path)
    assert found["activations"].tobytes() == rows.tobytes() and found["sample_ids"].tolist() == ["a", "b"]


def _instructions(stream: bytes) -> list[tuple[str, bytes]]:
    starts = [(code.name, start) for code, _, start in pickletools.genops(stream)]
    ends = [*(start for _, start in starts[1:]), len(stream)]
    return [(name, stream[start or 0 : end]) for (name, start), end in zip(starts, ends, strict=True)]


@every_dtype
def test_load_shard_reads_what_pickle_load_reads(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / f"layer_3_batch_000001.{SUFFIXES['pickle']}"
    path.write_bytes(shard("pickle", dtype))
    found = load_shard(path)
    assert found["activations"].dtype == values(dtype).dtype
    np.testing.assert_array_equal(found["activations"], values(dtype))
    found["activations"][0, 0] = 1  # a copy of the file's bytes, as with pickle.load


def test_torch_reads_tensors_from_the_pt_form() -> None:
    content = torch.load(io.BytesIO(shard("pt", "bfloat16")), weights_only=True)
    assert content["activations"].dtype == torch.bfloat16 and content["activations"].shape == (ROWS, WIDTH)
