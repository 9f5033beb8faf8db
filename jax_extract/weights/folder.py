"""A Hugging Face folder, and which of its files hold the weights: those that transformers reads, or why none do.

In: a folder with config.json. Out: a `SafetensorsCheckpoint`, or a sentence.

The order is transformers' own: the file that config.json names as `transformers_weights`, model.safetensors,
model.safetensors.index.json with the files it names. An index beside a whole model.safetensors was left behind by an
older save, and is not looked at; that is told. Where transformers would find nothing, one choice may still be the only
one: a variant (model.fp16.safetensors), pieces without their index, files under other names. It is taken, and told.
Adapters and the files of other programs (consolidated.safetensors, *.bin, *.pth, *.h5) never count; the sentence about
a folder that has nothing else says how they are converted.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_extract.errors import UserError
from jax_extract.weights.checkpoint import SafetensorsFiles, folder_tokenizer, read_json

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMED = "transformers_weights"  # in config.json
ADAPTER_SETTINGS, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PIECE = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_VARIANTS = re.compile(r"model\.(\w+)\.safetensors|model\.safetensors\.index\.(\w+)\.json")
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "random_states", "adapter_model")
_FEW = 3  # names in a sentence


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
        files = weight_files(folder, self.config, source)
        self.config.pop(NAMED, None)  # it says nothing of the model
        self.notes = (files.note,) if files.note else ()
        if (folder / ADAPTER_SETTINGS).is_file():
            self.notes += (f"{source} holds an adapter too, which is not merged; give --adapter {source} to merge it",)
        super().__init__(files.paths, files.of_one_save)

    def tokenizer(self) -> Any:
        return folder_tokenizer(self._folder)


@dataclass(frozen=True)
class WeightFiles:
    """The files that count.

    Attributes:
      paths: in the order in which they are read.
      of_one_save: where a tensor is in several of them, the last one counts, as in transformers; else none may be.
      note: to the user, where another choice was possible, or transformers would make none.
    """

    paths: tuple[Path, ...]
    of_one_save: bool = False
    note: str | None = None


def weight_files(folder: Path, config: Mapping[str, Any], source: str) -> WeightFiles:
    """UserError, naming `source`, where there is nothing that can be read, or a file is missing."""
    if named := config.get(NAMED):
        return _named(folder, str(named))
    if (folder / WHOLE).is_file():
        index = (folder / INDEX).is_file()
        note = f"{WHOLE} of {source} is read, as transformers does, and not the pieces of {INDEX}" if index else None
        return WeightFiles((folder / WHOLE,), note=note)
    if (folder / INDEX).is_file():
        return _indexed(folder / INDEX)
    for path in (folder / WHOLE, folder / INDEX):
        if path.is_symlink():
            raise UserError(f"{path} is {_missing(path)}")
    found = [path for path in sorted(folder.glob("*.safetensors")) if path.is_file() and _may_count(path.name)]
    variants = {match[1] or match[2] for path in folder.iterdir() if (match := _VARIANTS.fullmatch(path.name))}
    return _variant(folder, variants) or _pieces(found) or _others(found) or _nothing(folder, source)


def conversion_command(folder: Path, pattern: str, into: str) -> str:
    """A shell command that writes torch's files of a folder as one of safetensors, each tensor as it is stored."""
    files = f"glob.glob({pattern!r})" if "*" in pattern else f"[{pattern!r}]"
    program = (
        "import glob, torch; from safetensors.torch import save_file; save_file({k: v.contiguous().clone() "
        f"for f in sorted({files}) for k, v in torch.load(f, map_location='cpu', weights_only=True).items()}}, "
        f"'{into}', {{'format': 'pt'}})"
    )
    return f'cd {shlex.quote(str(folder))} && python -c "{program}"'


