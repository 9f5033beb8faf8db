"""The pickle within a file of `torch.save`: written and read without torch, and nothing it names is ever called.

In: a dictionary of strings, numbers, lists and `Tensor`s whose bytes lie elsewhere in the file. Out: the pickle; and
from one, the dictionary with NumPy arrays. What else a pickle may hold is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

# dtype -> the class of torch that stands for its storage.
_STORAGES = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float64": "DoubleStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
}
_DTYPES = {storage: dtype for dtype, storage in _STORAGES.items()}
_REBUILD = ("torch._utils", "_rebuild_tensor_v2")
_PROTOCOL = 2  # as torch writes
_MOST_AXES, _MOST = 8, 2**48
# Instructions that set attributes of what stands for torch's functions here, or make objects in other ways.
_CHANGES_OBJECTS = frozenset("BUILD NEWOBJ NEWOBJ_EX OBJ INST EXT1 EXT2 EXT4 STACK_GLOBAL PERSID".split())


@dataclass(frozen=True)
class Tensor:
    """A contiguous tensor; its bytes are the member `data/{key}` of the file."""

    key: str
    dtype: str
    shape: tuple[int, ...]


def dumps(content: Mapping[str, Any]) -> bytes:
    """What torch's own pickler would write, up to its memo."""
    parts = [pickle.PROTO + bytes([_PROTOCOL]), pickle.EMPTY_DICT, pickle.MARK]
    for name, value in content.items():
        parts += [_plain(name), _tensor(value) if isinstance(value, Tensor) else _plain(value)]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def _plain(value: Any) -> bytes:
    """The pickle of a value without its first and last instruction."""
    return pickle.dumps(value, _PROTOCOL)[2:-1]


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tensor(tensor: Tensor) -> bytes:
    """rebuild(storage by its key, offset 0, shape, strides, requires no gradient, no hooks)."""
    count = math.prod(tensor.shape)
    strides = tuple(math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape)))
    storage = [
        *(pickle.MARK, _plain("storage"), _global("torch", _STORAGES[tensor.dtype])),
        *(_plain(tensor.key), _plain("cpu"), _plain(count), pickle.TUPLE, pickle.BINPERSID),
    ]
    hooks = [_global("collections", "OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE]
    given = [
        *storage,
        pickle.BININT + struct.pack("<i", 0),
        _plain(tensor.shape),
        _plain(strides),
        pickle.NEWFALSE,
        *hooks,
    ]
    return b"".join([_global(*_REBUILD), pickle.MARK, *given, pickle.TUPLE, pickle.REDUCE])


def loads(data: bytes, storage: Callable[[str], bytes]) -> dict[str, Any]:
    """The dictionary with arrays, bfloat16 as `ml_dtypes.bfloat16`; `storage` gives the bytes of a key.

    Raises:
      pickle.UnpicklingError: it holds something else.
    """
    for instruction, argument, _ in pickletools.genops(data):
        if instruction.name in _CHANGES_OBJECTS:
            raise pickle.UnpicklingError(f"it has the instruction {instruction.name}, which no plain array needs")
        if instruction.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise pickle.UnpicklingError("it remembers more than it holds")  # would take that much memory
    content = _Unpickler(data, storage).load()
    if not isinstance(content, dict):
        raise pickle.UnpicklingError("it does not hold a dictionary")
    return content


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, storage: Callable[[str], bytes]) -> None:
        super().__init__(io.BytesIO(data))
        self._storage = storage
        self._read: dict[str, bytes] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _Storage(_DTYPES[name])
        if (module, name) == _REBUILD:
            return _array
        if (module, name) == ("collections", "OrderedDict"):
            return _no_hooks
        raise pickle.UnpicklingError(f"it calls {module}.{name}")

    def persistent_load(self, pid: Any) -> np.ndarray:
        plain = isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"  # noqa: PLR2004 (as torch has them)
        if not plain or type(pid[1]) is not _Storage or not (isinstance(pid[2], str) and pid[2].isdecimal()):
            raise pickle.UnpicklingError("it refers to something that is no storage")
        key = pid[2]
        if key not in self._read:
            self._read[key] = self._storage(key)
        return np.frombuffer(self._read[key], pid[1].dtype)


class _Storage:
    """Stands for a storage class of torch."""

    def __init__(self, dtype: str) -> None:
        self.dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)


def _array(storage: object, offset: object, shape: object, strides: object, *_: object) -> np.ndarray:
    """Stands for torch's function that makes a tensor of a storage; contiguous ones only."""
    plain = isinstance(storage, np.ndarray) and type(offset) is int and isinstance(shape, tuple)
    if not plain or not all(type(n) is int and n >= 0 for n in (offset, *shape)):  # type: ignore[misc] (`plain`)
        raise pickle.UnpicklingError("it holds a tensor that is not plain")
    assert isinstance(storage, np.ndarray) and isinstance(offset, int) and isinstance(shape, tuple)
    if (
        len(shape) > _MOST_AXES
        or (0 not in shape and any(n > storage.size for n in shape))
        or max(shape, default=0) > _MOST
    ):
        raise pickle.UnpicklingError("it holds a tensor of a shape that its bytes cannot have")
    contiguous = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    count = math.prod(shape)
    if (strides != contiguous and count) or offset + count > storage.size:
        raise pickle.UnpicklingError("it holds a tensor that is not contiguous")
    return storage[offset : offset + count].reshape(shape)


def _no_hooks(*_: object) -> None:
    """Stands for the dictionary of a tensor's hooks, which is empty."""
