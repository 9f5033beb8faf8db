"""The command that goes on with a run: the one that began it, from the options that lie beside it.

In: a run and the place that it was found in. Out: a command as a shell takes it, over as many lines as it needs; what
one of several processes says of itself is left out, and so is what is so by default. Passwords are not told.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import yaml

from jax_extract.config import ExtractConfig, from_mapping
from jax_extract.errors import UserError
from jax_extract.layer_words import OPTION
from jax_extract.store.ledger import CONFIG_FILE, Ledger
from jax_extract.store.storage.verbs import BUCKET_SCHEME
from jax_extract.terminal import ranges_text
from models.qwen2_jax_with_hooks import DEFAULT_SAE_LAYERS

_FILES = ("tasks_file", "solutions_file")
_PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_DEEPER = "    "  # than the line before


def command_of(ledger: Ledger, place: str) -> list[str] | None:
    """The words of the command, a flag with its values each; None where the options do not tell it.

    Those of a run that another command has made, such as `representations`, do not name its input.
    """
    if (config := _kept(ledger)) is None or ledger.run["description"].get("about"):
        return None
    if not config.upload_to_cloud or not place.startswith(BUCKET_SCHEME):
        config = dataclasses.replace(config, activations_dir=place)
    if config.layers_to_extract == tuple(DEFAULT_SAE_LAYERS):
        config = dataclasses.replace(config, layers_to_extract=None)
    said = ["jax-extract extract"]
    for field in dataclasses.fields(config):
        if (value := getattr(config, field.name)) != field.default or field.name == "activations_dir":
            words = _layers(value) if field.name == OPTION else value if isinstance(value, tuple) else (value,)
            said.append(f"--{field.name} " + " ".join(shlex.quote(_PASSWORD.sub("…", str(word))) for word in words))
    return said


def folded_command(said: list[str], width: int, indent: str) -> str:
    """The command over several lines that a shell reads as one, none of them broken within a flag."""
    lines = [indent + said[0]]
    for flag in said[1:]:
        if len(lines[-1]) + len(flag) + len("  \\") > width:
            lines.append(indent + _DEEPER + flag)
        else:
            lines[-1] += f" {flag}"
    return " \\\n".join(lines)


def needs_its_folder(ledger: Ledger) -> bool:
    """Whether the command means what it says only in the folder where it was first given."""
    config = _kept(ledger)
    given = [getattr(config, name) for name in _FILES] if config else []
    return any(path and not Path(path).is_absolute() for path in given)


def _kept(ledger: Ledger) -> ExtractConfig | None:
    """None where the file is not there, or not of this version."""
    if not ledger.storage.exists(CONFIG_FILE):
        return None
    try:
        values = yaml.safe_load(ledger.storage.read(CONFIG_FILE))
        config = from_mapping(values, ExtractConfig(), CONFIG_FILE)
        config.check()
    except (UserError, yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError):
        return None
    return config


def _layers(words: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """`3-17 20` of many numbers; words stay as they are."""
    numbers = [word for word in words if isinstance(word, int) and word >= 0]
    return tuple(ranges_text(sorted(numbers)).split(", ")) if len(numbers) == len(words) else words
