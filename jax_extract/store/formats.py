"""The shard formats: pickle, npz, safetensors and torch's own, written as a stream and read by anyone.

In: a `ShardHeader` and then rows. Out: a file that plain `pickle.load`, `np.load`, safetensors or `torch.load` open,
and the byte offset at which its array lies, so that ranges of rows can be read without parsing.
The array's size is known before its first row, so nothing is held back in memory. docs/format.md
describes every byte.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Protocol

import ml_dtypes
import numpy as np
from numpy.lib import format as npy
from safetensors import SafetensorError, deserialize

from jax_extract.errors import UserError, damage_is_told
from jax_extract.store import torch_file, torch_pickle
from jax_extract.store.storage.opening import open_storage
from jax_extract.store.storage.verbs import BUCKET_SCHEME, Chunk

DTYPES = ("float32", "bfloat16", "float16")
_SAFETENSORS_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_NUMPY_TYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16, "I64": np.int64}
SUFFIXES = {"pickle": "pkl", "npz": "npz", "safetensors": "safetensors", "pt": "pt"}
_STORED_TEXT, _STORED_INT = np.dtype("<U"), np.dtype("<i8")
_ZIP_HEADER = 30  # bytes of a local header without name and extra fields
_ZIP64_EXTRA = 20
_PADDING_FIELD = 0x4246  # as torch marks its own
_ALIGNMENT = 64


class Sink(Protocol):
    """Where a shard's bytes go."""

    @property
    def size(self) -> int: ...

    def write(self, data: Chunk) -> int: ...


@dataclass(frozen=True)
class ShardHeader:
    """Everything in a shard but its rows.

    Attributes:
      rows, width: shape of `activations`.
      dtype: `float32` | `bfloat16` | `float16`.
      hook, layer: what the rows are; layer is None where the hook point has none.
      sample_ids: the samples, in row order.
      row_offsets: int64 [samples + 1]: sample i has rows row_offsets[i] to row_offsets[i + 1].
    """

    rows: int
    width: int
    dtype: str
    hook: str
    layer: int | None
    sample_ids: tuple[str, ...]
    row_offsets: np.ndarray

    @property
    def stored_dtype(self) -> np.dtype:
        """What NumPy sees: bfloat16 travels as its 16 bits where a format has no such type."""
        return np.dtype("<u2") if self.dtype == "bfloat16" else np.dtype(self.dtype).newbyteorder("<")

    @property
    def nbytes(self) -> int:
        return self.rows * self.width * self.stored_dtype.itemsize


class ShardEncoder(ABC):
    """Writes one shard: the constructor its head, `append` rows, `finish` its tail."""

    offset: int  # where the array's bytes start in the file

    def __init__(self, sink: Sink, header: ShardHeader) -> None:
        self._sink = sink
        self._header = header
        self._written = 0
        self._start()

    @abstractmethod
    def _start(self) -> None: ...

    def append(self, rows: Chunk) -> None:
        """The bytes of whole rows, C order, little-endian."""
        self._sink.write(rows)
        self._written += len(rows)

    def finish(self) -> None:
        """Completes the file; the rows appended must be exactly those announced."""
        if self._written != self._header.nbytes:
            raise AssertionError(f"shard announced {self._header.nbytes} bytes of rows but got {self._written}")
        self._finish()

    @abstractmethod
    def _finish(self) -> None: ...

    def abandon(self) -> None:  # noqa: B027 (most have nothing to give up)
        """The file will not be completed."""

    def leave_out_rows(self) -> None:
        """Stands for `append` where only the size of the rest is wanted."""
        self._written = self._header.nbytes


class _PickledArray:
    """An array that pickles as the call `numpy.ndarray(shape, dtype, bytearray)`.

    What NumPy itself writes names a module that only its own version has: `numpy._core` since 2.0, which 1.x lacks, and
    `numpy.core` before, of which 2.x warns. `numpy.ndarray` has been there always, and takes the dtype as text. Over a
    bytearray the array can be written to, and lies where the allocator puts things: at a multiple of 16 bytes.
    """

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __reduce__(self) -> tuple[Any, ...]:
        return np.ndarray, (self._array.shape, self._array.dtype.str, pickle.PickleBuffer(self._array.data))


