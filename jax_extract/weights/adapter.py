"""A LoRA adapter of the PEFT library, merged into the tensors of a checkpoint as they are read.

In: a `Checkpoint`, and a folder with adapter_config.json and adapter_model.safetensors. Out: a `Checkpoint` that gives
merged tensors in float32, and everything else as it was. What an adapter may hold: LoRA (Hu et al., "LoRA", 2021,
eq. 3), its scaling by the root of the rank (Kalajdzievski, "A Rank Stabilization Scaling Factor", 2023), ranks and
alphas by pattern, DoRA (Liu et al., "DoRA", 2024, eq. 5), matrices that are stored turned (GPT-2), embeddings, biases
and modules saved whole. Anything else is refused by name.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jax_extract.errors import UserError, user_path
from jax_extract.weights.adapter_tokenizer import adapter_tokenizer
from jax_extract.weights.checkpoint import Checkpoint, SafetensorsFiles, is_hub_id, read_json
from jax_extract.weights.folder import conversion_command
from jax_extract.weights.text_part import text_name
from models.errors import NotComputedHere
from models.ports import Port

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WRAPPER = "base_model.model."  # before the module's path in the model that was adapted

# Say nothing about the merged weights, or nothing that the tensors do not say.
_HARMLESS = frozenset(
    (
        "auto_mapping base_model_name_or_path revision peft_type peft_version task_type inference_mode r lora_alpha "
        "rank_pattern alpha_pattern use_rslora use_dora lora_bias bias fan_in_fan_out modules_to_save "
        "init_lora_weights target_modules exclude_modules layers_to_transform layers_pattern lora_dropout "
        "megatron_core runtime_config eva_config qalora_group_size"
    ).split()
)
_PART = re.compile(r"(.+)\.(lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))(\.weight|\.bias)?")
# Heads of other tasks than the next token: trained along, and not computed here.
_TASK_HEADS = ("score.", "classifier.", "qa_outputs.")
_DEFAULT = 8  # PEFT's own, of rank and alpha
# Names of modules or their ends; dots may be escaped, numbers be any. A file's own regular expression may never end.
_PATTERN = re.compile(r"\^?(?:\w|\.|\\\.|\\d\+)+")
# Ways to begin that leave the base model's own weights alone.
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")


@dataclass(frozen=True)
class _Module:
    """What the adapter holds of one module: its path, and the tensors by what they are."""

    path: str
    tensors: Mapping[str, str]  # such as lora_A -> name in the adapter's file


class AdaptedCheckpoint:
    """A checkpoint with an adapter merged into it."""

    def __init__(self, base: Checkpoint, folder: Path, port: Port, adapter: str) -> None:
        """Raises UserError where the adapter is not one of this model, or holds what is not understood."""
        self.source, self.revision = base.source, base.revision
        self.generation, self.notes = base.generation, base.notes
        self.adapter = adapter
        self.tokenizer_notes: tuple[str, ...] = ()
        self._base = base
        self._folder = folder
        self._settings = read_json(folder / SETTINGS)
        _refuse_other_kinds(self._settings, folder)
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"there is no {WEIGHTS} in {folder}; {_mend(folder)}")
        self._file = SafetensorsFiles([folder / WEIGHTS])
        self._prefix = port.prefix
        self.config, self._alias = self._untied(port)
        sources = port.sources(port.config(self.config))
        self._turned = {name for source in sources.values() if source.transposed for name in source.names}
        embeddings = ("embedding", "position_embedding")
        self._turned |= {name for path in embeddings if path in sources for name in sources[path].names}
        self._rows = port.config(self.config).vocab_size
        tables = [
            name
            for source in sources.values()
            if source.rows == (self._rows,) and not source.per_layer
            for name in source.names
        ]
        self._tables = {stored for name in tables if (stored := self._if_stored(name))}
        self._replaced: dict[str, str] = {}
        self._merged, self._replaced = self._by_stored_name()
        self._follow_vocabulary()
        if not self._merged and not self._replaced:
            raise UserError(f"{folder / WEIGHTS} holds nothing that changes this model; save the adapter again")

    def names(self) -> frozenset[str]:
        return self._base.names() | set(self._alias)

    def shape(self, name: str) -> tuple[int, ...]:
        if replacement := self._replaced.get(name):
            return self._file.shape(replacement)
        return self._base.shape(self._alias.get(name, name))

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        weight = self._before_merging(name, rows)
        module = self._merged.get(name)
        return weight if module is None else self._merge(name, module, weight.astype(np.float32), rows)

    def _before_merging(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """The base model's, or what the adapter has in its place."""
        if replacement := self._replaced.get(name):
            return self._file.read(replacement, rows)
        return self._base.read(self._alias.get(name, name), rows)

    def digest(self, names: Iterable[str]) -> str:
        """Of the base, by its commit where it has one, and of the adapter."""
        base = self._base.revision or self._base.digest({self._alias.get(name, name) for name in names})
        total = hashlib.sha256(base.encode())
        settings = {key: self._settings.get(key) for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")}
        settings |= {key: bool(self._settings.get(key)) for key in ("use_rslora", "use_dora")}
        total.update(json.dumps(settings, sort_keys=True).encode())
        total.update(self._file.digest(self._file.names()).encode())
        return f"sha256:{total.hexdigest()}"

    def tokenizer(self) -> Any:
        """The one in the adapter's folder, else the base model's; `tokenizer_notes` say which."""
        tokenizer, self.tokenizer_notes = adapter_tokenizer(self._folder, self._base.tokenizer, self._rows)
        return tokenizer

    def tokenizer_of_base(self) -> Any:
        """Whatever lies in the adapter's folder."""
        return self._base.tokenizer()

    # --------------------------------------------------------------------------------------- merging

    def _merge(self, name: str, module: _Module, weight: np.ndarray, rows: slice) -> np.ndarray:
        """Rows of a merged tensor, float32; of what is stored turned too, rows are those of the file."""
        scaling = self._scaling(module)
        if name.endswith(".bias"):
            return weight + np.float32(scaling) * self._tensor(module, "lora_B.bias")[rows]
        down, up = (self._tensor(module, part) for part in self._factors(module))  # [r, in], [out, r]
        turned = self._is_turned(name)
        delta = (up @ down[:, rows]).T if turned else up[rows] @ down
        merged = weight + np.float32(scaling) * delta
        if "lora_magnitude_vector" not in module.tensors:
            return merged
        magnitude = self._tensor(module, "lora_magnitude_vector")
        if not turned:
            return merged * (magnitude[rows] / np.linalg.norm(merged, axis=1))[:, None]
        whole = self._before_merging(name).astype(np.float32) + np.float32(scaling) * (up @ down).T
        return merged * (magnitude / np.linalg.norm(whole, axis=0))[None, :]

    def _scaling(self, module: _Module) -> float:
        """alpha / r, or alpha / sqrt(r); both by the module's path where a pattern matches it."""
        rank = self._rank(module)
        alpha = _by_pattern(
            self._settings.get("alpha_pattern"), module.path, self._settings.get("lora_alpha", _DEFAULT)
        )
        return alpha / (rank**0.5 if self._settings.get("use_rslora") else rank)

    def _rank(self, module: _Module) -> int:
        return _by_pattern(self._settings.get("rank_pattern"), module.path, self._settings.get("r", _DEFAULT))

    def _factors(self, module: _Module) -> tuple[str, str]:
        """How A and B are called: an embedding's have names of their own."""
        if "lora_embedding_A" in module.tensors:
            return "lora_embedding_A", "lora_embedding_B"
        return "lora_A", "lora_B"

    def _tensor(self, module: _Module, part: str) -> np.ndarray:
        return self._file.read(module.tensors[part]).astype(np.float32)

    def _is_turned(self, name: str) -> bool:
        """Whether a matrix is stored as [in, out]; an embedding is one, from tokens."""
        whole = name if name.startswith(self._prefix) else self._prefix + name
        return re.sub(r"\.\d+\.", ".{i}.", whole, count=1) in self._turned

    # ------------------------------------------------------------------------------- what is adapted

    @cached_property
    def _modules(self) -> dict[str, _Module]:
        """By path in the adapted model."""
        modules: dict[str, dict[str, str]] = {}
        for name in sorted(self._file.names()):
            path = name.removeprefix(_WRAPPER)
            if found := _PART.fullmatch(path):
                part = found[2] + (".bias" if found[3] == ".bias" else "")
                modules.setdefault(found[1], {})[part] = name
            elif "lora_" in path:
                raise UserError(f"{self.adapter} holds {name!r}, which is not understood; only LoRA and DoRA are")
        return {path: _Module(path, tensors) for path, tensors in modules.items()}

    def _by_stored_name(self) -> tuple[dict[str, _Module], dict[str, str]]:
        """(stored name -> module merged into it, stored name -> tensor that takes its place)."""
        merged: dict[str, _Module] = {}
        for module in self._modules.values():
            name = self._stored(f"{module.path}.weight", module.path)
            self._check_factors(module, name)
            merged[name] = module
            if "lora_B.bias" in module.tensors:
                merged[self._stored(f"{module.path}.bias", f"{module.path}, with a bias")] = module
        replaced: dict[str, str] = {}
        for name in sorted(self._file.names()):
            path = name.removeprefix(_WRAPPER).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            if "lora_" in path or path.startswith(_TASK_HEADS) or ".original_module." in path:
                continue  # what a module saved whole has taken the place of is saved too, where biases are
            stored = self._stored(path, path)
            if self._file.shape(name) != self.shape(stored) and not self._is_of_vocabulary(name, stored):
                raise UserError(
                    f"{name!r} in {self.adapter} has shape {self._file.shape(name)} and the model's has "
                    f"{self.shape(stored)}; the adapter is of a model with another vocabulary or size: give that one "
                    "as --model_path"
                )
            replaced[stored] = name
        return merged, replaced

    def _stored(self, name: str, what: str) -> str:
        """The checkpoint's own name of a tensor; some have the model's prefix and some have not."""
        if stored := self._if_stored(name):
            return stored
        raise UserError(
            f"{self.adapter} adapts {what}, which {self.source} does not have; it is another model's adapter"
        )

    def _if_stored(self, name: str) -> str | None:
        name = text_name(name) or name
        candidates = (name, self._prefix + name, name.removeprefix(self._prefix))
        return next((candidate for candidate in candidates if candidate in self.names()), None)

    def _check_factors(self, module: _Module, name: str) -> None:
        first, second = self._factors(module)
        if missing := [part for part in (first, second) if part not in module.tensors]:
            raise UserError(f"{self.adapter} lacks {missing[0]} of {module.path}; the adapter is incomplete")
        down, up = (self._file.shape(module.tensors[part]) for part in (first, second))
        shape = self.shape(name)
        expected = shape[::-1] if self._is_turned(name) else shape
        if len(down) != 2 or len(up) != 2 or (up[0], down[1]) != expected:  # noqa: PLR2004 (matrices)
            raise UserError(
                f"{module.path} in {self.adapter} has factors of shapes {up} and {down} and the model's matrix is "
                f"{expected}; it is another model's adapter"
            )
        for part in ("lora_magnitude_vector", "lora_B.bias"):
            if part in module.tensors and self._file.shape(module.tensors[part]) != up[:1]:
                raise UserError(
                    f"{part} of {module.path} in {self.adapter} has shape {self._file.shape(module.tensors[part])} "
                    f"where {up[:1]} is expected; the adapter is damaged"
                )
        has_magnitude, is_dora = "lora_magnitude_vector" in module.tensors, bool(self._settings.get("use_dora"))
        if has_magnitude != is_dora:
            raise UserError(
                f"{module.path} in {self.adapter} {'has' if has_magnitude else 'lacks'} a magnitude vector where "
                f"{SETTINGS} has use_dora {is_dora}; settings and weights do not belong together"
            )
        if not down[0] == up[1] == self._rank(module):
            raise UserError(
                f"{module.path} in {self.adapter} has rank {down[0]} where {SETTINGS} says {self._rank(module)}; "
                "settings and weights do not belong together"
            )

    def _is_of_vocabulary(self, name: str, stored: str) -> bool:
        """Whether a tensor is in place of one with a row a token, and may have more or fewer of them."""
        return (
            stored in self._tables
            and self._file.shape(name)[1:] == self._base.shape(self._alias.get(stored, stored))[1:]
        )

    def _follow_vocabulary(self) -> None:
        """A vocabulary that was resized before the training: the adapter has the tables of all its tokens."""
        rows = {self._file.shape(self._replaced[table])[0] for table in self._tables & self._replaced.keys()}
        if len(rows) > 1:
            raise UserError(
                f"{self.adapter} has tables of {' and '.join(map(str, sorted(rows)))} tokens; the adapter is damaged"
            )
        if not rows - {self._rows}:
            return
        self._rows = rows.pop()
        self.config = {**self.config, "vocab_size": self._rows}
        for head, embedding in self._alias.items():  # tied to a table that is another one now
            if embedding in self._replaced:
                self._replaced.setdefault(head, self._replaced[embedding])

    def _untied(self, port: Port) -> tuple[dict[str, Any], dict[str, str]]:
        """(config.json, names that stand for others): a head that is the embedding is its own once one is adapted."""
        config = self._base.config
        tied = port.config(config).tie_word_embeddings
        apart = {**config, "tie_word_embeddings": False}
        sources = port.sources(port.config(apart))
        embedding, head = (sources[name].names[0] for name in ("embedding", "head"))
        ends = tuple(name.removesuffix(".weight") for name in (embedding.removeprefix(port.prefix), head))
        touched = any(f".{end}." in f".{name}." for name in self._file.names() for end in ends)
        if not tied or not touched:
            return config, {}
        stored = embedding if embedding in self._base.names() else embedding.removeprefix(port.prefix)
        return apart, {head: stored}


def open_adapter(base: Checkpoint, adapter: str, port: Port) -> AdaptedCheckpoint:
    """The model under the adapter; UserError where there is none, or it is not one of this model."""
    folder, found = find_adapter(adapter)
    return AdaptedCheckpoint(base, folder, port, found)


class CheckpointBesideAdapter:
    """A checkpoint whose tensors are as they were, with the adapter that PEFT merges into the model made of them."""

    def __init__(self, base: Checkpoint, folder: Path, adapter: str, vocabulary: int) -> None:
        self.source, self.revision, self.config = base.source, base.revision, base.config
        self.generation, self.notes = base.generation, base.notes
        self.adapter, self.adapter_folder = adapter, folder
        self.tokenizer_notes: tuple[str, ...] = ()
        self._base = base
        self._rows = vocabulary
        self._settings = read_json(folder / SETTINGS)
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"there is no {WEIGHTS} in {folder}; {_mend(folder)}")
        self._file = SafetensorsFiles([folder / WEIGHTS])

    def names(self) -> frozenset[str]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        return self._base.read(name, rows)

    def digest(self, names: Iterable[str]) -> str:
        """Of the base, by its commit where it has one, and of the adapter, settings and all."""
        base = self._base.revision or self._base.digest(names)
        total = hashlib.sha256(base.encode())
        total.update(json.dumps(self._settings, sort_keys=True).encode())
        total.update(self._file.digest(self._file.names()).encode())
        return f"sha256:{total.hexdigest()}"

    def tokenizer(self) -> Any:
        """The one in the adapter's folder, else the base model's; `tokenizer_notes` say which."""
        tokenizer, self.tokenizer_notes = adapter_tokenizer(self.adapter_folder, self._base.tokenizer, self._rows)
        return tokenizer

    def tokenizer_of_base(self) -> Any:
        """Whatever lies in the adapter's folder."""
        return self._base.tokenizer()


