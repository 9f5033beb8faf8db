"""Edits from a file, for the command line.

In: a YAML file with a list of edits, each the arguments of `Edit`; arrays are numbers, or files of NumPy or
safetensors, runs are directories or buckets. Out: `Edit`s.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_extract.errors import UserError, user_path
from jax_extract.forward.edit import CHANGES, Edit
from jax_extract.store.reader import Run, open_activations
from jax_extract.yaml_text import parsed

_KEYS = ("hook", "change", "layer", "value", "scale", "positions", "samples", "source")
_MEND = "write a list of edits, such as `- {hook: ffn_out, change: zero, layer: 5}` (docs/interventions.md)"
_FORMS = "a list of numbers, a .npy file, or {file: F.npz or F.safetensors, name: ARRAY}"


def read_edits(path: str) -> list[Edit]:
    """UserError where the file is none, or one of its edits cannot be made."""
    file = user_path(path, "--edits")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"--edits {path} cannot be read ({reason}); give a YAML file with a list of edits") from None
    content = parsed(text, f"--edits {path}", _MEND)
    given = content.get("edits") if isinstance(content, Mapping) and set(content) == {"edits"} else content
    if not isinstance(given, list) or not given:
        raise UserError(f"--edits {path} holds no list of edits; {_MEND}")
    return [_edit(one, f"edit {number} of {path}", file.parent) for number, one in enumerate(given, 1)]


def _edit(given: Any, where: str, folder: Path) -> Edit:
    if not isinstance(given, Mapping):
        raise UserError(f"{where} is {given!r:.60}; expected {', '.join(_KEYS)}")
    if unknown := [key for key in given if key not in _KEYS]:
        raise UserError(f"{where} has {unknown[0]!r:.60}; expected {', '.join(_KEYS)}")
    if lacking := [key for key in ("hook", "change") if key not in given]:
        raise UserError(f"{where} lacks {lacking[0]!r}")
    arguments = dict(given)
    if not isinstance(arguments["change"], str) or arguments["change"] not in CHANGES:
        raise UserError(f"{where} has the change {arguments['change']!r:.60}; expected {', '.join(CHANGES)}")
    if "value" in given:
        arguments["value"] = _array(given["value"], where, folder)
    if "source" in given:
        arguments["source"] = _run(given["source"], where, folder)
    try:
        return Edit(**arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _array(given: Any, where: str, folder: Path) -> Any:
    if isinstance(given, list):
        return given
    named = given if isinstance(given, Mapping) else {"file": given}
    file, name = named.get("file"), named.get("name")
    if not isinstance(file, str) or set(named) - {"file", "name"}:
        raise UserError(f"{where} has the value {given!r:.60}; expected {_FORMS}")
    path = folder / user_path(file, f"{where}: the file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return _named(load_file(path), name, where, path)
        loaded = np.load(path, allow_pickle=False)
        return _named(loaded, name, where, path) if isinstance(loaded, np.lib.npyio.NpzFile) else loaded
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (whatever a damaged file makes the two libraries raise)
        reason = getattr(error, "strerror", None) or "it is no such file"
        raise UserError(f"{where} has the value {path}, which cannot be read ({reason}); give {_FORMS}") from None


def _named(arrays: Any, name: Any, where: str, path: Path) -> np.ndarray:
    names = list(arrays)
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        raise UserError(
            f"{where} names the array {name!r:.60} of {path}, which holds {', '.join(names[:10]) or 'none'}"
        )
    return arrays[name]


def _run(given: Any, where: str, folder: Path) -> Run:
    if not isinstance(given, str):
        raise UserError(f"{where} has the source {given!r:.60}; expected a run's directory or gs://bucket/run")
    return open_activations(given if given.startswith("gs://") else folder / user_path(given, f"{where}: the source"))
