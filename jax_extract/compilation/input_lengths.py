"""How many tokens the samples of a run have: from its own inputs, or from a list.

In: `--tasks_file`, as an extraction takes it, and the tokenizer of `--model_path`; or `--lengths`, a file of token
counts. Out: lengths, cut to what the run computes of a sample; told on a `Terminal`.
"""

from __future__ import annotations

import json
from pathlib import PurePath

import numpy as np

from jax_extract.compilation.config import CompileConfig
from jax_extract.errors import UserError, user_path
from jax_extract.extraction.capture import require_short_enough
from jax_extract.extraction.prepare import Job, wrapping_of
from jax_extract.extraction.summary import tell_input
from jax_extract.inputs.sources import open_source
from jax_extract.inputs.wrapping import Kept
from jax_extract.terminal import Terminal, plural

_MOST_TOKENS = 2**31 - 1  # of a sample


def read_lengths(config: CompileConfig, job: Job, terminal: Terminal) -> np.ndarray | None:
    """int64 [samples], from 1 token on; None where no input is given.

    Raises:
      UserError: the input cannot be read, has no sample, or there is no tokenizer for it.
    """
    if config.tasks_file is not None:
        return _tokenized(config, job, terminal)
    if config.lengths is not None:
        return _listed(config.lengths, config.n_samples, job, terminal)
    return None


def _tokenized(config: CompileConfig, job: Job, terminal: Terminal) -> np.ndarray:
    asked = config.as_extraction()
    source = open_source(
        asked.tasks_file,
        None,
        n_tasks=None,
        n_samples=asked.n_samples,
        encoder=asked.grid_encoder,
        seed=asked.seed,
        split=None,
        dataset_config=None,
        text_column=asked.text_column,
    )
    counts = job.new_counts()
    tables = job.tables(source.samples(), wrapping_of(asked, Kept.from_now_on()), counts)
    lengths = [table.lengths for table in tables]  # and not the tokens
    if not lengths:
        raise UserError(f"{source.name} gave no sample with a token; there is nothing to plan")
    tell_input(source, counts, job, terminal)
    return np.concatenate(lengths)


def _listed(name: str, n_samples: int | None, job: Job, terminal: Terminal) -> np.ndarray:
    """Of a file; where more samples are asked for than it has, from its beginning again."""
    listed = _read(name)
    full = np.resize(listed, n_samples or len(listed))
    lengths = np.minimum(full, job.max_length)
    require_short_enough(job.plan, [f"{name}:{place + 1}" for place in range(len(lengths))], lengths)
    again = f" (the {plural(len(listed), 'length')} of the file in turn)" if len(full) > len(listed) else ""
    cut = int((full > lengths).sum())
    terminal.line(
        "input",
        f"{PurePath(name).name}: {plural(len(full), 'sample')}{again}, {plural(int(lengths.sum()), 'token')}, "
        f"longest {int(full.max()):,}"
        + (f"; {plural(cut, 'sample')} truncated to {plural(job.max_length, 'token')}" if cut else ""),
    )
    return lengths


def _read(name: str) -> np.ndarray:
    path = user_path(name, "--lengths")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise UserError(f"--lengths {name} cannot be read; give a text or JSON file of token counts") from None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = [int(word) if word.isdecimal() else word for word in text.replace(",", " ").split()]
    values = [values] if isinstance(values, int) else values
    if not isinstance(values, list) or not values:
        raise UserError(
            f"--lengths {name} holds no list of token counts; write one whole number a line, or a JSON list"
        )
    for value in values:
        if type(value) is not int or not 1 <= value <= _MOST_TOKENS:
            raise UserError(
                f"--lengths {name} holds {value!r:.60}, which is no token count; write whole numbers from 1 to "
                f"{_MOST_TOKENS:,}"
            )
    return np.array(values, np.int64)
