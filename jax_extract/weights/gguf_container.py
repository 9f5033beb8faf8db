"""The GGUF container: its header, its metadata and where its tensors lie.

In: a `.gguf` file, or one piece of several. Out: the files mapped into memory, a dictionary of metadata values and a
directory of stored tensors, both checked against the files' sizes. It knows nothing of models; `gguf` does. The
gguf package's own reader takes seconds over a vocabulary that most callers never look at.
"""

import mmap
import re
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from jax_extract.errors import UserError

GGUF_MAGIC_BYTES = b"GGUF"
GGUF_VERSIONS = (2, 3)

CONVERT_MEND = "download or convert the model again"

# As llama.cpp names the pieces of a model, and what each says of itself.
PIECE = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
PIECES, PIECE_NUMBER, TENSORS_OF_PIECES = "split.count", "split.no", "split.tensors.count"
MOST_NAMES = 8  # in a sentence

SCALAR_FORMATS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True)
class MetadataArray:
    """A metadata array left where it lies in the file: vocabularies are large and rarely needed."""

    kind: GGUFValueType
    count: int
    offset: int


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as stored: encoding, NumPy shape (rows first), and its bytes' place in the file, or in a piece."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    piece: int = 0


@dataclass(frozen=True)
class Container:
    """A model's GGUF file, or all its pieces.

    Attributes:
      pieces: the files, mapped; a `MetadataArray` lies in the first one.
      metadata: of the first piece, which has everything.
      tensors: by name, of all pieces.
    """

    pieces: tuple[memoryview, ...]
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def only_model(folder: Path) -> Path:
    """The GGUF model of a folder, by its first file; UserError that lists them where there are several."""
    whole = sorted(folder.glob("*.gguf"))
    found = [path for path in whole if not path.name.lower().startswith("mmproj")] or whole  # not what reads pictures
    models = {(piece[1], piece[3]) if (piece := PIECE.fullmatch(path.name)) else path: path for path in reversed(found)}
    if len(models) == 1:
        return next(iter(models.values()))
    names = [path.name for path in sorted(models.values())]
    shown = ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if names[MOST_NAMES:] else "")
    raise UserError(f"{folder} holds {len(names)} GGUF models ({shown}); give the file of one of them as --model_path")


def open_container(path: Path) -> Container:
    """All of a model; UserError where a piece of it is missing, or is another model's."""
    data = map_file(path)
    metadata, tensors = read_header(data, str(path))
    count = metadata.get(PIECES, 1)
    if count == 1:
        return Container((data,), metadata, tensors)
    named = PIECE.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise UserError(
            f"{path} is one of {count} pieces of a model; expected a name such as model-00001-of-{count:05d}.gguf, by "
            "which the others are found: name them so, or join them with llama.cpp's llama-gguf-split --merge."
        )
    paths = [path.with_name(f"{named[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    if missing := [piece.name for piece in paths if not piece.is_file()]:
        raise UserError(f"{path} is one of {count} pieces of a model and {missing[0]} is missing: download it too.")
    pieces: list[memoryview] = []
    merged: dict[str, StoredTensor] = {}
    for number, piece in enumerate(paths):
        pieces.append(map_file(piece))
        own, directory = read_header(pieces[-1], str(piece))
        if (own.get(PIECES), own.get(PIECE_NUMBER)) != (count, number):
            raise UserError(
                f"{piece} says that it is piece {own.get(PIECE_NUMBER)} of {own.get(PIECES)}, counted from 0; expected "
                f"{number} of {count}: {CONVERT_MEND}."
            )
        metadata = metadata if number else own
        for name, tensor in directory.items():
            merged[_new_name(name, merged, str(piece))] = replace(tensor, piece=number)
    expected = metadata.get(TENSORS_OF_PIECES, len(merged))
    if expected != len(merged):
        raise UserError(
            f"the {count} pieces of {path} hold {len(merged)} tensors; expected {expected}, as the first one says: "
            f"{CONVERT_MEND}."
        )
    return Container(tuple(pieces), metadata, merged)


def map_file(path: Path) -> memoryview:
    if not path.is_file():
        raise UserError(f"{path} is not a file; expected one .gguf file: check the path.")
    with path.open("rb") as file:
        magic = file.read(len(GGUF_MAGIC_BYTES))
        if magic != GGUF_MAGIC_BYTES:
            raise UserError(
                f"{path} begins with {magic!r}, so it is not a GGUF file; expected {GGUF_MAGIC_BYTES!r}: "
                "give a .gguf file, or the folder where the model is in safetensors."
            )
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class _Cursor:
    """Reads little-endian header fields in turn; running over the end means a truncated file."""

    def __init__(self, data: memoryview, source: str) -> None:
        self.data = data
        self.source = source
        self.offset = 0

    def skip(self, nbytes: int) -> int:
        """Step over `nbytes` and return where they began."""
        start = self.offset
        if start + nbytes > len(self.data):
            raise _truncated(self.source, start + nbytes, len(self.data))
        self.offset = start + nbytes
        return start

    def scalar(self, layout: str) -> Any:
        return struct.unpack_from(layout, self.data, self.skip(struct.calcsize(layout)))[0]

    def string(self) -> str:
        length = self.scalar("<Q")
        start = self.skip(length)
        return _text(self.data[start : start + length], self.source)

    def value(self, kind: GGUFValueType) -> Any:
        """A scalar or a string, or a `MetadataArray` that says where the elements are."""
        if kind is GGUFValueType.STRING:
            return self.string()
        if kind is not GGUFValueType.ARRAY:
            return self.scalar(SCALAR_FORMATS[kind])
        element = self.value_kind()
        count = self.scalar("<Q")
        array = MetadataArray(element, count, self.offset)
        if element is GGUFValueType.STRING:
            for _ in range(count):
                self.skip(self.scalar("<Q"))
        elif element is GGUFValueType.ARRAY:
            raise UserError(f"{self.source} holds a metadata array of arrays; expected flat arrays: {CONVERT_MEND}.")
        else:
            self.skip(count * struct.calcsize(SCALAR_FORMATS[element]))
        return array

    def value_kind(self) -> GGUFValueType:
        number = self.scalar("<I")
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise UserError(
                f"{self.source} holds metadata of type {number}; expected one of GGUF's types 0 to "
                f"{max(GGUFValueType).value}: the file is damaged, {CONVERT_MEND}."
            ) from error


def _truncated(source: str, needed: int, size: int) -> UserError:
    return UserError(
        f"{source} is truncated or damaged: it has {size:,} bytes; expected at least {needed:,} "
        "from its header: download or copy it again."
    )


def _text(raw: memoryview, source: str) -> str:
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source} holds metadata text {bytes(raw[:40])!r}; expected UTF-8: the file is damaged, {CONVERT_MEND}."
        ) from error