class PickleEncoder(ShardEncoder):
    """A pickled dictionary of arrays, strings and numbers.

    Pickle protocol 5 can leave a buffer out of the stream; the array is left out and its bytes written
    where the stream refers to them, as the opcode for bytes that are in the stream. Frames, which may
    not contain them, are optional and taken out.
    """

    def _start(self) -> None:
        header = self._header
        array = np.empty((header.rows, header.width), header.stored_dtype)  # its memory is never touched
        content = {
            "activations": _PickledArray(array),
            "layer": header.layer,
            "hook": header.hook,
            "dtype": header.dtype,
            "sample_ids": _PickledArray(np.array(header.sample_ids, _STORED_TEXT)),
            "row_offsets": _PickledArray(np.array(header.row_offsets, _STORED_INT)),
        }
        is_array = iter([True])  # the first buffer that is met; later ones stay in the stream
        stream = pickle.dumps(content, protocol=5, buffer_callback=lambda _: not next(is_array, False))
        head, tail = io.BytesIO(), io.BytesIO()
        out = head
        operations = list(pickletools.genops(stream))
        for (code, _, start), end in zip(
            operations, [position for _, _, position in operations[1:]] + [len(stream)], strict=True
        ):
            assert start is not None
            if code.name == "NEXT_BUFFER":
                out.write(pickle.BYTEARRAY8 + struct.pack("<Q", header.nbytes))
                out = tail
            elif code.name != "FRAME":
                out.write(stream[start:end])
        self._sink.write(head.getvalue())
        self._tail = tail.getvalue()
        self.offset = self._sink.size

    def _finish(self) -> None:
        self._sink.write(self._tail)


class _ZipEncoder(ShardEncoder):
    """An uncompressed zip whose last member are the rows."""

    def __init__(self, sink: Sink, header: ShardHeader) -> None:
        self._zip = zipfile.ZipFile(_Unseekable(sink), "w", zipfile.ZIP_STORED)  # type: ignore[arg-type]
        self._member: Any = None
        super().__init__(sink, header)

    def append(self, rows: Chunk) -> None:
        self._member.write(rows)
        self._written += len(rows)

    def _finish(self) -> None:
        self._member.close()
        self._zip.close()

    def abandon(self) -> None:
        self._zip.fp = None  # else it would try to complete the file when it is forgotten, and complain


class NpzEncoder(_ZipEncoder):
    """An uncompressed npz: one member a value, `activations` last."""

    def _start(self) -> None:
        header = self._header
        members = {
            "layer": np.int64(-1 if header.layer is None else header.layer),
            "hook": np.str_(header.hook),
            "dtype": np.str_(header.dtype),
            "sample_ids": np.array(header.sample_ids, np.str_),
            "row_offsets": header.row_offsets,
        }
        for name, value in members.items():
            with self._zip.open(_member(name), "w") as member:
                npy.write_array(member, np.asarray(value), allow_pickle=False)
        self._member = self._zip.open(_member("activations"), "w", force_zip64=True)
        shape = {"descr": header.stored_dtype.str, "fortran_order": False, "shape": (header.rows, header.width)}
        npy.write_array_header_1_0(self._member, shape)
        self.offset = self._sink.size


