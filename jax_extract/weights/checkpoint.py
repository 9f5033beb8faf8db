"""Opens a model: a Hugging Face folder, a hub id or a GGUF file, all behind one interface.

In: `--model_path`. Out: a `Checkpoint` that gives the configuration, tensors by their Hugging Face
names (read from disk only when asked for, row ranges only), the tokenizer and a digest.
Safetensors and GGUF only: nothing is ever unpickled.
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

from jax_extract.errors import UserError, user_path

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}

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

    def names(self) -> frozenset[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Rows of one tensor in the dtype it is stored in (quantised ones as float32)."""
        ...

    def digest(self, names: Iterable[str]) -> str:
        """`sha256:…` over names, dtypes, shapes and stored bytes of these tensors, sorted by name."""
        ...

    def tokenizer(self) -> Any:
        """A transformers tokenizer."""
        ...


def open_checkpoint(model_path: str, revision: str | None = None) -> Checkpoint:
    """Finds out what `model_path` is; UserError where it is nothing that can be read."""
    path = user_path(model_path, "--model_path")
    if path.is_dir():
        if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
            raise UserError(f"{model_path} holds an adapter; give it as --adapter, and its base model as --model_path")
        if not (path / "config.json").exists() and len(ggufs := sorted(path.glob("*.gguf"))) == 1:
            path = ggufs[0]
        else:
            return SafetensorsCheckpoint(path, source=model_path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"model {model_path!r} is a file but not .gguf; give the folder that holds config.json")
        from jax_extract.weights.gguf import GgufCheckpoint

        return GgufCheckpoint(path)
    if is_hub_id(model_path):
        from jax_extract.weights.hub import download

        folder, commit = download(model_path, revision)
        return SafetensorsCheckpoint(folder, source=model_path, revision=commit)
    raise UserError(
        f"model {model_path!r} was not found; give a Hugging Face folder, a .gguf file, "
        "or a hub id of the form OWNER/NAME"
    )


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

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(_DTYPES[self.dtype])


class SafetensorsFiles:
    """The tensors of one or several files in a folder."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._tensors: dict[str, _Stored] = {}
        for path in paths:
            for name, stored in _read_header(path).items():
                if name in self._tensors:
                    raise UserError(f"tensor {name!r} is in two files of {path.parent}; keep one set of weights there")
                self._tensors[name] = stored

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        # Read, not mapped: mapped pages would stay in the process beside the parameters made of them.
        stored = self._tensors[name]
        start, stop, _ = rows.indices(stored.shape[0])
        row_values = int(np.prod(stored.shape[1:], dtype=np.int64))
        dtype = stored.numpy_dtype
        values = np.fromfile(
            stored.path,
            dtype,
            count=(stop - start) * row_values,
            offset=stored.offset + start * row_values * dtype.itemsize,
        )
        return values.reshape(stop - start, *stored.shape[1:])

    def digest(self, names: Iterable[str]) -> str:
        total = hashlib.sha256()
        for name in sorted(names):
            stored = self._tensors[name]
            total.update(f"{name} {stored.dtype} {list(stored.shape)}\n".encode())
            total.update(self.read(name).reshape(-1).view(np.uint8).data)
        return f"sha256:{total.hexdigest()}"


class SafetensorsCheckpoint(SafetensorsFiles):
    """A Hugging Face folder with config.json and one or several safetensors files."""

    adapter: str | None = None

    def __init__(self, folder: Path, source: str, revision: str | None = None) -> None:
        self.source = source
        self.revision = revision
        self._folder = folder
        self.config = read_json(folder / "config.json")
        said = folder / "generation_config.json"
        self.generation = read_json(said) if said.is_file() else {}
        super().__init__(_weight_files(folder))

    def tokenizer(self) -> Any:
        return folder_tokenizer(self._folder)


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
        with safe_open(path, framework="numpy"), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"weights file {path} cannot be read ({error}); it is truncated or damaged, download it again"
        ) from None
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise UserError(
                f"tensor {name!r} in {path} is stored as {entry['dtype']}, which is not understood; "
                f"convert the weights to one of {', '.join(_DTYPES)}"
            )
    return {
        name: _Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = read_json(index).get("weight_map", {})
        if not isinstance(listed, dict):
            raise UserError(f"{index} has no weight_map from tensors to files; download it again")
        names = sorted({str(name) for name in listed.values()})
        for name in names:
            if Path(name).name != name:
                raise UserError(f"{index} names {name!r}, which is not a plain file name of that folder")
            if not (folder / name).is_file():
                raise UserError(f"{index} names {name!r}, which is missing from {folder}; download it again")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if found := sorted(folder.glob("*.safetensors")):
        return found
    raise UserError(
        f"no *.safetensors file in {folder}; convert the weights with save_pretrained(…, safe_serialization=True)"
    )


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
