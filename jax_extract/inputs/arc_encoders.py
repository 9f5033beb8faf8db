"""ARC grids as text, and back: the prompt of a task, and the grid that an answer holds.

In: a `Grid` [rows, columns], or the text of one.
Out: text without a final newline, or the `Grid`. `prompt` joins a task's grids into what the model reads.
To add an encoder, add one entry to `ENCODERS`; its `decode` must undo its `encode`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from jax_extract.errors import UserError
from jax_extract.inputs.arc_task import COLOURS, ArcTask, Grid, grid_from_rows
from models.nearest import nearest

DEFAULT_ENCODER = "digits"


@dataclass(frozen=True)
class GridEncoder:
    """One way to write a grid.

    Attributes:
      encode: the grid's text, rows from top to bottom, without a final newline.
      decode: the grid of such a text, white space around it ignored; ValueError where it is no grid.
      find: (answer, whole) -> the grid that it begins with, whatever follows that; None where it begins with none, or
        where it is not whole and breaks off so early that its rest could have been more rows.
    """

    encode: Callable[[Grid], str]
    decode: Callable[[str], Grid]
    find: Callable[[str, bool], Grid | None]


def grid_encoder(name: str) -> GridEncoder:
    """The encoder called `name`; a UserError with the nearest name where there is none."""
    if name not in ENCODERS:
        near = nearest(name, ENCODERS)
        hint = f"did you mean {near!r}? The encoders are" if near else "take one of"
        raise UserError(f"There is no grid encoder {name!r}: {hint} {', '.join(ENCODERS)}.")
    return ENCODERS[name]


def prompt(task: ArcTask, test_index: int, encoder: str = DEFAULT_ENCODER) -> str:
    """The train pairs, then test input `test_index`, ending where the model's answer begins.

    A pair is "input:\\n<grid>\\noutput:\\n<grid>\\n\\n"; the text ends in "output:\\n". Raises UserError on
    an encoder that does not exist, IndexError on a test input that does not.
    """
    encode = grid_encoder(encoder).encode
    pairs = [f"input:\n{encode(shown)}\noutput:\n{encode(answer)}\n\n" for shown, answer in task.train]
    asked, _ = task.test[test_index]
    return "".join([*pairs, f"input:\n{encode(asked)}\noutput:\n"])


def _encode_symbols(grid: Grid, first: str, gap: str) -> str:
    # Shifting the whole array and cutting one string is five times faster than going cell by cell,
    # and a run of 50,000 prompts writes 150 million cells.
    symbols = (grid + ord(first)).tobytes().decode("ascii")
    width = grid.shape[1]
    return "\n".join(gap.join(symbols[start : start + width]) for start in range(0, len(symbols), width))


def _decode_symbols(text: str, first: str, gap: str) -> Grid:
    value = {chr(ord(first) + colour): colour for colour in range(COLOURS)}
    lines = text.strip().split("\n")
    rows = [[value.get(cell, cell) for cell in (line.split(gap) if gap else line)] for line in lines]
    return grid_from_rows(rows)


def _find_symbols(text: str, whole: bool, first: str, gap: str) -> Grid | None:
    """The first lines, as many as have symbols alone and are as long as the first one."""
    symbols = {chr(ord(first) + colour) for colour in range(COLOURS)}
    rows: list[str] = []
    lines = [line.rstrip() for line in text.lstrip().split("\n")]
    for line in lines:
        cells = line.split(gap) if gap else list(line)
        if not cells or not symbols.issuperset(cells) or (rows and len(line) != len(rows[0])):
            break
        rows.append(line)
    if not whole and _may_go_on(lines[len(rows) :], symbols | {gap}, len(lines[0])):
        return None
    return _grid_or_none(_symbols(first, gap), "\n".join(rows))


def _may_go_on(behind: list[str], symbols: set[str], width: int) -> bool:
    """Whether what stands behind rows of this width can be the beginning of one more."""
    return not behind or (len(behind) == 1 and len(behind[0]) < width and symbols.issuperset(behind[0]))


def _encode_json(grid: Grid) -> str:
    return json.dumps(grid.tolist(), separators=(",", ":"))


def _decode_json(text: str) -> Grid:
    try:
        rows = json.loads(text)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    return grid_from_rows(rows)


def _find_json(text: str, _: bool) -> Grid | None:
    try:
        _, end = json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        return None
    return _grid_or_none(_JSON, text.lstrip()[:end])


def _grid_or_none(encoder: GridEncoder, text: str) -> Grid | None:
    try:
        return encoder.decode(text)
    except ValueError:
        return None


def _symbols(first: str, gap: str) -> GridEncoder:
    return GridEncoder(
        partial(_encode_symbols, first=first, gap=gap),
        partial(_decode_symbols, first=first, gap=gap),
        partial(_find_symbols, first=first, gap=gap),
    )


_JSON = GridEncoder(_encode_json, _decode_json, _find_json)


ENCODERS: Mapping[str, GridEncoder] = MappingProxyType(
    {
        "digits": _symbols("0", ""),
        "spaced": _symbols("0", " "),
        "json": _JSON,
        "letters": _symbols("A", ""),
    }
)