class SafetensorsEncoder(ShardEncoder):
    """A safetensors file: `activations` and `row_offsets`; the rest is in its string metadata."""

    def _start(self) -> None:
        header = self._header
        offsets = header.row_offsets.astype("<i8")
        head = {
            "__metadata__": {
                "layer": "" if header.layer is None else str(header.layer),
                "hook": header.hook,
                "dtype": header.dtype,
                "sample_ids": json.dumps(header.sample_ids),
            },
            "activations": {
                "dtype": _SAFETENSORS_TYPES[header.dtype],
                "shape": [header.rows, header.width],
                "data_offsets": [0, header.nbytes],
            },
            "row_offsets": {
                "dtype": "I64",
                "shape": [len(offsets)],
                "data_offsets": [header.nbytes, header.nbytes + offsets.nbytes],
            },
        }
        text = json.dumps(head, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._sink.write(struct.pack("<Q", len(text)) + text)
        self._tail = offsets.tobytes()
        self.offset = self._sink.size

    def _finish(self) -> None:
        self._sink.write(self._tail)


class TorchEncoder(_ZipEncoder):
    """What `torch.save` makes of a dictionary of tensors, strings and numbers, written without torch.

    An uncompressed zip: `data.pkl` refers to the bytes of tensors, which are members of their own. The last one is
    `activations`, at a multiple of 64 bytes, so that `torch.load(…, mmap=True)` can use it where it lies.
    """

    def _start(self) -> None:
        header = self._header
        offsets = header.row_offsets.astype("<i8")
        content = {
            "activations": torch_pickle.Tensor("1", header.dtype, (header.rows, header.width)),
            "layer": header.layer,
            "hook": header.hook,
            "dtype": header.dtype,
            "sample_ids": list(header.sample_ids),
            "row_offsets": torch_pickle.Tensor("0", "int64", offsets.shape),
        }
        torch_file.head(self._zip, content)
        with self._zip.open(torch_file.member("data/0"), "w") as member:
            member.write(offsets.tobytes())
        last = torch_file.member("data/1")
        start = self._sink.size + _ZIP_HEADER + len(last.filename) + _ZIP64_EXTRA + len(_padding(0))
        last.extra = _padding(-start % _ALIGNMENT)
        self._member = self._zip.open(last, "w", force_zip64=True)
        self.offset = self._sink.size
        assert self.offset % _ALIGNMENT == 0


ENCODERS: dict[str, type[ShardEncoder]] = {
    "pickle": PickleEncoder,
    "npz": NpzEncoder,
    "safetensors": SafetensorsEncoder,
    "pt": TorchEncoder,
}


def shard_bytes(shard_format: str, header: ShardHeader) -> int:
    """The size of a shard; everything in it is made but its rows."""
    counter = _Counter()
    encoder = ENCODERS[shard_format](counter, header)
    encoder.leave_out_rows()
    encoder.finish()
    return counter.size + header.nbytes


class _Counter:
    """A sink of which only the size is wanted."""

    size = 0

    def write(self, data: Chunk) -> int:
        self.size += len(data)
        return len(data)


class _Unseekable(io.RawIOBase):
    """A sink as zipfile wants it. It cannot seek, so checksums follow the data and nothing is rewritten."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._sink.write(data)


def _member(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))  # equal content, equal bytes


def _padding(size: int) -> bytes:
    """A field of a zip header that means nothing, with so many bytes besides its own four."""
    return struct.pack("<HH", _PADDING_FIELD, size) + bytes(size)


# --------------------------------------------------------------------------------- reading one shard

_PLAIN_TYPE = re.compile(r"[<|]?([fiu][1248]|U\d{1,9})")


class _PlainType:
    """Stands for `numpy.dtype` while a shard is unpickled: numbers and strings only, and nothing to set.

    The real one can be made to take bytes for pointers to objects.
    """

    def __init__(self, text: object, *_: object) -> None:
        if not (isinstance(text, str) and _PLAIN_TYPE.fullmatch(text)):
            raise pickle.UnpicklingError(f"it holds values of type {text!r}")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: object) -> None:
        if not (isinstance(state, tuple) and state[:2] in ((3, "<"), (3, "|")) and state[2:5] == (None,) * 3):
            raise pickle.UnpicklingError("it changes a type")


def _plain_array(buffer: object, kind: object, shape: object, order: object, *_: object) -> np.ndarray:
    """Stands for NumPy's array constructor while a shard is unpickled."""
    plain = (
        isinstance(buffer, bytes | bytearray)
        and type(kind) is _PlainType
        and isinstance(shape, tuple)
        and all(type(n) is int and n >= 0 for n in shape)
        and order in ("C", "F")
    )
    if not plain:
        raise pickle.UnpicklingError("it holds an array that is not plain")
    return np.frombuffer(buffer, kind.dtype).reshape(shape, order=order)  # type: ignore[union-attr, arg-type]


def _array_over(shape: object, text: object, buffer: object) -> np.ndarray:
    """Stands for `numpy.ndarray` while a shard is unpickled."""
    return _plain_array(buffer, _PlainType(text), shape, "C")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles dictionaries of plain arrays, strings and numbers; nothing a pickle names is ever called.

    Shards from before `numpy.ndarray` was all that they named hold arrays as NumPy itself pickles them.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return _array_over
        if (module, name) == ("numpy", "dtype"):
            return _PlainType
        if name == "_frombuffer" and module in ("numpy.core.numeric", "numpy._core.numeric"):
            return _plain_array
        raise pickle.UnpicklingError(f"it calls {module}.{name}")


def load_shard(path: str | Path) -> dict[str, Any]:
    """Reads one shard of any format, on its own.

    Args:
      path: a file, or an object `gs://bucket/prefix/layer_10_batch_000001.pkl`.

    Returns:
      `activations` [rows, width] (bfloat16 as `ml_dtypes.bfloat16`), `layer` (None where there is none),
      `hook`, `dtype`, `sample_ids` (array of strings) and `row_offsets` int64 [samples + 1].

    Raises:
      UserError: it is missing, damaged, not a shard, or a pickle that holds more than plain arrays.
    """
    with open_shard(path) as file:
        return read_shard(file, path)


def open_shard(path: str | Path) -> BinaryIO:
    """A shard's bytes; an object is fetched whole. UserError where there is none."""
    missing = f"shard {path} does not exist; give a file such as layer_10_batch_000001.pkl"
    if str(path).startswith(BUCKET_SCHEME):
        place, _, name = str(path).rpartition("/")
        try:
            return io.BytesIO(open_storage(place).read(name))
        except FileNotFoundError:
            raise UserError(missing) from None
    if not Path(path).is_file():
        raise UserError(missing)
    return Path(path).open("rb")


def read_shard(file: BinaryIO, path: str | Path) -> dict[str, Any]:
    """As `load_shard`, of what `open_shard(path)` gave."""
    suffix = PurePath(path).suffix
    readers = {".pkl": _load_pickle, ".npz": _load_npz, ".safetensors": _load_safetensors, ".pt": _load_torch}
    if suffix not in readers:
        raise UserError(f"shard {path} has the suffix {suffix!r}; shards end in {', '.join(readers)}")
    try:
        with damage_is_told(f"shard {path}", "extract that batch again"):
            return _checked(readers[suffix](file))
    except (
        *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, EOFError, SafetensorError),
        *(NotImplementedError, RuntimeError),  # a zip of kinds that Python does not read, or that wants a password
    ) as error:
        raise UserError(
            f"shard {path} was not read ({error}); a shard holds plain arrays and nothing else: it is damaged, or none"
        ) from None


