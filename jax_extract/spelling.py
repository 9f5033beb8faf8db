"""Mistakes told in the words of who made them: a script's variables of the environment instead of the command's flags.

In: a sentence about flags, and what a script says of them in `JAX_EXTRACT_VARIABLES`: `learning_rate=LEARNING_RATE …`.
Out: the sentence about variables. Where no script says so, it stays as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

NAMES = "JAX_EXTRACT_VARIABLES"
_HELP = re.compile(r"; jax-extract \S+ --help lists the flags$")


def as_said(sentence: str, environment: Mapping[str, str] = os.environ) -> str:
    """The sentence with every flag that a variable sets called as the variable."""
    pairs = (pair.partition("=") for pair in environment.get(NAMES, "").split())
    variables = {flag: variable for flag, _, variable in pairs}
    if not variables:
        return sentence

    def called(found: re.Match[str]) -> str:
        if (variable := variables.get(found["flag"])) is None:
            return found[0]
        return variable + (f"={found['switch'].lower()}" if found["switch"] else "")

    said = re.sub(r"--(?P<flag>\w+)(?: (?P<switch>True|False)\b)?", called, _HELP.sub("", sentence))
    said = re.sub(r"\b(\w+) \(\1\)", r"\1", said)  # what was told by flag and by variable
    if any(re.search(rf"\b{variable}\b", said) for variable in variables.values()):
        return said
    set_here = {variable: environment.get(variable, "") for variable in variables.values()}
    meant = [f"{variable}={value:.60}" for variable, value in set_here.items() if _names(said, value)]
    return f"{said} ({', '.join(meant)})" if meant else said


def _names(sentence: str, value: str) -> bool:
    """Whether a sentence is about this value, or one of its words."""
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", sentence) for word in value.split())