def beside_adapter(base: Checkpoint, adapter: str, vocabulary: int) -> CheckpointBesideAdapter:
    """The model and the adapter that goes into it; UserError where there is none, or PEFT is not installed.

    Args:
      vocabulary: rows of the model's embedding.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            f"--adapter {adapter!r} is merged into this {base.config.get('model_type')!r} model by PEFT, which is not "
            "installed; pip install peft"
        )
    folder, found = find_adapter(adapter)
    return CheckpointBesideAdapter(base, folder, found, vocabulary)


def find_adapter(adapter: str) -> tuple[Path, str]:
    """The folder of an adapter, and the name that finds the same one again; UserError where there is none.

    Args:
      adapter: a folder, or a hub id, of a revision or the newest.
    """
    folder = user_path(adapter, "--adapter")
    if folder.is_dir():
        return folder, adapter
    hub_id, _, revision = adapter.partition("@")
    if not is_hub_id(hub_id):
        raise UserError(
            f"adapter {adapter!r} was not found; give its folder, or a hub id of the form OWNER/NAME or "
            "OWNER/NAME@REVISION"
        )
    from jax_extract.weights.hub import download

    folder, commit = download(hub_id, revision or None, "adapter", "--adapter")
    return folder, f"{hub_id}@{commit}"  # whatever is newest then


def _mend(folder: Path) -> str:
    pickled = WEIGHTS.replace(".safetensors", ".bin")
    if not (folder / pickled).is_file():
        return "save the adapter there with save_pretrained"
    return (
        f"{pickled} is a pickle, which is never opened here; convert it once, where torch is installed, with: "
        + conversion_command(folder, pickled, WEIGHTS)
    )


def _refuse_other_kinds(settings: Mapping[str, Any], folder: Path) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise NotComputedHere(f"the adapter in {folder} is of kind {kind!r}; only 'LORA' can be merged here")
    start = settings.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise NotComputedHere(
            f"the adapter in {folder} began with init_lora_weights {start!r}, which changes the base model's own "
            "weights; save it with path_initial_model_for_weight_conversion, as an adapter of the model as it was"
        )
    unset = (None, False, {}, [])
    if strange := sorted(key for key, value in settings.items() if key not in _HARMLESS and value not in unset):
        raise NotComputedHere(
            f"the adapter in {folder} has {', '.join(map(repr, strange))}, which cannot be merged here; merge it with "
            "PEFT (merge_and_unload) and give the saved model as --model_path"
        )
    for key in ("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out"):
        if settings.get(key) not in (None, True, False):
            raise UserError(f"{SETTINGS} in {folder} has {key} {settings[key]!r:.40}; expected true or false")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(key) or {}
        if not isinstance(patterns, dict):
            raise UserError(f"{SETTINGS} in {folder} has a {key} that is no mapping from modules to numbers")
        for pattern, value in patterns.items():
            if not _PATTERN.fullmatch(pattern):
                raise UserError(
                    f"{SETTINGS} in {folder} has the {key} {pattern!r:.60}; understood are names of modules, with \\d+ "
                    "for numbers: merge the adapter with PEFT and give the saved model as --model_path"
                )
            _require_number(value, f"{key} of {pattern!r}", folder)
    for key in ("r", "lora_alpha"):
        _require_number(settings.get(key, _DEFAULT), key, folder)


def _require_number(value: object, what: str, folder: Path) -> None:
    if type(value) not in (int, float) or not 0 < float(str(value)) < float("inf"):
        raise UserError(f"{SETTINGS} in {folder} has {what} {value!r:.40}; expected a positive number")


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first pattern that is the module's path or its end, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default