def _checked(shard: dict[str, Any]) -> dict[str, Any]:
    """The shard with its values as documented; raises where they do not belong together."""
    activations, row_offsets = shard["activations"], shard["row_offsets"]
    dtype, hook = str(shard["dtype"]), str(shard["hook"])
    if dtype == "bfloat16" and activations.dtype == np.uint16:
        activations = activations.view(ml_dtypes.bfloat16)
    if str(activations.dtype) != dtype or activations.ndim != 2:  # noqa: PLR2004 ([rows, width])
        raise ValueError("its activations are not what it says")
    ascending = row_offsets.dtype.kind == "i" and row_offsets[0] == 0 and (np.diff(row_offsets) >= 0).all()
    if not ascending or row_offsets[-1] != len(activations) or len(shard["sample_ids"]) != len(row_offsets) - 1:
        raise ValueError("its row offsets, samples and rows do not belong together")
    layer = None if shard["layer"] is None or int(shard["layer"]) < 0 else int(shard["layer"])
    return {**shard, "activations": activations, "layer": layer, "hook": hook, "dtype": dtype}


def _load_pickle(file: BinaryIO) -> dict[str, Any]:
    content = _ArrayUnpickler(file).load()
    if not isinstance(content, dict):
        raise ValueError("it does not hold a dictionary")
    return content


def _load_npz(file: BinaryIO) -> dict[str, Any]:
    with np.load(file, allow_pickle=False) as content:
        return {name: content[name] for name in content.files}


def _load_torch(file: BinaryIO) -> dict[str, Any]:
    content = torch_file.load(file)
    ids = content["sample_ids"]
    if not isinstance(ids, list) or not all(type(name) is str for name in ids):
        raise ValueError("its sample ids are no list of texts")
    return {**content, "sample_ids": np.array(content["sample_ids"], np.str_)}


def _load_safetensors(file: BinaryIO) -> dict[str, Any]:
    data = file.read()
    tensors = dict(deserialize(data))

    def array(name: str) -> np.ndarray:
        stored = tensors[name]
        return np.frombuffer(stored["data"], _NUMPY_TYPES[stored["dtype"]]).reshape(stored["shape"])

    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    return {
        "activations": array("activations"),
        "row_offsets": array("row_offsets"),
        "sample_ids": np.array(json.loads(metadata["sample_ids"]), np.str_),
        "layer": int(metadata["layer"]) if metadata["layer"] else None,
        "hook": metadata["hook"],
        "dtype": metadata["dtype"],
    }