def refuse_folder_without_config(folder: Path, source: str) -> None:
    """UserError where a folder without config.json is something that has a name."""
    if (folder / ADAPTER_SETTINGS).exists():
        raise UserError(f"{source} holds an adapter; give it as --adapter, and its base model as --model_path")
    if found := sorted(folder.glob("*.pth")):
        raise UserError(_of_meta(source, found[0].name))
    if (folder / "params.json").exists() and any(folder.glob("consolidated*.safetensors")):
        raise UserError(_of_mistral(source))
    inner = [path.parent for path in sorted((*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")))]
    if inner:
        names = ", ".join(str(path.relative_to(folder)) for path in inner[:_FEW])
        raise UserError(f"{source} has no config.json, but models in folders of it ({names}); give one of them")


# ------------------------------------------------------------------------------------ what transformers reads


def _named(folder: Path, name: str) -> WeightFiles:
    path = folder / name
    if not name.endswith((".safetensors", ".safetensors.index.json")) or not _is_within(name):
        raise UserError(
            f"config.json of {folder} names {name!r} as its {NAMED}; expected a *.safetensors file of "
            "that folder, or the index of several"
        )
    if not path.is_file():
        raise UserError(f"config.json of {folder} names {name!r} as its {NAMED}, {_missing(path)}")
    return _indexed(path) if name.endswith(".json") else WeightFiles((path,))


def _indexed(index: Path) -> WeightFiles:
    listed = read_json(index).get("weight_map", {})
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{index} has no weight_map from tensors to files; download it again")
    names = sorted({str(name) for name in listed.values()})
    for name in names:
        if not _is_within(name):
            raise UserError(f"{index} names {name!r}, which is not a file of that folder; download it again")
        if not (index.parent / name).is_file():
            raise UserError(f"{index} names {name!r}, {_missing(index.parent / name)}")
    return WeightFiles(tuple(index.parent / name for name in names), of_one_save=True)


def _is_within(name: str) -> bool:
    """Whether a name that a file gives stays in the folder that the file is in."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _missing(path: Path) -> str:
    if path.is_symlink():
        return f"a link to {path.readlink()}, which is not there; download it again"
    return f"which is missing from {path.parent}; download it again"


# ----------------------------------------------------------------------- the only choice, where it finds nothing


def _may_count(name: str) -> bool:
    return name != ADAPTER_WEIGHTS and not name.startswith("consolidated")


def _variant(folder: Path, variants: Iterable[str]) -> WeightFiles | None:
    """model.VARIANT.safetensors or its index, where there is one variant."""
    if len(names := sorted(variants)) != 1:
        if names:
            raise UserError(
                f"{folder} holds the variants {', '.join(names)} of its weights and no {WHOLE}; rename the one to be "
                f"read to {WHOLE}"
            )
        return None
    whole, index = folder / f"model.{names[0]}.safetensors", folder / f"{INDEX.removesuffix('.json')}.{names[0]}.json"
    note = f"the weights are those of the variant {names[0]}, the only ones in {folder}"
    if whole.is_file():
        return WeightFiles((whole,), note=note)
    return WeightFiles(_indexed(index).paths, of_one_save=True, note=note)


def _pieces(found: list[Path]) -> WeightFiles | None:
    """NAME-00001-of-00003.safetensors and so on, without the index."""
    parts = [match for path in found if (match := _PIECE.fullmatch(path.name))]
    if not parts or len(parts) < len(found) or len(sets := {(part[1], part[3]) for part in parts}) != 1:
        return None
    [(name, count)] = sets
    folder = found[0].parent
    paths = tuple(folder / f"{name}-{number:05d}-of-{count}.safetensors" for number in range(1, int(count) + 1))
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(f"the weights in {folder} are {int(count)} pieces, one of them {missing[0].name}, which is "
                        "missing; download it again")  # fmt: skip
    return WeightFiles(paths, note=f"{folder} has no {INDEX}; its {int(count)} pieces are read as they are")


def _others(found: list[Path]) -> WeightFiles | None:
    if not found:
        return None
    names = ", ".join(path.name for path in found[:_FEW]) + (" and others" if len(found) > _FEW else "")
    return WeightFiles(tuple(found), note=f"there is no {WHOLE} in {found[0].parent}; {names} is read in its place")


# ---------------------------------------------------------------------------------------- why nothing is read


def _nothing(folder: Path, source: str) -> WeightFiles:
    names = sorted(path.name for path in folder.iterdir())
    if "pytorch_model.bin" in names or any(re.fullmatch(r"pytorch_model-.*\.bin", name) for name in names):
        pattern = "pytorch_model.bin" if "pytorch_model.bin" in names else "pytorch_model-*.bin"
        raise UserError(
            f"the weights in {folder} are {pattern}, pickles, which are never opened here; convert them once, where "
            f"torch is installed, with: {conversion_command(folder, pattern, WHOLE)}"
        )
    if bins := [name for name in names if name.endswith((".bin", ".pt", ".ckpt")) and not name.startswith(_NO_WEIGHTS)]:
        raise UserError(
            f"the weights in {folder} are {bins[0]}, which is never opened here as it may be a pickle; save the model "
            "with save_pretrained"
        )
    if ADAPTER_SETTINGS in names:
        raise UserError(f"{source} holds an adapter; give it as --adapter, and its base model as --model_path")
    for ending, of in ((".h5", "TensorFlow"), (".msgpack", "Flax")):
        if others := [name for name in names if name.endswith(ending)]:
            flag = "from_tf" if ending == ".h5" else "from_flax"
            raise UserError(
                f"the weights in {folder} are {others[0]}, of {of}; take the model's safetensors, or convert them with "
                f"transformers 4: from_pretrained({str(folder)!r}, {flag}=True).save_pretrained({str(folder)!r})"
            )
    if any(name.startswith("consolidated") and name.endswith(".safetensors") for name in names):
        raise UserError(_of_mistral(source))
    if pths := [name for name in names if name.endswith(".pth")]:
        raise UserError(_of_meta(source, pths[0]))
    raise UserError(f"no *.safetensors file in {folder}; save the weights there with save_pretrained")


def _of_meta(source: str, name: str) -> str:
    return (
        f"{source} holds {name}, weights in the form in which Meta releases them; take the model in Hugging Face's "
        "form (config.json and *.safetensors), or convert it with transformers' convert_llama_weights_to_hf"
    )


def _of_mistral(source: str) -> str:
    return (
        f"{source} holds its weights as consolidated*.safetensors alone, under Mistral's own names; take the model in "
        f"Hugging Face's form (config.json and {WHOLE} or its pieces)"
    )
