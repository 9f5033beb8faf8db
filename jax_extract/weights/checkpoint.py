"""A model on disk, whatever its files: the interface, and what reads safetensors.

In: paths of safetensors files. Out: tensors by their names, read from disk only when asked for, row ranges only; and
`Checkpoint`, which adds the configuration, the tokenizer and a digest. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jax_extract.errors import UserError

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class Checkpoint(Protocol):
    """A model on disk."""

    @property
    def source(self) -> str:
        """As the user named it."""
        ...

    @property
    def revision(self) -> str | None:
        """Commit on the hub, where it came from there."""
        ...

    @property
    def adapter(self) -> str | None:
        """What is merged into it, as the user named it."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """config.json, or what it would be."""
        ...

    @property
    def generation(self) -> dict[str, Any]:
        """generation_config.json; empty where there is none."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """To the user, about which of its files are read."""
        ...

    def names(self) -> frozenset[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that is to be read; UserError where it is stored in a dtype that is not understood."""
        ...

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Rows of one tensor in the dtype it is stored in (quantised ones as float32)."""
        ...

    def digest(self, names: Iterable[str]) -> str:
        """`sha256:…` over names, dtypes, shapes and stored bytes of these tensors, sorted by name."""
        ...

    def tokenizer(self) -> Any:
        """A transformers tokenizer."""
        ...


def is_hub_id(text: str) -> bool:
    """Whether it is spelled OWNER/NAME."""
    return bool(_HUB_ID.fullmatch(text))


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: dtype as safetensors names it, offset in bytes from the start of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFiles:
    """The tensors of one or several files in a folder.

    Any dtype may be in them that safetensors has; only a tensor that is read must have one that is understood.
    """

    def __init__(self, paths: Iterable[Path], of_one_save: bool = False) -> None:
        """With `of_one_save` a tensor may be in several files, and the last one counts."""
        self._tensors: dict[str, _Stored] = {}
        for path in paths:
            stored = _read_header(path)
            if twice := sorted(stored.keys() & self._tensors.keys()) if not of_one_save else ():
                raise UserError(
                    f"tensor {twice[0]!r} is in two files of {path.parent}, {self._tensors[twice[0]].path.name} and "
                    f"{path.name}; keep one set of weights there"
                )
            self._tensors |= stored

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        self._numpy_dtype(name)
        return self._tensors[name].shape

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        # Read, not mapped: mapped pages would stay in the process beside the parameters made of them.
        stored, dtype = self._tensors[name], self._numpy_dtype(name)
        length, *rest = stored.shape or (1,)
        start, stop, _ = rows.indices(length)
        row_values = int(np.prod(rest, dtype=np.int64))
        values = np.fromfile(
            stored.path,
            dtype,
            count=(stop - start) * row_values,
            offset=stored.offset + start * row_values * dtype.itemsize,
        )
        return values.reshape(stop - start, *rest) if stored.shape else values.reshape(())

    def digest(self, names: Iterable[str]) -> str:
        total = hashlib.sha256()
        for name in sorted(names):
            stored = self._tensors[name]
            total.update(f"{name} {stored.dtype} {list(stored.shape)}\n".encode())
            total.update(np.fromfile(stored.path, np.uint8, stored.nbytes, offset=stored.offset).data)
        return f"sha256:{total.hexdigest()}"

    def _numpy_dtype(self, name: str) -> np.dtype:
        stored = self._tensors[name]
        if stored.dtype not in _DTYPES:
            raise UserError(
                f"tensor {name!r} in {stored.path} is stored as {stored.dtype}, which is not understood; "
                f"convert the weights to one of {', '.join(_DTYPES)}"
            )
        return np.dtype(_DTYPES[stored.dtype])


def folder_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, as transformers makes it; UserError where it cannot."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # without files it is made empty
            raise ValueError("it has no vocabulary")
        return tokenizer
    except Exception as error:  # noqa: BLE001 (every tokenizer class fails in its own way)
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"no usable tokenizer in {folder} ({first_line}); add its tokenizer.json") from None


def _read_header(path: Path) -> dict[str, _Stored]:
    """The tensors of one file; the library checks that the file is whole, the header says where they lie."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
            if start == _LFS_POINTER:
                raise UserError(f"{path} is a Git LFS pointer in place of the weights; fetch them with git lfs pull")
            size = int.from_bytes(start[:8], "little")
            with safe_open(path, framework="numpy"):
                file.seek(8)
                header: dict[str, Any] = json.loads(file.read(size))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"weights file {path} cannot be read ({error.strerror or error})") from None
    except (SafetensorError, ValueError) as error:
        raise UserError(
            f"weights file {path} cannot be read ({error}); it is truncated or damaged, download it again"
        ) from None
    header.pop("__metadata__", None)
    stored = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        stored[name] = _Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + size + first, last - first)
    return stored


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file of a model's folder holds; UserError where there is none."""
    if not path.is_file():
        raise UserError(f"{path.name} is missing from {path.parent}; a Hugging Face model folder has one")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}{line} is not valid JSON; download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; a Hugging Face file does")
    return value