def decode(data: memoryview, value: Any) -> Any:
    """A metadata value as plain Python: arrays become lists, everything else is already plain."""
    if not isinstance(value, MetadataArray):
        return value
    if value.kind is not GGUFValueType.STRING:
        return np.frombuffer(data, SCALAR_FORMATS[value.kind], value.count, value.offset).tolist()
    cursor = _Cursor(data, "the GGUF file")
    cursor.offset = value.offset
    return [cursor.string() for _ in range(value.count)]


def read_header(data: memoryview, source: str) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Metadata and tensor directory of a GGUF file (layout: docs/gguf.md of the ggml project)."""
    cursor = _Cursor(data, source)
    cursor.skip(len(GGUF_MAGIC_BYTES))
    version = cursor.scalar("<I")
    if version not in GGUF_VERSIONS:
        raise UserError(
            f"{source} has GGUF version {version:#x}; expected version 2 or 3, little-endian: "
            "convert the model again with a current llama.cpp."
        )
    tensor_count, metadata_count = cursor.scalar("<Q"), cursor.scalar("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = _new_name(cursor.string(), metadata, source)
        metadata[key] = cursor.value(cursor.value_kind())
    relative: dict[str, StoredTensor] = {}
    for _ in range(tensor_count):
        name = _new_name(cursor.string(), relative, source)
        relative[name] = _directory_entry(cursor, name)
    alignment = integer(metadata, "general.alignment", source, GGUF_DEFAULT_ALIGNMENT)
    data_start = -(-cursor.offset // alignment) * alignment
    needed = data_start + max((tensor.offset + tensor.nbytes for tensor in relative.values()), default=0)
    if needed > len(data):
        raise _truncated(source, needed, len(data))
    return metadata, {name: replace(tensor, offset=data_start + tensor.offset) for name, tensor in relative.items()}


def _new_name(name: str, seen: Collection[str], source: str) -> str:
    if name in seen:
        raise UserError(f"{source} holds {name!r} twice; expected it once: {CONVERT_MEND}.")
    return name


def _directory_entry(cursor: _Cursor, name: str) -> StoredTensor:
    """What follows a tensor's name; the offset is still relative to the start of the data."""
    dimensions = [cursor.scalar("<Q") for _ in range(cursor.scalar("<I"))]
    # GGML counts the fastest-moving dimension first, NumPy last.
    shape = tuple(reversed(dimensions))
    number = cursor.scalar("<I")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise UserError(
            f"Tensor {name!r} of {cursor.source} has encoding number {number}; expected one that the "
            "installed gguf package knows: upgrade gguf, or take a file in a common encoding such as Q8_0."
        ) from error
    block_elements, block_bytes = GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block_elements:
        raise UserError(
            f"Tensor {name!r} of {cursor.source} has shape {shape}; expected rows of whole {kind.name} "
            f"blocks of {block_elements}: the file is damaged, {CONVERT_MEND}."
        )
    nbytes = prod(shape) // block_elements * block_bytes
    return StoredTensor(kind, shape, cursor.scalar("<Q"), nbytes)


def integer(metadata: Mapping[str, Any], key: str, source: str, default: int | None = None) -> int:
    value = metadata.get(key, default)
    # Some models store a list with one entry a layer: no single config value stands for it.
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        shown = "a list" if isinstance(value, MetadataArray) else repr(value)
        raise UserError(f"{source} has {shown} for {key}; expected one positive integer: {CONVERT_MEND}.")
    return value
